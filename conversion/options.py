"""The options of a conversion: the one list from which the function and the command line take theirs.

Imports nothing slow: the command line must answer a wrong argument at once.
"""

import argparse
import enum
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..lsg_pattern import LSGPattern

DTYPES = ("float32", "float16", "bfloat16")

CONVERSION = "conversion"
PATTERN = "attention pattern, by default that of an LSG source, else as given"
PLACES = "reading and writing"


class _Unset(enum.Enum):
    """Stands for a parameter that is not given, where None is a value."""

    UNSET = enum.auto()


UNSET: Any = _Unset.UNSET


def _option(default: Any, text: str, group: str = CONVERSION, flag: str | None = None, **argument: Any) -> Any:
    """A field with what `argparse.ArgumentParser.add_argument` needs for it."""
    if isinstance(default, bool):
        argument["action"] = f"store_{not default}".lower()
    elif default is not None:
        text += f" ({default})"
    return field(default=default, metadata={"group": group, "flag": flag, "argument": {**argument, "help": text}})


def _parameter(default: Any, kind: Callable[[str], Any], text: str) -> Any:
    """A field of `LSGAlbertConfig`, whose default is named but left to that class, as the check of the value is."""
    argument = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": "VALUE"}
    argument |= {"help": f"{text} ({default})", "default": argparse.SUPPRESS}
    return field(default=UNSET, metadata={"group": PATTERN, "flag": None, "argument": argument})


def _or_none(kind: type) -> Callable[[str], Any]:
    """Reads values of a type where None is allowed, for which the word "none" stands."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return read


@dataclass(frozen=True)
class ConversionOptions:
    """What `convert_checkpoint` and `lsg-albert convert` can be told beside source and target.

    Values are checked where they are used, `dtype` here (ValueError).
    """

    max_length: int = _option(4096, "longest text, in tokens", type=int, metavar="N")
    architecture: str | None = _option(
        None, "AlbertForX, LSGAlbertForX or that of the family; by default the source's", metavar="CLASS"
    )
    random_global_init: bool = _option(False, "global tokens from random words, not [MASK]")
    global_positional_stride: int = _option(64, "positions from one global token to the next", type=int, metavar="N")
    keep_first_global_token: bool = _option(False, "keep an LSG source's first global token, remake the others")
    resize_lsg: bool = _option(False, "keep an LSG source's global tokens, change its positions")
    use_token_type: bool = _option(True, "leave token type 0 out of global tokens", flag="--no-token-type")
    seed: int = _option(0, "of all that is drawn", type=int, metavar="N")
    dtype: str | None = _option(None, "of the result's weights; by default the source's", choices=DTYPES)
    bos_token_id: int | None = _option(None, "token of the first global token", type=int, metavar="ID")
    mask_token_id: int | None = _option(None, "token of the other global tokens", type=int, metavar="ID")

    block_size: int = _parameter(
        128, int, f"tokens per block; a token sees its own and {LSGPattern.neighbours} on each side"
    )
    sparse_block_size: int | None = _parameter(
        128, _or_none(int), "sparse tokens seen on each side of the local window; 0 or none for no sparse part"
    )
    sparsity_factor: int = _parameter(
        2, int, "how many tokens one sparse token stands for; divides the block size; 0 for no sparse part"
    )
    sparsity_type: str | None = _parameter(
        "norm", _or_none(str), "norm, pooling, lsh, stride, block_stride, bos_pooling, or none for no sparse part"
    )
    num_global_tokens: int = _parameter(1, int, "tokens that see and are seen by all, 1 to 512")
    mask_first_token: bool = _parameter(
        False, bool, "hide [CLS] as a key; a global token made from it takes its part; usual for sentence-transformers"
    )
    pool_with_global: bool = _parameter(True, bool, "the first output is that of the first global token")
    adaptive: bool = _parameter(True, bool, "pad inputs to whole blocks, and take that padding out of the outputs")
    pack_padding: bool = _parameter(True, bool, "leave out whole blocks of padding behind the texts of a batch")
    lsh_num_pre_rounds: int = _parameter(1, int, "hashing rounds of lsh before the last one")
    lsh_seed: int | None = _parameter(0, _or_none(int), "of lsh's random projections; none draws them anew each time")
    pass_global_tokens_to_decoder: bool = _parameter(True, bool, "a decoder attends to the global tokens' states too")

    revision: str | None = _option(None, "branch, tag or commit of a source on the Hub", PLACES, metavar="NAME")
    token: str | None = _option(None, "for the Hub; by default the one that you are logged in with", PLACES)
    overwrite: bool = _option(False, "replace TARGET if it exists", PLACES)
    verify: bool = _option(True, "do not compare TARGET with SOURCE", PLACES, "--no-verify")
    max_shard_size: str = _option("5GB", "largest file of weights", PLACES, metavar="SIZE")
    push_to_hub: str | None = _option(None, "upload TARGET to the Hub", PLACES, metavar="REPOSITORY")
    private: bool = _option(False, "make the repository on the Hub a private one", PLACES)

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")

    @property
    def pattern(self) -> dict[str, Any]:
        """The parameters of `LSGAlbertConfig` that are given."""
        names = [option.name for option in fields(self) if option.metadata["group"] == PATTERN]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not UNSET}


ConversionOptions.__doc__ = f"{ConversionOptions.__doc__}\n    Args:" + "".join(
    f"\n        {option.name}: {'if False, ' * (option.default is True)}{option.metadata['argument']['help']}."
    for option in fields(ConversionOptions)
)


def add_options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Give a command all options of a conversion; returns the groups of its help by their titles."""
    groups = {title: parser.add_argument_group(title) for title in (CONVERSION, PATTERN, PLACES)}
    for option in fields(ConversionOptions):
        flag = option.metadata["flag"] or "--" + option.name.replace("_", "-")
        argument = {"dest": option.name, "default": option.default, **option.metadata["argument"]}
        groups[option.metadata["group"]].add_argument(flag, **argument)
    return groups
