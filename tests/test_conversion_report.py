"""What is told of a conversion: the report and the model card."""

import json

import pytest
from huggingface_hub import ModelCard

from lsg_albert.conversion import convert_checkpoint

SHORT = {"max_length": 64, "block_size": 16}


def test_the_card_says_what_is_known(source, target):
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: de\nmetrics: [x]\n---\n# Ein ALBERT\n")
    report = convert_checkpoint(source, target, **SHORT, sparsity_type="pooling")
    card = (target / "README.md").read_text()
    head = ModelCard(card).data.to_dict()
    assert head["license"] == "cc-by-4.0" and head["language"] == "de" and head["pipeline_tag"] == "fill-mask"
    assert "metrics" not in head and "base_model" not in head
    assert str(source.parent) not in card, "paths of this machine are nobody's business"
    for fact in ("`source`", "`AlbertForMaskedLM`", f"{report.parameters_after:,}", "`'pooling'`", "64 tokens"):
        assert fact in card
    assert f"{report.comparison.lossless_difference:.1e}" in card


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n# Broken\n", "---\n- a list\n---\n", "no metadata", ""])
def test_a_card_that_cannot_be_read_is_left_alone(source, target, text):
    (source / "README.md").write_text(text)
    convert_checkpoint(source, target, **SHORT, verify=False)
    head = ModelCard.load(target / "README.md").data.to_dict()
    assert head.keys() == {"library_name", "pipeline_tag", "tags"}


def test_the_card_names_what_was_left_out_and_drawn(source, target):
    (source / "spiece.model").unlink()
    report = convert_checkpoint(source, target, **SHORT, architecture="AlbertForTokenClassification", verify=False)
    card = (target / "README.md").read_text()
    assert report.drawn and report.dropped
    assert all(f"`{name}`" in card for name in [*report.drawn, *report.dropped])
    assert "AutoTokenizer" not in card and "The source had no tokenizer" in card
    assert "model = AutoModelForTokenClassification.from_pretrained(repo" in card
    assert "was not verified" in card and "Compared with" not in card


def test_the_report_is_json_with_every_fact(masked_lm, target, tmp_path):
    report = convert_checkpoint(masked_lm, target, **SHORT, seed=3)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved.keys() == vars(report).keys() and saved["comparison"].keys() == vars(report.comparison).keys()
    assert saved["seed"] == 3 and saved["source_max_length"] == 512 and saved["max_length"] == 64
    assert saved["target"] == str(target) and saved["source"] == str(masked_lm)
    for fact in (f"{report.parameters_after:,}", "512 -> 64", "AlbertForMaskedLM -> LSGAlbertForMaskedLM, float32"):
        assert fact in report.text()
