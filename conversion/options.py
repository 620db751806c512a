"""The options of a conversion: the one list from which the function and the command line take theirs.

Imports nothing slow: the command line must answer a wrong argument at once.
"""

import argparse
import enum
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

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


def _parameter(default: Any, text: str, kind: Callable[[str], Any]) -> Any:
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
    architecture: str | None = _option(None, "AlbertForX or LSGAlbertForX; by default the source's", metavar="CLASS")
    random_global_init: bool = _option(False, "global tokens from random words, not [MASK]")
    global_positional_stride: int = _option(
        64, "positions between one global token and the next", type=int, metavar="N"
    )
    keep_first_global_token: bool = _option(False, "keep an LSG source's first global token, remake the others")
    resize_lsg: bool = _option(False, "keep an LSG source's global tokens, change its positions")
    use_token_type: bool = _option(True, "leave token type 0 out of global tokens", flag="--no-token-type")
    seed: int = _option(
        0, "of all that is drawn: random words, positions below 512, a new head", type=int, metavar="N"
    )
    dtype: str | None = _option(None, "of the result's weights; by default the source's", choices=DTYPES)
    bos_token_id: int | None = _option(None, "token of the first global token", type=int, metavar="ID")
    mask_token_id: int | None = _option(None, "token of the other global tokens", type=int, metavar="ID")

    block_size: int = _parameter(
        128, "Tokens per block. A token sees its own block and one neighbour on each side", int
    )
    sparse_block_size: int | None = _parameter(
        128,
        "Sparse tokens seen on each side of the local window; 0 or None switches the sparse part off",
        _or_none(int),
    )
    sparsity_factor: int = _parameter(
        2,
        "How many tokens one sparse token stands for; divides block_size. 0 or less switches the sparse part off",
        int,
    )
    sparsity_type: str | None = _parameter(
        "norm",
        'Selection of the sparse tokens: "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", or '
        '"none"/None for no sparse part',
        _or_none(str),
    )
    num_global_tokens: int = _parameter(
        1, "Global tokens before the text, 1 to 512. They see and are seen by every token", int
    )
    mask_first_token: bool = _parameter(
        False,
        "Hides the first text token ([CLS]) as a key, whose part a global token made from [CLS] then plays",
        bool,
    )
    pool_with_global: bool = _parameter(
        True, "Replaces the first output by that of the first global token. Needed by mask_first_token", bool
    )
    adaptive: bool = _parameter(
        True,
        "Pads inputs to a multiple of block_size by itself, and removes that padding from the outputs",
        bool,
    )
    pack_padding: bool = _parameter(
        True, "Leaves out whole blocks of padding behind the texts of a batch; the outputs there are then zeros", bool
    )
    lsh_num_pre_rounds: int = _parameter(1, 'Hashing rounds of "lsh" before the last one', int)
    lsh_seed: int | None = _parameter(
        0,
        'Seed of the random projections of "lsh"; None draws them anew from torch\'s global generator',
        _or_none(int),
    )
    pass_global_tokens_to_decoder: bool = _parameter(
        True, "Whether a decoder also attends to the global tokens' last states, before the text's", bool
    )

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
        given = {
            option.name: getattr(self, option.name) for option in fields(self) if option.metadata["group"] == PATTERN
        }
        return {name: value for name, value in given.items() if value is not UNSET}


def _describe() -> str:
    """Each option in a line, for `help`."""
    lines = []
    for option in fields(ConversionOptions):
        condition = "if False, " if option.default is True else ""
        lines.append(f"        {option.name}: {condition}{option.metadata['argument']['help']}.")
    return "\n".join(["    Args:", *lines])


ConversionOptions.__doc__ = f"{ConversionOptions.__doc__}\n{_describe()}\n"


def add_options(parser: argparse.ArgumentParser) -> dict[str, argparse._ArgumentGroup]:
    """Give a command all options of a conversion; returns the groups of its help by their titles."""
    groups = {title: parser.add_argument_group(title) for title in (CONVERSION, PATTERN, PLACES)}
    for option in fields(ConversionOptions):
        flag = option.metadata["flag"] or "--" + option.name.replace("_", "-")
        argument = {"dest": option.name, "default": option.default, **option.metadata["argument"]}
        groups[option.metadata["group"]].add_argument(flag, **argument)
    return groups
