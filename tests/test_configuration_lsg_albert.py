"""The configuration: its checks, published files, overrides, and what it logs."""

import copy
import json
import logging
import math

import pytest
from transformers import AlbertConfig

from helpers import ROOT, logged_warnings
from lsg_albert import LSGAlbertConfig, LSGAlbertForConditionalGeneration, LSGAlbertForMaskedLM, LSGAlbertModel
from lsg_albert.configuration_lsg_albert import ATTN_IMPLEMENTATIONS, AUTO_MAP
from lsg_albert.lsg_pattern import SPARSITY_TYPES

INTEGERS = [
    "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "num_hidden_groups", "num_attention_heads",
    "intermediate_size", "inner_group_num", "max_position_embeddings", "type_vocab_size", "block_size",
    "num_global_tokens",
]  # fmt: skip
BAD_VALUES = [
    *[(field, value) for field in INTEGERS for value in (0, -8, 8.0, "8", True, None)],
    ("hidden_size", 30),  # not a multiple of the 4 heads
    ("num_attention_heads", 5),
    ("hidden_act", "gelu_nwe"), ("hidden_act", None), ("hidden_act", 3),
    *[
        (field, value)
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
        for value in (-0.1, 1.5, math.nan, "0.1", True)
    ],
    ("hidden_dropout_prob", None), ("attention_probs_dropout_prob", None),
    ("initializer_range", -0.02), ("initializer_range", math.nan), ("initializer_range", None),
    ("layer_norm_eps", 0), ("layer_norm_eps", -1e-12), ("layer_norm_eps", math.inf), ("layer_norm_eps", "1e-12"),
    ("position_embedding_type", "absolut"), ("position_embedding_type", None),
    ("pad_token_id", -1), ("pad_token_id", 120), ("pad_token_id", "0"), ("pad_token_id", 1.0),
    ("bos_token_id", -1), ("bos_token_id", "[CLS]"), ("eos_token_id", -1), ("eos_token_id", 3.0),
    ("decoder_start_token_id", -1), ("decoder_start_token_id", "[CLS]"), ("use_cache", None), ("use_cache", 1),
    ("tie_word_embeddings", "yes"), ("tie_word_embeddings", None),
    ("block_size", 7),  # not divisible by the sparsity factor of 2
    ("sparse_block_size", -8), ("sparse_block_size", 8.0), ("sparse_block_size", "8"), ("sparse_block_size", True),
    ("sparse_block_size", 3),  # "norm" cuts blocks of 8 into chunks of this size
    ("sparsity_factor", 3), ("sparsity_factor", 16), ("sparsity_factor", 2.0), ("sparsity_factor", None),
    ("sparsity_type", "nrom"), ("sparsity_type", ""), ("sparsity_type", 1), ("sparsity_type", False),
    ("sparsity_type", ["norm"]),
    ("num_global_tokens", 513),
    *[
        (field, value)
        for field in ("mask_first_token", "pool_with_global", "adaptive", "pack_padding", "pass_global_tokens_to_decoder")
        for value in (None, 1, "true")
    ],
    *[(field, value) for field in ("lsh_num_pre_rounds", "lsg_num_pre_rounds") for value in (-1, 1.5, "1", None)],
    ("lsh_seed", -1), ("lsh_seed", 2**63), ("lsh_seed", 0.5), ("lsh_seed", "0"), ("lsh_seed", True),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_impossible_value_is_refused_by_name(tiny_config, field, value):
    with pytest.raises(ValueError) as error:
        tiny_config(**{field: value})
    message = str(error.value)
    assert f"`{field.replace('lsg_', 'lsh_')}`" in message
    assert str(value) in message


def test_every_field_has_a_bad_value():
    ours = {"base_model_prefix", "auto_map"}  # marks of the checkpoint, not parameters
    others = LSGAlbertConfig.__init__.__code__
    fields = set(others.co_varnames[1 : others.co_argcount])
    assert fields - ours == {field for field, _ in BAD_VALUES} - {"lsg_num_pre_rounds"}


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("nrom", "norm"), ("Norm", "norm"), ("pool", "pooling"), ("LSH", "lsh"), ("strided", "stride"),
        ("block-stride", "block_stride"), ("bos", "bos_pooling"), ("None", "none"),
    ],
)  # fmt: skip
def test_unknown_sparsity_type_gets_the_nearest_name(tiny_config, typo, nearest):
    with pytest.raises(ValueError, match=f"`sparsity_type` '{typo}' is unknown: did you mean '{nearest}'?"):
        tiny_config(sparsity_type=typo)


