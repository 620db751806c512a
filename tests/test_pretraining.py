"""Masking, cutting and training, on a text written here and the vocabulary at the root."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")

import numpy as np
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from helpers import write_repository
from lsg_albert import LSGAlbertForMaskedLM
from pretraining import pretrain_mlm, token_cache
from pretraining.corpus import CorpusError, is_drawn, read_documents
from pretraining.initial_weights import extend_positions, look_at_neighbours, position_features, shift, unshare_layers
from pretraining.masking import IGNORED, Masker
from pretraining.token_cache import TokenizedDocuments, cut_pieces, load_tokens, piece_starts
from pretraining.word_vectors import cooccurrences, set_word_embeddings

ROOT = Path(__file__).parents[1]
SIZES = "--hidden_size 16 --layers 1 --heads 2 --intermediate_size 16 --embedding_size 8 --positions 64".split()
RECIPE = "--max_steps 6 --per_device_train_batch_size 2 --max_length 16 --warmup_steps 2 --logging_steps 1 --save_steps 2 --dropout 0.1".split()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def masker(tokenizer) -> Masker:
    return Masker.for_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def tokens(tokenizer) -> np.ndarray:
    """Ordinary English with words of one piece and of many."""
    text = "The unquestionable antidisestablishmentarian walked along the river, towards Rhododendron Hall, in 1847. "
    return np.array(tokenizer(text * 40, add_special_tokens=False)["input_ids"])


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Twelve documents, each of a word of its own; the last two are held out."""
    words = "king queen river mountain science music letter garden winter summer house window".split()
    rows = [{"id": word, "text": f"the {word} and a {word}\n\n" * 8} for word in words]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held_out.txt").write_text("house\nwindow\n")
    return path


def arguments(corpus: Path, output: Path, *options: str) -> list[str]:
    held_out = ["--exclude_ids", str(corpus.parent / "held_out.txt"), "--eval_tokens", "64"]
    return [str(corpus), *held_out, "--tokenizer", str(ROOT), "--output_dir", str(output), *SIZES, *RECIPE, *options]


def words_of(tokens: np.ndarray, masker: Masker) -> list[np.ndarray]:
    """The positions of every word."""
    return np.split(np.arange(len(tokens)), np.flatnonzero(masker.starts_word[tokens])[1:])


# --- masking


@pytest.mark.parametrize("length", [1, 2, 3, 7, 126, 600])
def test_chosen_tokens_are_at_most_the_rate(masker, tokens, length):
    chosen = masker.choose(tokens[:length], np.random.default_rng(0))
    assert 1 <= chosen.sum() <= max(1, round(0.15 * length))
    if length > 100:
        assert chosen.sum() >= 0.15 * length - 2


@pytest.mark.parametrize("seed", range(5))
def test_words_are_chosen_whole(masker, tokens, seed):
    chosen = masker.choose(tokens, np.random.default_rng(seed))
    assert {len(set(chosen[word])) for word in words_of(tokens, masker)} == {1}


def test_spans_have_up_to_three_words(masker, tokens):
    """Words side by side are chosen far more often than by chance, as spans of two and three words."""
    words = words_of(tokens, masker)
    pairs = both = single = 0
    for seed in range(50):
        chosen = masker.choose(tokens, np.random.default_rng(seed))
        flags = [chosen[word[0]] for word in words]
        single += sum(flags)
        both += sum(first and second for first, second in zip(flags, flags[1:], strict=False))
        pairs += len(flags) - 1
    assert both / pairs > 2 * (single / pairs) ** 2


