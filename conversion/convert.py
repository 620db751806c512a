"""Conversion of a checkpoint, a directory or a repository on the Hub, into a directory with an LSG-ALBERT."""

import copy
import inspect
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration_lsg_albert import AUTO_MAP, LSG_FIELDS
from .account import model_class, parameter_shapes
from .families import IDENTITY, ZEROS
from .files import (
    ConversionError,
    SourceWeights,
    copy_code,
    copy_modules,
    copy_tokenizer,
    fetch_source,
    module_folders,
    one_line,
    read_checked,
    whole_directory,
    write_json,
    write_weights,
)
from .options import ConversionOptions
from .plan import (
    Plan,
    Tokens,
    choose_tokens,
    find_warnings,
    load_tokenizer,
    make_plan,
    read_source,
    with_token_ids,
)
from .report import Report, model_card
from .tensors import convert_state_dict
from .verify import Comparison, compare

logger = logging.getLogger(__name__)


def convert_checkpoint(source: str | Path, target: str | Path, **options: Any) -> Report:
    """Make an LSG-ALBERT from a checkpoint of one of the families, LSG models included. The source is not changed.

    Args:
        source: a directory, or the name of a repository on the Hub.
        target: the directory to create. It appears only when it is complete.
        options: the fields of `ConversionOptions`, which describes them.

    Returns:
        What was done and measured.

    Raises:
        ValueError: an option, the source or the target is not right; `ConversionError` if it is a file.
        OSError: a file or directory cannot be read or written.
    """
    unknown = options.keys() - {option.name for option in fields(ConversionOptions)}
    if unknown:
        raise TypeError(f"convert_checkpoint() has no argument {sorted(unknown)[0]!r}.")
    chosen = ConversionOptions(**options)
    target = Path(target).resolve()
    folder = fetch_source(str(source), chosen.revision, chosen.token)
    check_apart(folder, target)
    with whole_directory(target, chosen.overwrite) as partial:
        plan = make_plan(read_source(folder), chosen)
        write_surroundings(plan, partial)
        tokenizer = load_tokenizer(partial, plan.source)
        plan = with_token_ids(plan, tokenizer)
        write_json(partial / "config.json", target_config(plan))  # again: loading the tokenizer needed a first one
        tokens = choose_tokens(plan, tokenizer)
        for warning in find_warnings(plan, tokens):
            logger.warning(warning)
        tensors, made = make_tensors(plan, tokens)
        check_space(target.parent, tensors)
        write_weights(partial, tensors, chosen.max_shard_size)
        del tensors  # the comparison needs the memory
        comparison = compare(plan, tokens, made, partial) if chosen.verify else None
        report = make_report(plan, tokens, comparison, partial, source=str(source), target=str(target))
        (partial / "README.md").write_text(model_card(report, folder), encoding="utf-8")
    if chosen.push_to_hub is not None:
        report.pushed_to = push(target, chosen.push_to_hub, chosen.token, chosen.private)
    return report


_PLACES = list(inspect.signature(convert_checkpoint).parameters.values())[:2]
_OPTIONS = [
    option.replace(kind=option.KEYWORD_ONLY) for option in inspect.signature(ConversionOptions).parameters.values()
]
convert_checkpoint.__signature__ = inspect.Signature(_PLACES + _OPTIONS, return_annotation=Report)  # for `help`


def check_apart(source: Path, target: Path) -> None:
    """Refuse a target that is the source, lies inside it, or contains it."""
    source = source.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise ConversionError(
            f"The target {target} and the source {source} must be apart: the source is never changed."
        )


def write_surroundings(plan: Plan, folder: Path) -> None:
    """Write everything except the weights: configuration, code, tokenizer, and modules after the encoder."""
    copy_code(folder)
    source, length = plan.source, plan.config.max_position_embeddings
    named = source.config.get("tokenizer_class")
    copy_modules(source.root, folder, length)
    tokenizer_class = copy_tokenizer(source.folder, folder, source.family.vocabularies, length, named)
    if tokenizer_class is not None:
        plan.config.tokenizer_class = tokenizer_class
    write_json(folder / "config.json", target_config(plan))


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


