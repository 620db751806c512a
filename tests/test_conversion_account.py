"""Which tensor of a source goes where in the target: names, and what is refused."""

import pytest

from lsg_albert.conversion import ConversionError
from lsg_albert.conversion.account import lsg_architecture, match_tensors, parameter_shapes, target_name
from lsg_albert.conversion.families import ALBERT, Family

OTHER = Family(
    model_type="other",
    title="Other",
    class_name="Other",
    prefix="other.",
    cls_id=0,
    mask_id=1,
    vocabularies={},
    tensors={r"\bgamma$": "weight", r"^layer\.(\d+)\.": r"encoder.albert_layer_groups.\1.albert_layers.0."},
)


@pytest.mark.parametrize(
    ("name", "family", "prefix", "expected"),
    [
        ("albert.pooler.weight", ALBERT, "albert.", "albert.pooler.weight"),
        ("albert.pooler.weight", ALBERT, "", "pooler.weight"),
        ("pooler.weight", ALBERT, "albert.", "albert.pooler.weight"),
        ("predictions.bias", ALBERT, "albert.", "predictions.bias"),
        ("other.embeddings.LayerNorm.gamma", OTHER, "albert.", "albert.embeddings.LayerNorm.weight"),
        ("layer.3.ffn.bias", OTHER, "", "encoder.albert_layer_groups.3.albert_layers.0.ffn.bias"),
        ("classifier.gamma", OTHER, "albert.", "classifier.weight"),
    ],
)
def test_names_in_the_target(name, family, prefix, expected):
    assert target_name(name, family, prefix) == expected


@pytest.mark.parametrize(
    "name", ["OtherForMaskedLM", "LSGOtherForMaskedLM", "AlbertForMaskedLM", "LSGAlbertForMaskedLM"]
)
def test_a_class_has_the_names_of_the_family_and_of_albert(name):
    assert lsg_architecture(name, OTHER) == "LSGAlbertForMaskedLM"


@pytest.mark.parametrize(
    "name", ["ForMaskedLM", "BertForMaskedLM", "OtherForMaskedML", "LSGAlbertForConditionalGeneration", 5]
)
def test_other_classes_are_refused_with_those_of_the_family(name):
    with pytest.raises(
        ConversionError, match=rf"architecture {name!r}: did you mean 'Other.*Choose from OtherModel, OtherFor"
    ):
        lsg_architecture(name, OTHER)


@pytest.fixture
def shapes(tiny_config):
    """Of the tensors of an ALBERT for masked language modeling, as transformers saves it."""
    shapes = parameter_shapes("LSGAlbertForMaskedLM", tiny_config())
    return {name: shape for name, shape in shapes.items() if "global" not in name and "decoder.weight" not in name}


def test_every_tensor_is_accounted_for(shapes, tiny_config):
    source = shapes | {"albert.embeddings.position_ids": (1, 176), "sop_classifier.classifier.bias": (2,)}
    account = match_tensors(source, ALBERT, "LSGAlbertForMaskedLM", tiny_config(), strict=True)
    assert account.copied == {name: name for name in source if name != "albert.embeddings.position_ids"}
    assert account.dropped.keys() == {"albert.embeddings.position_ids"} and account.missing == []

    bare = match_tensors(source, ALBERT, "LSGAlbertModel", tiny_config(), strict=False)
    assert {*bare.copied.values(), *bare.dropped} == source.keys()
    assert bare.copied["encoder.embedding_hidden_mapping_in.bias"] == "albert.encoder.embedding_hidden_mapping_in.bias"
    assert set(bare.missing) == {"pooler.weight", "pooler.bias"}


def test_a_tensor_under_its_second_name_goes_under_its_first(shapes, tiny_config):
    words = "albert.embeddings.word_embeddings.weight"
    source = {("predictions.decoder.weight" if name == words else name): shape for name, shape in shapes.items()}
    account = match_tensors(source, ALBERT, "LSGAlbertForMaskedLM", tiny_config(), strict=True)
    assert account.copied[words] == "predictions.decoder.weight" and account.missing == []
    with pytest.raises(ConversionError, match="lacks albert.embeddings.word_embeddings.weight"):
        match_tensors(source, ALBERT, "LSGAlbertForMaskedLM", tiny_config(tie_word_embeddings=False), strict=True)


@pytest.mark.parametrize("strict", [True, False])
def test_two_tensors_of_one_name_are_refused(shapes, tiny_config, strict):
    source = shapes | {"embeddings.word_embeddings.weight": (120, 16)}
    with pytest.raises(
        ConversionError, match="two tensors for albert.embeddings.word_embeddings.weight: albert.* and emb"
    ):
        match_tensors(source, ALBERT, "LSGAlbertForMaskedLM", tiny_config(), strict)


def test_a_part_of_the_pooler_that_no_albert_has_is_named(shapes, tiny_config):
    source = shapes | {"albert.pooler.dense.weight": (32, 32)}
    with pytest.raises(ConversionError, match="tensor albert.pooler.dense.weight, which no ALBERT has"):
        match_tensors(source, ALBERT, "LSGAlbertForMaskedLM", tiny_config(), strict=True)
    account = match_tensors(source, ALBERT, "LSGAlbertForMaskedLM", tiny_config(), strict=False)
    assert account.dropped == {"albert.pooler.dense.weight": "LSGAlbertForMaskedLM has no such parameter"}
