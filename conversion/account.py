"""What happens to each tensor of the source, and where each tensor of the target comes from."""

import copy
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from transformers import PreTrainedModel

from .. import modeling_lsg_albert
from ..configuration_lsg_albert import AUTO_MAP, LSGAlbertConfig
from .families import Family, Head, added_tensors
from .files import ConversionError
from .tensors import GLOBAL_TABLE

Shape = tuple[int, ...]

# Without the sequence-to-sequence class: transformers has no counterpart to compare it with. It loads from all others.
ARCHITECTURES = tuple(
    path.split(".")[1] for auto, path in AUTO_MAP.items() if auto not in ("AutoConfig", "AutoModelForSeq2SeqLM")
)
BARE = "LSGAlbertModel"  # the class without a head
BASE_PARTS = ("embeddings", "encoder", "pooler")
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# Second names of a parameter. A file may lack them. The decoder's weight has one only if it is tied.
DECODER, BIAS = "predictions.decoder.weight", "predictions.bias"
TWINS = {DECODER: "albert.embeddings.word_embeddings.weight", "predictions.decoder.bias": BIAS}
# Reasons to leave out tensors whose content is not lost.
BUFFER = "a buffer that the model creates itself"
UNUSED = "rows of positions that no text uses"
TIED = f"tied to {TWINS[DECODER]}, so it has the same values"
OVERRULED = "the values under the second name of the same parameter are used"


@dataclass(frozen=True)
class Account:
    """What happens to each tensor of the source, and where each tensor of the target comes from."""

    copied: dict[str, str]  # name in the target: name in the source
    dropped: dict[str, str]  # name in the source: reason
    missing: list[str]  # names in the target for which the source has nothing
    filled: dict[str, str] = field(default_factory=dict)  # what fills tensors that the family never has


def lsg_architecture(name: str, family: Family) -> str:
    """The LSG class for a class of the family, of ALBERT or of ours, such as `AlbertForX` or `LSGAlbertForX`.

    Raises:
        ConversionError: there is no such class.
    """
    heads = [architecture.removeprefix("LSGAlbert") for architecture in ARCHITECTURES]
    becomes = {head: special.becomes for head, special in family.heads.items() if special.becomes}
    own = {family.class_name, *family.kin}
    classes = {
        mark + start + head: "LSGAlbert" + (becomes.get(head, head) if start in own else head)
        for head in {*heads, *becomes} for start in {"Albert", *own} for mark in ("", "LSG")
        if head in heads or start in own
    }  # fmt: skip
    if name not in classes:
        known = [family.class_name + head for head in (*heads, *(becomes.keys() - set(heads)))]
        nearest = difflib.get_close_matches(str(name).removeprefix("LSG"), known, n=1, cutoff=0.0)[0]
        raise ConversionError(
            f"There is no LSG class for the architecture {name!r}: did you mean {nearest!r}? Choose from "
            f"{', '.join(known)}."
        )
    return classes[name]


def head_of(name: str, family: Family) -> str:
    """The part of a class name after "Albert" or the family's name, such as "ForMaskedLM"."""
    name = name.removeprefix("LSG")
    starts = [start for start in (family.class_name, *family.kin, "Albert") if name.startswith(start)]
    head = name.removeprefix(max(starts, key=len)) if starts else name
    is_other = name.startswith("Albert") and family.heads.get(head, Head()).becomes
    return "" if is_other else head  # ALBERT's pre-training is not ELECTRA's


def model_class(architecture: str) -> type[PreTrainedModel]:
    """The class of that name: ours if it begins with LSG, otherwise transformers' own."""
    return getattr(modeling_lsg_albert if architecture.startswith("LSG") else transformers, architecture)


def base_prefix(architecture: str) -> str:
    """The prefix of the base model's tensor names in an LSG class."""
    return "" if architecture == BARE else "albert."


