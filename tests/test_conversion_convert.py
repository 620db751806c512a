"""Whole conversions as a function: sources of every kind, damaged ones, and what the result computes."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AlbertForMaskedLM, AlbertForPreTraining, AutoConfig

import lsg_albert
from albert_sources import HEADS, VOCAB_SIZE, edit_json, fingerprint, make_albert, pickle_weights, same, save
from helpers import run_in_new_process
from lsg_albert.configuration_lsg_albert import LSG_FIELDS
from lsg_albert.conversion.convert import convert_checkpoint
from lsg_albert.conversion.files import ConversionError

MADE = ("embeddings.global_embeddings.weight", "embeddings.position_embeddings.weight")
SHORT = {"max_length": 64, "block_size": 16}


def load(folder, name):
    model, info = getattr(lsg_albert, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.get(key) for key in ("missing_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("head", HEADS)
def test_every_head_keeps_its_weights_and_labels(tmp_path, target, head):
    names = ["A", "B"] if head == "AlbertForQuestionAnswering" else ["A", "B", "C"]  # a span has two ends
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = make_albert(head, **labels, problem_type="multi_label_classification")
    source = save(model, tmp_path / "source")
    report = convert_checkpoint(source, target, **SHORT)

    assert report.comparison.lossless_difference < 1e-4
    assert report.comparison.lossless_global_token == "stored"
    assert report.architecture == "LSG" + head
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert {name.removeprefix("albert.") for name in after.keys() - before.keys()} == {MADE[0]}
    kept = [name for name in before if not name.endswith(MADE)]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    config = load(target, "LSG" + head).config
    assert config.id2label == labels["id2label"] and config.label2id == labels["label2id"]
    assert config.problem_type == "multi_label_classification"
    assert config.architectures == ["LSG" + head] and config.max_position_embeddings == 64 and config.block_size == 16


def test_results_agree_with_the_source_where_they_must(masked_lm, target):
    convert_checkpoint(masked_lm, target, **SHORT, verify=False)
    ids = torch.randint(5, VOCAB_SIZE, (2, 32))
    ids[:, 0] = 2
    expected = make_albert()(ids).logits
    model = lsg_albert.LSGAlbertForMaskedLM.from_pretrained(target, mask_first_token=True).eval()
    assert (model(ids).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 4, "num_hidden_groups": 2},
        {"inner_group_num": 2},
        {"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},  # as in version 1
        {"max_position_embeddings": 100},
        {"max_position_embeddings": 1024},
        {"type_vocab_size": 1},
    ],
)
def test_configurations_of_every_kind(tmp_path, target, fields):
    source = save(make_albert(**fields), tmp_path / "source")
    report = convert_checkpoint(source, target, **SHORT)
    assert report.comparison.lossless_difference < 1e-4


def test_untied_word_embeddings_are_both_kept(tmp_path, target):
    model = make_albert(tie_word_embeddings=False)
    with torch.no_grad():
        model.predictions.decoder.weight.add_(1)
    report = convert_checkpoint(save(model, tmp_path / "source"), target, **SHORT)
    assert report.comparison.lossless_difference < 1e-4
    weights = load_file(target / "model.safetensors")
    assert torch.equal(weights["predictions.decoder.weight"], model.predictions.decoder.weight)
    loaded = load(target, "LSGAlbertForMaskedLM")
    assert torch.equal(loaded.predictions.decoder.weight, model.predictions.decoder.weight)
    assert torch.equal(loaded.albert.embeddings.word_embeddings.weight, model.albert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("form", ["sharded", "pickle", "old pickle", "sharded pickle"])
def test_every_format_gives_the_same(masked_lm, source, target, tmp_path, form):
    if form == "sharded":
        (source / "model.safetensors").unlink()
        save(make_albert(), source, max_shard_size="100KB")
        assert len(list(source.glob("model-*.safetensors"))) > 1
    else:
        pickle_weights(source, 3 if "sharded" in form else 1, old_format="old" in form)
    convert_checkpoint(masked_lm, tmp_path / "expected", **SHORT, verify=False)
    report = convert_checkpoint(source, target, **SHORT)
    assert report.comparison.lossless_difference < 1e-4
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert same(load_file(target / "model.safetensors"), expected)


def test_weights_are_sharded_where_asked(masked_lm, target):
    convert_checkpoint(masked_lm, target, **SHORT, max_shard_size="100KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1 and not (target / "model.safetensors").exists()
    load(target, "LSGAlbertForMaskedLM")


def test_a_pickle_with_code_is_refused_and_not_run(source, target, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    (source / "model.safetensors").unlink()
    torch.save({"albert.embeddings.word_embeddings.weight": Trap()}, source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="pytorch_model.bin is damaged, or holds more than weights"):
        convert_checkpoint(source, target)
    assert not (tmp_path / "trapped").exists() and not target.exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_kept(tmp_path, target, dtype):
    source = save(make_albert().to(getattr(torch, dtype)), tmp_path / "source")
    report = convert_checkpoint(source, target, **SHORT)
    assert report.dtype == dtype
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert report.comparison.lossless_difference < 1e-4
    assert report.comparison.lossless_global_token == "computed"
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == dtype


def test_dtype_is_changed_on_request(masked_lm, target):
    report = convert_checkpoint(masked_lm, target, **SHORT, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    assert report.comparison.lossless_difference < 1e-4 < report.comparison.chosen_difference
    with pytest.raises(ValueError, match="`dtype` must be one of float32, float16, bfloat16, got 'int8'"):
        convert_checkpoint(masked_lm, target, dtype="int8")


def test_golden_end_to_end_case(shared, target):
    folder = shared / "golden" / "public" / "conversion"
    case = json.loads((folder / "expected_512.json").read_text())
    expected = load_file(folder / "expected_512_globals.safetensors")
    report = convert_checkpoint(
        folder / case["source"],
        target,
        max_length=case["e2e"]["max_sequence_length"],
        bos_token_id=case["bos_or_cls_id"],
        mask_token_id=case["mask_id"],
        **case["e2e"]["model_kwargs"],
    )
    assert report.comparison.lossless_difference < 1e-4
    model = load(target, case["e2e"]["class"]).double()
    logits = model(expected["e2e.input_ids"]).logits[:, expected["e2e.positions"]]
    torch.testing.assert_close(logits, expected["e2e.logits"], rtol=0, atol=1e-6)


def test_golden_lsg_source(shared, tmp_path):
    folder = shared / "golden" / "public" / "conversion"
    case = json.loads((folder / "expected_lsg_512.json").read_text())
    expected = load_file(folder / "expected_lsg_512_globals.safetensors")
    for i, table in enumerate(case["global_tables"]):
        report = convert_checkpoint(
            folder / case["source"],
            tmp_path / str(i),
            max_length=table["max_sequence_length"],
            keep_first_global_token=table["keep_first_global_token"],
            resize_lsg=table["resize_lsg"],
        )
        assert report.source_is_lsg and report.comparison.lossless_difference < 1e-4
        assert any("made again" in warning for warning in report.warnings) != table["resize_lsg"]
        made = load_file(tmp_path / str(i) / "model.safetensors")["albert." + MADE[0]]
        torch.testing.assert_close(made, expected[table["tensor"]], rtol=0, atol=1e-6)
        config = json.loads((tmp_path / str(i) / "config.json").read_text())
        assert config["block_size"] == 8  # the source's own
        assert config["auto_map"]["AutoConfig"] == "configuration_lsg_albert.LSGAlbertConfig"


def test_our_own_result_is_resized(masked_lm, tmp_path):
    convert_checkpoint(masked_lm, tmp_path / "a", **SHORT, num_global_tokens=3, sparsity_type="pooling", verify=False)
    report = convert_checkpoint(tmp_path / "a", tmp_path / "b", max_length=256, resize_lsg=True)
    assert report.comparison.chosen_difference < 1e-5
    assert report.lsg_parameters["sparsity_type"] == "pooling" and report.lsg_parameters["num_global_tokens"] == 3
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    names = before.keys() - {"albert." + MADE[1]}
    assert all(torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize("length", [32, 77, 65_536])
def test_any_length_from_two_blocks_up(masked_lm, target, length):
    report = convert_checkpoint(masked_lm, target, max_length=length, block_size=16, sparse_block_size=16)
    assert report.comparison.full_length == length
    table = load_file(target / "model.safetensors")["albert." + MADE[1]]
    source_table = load_file(masked_lm / "model.safetensors")["albert." + MADE[1]]
    assert torch.equal(table, source_table.repeat(128, 1)[:length])


def test_options_have_their_effect(masked_lm, tmp_path):
    def table(name, **options):
        convert_checkpoint(masked_lm, tmp_path / name, **SHORT, verify=False, **options)
        return load_file(tmp_path / name / "model.safetensors")["albert." + MADE[0]]

    plain = table("plain")
    token_type = load_file(masked_lm / "model.safetensors")["albert.embeddings.token_type_embeddings.weight"][0]
    torch.testing.assert_close(table("no types", use_token_type=False) + token_type, plain)
    assert not torch.equal(table("stride", global_positional_stride=32), plain)
    drawn = table("random", random_global_init=True, seed=3)
    assert torch.equal(drawn, table("again", random_global_init=True, seed=3))
    assert not torch.equal(drawn, table("other", random_global_init=True, seed=4))
    torch.testing.assert_close(drawn[0], plain[0])


def test_another_architecture_gets_a_new_head_and_loses_the_old(masked_lm, tmp_path, target):
    state = torch.get_rng_state()
    report = convert_checkpoint(masked_lm, target, **SHORT, architecture="AlbertForSequenceClassification", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(report.drawn) == {"classifier.weight", "classifier.bias", "albert.pooler.weight", "albert.pooler.bias"}
    assert all(name.startswith("predictions.") for name in report.dropped)
    assert report.comparison.lossless_difference < 1e-4
    load(target, "LSGAlbertForSequenceClassification")
    bare = convert_checkpoint(masked_lm, tmp_path / "bare", **SHORT, architecture="LSGAlbertModel")
    assert bare.architecture == "LSGAlbertModel"
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    back = convert_checkpoint(tmp_path / "bare", tmp_path / "back", architecture="AlbertForMaskedLM", resize_lsg=True)
    assert "predictions.dense.weight" in back.drawn
    load(tmp_path / "back", "LSGAlbertForMaskedLM")


def test_a_head_of_the_same_name_but_another_shape_is_made_anew(tmp_path, target):
    source = save(make_albert("AlbertForTokenClassification", num_labels=5), tmp_path / "source")
    report = convert_checkpoint(source, target, **SHORT, architecture="AlbertForMultipleChoice")
    assert {"classifier.weight", "classifier.bias"} <= set(report.drawn) & report.dropped.keys()
    assert load(target, "LSGAlbertForMultipleChoice").classifier.weight.shape == (1, 32)


def test_a_file_with_only_the_second_name_of_a_tied_tensor_is_read(source, target):
    damage_weights(
        source, lambda w: w.update({"predictions.decoder.weight": w.pop("albert.embeddings.word_embeddings.weight")})
    )
    assert convert_checkpoint(source, target, **SHORT).comparison.lossless_difference < 1e-4
    load(target, "LSGAlbertForMaskedLM")


def test_without_a_named_architecture_it_is_pre_training(tmp_path, target):
    source = save(make_albert("AlbertForPreTraining"), tmp_path / "source")
    edit_json(source / "config.json", architectures=None)
    assert convert_checkpoint(source, target, **SHORT).architecture == "LSGAlbertForPreTraining"


def test_what_published_files_hold_beside_the_model_is_kept_or_known(source, target):
    """As albert-base-v2: a masked-language model's class, and a pooler and tied tensors in the file."""
    weights = load_file(source / "model.safetensors")
    weights |= {
        "albert.pooler.weight": torch.randn(32, 32),
        "albert.pooler.bias": torch.randn(32),
        "predictions.decoder.weight": weights["albert.embeddings.word_embeddings.weight"].clone(),
        "predictions.decoder.bias": weights["predictions.bias"].clone(),
        "albert.embeddings.position_ids": torch.arange(512)[None],
    }
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(source / "config.json", net_structure_type=0, gap_size=0, num_memory_blocks=0, down_scale_factor=1)
    report = convert_checkpoint(source, target, **SHORT)
    after = load_file(target / "model.safetensors")
    assert torch.equal(after["albert.pooler.weight"], weights["albert.pooler.weight"])
    assert report.dropped.keys() == {"predictions.decoder.weight", "albert.embeddings.position_ids"}
    assert torch.equal(after["predictions.decoder.bias"], weights["predictions.bias"])
    ids = torch.randint(5, VOCAB_SIZE, (1, 20))
    torch.testing.assert_close(AlbertForMaskedLM.from_pretrained(target).eval()(ids).logits, make_albert()(ids).logits)
    loaded = lsg_albert.LSGAlbertForMaskedLM.from_pretrained(target)
    assert torch.equal(loaded.predictions.decoder.bias, weights["predictions.bias"])
    assert torch.equal(load(target, "LSGAlbertModel").pooler.weight, weights["albert.pooler.weight"])