def test_hidden_tokens_are_80_10_10(masker, tokens):
    many = np.resize(tokens, 100_000)
    chosen = np.random.default_rng(1).random(len(many)) < 0.5
    before = many.copy()
    hidden = masker.hide(many, chosen, np.random.default_rng(0))
    assert (hidden[~chosen] == many[~chosen]).all()
    assert (many == before).all()
    masked, kept = hidden[chosen] == masker.mask_id, hidden[chosen] == many[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert kept.mean() == pytest.approx(0.1, abs=0.01)
    assert hidden[chosen][~masked].min() >= 5  # no special token as a replacement


# --- documents and pieces


@pytest.mark.parametrize("length", [1, 9, 10, 11, 20, 21, 99, 100])
def test_pieces_cover_a_document(length):
    starts = piece_starts(length, 10)
    covered = np.zeros(length, dtype=bool)
    for start in starts:
        covered[start : start + 10] = True
    assert covered.all()
    assert len(starts) == -(-length // 10)
    assert starts[-1] == max(length - 10, 0)


def test_pieces_never_cross_documents():
    offsets = np.array([0, 7, 7, 40, 63])
    documents = TokenizedDocuments(np.arange(63), offsets, list("abcd"))
    pieces = cut_pieces(documents, 10, [True, True, False, True])
    assert [tuple(piece) for piece in pieces] == [(0, 7), (40, 50), (46, 56), (53, 63)]


def test_cache_gives_the_tokens_of_the_documents(corpus, tokenizer, tmp_path):
    first, again = (load_tokens(corpus, tokenizer, tmp_path / "cache") for _ in range(2))
    assert first.tokens.dtype == again.tokens.dtype == np.uint16
    assert (first.tokens == again.tokens).all() and (first.offsets == again.offsets).all() and first.ids == again.ids
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row, begin, end in zip(rows, again.offsets, again.offsets[1:], strict=False):
        assert list(again.tokens[begin:end]) == tokenizer(row["text"], add_special_tokens=False)["input_ids"]


def test_a_cache_is_not_changed_under_its_readers(corpus, tokenizer, tmp_path, monkeypatch):
    """Two processes find no cache. The second one writes the file when the first one already reads it."""
    documents = load_tokens(corpus, tokenizer, tmp_path)
    expected = documents.tokens.copy()
    for index in tmp_path.glob("corpus*-*.json"):
        index.unlink()
    monkeypatch.setattr(token_cache, "tokenize_source", lambda *_: dataclasses.replace(documents, tokens=expected + 1))
    assert (load_tokens(corpus, tokenizer, tmp_path).tokens == expected + 1).all()
    assert (documents.tokens == expected).all()


def test_samples_come_from_one_document_and_every_pass_reads_all(corpus, tokenizer, tmp_path):
    args = pretrain_mlm.parse_args(arguments(corpus, tmp_path / "out"))
    train, evaluation = pretrain_mlm.load_corpora(args, tokenizer)
    names = {tokenizer.convert_tokens_to_ids(f"▁{path}") for path in "king queen river mountain".split()}
    samples = pretrain_mlm.MaskedSamples(train, Masker.for_tokenizer(tokenizer), tokenizer, 1, 3 * len(train))
    passes = []
    for index in range(len(samples)):
        ids, labels, _ = samples[index]
        text = np.where(labels == IGNORED, ids, labels)
        assert text[0] == 2 and text[-1] == 3 and len(text) <= 16 and labels[0] == labels[-1] == IGNORED
        assert len(names & set(text)) <= 1
        assert (samples[index][0] == ids).all()
        passes.append(tuple(text))
    size = len(train)
    assert sorted(passes[:size]) == sorted(passes[size : 2 * size])
    assert passes[:size] != passes[size : 2 * size]
    held_out = {tokenizer.convert_tokens_to_ids("▁house"), tokenizer.convert_tokens_to_ids("▁window")}
    assert all(held_out & set(evaluation[index]) for index in range(len(evaluation)))
    assert not any(held_out & set(train[index]) for index in range(len(train)))


def test_shifted_samples_reach_every_position_and_keep_their_text(corpus, tokenizer, tmp_path):
    train, _ = pretrain_mlm.load_corpora(pretrain_mlm.parse_args(arguments(corpus, tmp_path / "out")), tokenizer)
    options = train, Masker.for_tokenizer(tokenizer), tokenizer, 1, 400
    plain, shifted = pretrain_mlm.MaskedSamples(*options), pretrain_mlm.MaskedSamples(*options, positions=64)
    pairs = [(plain[index], shifted[index]) for index in range(400)]
    assert all((a.input_ids == b.input_ids).all() and (a.labels == b.labels).all() for a, b in pairs)
    assert all(a.first_position == 0 for a, _ in pairs)
    reached = {b.first_position + i for _, b in pairs for i in range(len(b.input_ids))}
    assert reached == set(range(64))


def test_collate_masks_padding_only():
    rows = [
        pretrain_mlm.Sample(np.array([2, 7, 8, 3]), np.array([-100, 7, -100, -100])),
        pretrain_mlm.Sample(np.array([2, 9, 3]), np.array([-100, 9, -100])),
    ]
    batch = pretrain_mlm.collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[2, 7, 8, 3], [2, 9, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 7, -100, -100], [-100, 9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert set(pretrain_mlm.collate(rows[:1], pad_id=0)) == {"input_ids", "labels"}
    shifted = pretrain_mlm.collate([rows[0], rows[1]._replace(first_position=5)], pad_id=0)
    assert shifted["position_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 0]]


def test_word_vectors_bring_words_of_like_surroundings_together():
    """Two languages that share no word: vectors of one are nearer to each other than to the other's."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(low, low + 5, size=2000) for low in (5, 10)]
    embeddings = 0.02 * torch.randn(16, 8)
    before = embeddings.clone()
    set_word_embeddings(embeddings, np.concatenate(texts), window=2)
    unseen = [0, 1, 2, 3, 4, 15]
    assert torch.equal(embeddings[unseen], before[unseen])
    assert embeddings.std().item() == pytest.approx(before.std().item(), rel=0.2)
    products = torch.nn.functional.normalize(embeddings, dim=1) @ torch.nn.functional.normalize(embeddings, dim=1).T
    assert products[5:10, 5:10].min() > 0.5 and products[5:10, 10:15].max() < 0


def test_counts_weigh_pairs_by_distance():
    counts = cooccurrences([np.array([0, 1, 2]), np.array([2, 2])], vocab_size=3, window=2)
    assert counts.tolist() == [[0, 1, 0.5], [1, 0, 1], [0.5, 1, 2]]


# --- training


training = pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.48"),
    reason="the training script needs transformers 4.48 or newer",
)


class Kill(TrainerCallback):
    """Ends the run in the middle, between two checkpoints."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def losses(output: Path) -> list[float]:
    history = json.loads((output / "history.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(params=["new", "muon", "plain", "lsg"])
def start(request, tiny_config, tmp_path) -> list[str]:
    """What to train: a new model, or one from a checkpoint, which transformers 5.0.0 saves under other names."""
    if request.param == "new":
        return []
    if request.param == "muon":
        return ["--muon"]
    torch.manual_seed(0)
    if request.param == "plain":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "embedding_size": 8}
        AlbertForMaskedLM(AlbertConfig(vocab_size=16000, **sizes)).save_pretrained(tmp_path / "start")
    else:
        write_repository(tmp_path / "start", LSGAlbertForMaskedLM(tiny_config(vocab_size=16000, block_size=4)))
    return ["--model", str(tmp_path / "start")]


@training
def test_killed_and_resumed_run_equals_an_unbroken_one(corpus, start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = pretrain_mlm.run(pretrain_mlm.parse_args(arguments(corpus, whole, *start)))
    args = pretrain_mlm.parse_args(arguments(corpus, broken, *start))
    trainer = pretrain_mlm.build_trainer(args)
    trainer.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert pretrain_mlm.run(args) == expected
    assert len(losses(whole)) == 6 and losses(broken) == losses(whole)
    load = AutoModelForMaskedLM.from_pretrained
    weights = [load(path / "final", trust_remote_code=True).state_dict() for path in (whole, broken)]
    assert json.loads((whole / "final" / "config.json").read_text())["use_cache"] is True
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@training
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(corpus, tmp_path, monkeypatch, file):
    """Half of a file of checkpoint-4 is there, and what was to be written after it is not."""
    arguments_of = {name: arguments(corpus, tmp_path / name) for name in ("whole", "broken")}
    expected = pretrain_mlm.run(pretrain_mlm.parse_args(arguments_of["whole"]))
    half = tmp_path / "broken" / "checkpoint-4" / file

    def until_killed(write, path_of):
        def written(*args, **kwargs):
            write(*args, **kwargs)
            if Path(path_of(*args, **kwargs)) == half:
                half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
                raise KeyboardInterrupt

        return written

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", until_killed(torch.save, lambda value, path, **kwargs: path))
        save_to_json = transformers.TrainerState.save_to_json
        patch.setattr(transformers.TrainerState, "save_to_json", until_killed(save_to_json, lambda state, path: path))
        pretrain_mlm.run(pretrain_mlm.parse_args(arguments_of["broken"]))
    assert half.is_file()
    assert pretrain_mlm.last_checkpoint(tmp_path / "broken") == str(tmp_path / "broken" / "checkpoint-2")
    assert pretrain_mlm.run(pretrain_mlm.parse_args(arguments_of["broken"])) == expected
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@training
def test_a_run_killed_while_it_writes_the_result_writes_it_again(corpus, tmp_path):
    args = pretrain_mlm.parse_args(arguments(corpus, tmp_path))
    expected = pretrain_mlm.run(args)
    curve = losses(tmp_path)
    weights = copy.deepcopy(AutoModelForMaskedLM.from_pretrained(tmp_path / "final").state_dict())  # not of the file
    (tmp_path / "final" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "history.json").unlink()
    assert pretrain_mlm.run(args) == expected and losses(tmp_path) == curve
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@training
def test_a_log_without_terminal_has_steps_and_the_time_left(corpus, tmp_path, capsys):
    pretrain_mlm.run(
        pretrain_mlm.parse_args(arguments(corpus, tmp_path, "--eval_strategy", "steps", "--eval_steps", "3"))
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if ": loss" in line] == list("123456")
    assert all(re.match(r"step \d of 6, \d+:\d\d:\d\d left: \w+ [\d.e+-]+", line) for line in lines)
    assert any("step 3 of 6" in line and "eval_loss" in line for line in lines)


def test_last_checkpoint_is_the_newest_one_that_is_marked_complete(tmp_path):
    """A kill in the middle of saving, of whichever process, leaves a folder without the mark."""
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 2}')
        if step != 12:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert pretrain_mlm.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert pretrain_mlm.last_checkpoint(tmp_path / "nowhere") is None


@training
def test_loss_is_that_of_the_model_itself(corpus, tokenizer, tmp_path):
    trainer = pretrain_mlm.build_trainer(pretrain_mlm.parse_args(arguments(corpus, tmp_path, "--dropout", "0")))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trained = trainer.model(**batch)["loss"]
    assert torch.allclose(trained, AlbertForMaskedLM.forward(trainer.model, **batch).loss)


def test_positions_are_shifted_by_a_rotation():
    features = position_features(50)
    torch.testing.assert_close(features[:-3] @ shift(3).T, features[3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift(-3), shift(3).T)
    assert features.square().mean().sqrt().item() == pytest.approx(1, rel=1e-5)


def test_first_heads_look_at_the_neighbours():
    """Before any training the first layer's first head looks at the token before, the second at the one after."""
    config = AlbertConfig(vocab_size=200, hidden_size=256, num_attention_heads=4, num_hidden_layers=1)
    config._attn_implementation = "eager"
    model = AlbertForMaskedLM(config).eval()
    look_at_neighbours(model)
    ids = torch.randint(5, 200, (2, 300), generator=torch.Generator().manual_seed(0))
    before, after, around, free = model.albert(input_ids=ids, output_attentions=True).attentions[0].mean(0)
    assert before.diagonal(-1).mean() > 0.5 and after.diagonal(1).mean() > 0.5
    assert sum(around.diagonal(distance).mean() for distance in range(-5, 6)) > 0.5
    assert free.max() < 0.05


def test_positions_are_carried_on_as_they_were_trained():
    """Trained positions that are a linear function of the features go on as the same function."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=50, hidden_size=128, num_attention_heads=4, num_hidden_layers=1, embedding_size=64
    )
    model = AlbertForMaskedLM(config)
    look_at_neighbours(model)
    positions = model.albert.embeddings.position_embeddings.weight
    moved = positions.detach() @ torch.randn(64, 64) + torch.randn(64)
    with torch.no_grad():
        positions[1:127] = moved[1:127]
    untouched = positions.detach().clone()
    extend_positions(model, 128)
    assert torch.equal(positions[1:127], moved[1:127])
    error, before = ((table - moved)[127:].norm(dim=1) / moved[127:].norm(dim=1) for table in (positions, untouched))
    assert error[:8].max() < 0.1  # then it grows: the slowest features hardly turn in 128 tokens
    assert (error < before).all()
    for trained in (34, 514):
        with pytest.raises(ValueError, match=f"`trained` is {trained}"):
            extend_positions(model, trained)


@training
def test_goes_on_at_shifted_positions(corpus, tmp_path):
    """A killed and resumed run draws the same positions: its losses are those of an unbroken one."""
    options = [
        "--shift_positions",
        "--neighbour_heads",
        "--hidden_size",
        "96",
        "--embedding_size",
        "48",
        "--max_steps",
        "4",
    ]
    assert pretrain_mlm.main(arguments(corpus, tmp_path / "a", *options)) == 0
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "a" / "final" / name).unlink()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    assert pretrain_mlm.main(arguments(corpus, tmp_path / "b", *options)) == 0
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    plain = [option for option in options if option != "--shift_positions"]
    assert pretrain_mlm.main(arguments(corpus, tmp_path / "c", *plain)) == 0
    assert losses(tmp_path / "c") != losses(tmp_path / "a")


@pytest.mark.parametrize("model_class", [AlbertForMaskedLM, LSGAlbertForMaskedLM])
def test_layers_part_from_the_same_outputs(tiny_config, model_class):
    """Three groups of four layers compute what one did; then a step trains each of them differently."""
    config = tiny_config(num_hidden_layers=4)
    shared = model_class(config if model_class is LSGAlbertForMaskedLM else AlbertConfig(**config.to_dict())).eval()
    parted = unshare_layers(shared, 3).eval()
    ids = torch.randint(5, 120, (2, 40))
    torch.testing.assert_close(parted(ids).logits, shared(ids).logits)
    assert shared.config.num_hidden_groups == 1 and parted.config.num_hidden_groups == 3
    parted(ids, labels=ids).loss.backward()
    weights = [group.albert_layers[0].ffn.weight for group in parted.albert.encoder.albert_layer_groups]
    assert len(weights) == 3 and not torch.equal(weights[0].grad, weights[1].grad)
    for model, groups in ((parted, 4), (shared, 5), (shared, 0)):
        with pytest.raises(ValueError, match=f"`groups` is {groups}"):
            unshare_layers(model, groups)


@training
def test_goes_on_with_layers_of_their_own(corpus, tmp_path):
    assert pretrain_mlm.main(arguments(corpus, tmp_path / "a", "--layers", "2", "--max_steps", "1")) == 0
    options = ["--model", str(tmp_path / "a" / "final"), "--groups", "2", "--max_steps", "2"]
    for steps in ("2", "3"):  # the second time from the checkpoint, which has two groups already
        assert pretrain_mlm.main(arguments(corpus, tmp_path / "b", *options, "--max_steps", steps)) == 0
    weights = load_file(tmp_path / "b" / "final" / "model.safetensors")
    name = "albert.encoder.albert_layer_groups.{}.albert_layers.0.ffn.weight"
    assert not torch.equal(weights[name.format(0)], weights[name.format(1)])


@training
def test_training_lowers_the_loss(corpus, tmp_path):
    pretrain_mlm.run(
        pretrain_mlm.parse_args(arguments(corpus, tmp_path, "--max_steps", "60", "--learning_rate", "0.01"))
    )
    assert np.mean(losses(tmp_path)[-5:]) < np.mean(losses(tmp_path)[:5]) - 2


@training
def test_muon_makes_the_updates_of_matrices_orthogonal(corpus, tmp_path):
    """A matrix changes by about 0.2 sqrt(longer side) times its gradient's polar factor, other weights as with AdamW."""
    options = ["--muon", "--max_steps", "1", "--warmup_steps", "0", "--dropout", "0", "--weight_decay", "0"]
    args = pretrain_mlm.parse_args(arguments(corpus, tmp_path, *options, "--learning_rate", "0.01"))
    trainer = pretrain_mlm.build_trainer(args)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    changes = {name: (value - before[name]) / 0.01 for name, value in trainer.model.state_dict().items()}
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0."
    matrices = [name for name, change in changes.items() if name.startswith(layer) and change.ndim == 2]
    assert len(matrices) == 6
    for name in matrices:
        # the polar factor's singular values are 1; the iteration of Newton and Schulz leaves the large ones near it
        largest = torch.linalg.matrix_norm(changes[name], 2) / (0.2 * max(changes[name].shape) ** 0.5)
        assert 0.6 < largest < 1.3, name
    for name in set(changes) - set(matrices):
        assert changes[name].abs().max() < 1.01, name  # AdamW's first step is the gradient's sign
    assert changes["albert.embeddings.word_embeddings.weight"].abs().max() > 0.9


@training
def test_goes_on_from_a_checkpoint_with_longer_text(corpus, tmp_path, capsys):
    assert pretrain_mlm.main(arguments(corpus, tmp_path / "a")) == 0
    final = str(tmp_path / "a" / "final")
    options = ["--model", final, "--max_length", "32", "--max_steps", "1"]
    assert pretrain_mlm.main(arguments(corpus, tmp_path / "b", *options)) == 0
    capsys.readouterr()
    assert pretrain_mlm.main(arguments(corpus, tmp_path / "b", "--model", final, "--eval_only")) == 0
    metrics = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 <= metrics["eval_top1"] <= metrics["eval_top5"] <= 1 and metrics["eval_loss"] > 0
    assert AutoTokenizer.from_pretrained(final).mask_token_id == 4
    assert (tmp_path / "b" / "final" / "spiece.model").read_bytes() == (ROOT / "spiece.model").read_bytes()


@training
@pytest.mark.parametrize("content", [None, "", "no json\n", '{"id": "house", "text": "held out"}\n'])
def test_bad_corpora_are_reported_in_one_line(corpus, tmp_path, capsys, content):
    corpus.unlink()
    if content is not None:
        corpus.write_text(content)
    assert pretrain_mlm.main(arguments(corpus, tmp_path / "out")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


# --- sources of text


def test_documents_of_every_kind_of_source(corpus, tmp_path, monkeypatch):
    """JSON lines, a text file, a folder of them, and a data set's folder give the same texts."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    texts, table = tmp_path / "texts", tmp_path / "table"
    for number, row in enumerate(rows):
        path = texts / str(number % 3) / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row["text"])
    table.mkdir()
    (table / "train.jsonl").write_text(corpus.read_text())
    expected = [(row["id"], row["text"]) for row in rows]
    assert list(read_documents([corpus])) == list(read_documents([table])) == expected
    by_name = dict(read_documents([texts]))
    assert by_name == {f"{number % 3}/{number:02}.txt": row["text"] for number, row in enumerate(rows)}
    assert list(read_documents([texts / "0" / "00.txt"])) == [("00.txt", rows[0]["text"])]


def test_the_cache_notices_a_changed_folder(tokenizer, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the king")
    assert load_tokens(texts, tokenizer, tmp_path / "cache").ids == ["a.txt"]
    (texts / "b.txt").write_text("the queen")
    assert load_tokens(texts, tokenizer, tmp_path / "cache").ids == ["a.txt", "b.txt"]


def test_a_share_of_the_documents_is_held_out_by_their_ids(corpus, tokenizer, tmp_path):
    names = [str(number) for number in range(4000)]
    drawn = {share: {name for name in names if is_drawn(name, share)} for share in (0.0, 0.1, 0.3, 1.0)}
    assert not drawn[0.0] and len(drawn[1.0]) == 4000 and drawn[0.1] < drawn[0.3]
    assert len(drawn[0.3]) / 4000 == pytest.approx(0.3, abs=0.03)
    args = pretrain_mlm.parse_args(arguments(corpus, tmp_path / "out", "--held_out_share", "0.4"))
    train, evaluation = pretrain_mlm.load_corpora(args, tokenizer)
    ids = [json.loads(line)["id"] for line in corpus.read_text().splitlines()]
    held_out = {name for name in ids if is_drawn(name, 0.4)} | {"house", "window"}
    assert 2 < len(held_out) < 12
    seen = {name: tokenizer.convert_tokens_to_ids(f"▁{name}") for name in ids}
    for pieces, expected in ((train, set(ids) - held_out), (evaluation, held_out)):
        tokens = {token for index in range(len(pieces)) for token in pieces[index].tolist()}
        assert {name for name in ids if seen[name] in tokens} == expected


@pytest.mark.parametrize("source", ["missing.jsonl", "missing.txt", "no/such:dataset"])
def test_a_missing_source_is_named(source):
    with pytest.raises(CorpusError, match=source):
        list(read_documents([source]))


def test_positions_are_extended_of_a_trained_model_only(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain_mlm.parse_args(arguments(corpus, tmp_path / "out", "--extend_positions", "40"))
    assert "--extend_positions is for a trained --model" in capsys.readouterr().err
