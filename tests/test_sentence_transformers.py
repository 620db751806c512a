"""Converted models in the library sentence-transformers, which makes their sources here: embedders, rerankers, training."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="these tests are about models of that library")
pytest.importorskip("datasets", reason="that library trains with it")
pytest.importorskip("accelerate", reason="that library trains with it")

import numpy as np
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, CrossEntropyLoss

from albert_sources import edit_json
from family_sources import BYTES, PIECES, make_model, save, save_bytes, save_pieces, save_words, use_first_layout
from helpers import run_in_new_process
from lsg_albert.conversion import convert_checkpoint

try:
    from sentence_transformers.sentence_transformer import modules
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ImportError:  # before 5.4
    from sentence_transformers import models as modules
    from sentence_transformers.losses import MultipleNegativesRankingLoss

SHORT = {"max_length": 64, "block_size": 16}
TEXTS = ["the river flows", "ships go up and down on the river, from the mountains into the sea.", "towns lie"]
LONG = "towns lie on both sides. " * 9  # as much as the target reads, and more than two blocks
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
WORDS_OF = {"bert": save_words, "distilbert": save_words, "roberta": save_bytes, "xlm-roberta": save_pieces}
SIZES = {save_bytes: {"vocab_size": BYTES}, save_pieces: {"vocab_size": PIECES}}


def make_encoder(folder: Path, model_type: str = "bert", head: str = "Model", **fields) -> Path:
    """A random model of a family and its tokenizer, for texts of 512 tokens."""
    save_vocabulary = WORDS_OF[model_type]
    save(make_model(model_type, head, **SIZES.get(save_vocabulary, {}), **fields), folder)
    save_vocabulary(folder, model_max_length=512)
    return folder


def make_embedder(folder: Path, encoder: Path, *behind: torch.nn.Module, **options) -> SentenceTransformer:
    """An encoder with modules behind it, saved into a folder as the library saves it."""
    parts = [modules.Transformer(str(encoder), max_seq_length=32), *behind]
    SentenceTransformer(modules=parts, device="cpu", **options).save_pretrained(str(folder))
    return SentenceTransformer(str(folder), device="cpu")


def load(folder: Path, **options) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, **options)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(abs(one - other).max())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture(scope="module")
def source(encoder, tmp_path_factory):
    """An embedder with a dense layer, normalization and prompts; a folder, not to be changed."""
    folder = tmp_path_factory.mktemp("embedders") / "source"
    prompts = {"query": "ships go: ", "document": "the river: "}
    behind = modules.Pooling(32, "mean"), modules.Dense(32, 8), modules.Normalize()
    make_embedder(folder, encoder, *behind, prompts=prompts)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """Its conversion, likewise."""
    target = tmp_path_factory.mktemp("embedders") / "converted"
    convert_checkpoint(source, target, **SHORT)
    return target


# --- embeddings


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_gives_the_sources_embeddings(encoder, tmp_path, target, pooling):
    before = make_embedder(tmp_path / "source", encoder, modules.Pooling(32, pooling))
    report = convert_checkpoint(tmp_path / "source", target, **SHORT)
    assert report.modules == ["1_Pooling"]
    after = load(target)
    assert after.max_seq_length == 64 and before.max_seq_length == 32
    assert difference(after.encode(TEXTS), before.encode(TEXTS)) < 1e-5


@pytest.mark.parametrize("model_type", WORDS_OF)
def test_every_family_gives_the_sources_embeddings(tmp_path, target, model_type):
    encoder = make_encoder(tmp_path / "encoder", model_type)
    before = make_embedder(tmp_path / "source", encoder, modules.Pooling(32, "mean"), modules.Normalize())
    convert_checkpoint(tmp_path / "source", target, **SHORT)
    texts = ["the river", "the sea, and the river."]  # a token is a character in some of the vocabularies
    assert difference(load(target).encode(texts), before.encode(texts)) < 1e-5


def test_layers_can_be_weighted(tmp_path, target):
    encoder = make_encoder(tmp_path / "encoder", output_hidden_states=True)
    weights = torch.nn.Parameter(torch.tensor([1.0, 2.0, 5.0]))
    layers = modules.WeightedLayerPooling(32, num_hidden_layers=3, layer_start=1, layer_weights=weights)
    before = make_embedder(tmp_path / "source", encoder, layers, modules.Pooling(32, "mean"))
    convert_checkpoint(tmp_path / "source", target, **SHORT)
    assert difference(load(target).encode(TEXTS), before.encode(TEXTS)) < 1e-5


def test_dense_layers_normalization_and_prompts_travel_along(source, converted):
    before, after = SentenceTransformer(str(source), device="cpu"), load(converted)
    plain = after.encode(TEXTS)
    assert plain.shape == (3, 8) and np.allclose(np.linalg.norm(plain, axis=1), 1)
    assert difference(plain, before.encode(TEXTS)) < 1e-5
    for name in ("query", "document"):
        own = getattr(after, f"encode_{name}")(TEXTS)
        assert difference(own, getattr(before, f"encode_{name}")(TEXTS)) < 1e-5
        assert difference(own, after.encode(TEXTS, prompt_name=name)) < 1e-6 < 1e-2 < difference(own, plain)


def test_what_encode_offers_works(converted):
    model = load(converted)
    whole = model.encode([*TEXTS, LONG])
    assert difference(model.encode([*TEXTS, LONG], truncate_dim=5), whole[:, :5]) < 1e-6
    assert difference(load(converted, truncate_dim=5).encode([*TEXTS, LONG]), whole[:, :5]) < 1e-6
    assert difference(model.similarity(whole, whole).numpy(), whole @ whole.T) < 1e-6  # they have length one
    half = load(converted, model_kwargs={"torch_dtype": torch.bfloat16})
    assert {parameter.dtype for parameter in half[0].parameters()} == {torch.bfloat16}
    found = half.encode([*TEXTS, LONG], convert_to_tensor=True).float().numpy()
    assert (found * whole).sum(1).min() > 0.99
    states = model.encode(LONG, output_value="token_embeddings")
    assert states.shape == (56, 32)  # 54 words and stops, [CLS], [SEP]


def test_mixed_batches_equal_one_by_one(converted):
    model = load(converted)
    texts = [LONG, *TEXTS, LONG[: len(LONG) // 2], "the"]
    together = model.encode(texts, batch_size=6)
    assert difference(together, np.stack([model.encode(text) for text in texts])) < 1e-5
    assert difference(model.encode(texts[::-1], batch_size=2)[::-1], together) < 1e-5


def test_a_document_of_three_thousand_tokens_is_read_in_one_pass(encoder, tmp_path, target):
    before = make_embedder(tmp_path / "source", encoder, modules.Pooling(32, "mean"))
    convert_checkpoint(tmp_path / "source", target, max_length=3200, block_size=16, verify=False)
    model = load(target)
    document = "ships go up and down on the river. " * 333
    assert 2990 < len(model.tokenizer(document)["input_ids"]) < 3010
    ends = [document + end for end in ("towns lie", "sea sea")]
    found = model.encode([*ends, document[: len(document) // 2]])
    assert np.isfinite(found).all() and difference(found[0], found[1]) > 1e-5 < difference(found[0], found[2])
    assert difference(*before.encode(ends)) < 1e-7  # which reads 32 tokens


@pytest.mark.slow
def test_several_processes_give_the_same(converted):
    model = load(converted)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = model.encode([*TEXTS, LONG], pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    assert difference(found, model.encode([*TEXTS, LONG])) < 1e-5


# --- layouts


@pytest.mark.parametrize("settings", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_the_encoder_may_lie_in_a_folder_of_its_own(source, tmp_path, target, settings):
    """As in the first models of the library."""
    old = use_first_layout(shutil.copytree(source, tmp_path / "old"))
    (old / "0_Transformer" / "sentence_bert_config.json").unlink()
    (old / "0_Transformer" / settings).write_text('{"max_seq_length": 32, "do_lower_case": false}')
    before = SentenceTransformer(str(old), device="cpu")
    report = convert_checkpoint(old, target, **SHORT)
    assert report.lsg_parameters["mask_first_token"] and report.modules[0] == "1_Pooling"
    assert json.loads((target / settings).read_text())["max_seq_length"] == 64
    after = load(target)
    assert after.max_seq_length == 64 and before.max_seq_length == 32
    assert difference(after.encode(TEXTS, prompt_name="query"), before.encode(TEXTS, prompt_name="query")) < 1e-5
    assert not (target / "0_Transformer").exists()


def test_lengths_that_the_library_passes_to_the_tokenizer_are_the_new_one(source, tmp_path, target):
    copy = shutil.copytree(source, tmp_path / "source")
    edit_json(copy / "sentence_bert_config.json", tokenizer_args={"model_max_length": 32})
    convert_checkpoint(copy, target, **SHORT)
    model = load(target)
    assert model.max_seq_length == 64
    assert difference(*model.encode([LONG, LONG[: len(LONG) // 2]])) > 1e-4


# --- training and saving

_ENCODE = """
import numpy as np
from sentence_transformers import SentenceTransformer
folder, result, *texts = sys.argv[1:]
np.save(result, SentenceTransformer(folder, device="cpu", trust_remote_code=True).encode(texts))
"""


def train(trainer_class, arguments_class, folder: Path, rows: dict, **parts) -> None:
    """Twenty steps with a trainer of the library, which must lower the loss."""
    if Version(transformers.__version__) < Version("4.46"):
        pytest.skip("the library's trainers give transformers' Trainer a `processing_class`, which is new in 4.46")
    arguments = arguments_class(
        output_dir=str(folder), max_steps=20, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = trainer_class(args=arguments, train_dataset=Dataset.from_dict(rows), **parts)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and all(np.isfinite(losses))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_a_trained_embedder_is_loaded_in_another_process_with_the_same_embeddings(converted, tmp_path):
    model = load(converted)
    before = model.encode([*TEXTS, LONG])
    rows = {"anchor": [str(i) for i in range(24)], "positive": [f"{59 - i} " * 40 for i in range(24)]}
    kinds = SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    train(*kinds, tmp_path / "run", rows, model=model, loss=MultipleNegativesRankingLoss(model))
    after = model.encode([*TEXTS, LONG])
    assert difference(after, before) > 1e-2
    model.save_pretrained(str(tmp_path / "trained"))
    arguments = tmp_path / "trained", tmp_path / "embeddings.npy", *TEXTS, LONG
    done = run_in_new_process(_ENCODE, *arguments, cwd=tmp_path, modules_cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert difference(np.load(tmp_path / "embeddings.npy"), after) < 1e-5


@pytest.mark.parametrize(("num_labels", "saved_by"), [(1, "transformers"), (3, "the library")])
def test_a_reranker_scores_as_its_source_and_learns(tmp_path, target, num_labels, saved_by):
    source = make_encoder(tmp_path / "source", head="ForSequenceClassification", num_labels=num_labels)
    before = CrossEncoder(str(source), device="cpu")
    if saved_by == "the library":  # which writes a modules.json since 5.4
        source = tmp_path / "saved"
        before.save_pretrained(str(source))
    convert_checkpoint(source, target, **SHORT, mask_first_token=True)
    model = CrossEncoder(str(target), device="cpu", trust_remote_code=True)
    pairs = [(TEXTS[0], text) for text in TEXTS]
    scores = before.predict(pairs)
    assert scores.shape == ((3,) if num_labels == 1 else (3, 3))
    assert difference(model.predict(pairs), scores) < 1e-5
    assert difference(*model.predict([(TEXTS[0], LONG), (TEXTS[0], LONG[: len(LONG) // 2])])) > 1e-5

    labels = [i % 3 if num_labels > 1 else float(i % 3 == 0) for i in range(48)]
    loss = (BinaryCrossEntropyLoss if num_labels == 1 else CrossEntropyLoss)(model)
    rows = {"query": [TEXTS[i % 3] for i in range(48)], "text": [LONG] * 48, "label": labels}
    train(CrossEncoderTrainer, CrossEncoderTrainingArguments, tmp_path / "run", rows, model=model, loss=loss)
    pairs.append((TEXTS[0], LONG))
    found = model.predict(pairs)
    assert difference(found[:-1], scores) > 1e-2
    model.save_pretrained(str(tmp_path / "trained"))
    again = CrossEncoder(str(tmp_path / "trained"), device="cpu", trust_remote_code=True)
    assert difference(again.predict(pairs), found) < 1e-5


def test_a_sparse_encoder_gives_the_sources_weights(tmp_path, target):
    encoder = make_encoder(tmp_path / "encoder", head="ForMaskedLM")
    before = SparseEncoder(str(encoder), device="cpu")
    before.save_pretrained(str(tmp_path / "source"))
    convert_checkpoint(tmp_path / "source", target, **SHORT)
    after = SparseEncoder(str(target), device="cpu", trust_remote_code=True)
    expected, found = (model.encode(TEXTS, convert_to_sparse_tensor=False) for model in (before, after))
    assert (expected.count_nonzero(1) > 5).all() and (found - expected).abs().max() < 1e-5
    assert "SparseEncoder(" in (target / "README.md").read_text()