@pytest.mark.parametrize(
    "fields",
    [
        *[{field: 1} for field in INTEGERS if field not in ("vocab_size", "block_size", "hidden_size")],
        {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None},
        {"block_size": 1, "sparsity_factor": 1}, {"sparsity_factor": 8}, {"sparsity_factor": 1},
        {"hidden_size": 4}, {"num_attention_heads": 32},
        {"num_global_tokens": 512}, {"max_position_embeddings": 3}, {"num_hidden_groups": 7},
        {"sparse_block_size": 4}, {"sparse_block_size": 13}, {"sparse_block_size": 800},
        {"sparse_block_size": 3, "sparsity_type": "pooling"}, {"sparse_block_size": 3, "sparsity_factor": 1},
        {"hidden_dropout_prob": 1}, {"attention_probs_dropout_prob": 0}, {"classifier_dropout_prob": None},
        {"initializer_range": 0}, {"layer_norm_eps": 1}, {"hidden_act": "relu"},
        {"pad_token_id": None}, {"pad_token_id": 119}, {"bos_token_id": None}, {"eos_token_id": None},
        {"tie_word_embeddings": False},
        {"lsh_num_pre_rounds": 0}, {"lsh_seed": None}, {"lsh_seed": 2**63 - 1},
        # Without a sparse part its sizes need not fit together.
        *[{**off, "block_size": 7} for off in (
            {"sparse_block_size": 0}, {"sparse_block_size": None}, {"sparsity_factor": 0}, {"sparsity_factor": -1},
            {"sparsity_type": None}, {"sparsity_type": "none"},
        )],
    ],
    ids=str,
)  # fmt: skip
def test_legal_corner_values_are_accepted_and_kept(tiny_config, tmp_path, fields):
    with logged_warnings() as messages:
        config = tiny_config(**fields)
    assert not messages
    for field, value in fields.items():
        assert getattr(config, field) == value
    again = LSGAlbertConfig.from_dict(json.loads(config.to_json_string()))
    if fields == {"classifier_dropout_prob": None}:
        fields = {"classifier_dropout_prob": config.hidden_dropout_prob}  # what it means
    assert {field: getattr(again, field) for field in fields} == fields
    # Without remote code it is a plain ALBERT's, whose types transformers 5 checks.
    config.save_pretrained(tmp_path)
    AlbertConfig.from_pretrained(tmp_path)


def test_values_set_later_are_saved_in_types_that_plain_albert_reads(tiny_config, tmp_path):
    config = tiny_config(hidden_dropout_prob=0.3)
    config.classifier_dropout_prob, config.initializer_range, config.layer_norm_eps = None, 1, 2
    config.save_pretrained(tmp_path)
    assert (config.classifier_dropout_prob, config.initializer_range) == (None, 1)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["classifier_dropout_prob"], saved["initializer_range"], saved["layer_norm_eps"]) == (0.3, 1.0, 2.0)
    assert all(isinstance(saved[field], float) for field in ("initializer_range", "layer_norm_eps"))
    AlbertConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("typo", ["singel_label_classification", "multi_label", ["regression"], 1])
def test_kind_of_loss_that_does_not_exist_is_refused(tiny_config, typo):
    with pytest.raises(ValueError, match="`problem_type`"):
        tiny_config(problem_type=typo)


@pytest.mark.parametrize("given", [AlbertConfig(hidden_size=64, num_attention_heads=4), {"hidden_size": 64}, None])
def test_another_models_configuration_is_refused_with_the_right_call(given):
    for model_class in (LSGAlbertModel, LSGAlbertForMaskedLM, LSGAlbertForConditionalGeneration):
        with pytest.raises(ValueError, match=f"`LSGAlbertConfig`, got {type(given).__name__}.*trust_remote_code"):
            model_class(given)


