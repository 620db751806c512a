"""What is decided before a conversion: fields of a config.json that are not right, tokens, and warnings."""

import json

import pytest
import transformers

from albert_sources import edit_json, make_albert, save
from lsg_albert import LSGAlbertConfig
from lsg_albert.conversion import ConversionError, ConversionOptions, convert_checkpoint
from lsg_albert.conversion.plan import choose_tokens, find_warnings, make_plan, read_source, source_sizes

SHORT = {"max_length": 64, "block_size": 16}
# Fields that some release of transformers reads for itself, or that say how a model is loaded and run.
OTHERS = (
    "architectures", "attn_implementation", "_attn_implementation", "dtype", "torch_dtype", "lsg_num_pre_rounds",
    "num_labels", "per_layer_config", "problem_type", "quantization_config", "rope_parameters",
    "task_specific_params", "transformers_weights", "use_return_dict", "pruned_heads", "tokenizer_class", "auto_map",
)  # fmt: skip
FIELDS = sorted({*transformers.AlbertConfig().to_dict(), *LSGAlbertConfig().to_dict(), *OTHERS} - {"model_type"})
ODD = (None, "odd", "", [], ["x"], {"a": 1}, 1.5, -1, True)


@pytest.fixture
def small(tmp_path):
    """A source without tokenizer."""
    return save(make_albert(vocab_size=100), tmp_path / "small", tokenizer=False)


def set_field(folder, values, field, value):
    (folder / "config.json").write_text(json.dumps({**values, field: value}))


@pytest.mark.parametrize("field", FIELDS)
def test_an_odd_value_of_any_field_is_taken_or_named(small, field):
    values = json.loads((small / "config.json").read_text())
    for value in ODD:
        set_field(small, values, field, value)
        try:
            source_sizes(read_source(small))
        except ConversionError as error:
            name = "lsh_num_pre_rounds" if field == "lsg_num_pre_rounds" else field
            assert f"`{name}`" in str(error) and "\n" not in str(error), (value, str(error))
            assert str(value) in str(error) or field == "quantization_config", (value, str(error))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("num_hidden_layers", "12"),
        ("hidden_act", ["gelu"]),
        ("id2label", "odd"),
        ("id2label", {"a": 1}),
        ("num_labels", "odd"),
        ("chunk_size_feed_forward", "odd"),
        ("chunk_size_feed_forward", None),
        ("chunk_size_feed_forward", -1),
        ("chunk_size_feed_forward", True),
        ("output_hidden_states", ["x"]),
        ("output_attentions", "yes"),
        ("architectures", "AlbertForMaskedLM"),
        ("architectures", [None]),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_field(small, target, tmp_path, field, value):
    values = json.loads((small / "config.json").read_text())
    set_field(small, values, field, value)
    with pytest.raises(ValueError, match=f"`{field}`"):
        convert_checkpoint(small, target, **SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_value_that_plays_no_part_does_no_harm(small, tmp_path):
    """transformers 5 refuses some of these in a config.json; a checkpoint of 4 may have them."""
    expected = convert_checkpoint(small, tmp_path / "expected", **SHORT)
    edit_json(
        small / "config.json", initializer_range=0, dtype="odd", transformers_weights=["x"], _attn_implementation=5
    )
    values = json.loads((small / "config.json").read_text())
    set_field(small, values, "classifier_dropout_prob", None)
    report = convert_checkpoint(small, tmp_path / "target", **SHORT)
    assert report.comparison.lossless_difference == expected.comparison.lossless_difference
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert (
        written["torch_dtype"] == "float32" and not {"transformers_weights", "_attn_implementation"} & written.keys()
    )


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
def test_an_odd_value_of_any_field_is_one_line_or_converts(small, target, field):
    values = json.loads((small / "config.json").read_text())
    for value in (None, "odd", ["x"]):
        set_field(small, values, field, value)
        try:
            convert_checkpoint(small, target, **SHORT, overwrite=True)
        except ConversionError as error:
            assert "\n" not in str(error) and field.removesuffix("s").removeprefix("lsg_") in str(error), str(error)


class _Tokenizer:
    def __init__(self, bos=None, cls=None, mask=None):
        self.bos_token_id, self.cls_token_id, self.mask_token_id = bos, cls, mask


@pytest.mark.parametrize(
    ("tokenizer", "options", "expected"),
    [
        (None, {}, (7, 4)),
        (None, {"bos_token_id": 0, "mask_token_id": 0}, (0, 0)),
        (_Tokenizer(10, 11, 12), {}, (10, 12)),
        (_Tokenizer(None, 11, 12), {"mask_token_id": 1}, (11, 1)),
        (_Tokenizer(0, 11, 0), {}, (0, 0)),
        (_Tokenizer(None, None, None), {"random_global_init": True}, (7, None)),
    ],
)
def test_tokens_are_those_given_or_the_tokenizers_or_the_models(small, tokenizer, options, expected):
    edit_json(small / "config.json", bos_token_id=7)
    plan = make_plan(read_source(small), ConversionOptions(**SHORT, **options))
    tokens = choose_tokens(plan, tokenizer)
    assert (tokens.bos, tokens.mask) == expected
    warned = any("has no tokenizer" in warning for warning in find_warnings(plan, tokens))
    assert warned == (tokenizer is None and "mask_token_id" not in options)


def test_a_tokenizer_without_mask_token_is_refused(small):
    plan = make_plan(read_source(small), ConversionOptions(**SHORT))
    with pytest.raises(ConversionError, match="no mask token: .*--mask-token-id.*--random-global-init"):
        choose_tokens(plan, _Tokenizer(1, 2, None))
