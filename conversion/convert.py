"""Conversion of a checkpoint, a directory or a repository on the Hub, into a directory with an LSG-ALBERT."""

import copy
import inspect
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration_lsg_albert import AUTO_MAP, LSG_FIELDS
from .account import DECODER, TWINS, base_prefix, model_class
from .files import (
    ConversionError,
    copy_code,
    fetch_source,
    one_line,
    read_checked,
    whole_directory,
    write_json,
    write_weights,
)
from .options import ConversionOptions
from .plan import Plan, make_plan, read_source, take_tokenizer
from .report import Report, model_card
from .tensors import POSITION_TABLE, convert_state_dict
from .verify import Comparison, compare

logger = logging.getLogger(__name__)


def convert_checkpoint(source: str | Path, target: str | Path, **options: Any) -> Report:
    """Make an LSG-ALBERT from an ALBERT, or another one from an LSG-ALBERT. The source is only read.

    Args:
        source: a directory, or the name of a repository on the Hub.
        target: the directory to make. It appears whole, or not at all.
        options: the fields of `ConversionOptions`, which describes them.

    Returns:
        What was done and measured.

    Raises:
        ValueError: an option, the source or the target is not right; `ConversionError` if it is a file.
        OSError: a place cannot be read or written.
    """
    unknown = options.keys() - {option.name for option in fields(ConversionOptions)}
    if unknown:
        raise TypeError(f"convert_checkpoint() has no argument {sorted(unknown)[0]!r}.")
    chosen = ConversionOptions(**options)
    target = Path(target).resolve()
    folder = fetch_source(str(source), chosen.revision, chosen.token)
    check_apart(folder, target)
    with whole_directory(target, chosen.overwrite) as partial:
        opened = read_source(folder)
        plan = make_plan(opened, take_tokenizer(opened, partial, chosen.max_length), chosen)
        for warning in plan.warnings:
            logger.warning(warning)
        tensors, made = make_tensors(plan)
        check_space(target.parent, tensors)
        write_model(plan, tensors, partial)
        del tensors  # the comparison needs the room
        comparison = compare(plan, made.drawn, partial) if chosen.verify else None
        report = make_report(plan, made, comparison, str(source), str(target))
        (partial / "README.md").write_text(model_card(report, folder), encoding="utf-8")
    if chosen.push_to_hub is not None:
        report.pushed_to = push(target, chosen.push_to_hub, chosen.token, chosen.private)
    return report


# For `help` and editors: the options as arguments.
_PLACES = list(inspect.signature(convert_checkpoint).parameters.values())[:2]
_OPTIONS = inspect.signature(ConversionOptions).parameters.values()
convert_checkpoint.__signature__ = inspect.Signature(
    [*_PLACES, *(option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in _OPTIONS)],
    return_annotation=Report,
)


def check_apart(source: Path, target: Path) -> None:
    """Refuse a target that is the source, or inside of it, or around it.

    Raises:
        ConversionError: it is.
    """
    source = source.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise ConversionError(
            f"The target {target} and the source {source} must be apart: the source is never touched."
        )


@dataclass(frozen=True)
class Made:
    """What is known of a target's tensors once they are made."""

    drawn: Mapping[str, Tensor]  # those that the source lacks
    dropped: Mapping[str, str]  # tensor of the source: reason
    source_max_length: int  # positions
    parameters_before: int
    parameters_after: int


def make_tensors(plan: Plan) -> tuple[dict[str, Tensor], Made]:
    """The tensors of the target.

    Raises:
        ConversionError: a tensor of the source is damaged.
    """
    account, options = plan.account, plan.options
    tensors, dropped = {}, dict(account.dropped)
    for name, source_name in tqdm(account.copied.items(), "reading", unit="tensor", disable=None):
        tensors[name] = read_checked(plan.source.weights, source_name)
    # Of the bias the second name stays: before release 5, transformers' own ALBERT reads the bias from there alone.
    if plan.config.tie_word_embeddings and DECODER in tensors:
        if torch.equal(tensors[DECODER], tensors[TWINS[DECODER]]):
            del tensors[DECODER]
            dropped[account.copied[DECODER]] = f"the same as {TWINS[DECODER]}, to which it is tied"
    drawn = draw_missing(plan)
    result = convert_state_dict(
        tensors | {name: tensor.to(plan.source_dtype) for name, tensor in drawn.items()},
        max_length=plan.config.max_position_embeddings,
        bos_token_id=plan.bos_token_id,
        mask_token_id=plan.mask_token_id,
        stride=options.global_positional_stride,
        use_token_type=options.use_token_type,
        random_globals=options.random_global_init,
        keep_globals=plan.keep_globals,
        keep_first_global=plan.keep_first_global,
        seed=options.seed,
    )
    made = Made(
        drawn=drawn,
        dropped=dropped,
        source_max_length=len(tensors[base_prefix(plan.architecture) + POSITION_TABLE]),
        parameters_before=count_parameters(tensors),
        parameters_after=count_parameters(result),
    )
    del tensors
    for name in result:
        result[name] = result[name].to(plan.dtype)
    return result, made


