"""A family is a table: one that is invented converts like ALBERT."""

import dataclasses
import json

from safetensors.torch import load_file, save_file

from albert_sources import edit_json, same
from lsg_albert.conversion import convert_checkpoint
from lsg_albert.conversion import plan as plan_module
from lsg_albert.conversion.families import ALBERT, FAMILIES

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