@pytest.mark.parametrize("sparsity_type", [*SPARSITY_TYPES, None])
def test_only_none_and_its_name_switch_the_sparse_part_off(tiny_config, sparsity_type):
    config = tiny_config(sparsity_type=sparsity_type)
    assert config.sparsity_type == sparsity_type
    assert config.is_sparse == (sparsity_type not in (None, "none"))


def test_defaults_are_albert_base_with_4096_positions_and_nothing_is_logged():
    with logged_warnings() as messages:
        config = LSGAlbertConfig()
    assert not messages
    expected = {
        "model_type": "albert", "vocab_size": 30000, "embedding_size": 128, "hidden_size": 768,
        "num_hidden_layers": 12, "num_hidden_groups": 1, "num_attention_heads": 12, "intermediate_size": 3072,
        "inner_group_num": 1, "hidden_act": "gelu_new", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
        "max_position_embeddings": 4096, "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
        "classifier_dropout_prob": 0.1, "position_embedding_type": "absolute", "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3, "tie_word_embeddings": True, "block_size": 128, "sparse_block_size": 128,
        "sparsity_factor": 2, "sparsity_type": "norm", "num_global_tokens": 1, "mask_first_token": False,
        "pool_with_global": True, "adaptive": True, "lsh_num_pre_rounds": 1, "lsh_seed": 0,
        "pass_global_tokens_to_decoder": True, "base_model_prefix": "lsg", "auto_map": AUTO_MAP,
    }  # fmt: skip
    assert {field: getattr(config, field) for field in expected} == expected


# The file of a published checkpoint, with the keys that its ALBERT brought along.
PUBLISHED = {
    "_name_or_path": "ccdv/lsg-albert-base-v2-4096",
    "adaptive": True,
    "architectures": ["LSGAlbertForMaskedLM"],
    "attention_probs_dropout_prob": 0,
    "auto_map": {
        "AutoConfig": "modeling_lsg_albert.LSGAlbertConfig",
        "AutoModel": "modeling_lsg_albert.LSGAlbertModel",
        "AutoModelForMaskedLM": "modeling_lsg_albert.LSGAlbertForMaskedLM",
        "AutoModelForMultipleChoice": "modeling_lsg_albert.LSGAlbertForMultipleChoice",
        "AutoModelForPreTraining": "modeling_lsg_albert.LSGAlbertForPreTraining",
        "AutoModelForQuestionAnswering": "modeling_lsg_albert.LSGAlbertForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_lsg_albert.LSGAlbertForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_lsg_albert.LSGAlbertForTokenClassification",
    },
    "base_model_prefix": "lsg",
    "block_size": 128,
    "bos_token_id": 2,
    "classifier_dropout_prob": 0.1,
    "down_scale_factor": 1,
    "embedding_size": 128,
    "eos_token_id": 3,
    "gap_size": 0,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "inner_group_num": 1,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "lsh_num_pre_rounds": 1,
    "mask_first_token": False,
    "max_position_embeddings": 4096,
    "model_type": "albert",
    "net_structure_type": 0,
    "num_attention_heads": 12,
    "num_global_tokens": 1,
    "num_hidden_groups": 1,
    "num_hidden_layers": 12,
    "num_memory_blocks": 0,
    "pad_token_id": 0,
    "pool_with_global": True,
    "position_embedding_type": "absolute",
    "sparse_block_size": 128,
    "sparsity_factor": 2,
    "sparsity_type": "norm",
    "torch_dtype": "float32",
    "transformers_version": "4.20.1",
    "type_vocab_size": 2,
    "vocab_size": 30000,
}
NOT_KEPT = {"_name_or_path", "torch_dtype", "transformers_version"}  # transformers writes its own


@pytest.fixture
def published(tmp_path):
    """A factory of folders with a published `config.json`; keywords replace fields."""

    def write(**fields):
        (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **fields}))
        return tmp_path

    return write


