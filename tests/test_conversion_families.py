"""A family is a table: one that is invented converts like ALBERT, and published LSG models of others compute the same."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lsg_albert
from albert_sources import edit_json, same
from conftest import SHARED
from lsg_albert.__main__ import main
from lsg_albert.conversion import convert_checkpoint
from lsg_albert.conversion import plan as plan_module
from lsg_albert.conversion.families import ALBERT, FAMILIES

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SHORT = {"max_length": 64, "block_size": 16}


def test_a_family_is_known_by_its_model_type():
    assert all(family.model_type == model_type for model_type, family in FAMILIES.items())


def test_a_checkpoint_with_other_names_gives_the_same_target(masked_lm, source, tmp_path, monkeypatch):
    """Its tensors, classes and fields have names of their own; the table turns them into ALBERT's."""
    layer = "encoder.albert_layer_groups.0.albert_layers.0."
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        name = name.replace("albert." + layer, "other.block.").replace("albert.", "other.")
        weights[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("predictions.", "lm_head.")] = tensor
    save_file(weights, source / "model.safetensors")
    width = json.loads((source / "config.json").read_text())["hidden_size"]
    edit_json(
        source / "config.json", model_type="other", architectures=["OtherForMaskedLM"], hidden_size=None, dim=width
    )
    other = dataclasses.replace(
        ALBERT,
        model_type="other",
        title="Other",
        class_name="Other",
        prefix="other.",
        tensors={r"^block\.": layer, r"LayerNorm\.gamma$": "LayerNorm.weight", r"^lm_head\.": "predictions."},
        fields={"dim": "hidden_size"},
    )
    monkeypatch.setitem(plan_module.FAMILIES, "other", other)

    report = convert_checkpoint(source, tmp_path / "other", **SHORT)
    convert_checkpoint(masked_lm, tmp_path / "albert", **SHORT, verify=False)
    assert report.comparison.lossless_difference < 1e-4 and report.source_architecture == "OtherForMaskedLM"
    targets = [tmp_path / name for name in ("other", "albert")]
    assert same(*(load_file(target / "model.safetensors") for target in targets))
    assert len({(target / "config.json").read_text() for target in targets}) == 1


GOLDEN = sorted(path.name for path in (SHARED / "golden" / "families").glob("lsg_*"))


@pytest.mark.parametrize("name", GOLDEN or ["none"])
def test_published_lsg_checkpoints_compute_what_they_did(shared, target, capsys, name):
    """`expected.safetensors` holds what the published code computes from these weights in float64."""
    source = shared / "golden" / "families" / name
    if not source.is_dir():
        pytest.skip("../shared has no golden/families")
    assert main(["convert", str(source), str(target), "--resize-lsg", "--max-length", "96"]) == 0
    assert "\nglobal tokens     the source's\n" in capsys.readouterr().out
    architecture = json.loads((target / "config.json").read_text())["architectures"][0]
    model = getattr(lsg_albert, architecture).from_pretrained(target).double().eval()
    expected = load_file(source / "expected.safetensors")
    for case in json.loads((source / "case.json").read_text())["inputs"]:
        values = {key.removeprefix(f"{case}."): tensor for key, tensor in expected.items() if key.startswith(case)}
        inputs = {key: values.pop(key) for key in INPUTS if key in values}
        outputs = model(**inputs)
        for key, value in values.items():
            output = outputs[key.replace("seq_relationship", "sop")]
            torch.testing.assert_close(output, value, rtol=0, atol=1e-9)