def make_tensors(plan: Plan, tokens: Tokens) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the target, and those among them that are created because the source lacks them.

    Raises:
        ConversionError: a tensor of the source is damaged.
    """
    options, copied = plan.options, {}
    for name, source_name in tqdm(plan.account.copied.items(), "reading", unit="tensor", disable=None):
        copied[name] = read_checked(plan.source.weights, source_name)
    made = draw_missing(plan) | fill_in(plan)
    tensors = convert_state_dict(
        copied | {name: tensor.to(plan.source_dtype) for name, tensor in made.items()},
        max_length=plan.config.max_position_embeddings,
        bos_token_id=tokens.bos,
        mask_token_id=tokens.mask,
        stride=options.global_positional_stride,
        use_token_type=options.use_token_type,
        random_globals=options.random_global_init,
        keep_globals=plan.keeps_globals,
        keep_first_global=plan.keeps_first_global,
        seed=options.seed,
    )
    del copied
    for name in tensors:
        tensors[name] = tensors[name].to(plan.dtype)
    return tensors, made


def draw_missing(plan: Plan) -> dict[str, Tensor]:
    """Random weights, as in a new model, for the parameters that the source lacks."""
    if not plan.account.missing:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.options.seed)
        model = model_class(plan.architecture)(copy.deepcopy(plan.sizes))
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name in plan.account.missing}


def fill_in(plan: Plan) -> dict[str, Tensor]:
    """The tensors that ALBERT has and the source's family lacks."""
    shapes = parameter_shapes(plan.architecture, plan.sizes)
    make = {ZEROS: torch.zeros, IDENTITY: torch.eye}
    return {name: make[value](*shapes[name]) for name, value in plan.account.filled.items()}


def check_space(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `OSError` if the disk cannot hold the tensors."""
    size, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder} is too full: the weights take {size:,} bytes, but only {free:,} are free.")


def make_report(plan: Plan, tokens: Tokens, comparison: Comparison | None, folder: Path, **places: str) -> Report:
    """The report about `folder`; `places` are the source and the target as the user named them."""
    source, copied = plan.source, plan.account.copied
    return Report(
        source_commit=source.root.name if source.root.parent.name == "snapshots" else None,
        family=source.family.title,
        source_architecture=source.architecture,
        source_is_lsg=plan.is_lsg,
        architecture=plan.architecture,
        dtype=name_of(plan.dtype),
        source_max_length=plan.sizes.max_position_embeddings,
        max_length=plan.config.max_position_embeddings,
        parameters_before=count_parameters({name: source.weights.whole_shape(copied[name]) for name in copied}),
        parameters_after=count_parameters(SourceWeights(folder).shapes),
        lsg_parameters={name: getattr(plan.config, name) for name in LSG_FIELDS},
        global_tokens=describe_globals(plan, tokens),
        bos_token_id=tokens.bos,
        mask_token_id=tokens.mask,
        seed=plan.options.seed,
        has_tokenizer=tokens.tokenizer is not None,
        modules=module_folders(source.root),
        dropped=plan.account.dropped,
        drawn=plan.account.missing,
        differences=source.family.differences_of(plan.head),
        warnings=find_warnings(plan, tokens),
        comparison=comparison,
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
        **places,
    )


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of values in all tensors; the decoder's bias counts once."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name != "predictions.decoder.bias")


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def describe_globals(plan: Plan, tokens: Tokens) -> str:
    """How the table of global tokens was made, in words."""
    if plan.keeps_globals:
        return "the source's"
    options = plan.options
    words = "random words" if options.random_global_init else f"token {tokens.mask} ([MASK])"
    types = "token type 0" if options.use_token_type else "no token type"
    first = f"the first from token {tokens.bos} ([CLS])"
    if plan.keeps_first_global:
        first = "the first is the source's"
    return f"{first}, the others from {words}, with positions {options.global_positional_stride} apart and {types}"


def push(folder: Path, repository: str, token: str | None, private: bool) -> str:
    """Upload a directory to a repository on the Hub, which is created if needed, and return its address.

    Raises:
        ConversionError: the Hub refuses the upload, or cannot be reached.
    """
    try:
        api = HfApi(token=token)
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Add an LSG-ALBERT")
    except Exception as error:  # network errors: each release of huggingface_hub has its own
        reason = one_line(error)
        raise ConversionError(f"{folder} is complete, but could not be pushed to {repository}: {reason}") from error
    return str(address)