@pytest.mark.parametrize("spelling", ["lsh_num_pre_rounds", "lsg_num_pre_rounds"])
def test_published_file_loads_unchanged_and_round_trips(published, tmp_path, spelling):
    folder = published()
    file = json.loads((folder / "config.json").read_text())
    file[spelling] = file.pop("lsh_num_pre_rounds")
    (folder / "config.json").write_text(json.dumps(file))
    kept = {key: value for key, value in PUBLISHED.items() if key not in NOT_KEPT}
    kept["auto_map"] = {**AUTO_MAP, **PUBLISHED["auto_map"]}  # no file was published with a decoder
    with logged_warnings() as messages:
        config = LSGAlbertConfig.from_pretrained(folder)
        for loaded in (config, copy.deepcopy(config), LSGAlbertConfig.from_dict(config.to_dict())):
            assert {key: loaded.to_dict()[key] for key in kept} == kept
        config.save_pretrained(tmp_path / "saved")
        again = LSGAlbertConfig.from_pretrained(tmp_path / "saved").to_dict()
    assert not messages
    kept["auto_map"] = AUTO_MAP  # saving names the file of the class itself
    assert {key: again[key] for key in kept} == kept


def test_both_spellings_of_the_hashing_rounds_are_one_field(published, tiny_config):
    config = tiny_config(lsg_num_pre_rounds=3)
    assert config.lsh_num_pre_rounds == config.lsg_num_pre_rounds == 3
    config.lsg_num_pre_rounds = 4
    assert config.lsh_num_pre_rounds == config.to_dict()["lsh_num_pre_rounds"] == 4
    assert "lsg_num_pre_rounds" not in config.to_dict()
    # What is said at loading counts, in either spelling, over what the file says in either spelling.
    without = {key: value for key, value in PUBLISHED.items() if key != "lsh_num_pre_rounds"}
    for in_file in ("lsh_num_pre_rounds", "lsg_num_pre_rounds"):
        for given in ("lsh_num_pre_rounds", "lsg_num_pre_rounds"):
            assert LSGAlbertConfig.from_dict({**without, in_file: 2}).lsh_num_pre_rounds == 2
            assert LSGAlbertConfig.from_dict({**without, in_file: 2}, **{given: 5}).lsh_num_pre_rounds == 5


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_overrides_at_loading_pass_the_same_checks(tiny_config, field, value):
    source = tiny_config().to_dict()
    with pytest.raises(ValueError) as error:
        LSGAlbertConfig.from_dict(source, **{field: value})
    assert f"`{field.replace('lsg_', 'lsh_')}`" in str(error.value)


def test_overrides_are_checked_together_and_the_rest_is_returned(published):
    folder = published()
    config, unused = LSGAlbertConfig.from_pretrained(
        folder, block_size=96, sparsity_factor=3, sparse_block_size=48, num_labels=5, not_a_field=1,
        return_unused_kwargs=True,
    )  # fmt: skip
    assert (config.block_size, config.sparsity_factor, config.sparse_block_size, config.num_labels) == (96, 3, 48, 5)
    assert unused == {"not_a_field": 1}
    with pytest.raises(ValueError, match="`block_size` .100. must be divisible by `sparsity_factor` .3."):
        LSGAlbertConfig.from_pretrained(folder, block_size=100, sparsity_factor=3)
    assert json.loads((folder / "config.json").read_text()) == PUBLISHED


def test_source_dictionary_is_not_changed(tiny_config):
    source = tiny_config().to_dict()
    before = copy.deepcopy(source)
    LSGAlbertConfig.from_dict(source, block_size=16, mask_first_token=True, auto_map={"AutoModel": "x.Y"})
    source.pop("attn_implementation", None)  # a leaving of PretrainedConfig.from_dict before transformers 4.50
    assert source == before
    assert LSGAlbertConfig().auto_map == AUTO_MAP


def test_fields_set_later_are_checked_when_a_model_is_made(tiny_config):
    config = tiny_config()
    config.sparsity_factor = 3
    with pytest.raises(ValueError, match="`sparsity_factor` .3."):
        LSGAlbertModel(config)