def test_of_two_biases_the_decoders_counts_as_in_transformers(source, target):
    weights = load_file(source / "model.safetensors")
    weights |= {"predictions.bias": torch.ones(VOCAB_SIZE), "predictions.decoder.bias": torch.full((VOCAB_SIZE,), 2.0)}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    report = convert_checkpoint(source, target, **SHORT)
    assert "predictions.bias and predictions.decoder.bias are names of one parameter" in " ".join(report.warnings)
    assert (AlbertForMaskedLM.from_pretrained(source).predictions.decoder.bias == 2).all()
    assert (lsg_albert.LSGAlbertForMaskedLM.from_pretrained(target).predictions.bias == 2).all()


def damage_config(source, **fields):
    edit_json(source / "config.json", **fields)


def damage_weights(source, change):
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors")


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def lose_a_shard(source):
    (source / "model.safetensors").unlink()
    save(make_albert(), source, max_shard_size="100KB")
    sorted(source.glob("model-*.safetensors"))[1].unlink()


def set_nan(weights):
    weights["predictions.dense.weight"][1, 2] = float("nan")


def cut(weights):
    weights["predictions.dense.weight"] = weights["predictions.dense.weight"][:, :-1].contiguous()


LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0."
DAMAGES = {
    "another model": (lambda s: damage_config(s, model_type="bert"), "is 'bert', its class AlbertForMaskedLM"),
    "no config": (lambda s: (s / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda s: truncate(s / "config.json"), "config.json is damaged"),
    "no object": (lambda s: (s / "config.json").write_text("[]"), "config.json is damaged"),
    "impossible config": (lambda s: damage_config(s, num_attention_heads=5), r"`hidden_size` \(32\).*\(5\)"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "source has no weights"),
    "tensorflow": (
        lambda s: (s / "model.safetensors").rename(s / "tf_model.h5"),
        "source has no weights.*tf_model.h5 belongs to another framework",
    ),
    "truncated": (lambda s: truncate(s / "model.safetensors"), r"model\.safetensors is damaged"),
    "empty": (lambda s: (s / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged"),
    "truncated pickle": (lambda s: truncate(pickle_weights(s) / "pytorch_model.bin"), "pytorch_model.bin is damaged"),
    "missing shard": (lose_a_shard, r"model-00002-of-\d+\.safetensors is missing"),
    "wrong shape": (lambda s: damage_weights(s, cut), r"predictions.dense.weight has the shape \(16, 31\).*\(16, 32\)"),
    "wrong positions": (lambda s: damage_config(s, max_position_embeddings=511), r"\(512, 16\).*\(511, 16\)"),
    "nan": (lambda s: damage_weights(s, set_nan), "predictions.dense.weight has 1 of 512 values that are NaN"),
    "missing tensor": (lambda s: damage_weights(s, lambda w: w.pop(LAYER + "ffn.bias")), "lacks .*ffn.bias"),
    "missing table": (
        lambda s: damage_weights(s, lambda w: w.pop("albert.embeddings.word_embeddings.weight")),
        "lacks .*word_embeddings",
    ),
    "missing head": (
        lambda s: damage_weights(s, lambda w: [w.pop(n) for n in list(w) if n.startswith("predictions")]),
        "lacks predictions.*--architecture",
    ),
    "half a head": (lambda s: damage_weights(s, lambda w: w.pop("predictions.dense.bias")), "lacks predictions.dense"),
    "foreign tensor": (lambda s: damage_weights(s, lambda w: w.update(lora=torch.ones(1))), "tensor lora.*no ALBERT"),
    "integers": (
        lambda s: damage_weights(s, lambda w: w.update({"predictions.bias": w["predictions.bias"].to(torch.int8)})),
        "predictions.bias has the type torch.int8",
    ),
    "unknown class": (
        lambda s: damage_config(s, architectures=["AlbertForTokenClassifcation"]),
        "did you mean 'AlbertForTokenClassification'",
    ),
    "lsg without globals": (lambda s: damage_config(s, base_model_prefix="lsg"), "lacks albert.embeddings.global"),
    "broken tokenizer": (lambda s: (s / "spiece.model").write_bytes(b"no"), "tokenizer of .* cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_source_that_is_not_right_is_named_and_nothing_is_left(source, target, tmp_path, damage):
    make, message = DAMAGES[damage]
    make(source)
    before = fingerprint(source)
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(source, target, verify=False)
    assert "\n" not in str(caught.value)
    assert fingerprint(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 255}, r"`max_length` \(255\) must be at least 256"),
        ({"max_length": 0}, "`max_position_embeddings` must be at least 1"),
        ({"global_positional_stride": 7}, "`stride` 7 does not work with 512 positions"),
        ({"architecture": "BertModel"}, "did you mean"),
        ({"sparsity_type": "nrom"}, "did you mean 'norm'"),
        ({"block_size": 100, "sparsity_factor": 3}, "divisible"),
        ({"num_global_tokens": 513}, "from 1 to 512"),
        ({"mask_token_id": 10**6}, "`mask_token_id` must be an id of the vocabulary"),
        ({"revision": "main"}, "`revision` is for sources on the Hub"),
    ],
)
def test_an_option_that_is_not_right_is_named(masked_lm, target, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(masked_lm, target, verify=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_argument_is_a_type_error(masked_lm, target):
    with pytest.raises(TypeError, match="no argument 'blocksize'"):
        convert_checkpoint(masked_lm, target, blocksize=3)


def test_options_without_effect_are_reported(masked_lm, target):
    report = convert_checkpoint(
        masked_lm, target, **SHORT, keep_first_global_token=True, resize_lsg=True, verify=False
    )
    assert [warning.split("`")[1] for warning in report.warnings] == ["--keep-first-global-token", "--resize-lsg"]


def test_a_source_without_tokenizer_takes_given_ids_or_alberts(source, target, tmp_path):
    (source / "spiece.model").unlink()
    report = convert_checkpoint(source, target, **SHORT)
    assert (report.bos_token_id, report.mask_token_id) == (2, 4) and not report.has_tokenizer
    assert any("has no tokenizer" in warning for warning in report.warnings)
    assert not (target / "tokenizer_config.json").exists()
    words = load_file(source / "model.safetensors")["albert.embeddings.word_embeddings.weight"]
    given = convert_checkpoint(source, tmp_path / "given", **SHORT, bos_token_id=7, mask_token_id=8)
    assert (given.bos_token_id, given.mask_token_id) == (7, 8)
    tables = [load_file(tmp_path / n / "model.safetensors")["albert." + MADE[0]] for n in ("target", "given")]
    torch.testing.assert_close((tables[1] - tables[0])[0], words[7] - words[2])
    torch.testing.assert_close((tables[1] - tables[0])[5], words[8] - words[4])


def test_tokenizer_files_are_copied_as_they_are(source, target):
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(source)
    edit_json(source / "tokenizer_config.json", model_max_length=512)
    convert_checkpoint(source, target, **SHORT, verify=False)
    before, after = fingerprint(source), fingerprint(target)
    files = before.keys() & {"spiece.model", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"}
    assert len(files) >= 2 and all(before[name] == after[name] for name in files)
    settings = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (source, target)]
    assert settings[1] == settings[0] | {"model_max_length": 64}


def test_the_target_is_whole_in_itself(masked_lm, tmp_path):
    """It loads offline in a new process by every Auto class, and by the tokenizer's."""
    convert_checkpoint(masked_lm, tmp_path / "target", **SHORT, verify=False)
    code = """
import sys, transformers
assert "lsg_albert" not in sys.modules
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The river flows into the [MASK]. " * 20, return_tensors="pt", truncation=True)
assert inputs["input_ids"].shape == (1, 64), inputs["input_ids"].shape
for name in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"):
    model = getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model).__name__.startswith("LSGAlbert"), type(model)
    assert model(**inputs)[0].isfinite().all()
"""
    done = run_in_new_process(code, tmp_path / "target", cwd=tmp_path, modules_cache=tmp_path / "modules")
    assert done.returncode == 0, done.stderr


def test_plain_transformers_reads_the_target_too(masked_lm, target):
    convert_checkpoint(masked_lm, target, **SHORT, verify=False)
    ids = torch.randint(5, VOCAB_SIZE, (1, 20))
    outputs = [AlbertForMaskedLM.from_pretrained(folder).eval()(ids).logits for folder in (masked_lm, target)]
    torch.testing.assert_close(*outputs)


def test_config_is_read_by_transformers_with_all_parameters(masked_lm, target):
    convert_checkpoint(masked_lm, target, **SHORT, lsh_seed=None, sparsity_type=None, verify=False)
    values = json.loads((target / "config.json").read_text())
    assert {*LSG_FIELDS} <= values.keys()
    config = lsg_albert.LSGAlbertConfig.from_pretrained(target)
    assert config.lsh_seed is None and config.sparsity_type is None and config.max_position_embeddings == 64
    assert type(AutoConfig.from_pretrained(target)).__name__ == "AlbertConfig"


def test_pre_training_models_keep_both_heads(tmp_path, target):
    source = save(make_albert("AlbertForPreTraining"), tmp_path / "source")
    report = convert_checkpoint(source, target, **SHORT)
    assert report.comparison.source_top5 is not None
    model = AlbertForPreTraining.from_pretrained(source)
    loaded = load(target, "LSGAlbertForPreTraining")
    assert torch.equal(loaded.sop_classifier.classifier.weight, model.sop_classifier.classifier.weight)
