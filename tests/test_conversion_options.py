"""The options: one list for the function and the command line, which agrees with the configuration."""

import argparse
import inspect
from dataclasses import fields

import pytest

from lsg_albert import LSGAlbertConfig
from lsg_albert.configuration_lsg_albert import LSG_FIELDS
from lsg_albert.conversion import ConversionOptions, convert_checkpoint
from lsg_albert.conversion.options import UNSET, add_options


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser


def test_the_pattern_is_that_of_the_configuration():
    """Names, types, and the defaults that are shown."""
    parameters = inspect.signature(LSGAlbertConfig.__init__).parameters
    options = {option.name: option for option in fields(ConversionOptions) if option.default is UNSET}
    assert tuple(options) == LSG_FIELDS
    for name, option in options.items():
        assert option.type == parameters[name].annotation, name
        assert option.metadata["argument"]["help"].endswith(f"(default: {parameters[name].default})"), name


def test_the_command_line_without_options_gives_the_defaults(parser):
    assert ConversionOptions(**vars(parser.parse_args([]))) == ConversionOptions()
    assert ConversionOptions().pattern == {}


def test_the_command_line_can_say_what_the_function_can(parser):
    chosen = {
        "max_length": 64, "architecture": "AlbertModel", "random_global_init": True, "global_positional_stride": 8,
        "keep_first_global_token": True, "resize_lsg": True, "use_token_type": False, "seed": 3, "dtype": "float16",
        "bos_token_id": 5, "mask_token_id": 6, "block_size": 16, "sparse_block_size": None, "sparsity_factor": 4,
        "sparsity_type": None, "num_global_tokens": 2, "mask_first_token": True, "pool_with_global": False,
        "adaptive": False, "pack_padding": False, "lsh_num_pre_rounds": 2, "lsh_seed": None,
        "pass_global_tokens_to_decoder": False, "revision": "v1", "token": "hf_a", "overwrite": True, "verify": False,
        "max_shard_size": "1GB", "push_to_hub": "me/it", "private": True,
    }  # fmt: skip
    assert chosen.keys() == {option.name for option in fields(ConversionOptions)}
    line = "--max-length 64 --architecture AlbertModel --random-global-init --global-positional-stride 8 "
    line += "--keep-first-global-token --resize-lsg --no-token-type --seed 3 --dtype float16 --bos-token-id 5 "
    line += "--mask-token-id 6 --block-size 16 --sparse-block-size none --sparsity-factor 4 --sparsity-type None "
    line += "--num-global-tokens 2 --mask-first-token --no-pool-with-global --no-adaptive --no-pack-padding "
    line += "--lsh-num-pre-rounds 2 --lsh-seed NONE --no-pass-global-tokens-to-decoder --revision v1 --token hf_a "
    line += "--overwrite --no-verify --max-shard-size 1GB --push-to-hub me/it --private"
    options = ConversionOptions(**vars(parser.parse_args(line.split())))
    assert options == ConversionOptions(**chosen)
    assert options.pattern == {name: chosen[name] for name in LSG_FIELDS}


def test_help_of_the_function_names_every_option():
    parameters = inspect.signature(convert_checkpoint).parameters
    assert list(parameters) == ["source", "target", *(option.name for option in fields(ConversionOptions))]
    assert parameters["max_length"].default == 4096
    assert all(f"\n        {option.name}: " in ConversionOptions.__doc__ for option in fields(ConversionOptions))


def test_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        ConversionOptions().seed = 1