def test_first_token_masked_without_pooling_is_corrected_with_a_warning(tiny_config, published):
    asked = {"mask_first_token": True, "pool_with_global": False}
    for make in (
        lambda: tiny_config(**asked),
        lambda: LSGAlbertConfig.from_pretrained(published(**asked)),
        lambda: LSGAlbertConfig.from_pretrained(published(), **asked),
        lambda: LSGAlbertConfig.from_pretrained(published(pool_with_global=False), mask_first_token=True),
    ):
        forget_warnings_given_once()
        with logged_warnings() as messages:
            config = make()
        assert config.mask_first_token and config.pool_with_global
        assert len(messages) == 1
        assert "`mask_first_token=True` needs `pool_with_global=True`" in messages[0]


@pytest.mark.parametrize("sparsity_type", ["stride", "block_stride"])
def test_stride_with_more_factors_than_heads_warns_once(tiny_config, sparsity_type):
    forget_warnings_given_once()
    with logged_warnings() as messages:
        tiny_config(sparsity_type=sparsity_type, sparsity_factor=4)
        assert not messages  # as many as heads
        for _ in range(3):
            LSGAlbertModel(tiny_config(sparsity_type=sparsity_type, sparsity_factor=8))
    assert len(messages) == 1
    for part in ("`sparsity_factor` (8)", "`num_attention_heads` (4)", sparsity_type):
        assert part in messages[0]


def test_relative_positions_warn_that_there_are_none(tiny_config):
    forget_warnings_given_once()
    with logged_warnings() as messages:
        tiny_config(position_embedding_type="relative_key")
    assert len(messages) == 1 and "no position embedding is added" in messages[0]


def forget_warnings_given_once():
    logging.Logger.warning_once.cache_clear()


def test_config_of_a_plain_albert_becomes_one_with_our_defaults():
    with logged_warnings() as messages:
        config = LSGAlbertConfig.from_dict(AlbertConfig(num_labels=3, hidden_dropout_prob=0.25).to_dict())
    assert not messages
    assert config.model_type == "albert"
    assert (config.hidden_size, config.num_attention_heads, config.max_position_embeddings) == (4096, 64, 512)
    assert (config.num_labels, config.hidden_dropout_prob) == (3, 0.25)
    assert (config.block_size, config.sparsity_type, config.num_global_tokens) == (128, "norm", 1)
    assert config.auto_map == AUTO_MAP


def test_tokenizer_is_alberts_where_nothing_else_is_said(tiny_config):
    for config in (tiny_config(), tiny_config(tokenizer_class=None), LSGAlbertConfig.from_dict({})):
        assert config.tokenizer_class == config.to_dict()["tokenizer_class"] == "AlbertTokenizer"
    assert tiny_config(tokenizer_class="BertTokenizer").tokenizer_class == "BertTokenizer"


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flax_attention", "sdpaa", 3])
def test_attention_that_lsg_has_not_is_refused(tiny_config, implementation):
    for make in (
        lambda: tiny_config(attn_implementation=implementation),
        lambda: LSGAlbertConfig.from_dict(tiny_config().to_dict(), attn_implementation=implementation),
    ):
        with pytest.raises(ValueError) as error:
            make()
        for part in (f'`attn_implementation="{implementation}"`', '"sdpa"', '"eager"'):
            assert part in str(error.value)


def test_attention_that_lsg_has_is_kept_and_not_written(tiny_config):
    for implementation in ATTN_IMPLEMENTATIONS:
        config = tiny_config(attn_implementation=implementation)
        assert config._attn_implementation == implementation
        assert implementation not in config.to_json_string()


# The cache of a decoder


def test_false_that_a_trainer_left_in_an_encoders_file_is_not_a_decoders(tiny_config, tmp_path):
    LSGAlbertForMaskedLM(tiny_config(use_cache=False)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is False
    decoder = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path)
    assert decoder.config.use_cache and decoder.generation_config.use_cache
    asked = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path, use_cache=False)
    assert not asked.config.use_cache and not asked.generation_config.use_cache


def test_a_decoders_own_false_is_kept(tiny_config, tmp_path):
    LSGAlbertForConditionalGeneration(tiny_config(use_cache=False)).save_pretrained(tmp_path)
    loaded = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.config.use_cache and not loaded.generation_config.use_cache


def test_the_roots_file_says_true():
    assert json.loads((ROOT / "config.json").read_text())["use_cache"] is True