def parameter_shapes(architecture: str, config: LSGAlbertConfig) -> dict[str, Shape]:
    """Names and shapes of all parameters of a class."""
    with torch.device("meta"):
        model = model_class(architecture)(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def part_of(name: str) -> str:
    """The part of a model to which a tensor belongs: "embeddings", "predictions", "classifier", ..."""
    return name.removeprefix("albert.").split(".")[0]


def target_name(name: str, family: Family, prefix: str, head: str | None = None) -> str:
    """The name of a source's tensor in a target with that prefix. The target may not have such a tensor."""
    name = family.tensor_name(name.removeprefix(family.prefix), head)
    return prefix + name if part_of(name) in BASE_PARTS else name


def name_tensors(
    source: Iterable[str], family: Family, prefix: str, heads: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The names of a source's tensors in a target, and the reasons why some tensors are never copied.

    Args:
        source: names of tensors.
        family, prefix: as in `target_name`.
        heads: as in `match_tensors`.

    Returns:
        Two dictionaries. Their keys are the names in the source.
    """
    special = [family.heads.get(head, Head()) for head in heads]
    named, dropped = {}, {}
    for source_name in source:
        lost = [head.reason for head in special if re.search(head.lost, source_name.removeprefix(family.prefix))]
        name = target_name(source_name, family, prefix, heads[0] if heads else None)
        if lost:
            dropped[source_name] = lost[0]
        elif name.endswith(BUFFERS):
            dropped[source_name] = BUFFER
        else:
            named[source_name] = name
    return named, dropped


def misfit(name: str, shape: Shape, wanted: Shape | None, architecture: str, strict: bool) -> str | None:
    """Why a tensor of the source is left out of the target; None if it is copied.

    Args:
        name: the tensor's name in the source.
        shape: the tensor's shape.
        wanted: the shape of the target's parameter with its name, or None if there is none.
        architecture: the target's class.
        strict: whether a misfit is an error. It is one in an encoder, and if the source itself names this class.

    Raises:
        ConversionError: the tensor does not fit, and must not be left out.
    """
    if shape == wanted:
        return None
    if strict and wanted is None:
        raise ConversionError(
            f"The source has the tensor {name}, which no ALBERT has. To leave such tensors out, name the target's "
            "class with `--architecture`."
        )
    if strict:
        raise ConversionError(f"The source's tensor {name} has the shape {shape}, but its config requires {wanted}.")
    if wanted is None:
        return f"{architecture} has no such parameter"
    return f"it has the shape {shape}, but {architecture} needs {wanted}"


def match_tensors(
    source: Mapping[str, Shape],
    family: Family,
    architecture: str,
    config: LSGAlbertConfig,
    strict: bool,
    heads: Sequence[str] = (),
) -> Account:
    """Match the tensors of a source, by name and shape, with the parameters of an LSG class.

    Args:
        source: shapes of the source's tensors.
        family: the source's family.
        architecture: the LSG class.
        config: a configuration with the source's sizes.
        strict: whether the source itself names this class. If so, its head must be complete, and heads of other
            classes are kept too. Otherwise these are dropped, and a missing head is initialized at random.
        heads: the head of the family's class that is made and, if it differs, the head of the source's class.

    Raises:
        ConversionError: the source's encoder is incomplete, or has other shapes or tensors than ALBERT's.
    """
    prefix = base_prefix(architecture)
    expected = parameter_shapes(architecture, config)
    # A file may hold a pooler that the class lacks; it is kept, since other classes have it.
    fitting = {prefix + name: shape for name, shape in parameter_shapes(BARE, config).items()} | expected
    others = {name for other in ARCHITECTURES for name in parameter_shapes(other, config)} if strict else set()
    named, dropped = name_tensors(source, family, prefix, heads)
    copied: dict[str, str] = {}
    for source_name, name in named.items():
        if name in copied:
            raise ConversionError(f"The source has two tensors for {name}: {copied[name]} and {source_name}.")
        shape = source[source_name]
        wanted = fitting.get(name, shape if name in others else None)
        is_base = wanted is not None and part_of(name) in BASE_PARTS
        reason = misfit(source_name, shape, wanted, architecture, strict or is_base)
        if reason is None:
            copied[name] = source_name
        else:
            dropped[source_name] = reason
    twins = {twin: name for twin, name in TWINS.items() if twin != DECODER or config.tie_word_embeddings}
    # If the file has a tensor under its second name alone, the tensor gets its first name.
    first = {twin: name for twin, name in twins.items() if name not in copied and name in expected}
    copied = {first.get(name, name): source_name for name, source_name in copied.items()}
    added = added_tensors(family, config.embedding_size, config.hidden_size)
    filled = {prefix + name: value for name, value in added.items() if prefix + name not in copied}
    made = {*twins, *filled, prefix + GLOBAL_TABLE}
    missing = [name for name in expected if name not in copied and name not in made]
    is_new = any(family.heads.get(head, Head()).is_new for head in heads)
    refuse_parts(missing, copied, needs_head=strict and not is_new)
    return Account(copied, dropped, missing, filled)


def refuse_parts(missing: Iterable[str], copied: Iterable[str], needs_head: bool) -> None:
    """Raise `ConversionError` if the source lacks a part of its encoder, or of its head.

    The whole pooler may be missing, and so may the whole head unless `needs_head`. They are initialized at random.
    """
    parts_there = {part_of(name) for name in copied}
    for part, group in itertools.groupby(sorted(missing, key=part_of), key=part_of):
        may_be_drawn = part == "pooler" or (part not in BASE_PARTS and not needs_head)
        if may_be_drawn and part not in parts_there:
            continue
        first, *others = group
        more = f" and {len(others)} more tensors" if others else ""
        hint = "" if part in BASE_PARTS else " If this is right, name another target class with `--architecture`."
        raise ConversionError(f"The source lacks {first}{more}.{hint}")
