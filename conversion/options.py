"""The options of a conversion: one list for both the function and the command line.

This module imports nothing slow, because the command line must answer a wrong argument at once.
"""

import argparse
import enum
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..lsg_pattern import SPARSITY_TYPES, LSGPattern

DTYPES = ("float32", "float16", "bfloat16")

CONVERSION = "conversion"
PATTERN = "attention pattern (default: that of an LSG source, otherwise as shown)"
PLACES = "reading and writing"


class _Unset(enum.Enum):
    """Marks a parameter that is not given, because None is a value."""

    UNSET = enum.auto()


UNSET: Any = _Unset.UNSET


def _option(default: Any, text: str, group: str = CONVERSION, flag: str | None = None, **argument: Any) -> Any:
    """A field, with the arguments of `argparse.ArgumentParser.add_argument` for it."""
    if isinstance(default, bool):
        argument["action"] = f"store_{not default}".lower()
    elif default is not None:
        text += f" (default: {default})"
    return field(default=default, metadata={"group": group, "flag": flag, "argument": {**argument, "help": text}})


def _parameter(default: Any, kind: Callable[[str], Any], text: str) -> Any:
    """A field of `LSGAlbertConfig`. Help names its default; that class sets the default and checks the value."""
    argument = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": "VALUE"}
    argument |= {"help": f"{text} (default: {default})", "default": argparse.SUPPRESS}
    return field(default=UNSET, metadata={"group": PATTERN, "flag": None, "argument": argument})


def _or_none(kind: type) -> Callable[[str], Any]:
    """Reads values of a type, or the word "none" for None."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return read


@dataclass(frozen=True)
class ConversionOptions:
    """The options of `convert_checkpoint` and `lsg-albert convert`.

    Values are checked where they are used. Only `dtype` is checked here (ValueError).
    """

    max_length: int = _option(4096, "length of the longest text in tokens", type=int, metavar="N")
    architecture: str | None = _option(
        None,
        "class of TARGET: AlbertForX, LSGAlbertForX or the family's own class (default: the source's)",
        metavar="CLASS",
    )
    random_global_init: bool = _option(False, "make the global tokens from random words (default: from [MASK])")
    global_positional_stride: int = _option(
        64, "distance in positions between one global token and the next", type=int, metavar="N"
    )
    keep_first_global_token: bool = _option(False, "LSG sources: keep the first global token and remake the others")
    resize_lsg: bool = _option(False, "LSG sources: keep the global tokens and change only the length")
    use_token_type: bool = _option(True, "do not add token type 0 to the global tokens", flag="--no-token-type")
    seed: int = _option(0, "random seed", type=int, metavar="N")
    dtype: str | None = _option(None, "data type of the weights (default: the source's)", choices=DTYPES)
    bos_token_id: int | None = _option(
        None, "token that the first global token is made from (default: the tokenizer's [CLS])", type=int, metavar="ID"
    )
    mask_token_id: int | None = _option(
        None,
        "token that the other global tokens are made from (default: the tokenizer's [MASK])",
        type=int,
        metavar="ID",
    )

    block_size: int = _parameter(
        128, int, f"tokens in a block; a token attends to its own block and {LSGPattern.neighbours} on each side"
    )
    sparse_block_size: int | None = _parameter(
        128, _or_none(int), "sparse tokens on each side of the local window; 0 or none for no sparse part"
    )
    sparsity_factor: int = _parameter(
        2, int, "number of tokens that one sparse token stands for; must divide the block size; 0 for no sparse part"
    )
    sparsity_type: str | None = _parameter(
        "norm", _or_none(str), f"how sparse tokens are selected: {', '.join(SPARSITY_TYPES)} (no sparse part)"
    )
    num_global_tokens: int = _parameter(
        1, int, "number of global tokens, 1 to 512; they attend to all tokens, and all tokens attend to them"
    )
    mask_first_token: bool = _parameter(
        False,
        bool,
        "hide [CLS] from all tokens; the first global token replaces it; on for sentence-transformers unless given",
    )
    pool_with_global: bool = _parameter(True, bool, "return the first global token's output in place of [CLS]'s")
    adaptive: bool = _parameter(True, bool, "pad inputs to whole blocks, and remove this padding from the outputs")
    pack_padding: bool = _parameter(True, bool, "skip whole blocks of padding at the end of texts")
    lsh_num_pre_rounds: int = _parameter(1, int, "lsh: number of hashing rounds before the last one")
    lsh_seed: int | None = _parameter(
        0, _or_none(int), "lsh: seed of the random projections; none for new ones in each call"
    )
    pass_global_tokens_to_decoder: bool = _parameter(True, bool, "let a decoder also attend to the global tokens")

    revision: str | None = _option(
        None, "branch, tag or commit of a source on the Hub (default: main)", PLACES, metavar="NAME"
    )
    token: str | None = _option(None, "access token for the Hub (default: the one you are logged in with)", PLACES)
    overwrite: bool = _option(False, "replace TARGET if it exists", PLACES)
    verify: bool = _option(True, "skip the comparison of TARGET with SOURCE", PLACES, "--no-verify")
    max_shard_size: str = _option("5GB", "size of the largest weight file", PLACES, metavar="SIZE")
    push_to_hub: str | None = _option(
        None, "upload TARGET to this repository on the Hub", PLACES, metavar="REPOSITORY"
    )
    private: bool = _option(False, "make the repository on the Hub private", PLACES)

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")

    @property
    def pattern(self) -> dict[str, Any]:
        """The parameters of `LSGAlbertConfig` that the user gave."""
        names = [option.name for option in fields(self) if option.metadata["group"] == PATTERN]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not UNSET}


ConversionOptions.__doc__ = f"{ConversionOptions.__doc__}\n    Args:" + "".join(
    f"\n        {option.name}: {'if False, ' * (option.default is True)}{option.metadata['argument']['help']}."
    for option in fields(ConversionOptions)
)


def add_options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Add all options of a conversion to a command. Return the groups of its help by their titles."""
    groups = {title: parser.add_argument_group(title) for title in (CONVERSION, PATTERN, PLACES)}
    for option in fields(ConversionOptions):
        flag = option.metadata["flag"] or "--" + option.name.replace("_", "-")
        argument = {"dest": option.name, "default": option.default, **option.metadata["argument"]}
        groups[option.metadata["group"]].add_argument(flag, **argument)
    return groups