def draw_missing(plan: Plan) -> dict[str, Tensor]:
    """Fresh weights for the parameters that the source lacks, as for a new model."""
    if not plan.account.missing:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.options.seed)
        model = model_class(plan.architecture)(copy.deepcopy(plan.sizes))
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name in plan.account.missing}


def count_parameters(tensors: Mapping[str, Tensor]) -> int:
    """The number of values in all tensors; the decoder's bias counts once."""
    return sum(tensor.numel() for name, tensor in tensors.items() if name != "predictions.decoder.bias")


def check_space(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a place that cannot hold the tensors.

    Raises:
        OSError: it has less room.
    """
    size, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder} is too full: the weights take {size:,} bytes, and {free:,} are free.")


def write_model(plan: Plan, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write configuration, code and weights.

    Raises:
        OSError: the place is full or not writable.
    """
    write_json(folder / "config.json", target_config(plan))
    copy_code(folder)
    write_weights(folder, tensors, plan.options.max_shard_size)


def target_config(plan: Plan) -> dict[str, Any]:
    """The config.json of the target, with every field of LSG in it."""
    config = plan.config.to_diff_dict()
    config.update({name: getattr(plan.config, name) for name in LSG_FIELDS})
    for name in ("dtype", "_name_or_path", "_attn_implementation_autoset"):
        config.pop(name, None)
    config |= {
        "architectures": [plan.architecture],
        "auto_map": AUTO_MAP,
        "base_model_prefix": "lsg",
        "max_position_embeddings": plan.config.max_position_embeddings,
        "model_type": "albert",
        "torch_dtype": name_of(plan.dtype),  # the key that all releases of transformers read
    }
    return dict(sorted(config.items()))


def make_report(plan: Plan, made: Made, comparison: Comparison | None, source: str, target: str) -> Report:
    """What was done. `source` and `target` are the places as the user knows them."""
    folder = plan.source.folder
    return Report(
        source=source,
        source_commit=folder.name if folder.parent.name == "snapshots" else None,
        source_architecture=plan.source.architecture,
        source_is_lsg=plan.is_lsg,
        target=target,
        architecture=plan.architecture,
        dtype=name_of(plan.dtype),
        source_max_length=made.source_max_length,
        max_length=plan.config.max_position_embeddings,
        parameters_before=made.parameters_before,
        parameters_after=made.parameters_after,
        lsg_parameters={name: getattr(plan.config, name) for name in LSG_FIELDS},
        global_tokens=describe_globals(plan),
        bos_token_id=plan.bos_token_id,
        mask_token_id=plan.mask_token_id,
        seed=plan.options.seed,
        has_tokenizer=plan.tokenizer is not None,
        dropped=dict(made.dropped),
        drawn=list(made.drawn),
        warnings=plan.warnings,
        comparison=comparison,
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
    )


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def describe_globals(plan: Plan) -> str:
    """How the table of global tokens was made, in words."""
    if plan.keep_globals:
        return "the source's"
    options = plan.options
    words = "random words" if options.random_global_init else f"token {plan.mask_token_id} ([MASK])"
    types = "token type 0" if options.use_token_type else "no token type"
    first = f"the first from token {plan.bos_token_id} ([CLS])"
    if plan.keep_first_global:
        first = "the first is the source's"
    return f"{first}, the others from {words}, with positions {options.global_positional_stride} apart and {types}"


def push(folder: Path, repository: str, token: str | None, private: bool) -> str:
    """Upload a directory to a repository on the Hub, which is made if it does not exist; returns its address.

    Raises:
        ConversionError: the Hub refuses, or is out of reach.
    """
    try:
        api = HfApi(token=token)
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Add an LSG-ALBERT")
    except Exception as error:  # of the network: each release of huggingface_hub has its own
        raise ConversionError(
            f"{folder} is whole, but could not be pushed to {repository}: {one_line(error)}"
        ) from error
    return str(address)
