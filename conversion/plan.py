"""The plan of a conversion, which is made before anything is written."""

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_lsg_albert import LSGAlbertConfig
from ..lsg_pattern import LSGPattern
from .account import (
    BIAS,
    BUFFER,
    DECODER,
    OVERRULED,
    TIED,
    TWINS,
    Account,
    base_prefix,
    head_of,
    lsg_architecture,
    match_tensors,
    part_of,
    target_name,
)
from .families import ALBERT, CONVERTIBLE, FAMILIES, OTHERS, Family
from .files import MODULES, TOKENIZER_SETTINGS, ConversionError, SourceWeights, encoder_folder, one_line, read_json
from .options import ConversionOptions
from .tensors import GLOBAL_TABLE, POSITION_TABLE, WORD_TABLE

# Fields of a config.json that tell how a model was saved or run. They do not describe the model itself.
NOT_KEPT = {"model_type", "architectures", "auto_map", "transformers_version", "transformers_weights", "_name_or_path"}
NOT_KEPT |= {"dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"}

RUN_SETTINGS = {"chunk_size_feed_forward": int, "output_attentions": bool, "output_hidden_states": bool}  # with types


@dataclass(frozen=True)
class Source:
    """A checkpoint in a directory."""

    root: Path  # the directory of the whole model
    folder: (
        Path  # the one with the encoder's config.json and weights; early sentence-transformers models have their own
    )
    family: Family
    config: dict[str, Any]  # the config.json
    architecture: str | None  # as the config.json has it
    weights: SourceWeights

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the model under ALBERT's names."""
        return self.family.albert_fields({n: value for n, value in self.config.items() if n not in NOT_KEPT})

    def own_name(self, field: str) -> str:
        """The name, in the source's config.json, of a field of ALBERT."""
        return self.family.own_name(field, self.config)


@dataclass(frozen=True)
class Plan:
    """Decisions, made from a source's config.json, the names and shapes of its tensors, and the options."""

    source: Source
    options: ConversionOptions
    sizes: LSGAlbertConfig  # of the source
    config: LSGAlbertConfig  # of the target
    architecture: str  # of the target
    head: str  # of the matching class in the source's family, such as "ForMaskedLM"
    account: Account
    source_dtype: torch.dtype
    is_lsg: bool  # whether the source is an LSG-ALBERT already

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the target's weights."""
        return self.source_dtype if self.options.dtype is None else getattr(torch, self.options.dtype)

    @property
    def keeps_globals(self) -> bool:
        """Whether the source's global tokens stay as they are."""
        return self.is_lsg and self.options.resize_lsg

    @property
    def keeps_first_global(self) -> bool:
        """Whether only the first global token stays, and the others are made again."""
        return self.is_lsg and self.options.keep_first_global_token and not self.options.resize_lsg


@dataclass(frozen=True)
class Tokens:
    """The tokens from which global tokens are made, and the tokenizer that has them."""

    tokenizer: PreTrainedTokenizerBase | None
    bos: int  # for the first global token
    mask: int | None  # for the others, None if they are made from random words


def read_source(root: Path) -> Source:
    """Open a checkpoint of one of the families.

    Raises:
        ConversionError: there is no config.json, it belongs to an unknown model, or the weights are wrong.
    """
    folder = encoder_folder(root)
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} is not a checkpoint: it has no config.json.")
    config = read_json(path)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConversionError(f"{path}: `architectures` must be a list of names of classes, got {architectures!r}.")
    if config.get("quantization_config"):
        raise ConversionError(f"{path}: `quantization_config` is set. Save the model without quantization first.")
    architecture = next(iter(architectures), None)
    check_type(path, config.get("model_type"))
    weights = SourceWeights(folder)
    family = find_family(path, config.get("model_type"), architecture, weights.shapes)
    if family is not ALBERT:  # ALBERT's fields are all checked later
        check_encoder(path, config, architecture)
    unused = family.unused_positions(config)
    for name in [name for name in weights.shapes if unused and name.endswith(POSITION_TABLE)]:
        weights.skip_rows(name, unused)
    return Source(root, folder, family, config, architecture, weights)


def check_type(path: Path, model_type: Any) -> None:
    """Refuse models of other families, with the reason if it is known. None is accepted."""
    if model_type is None or (isinstance(model_type, str) and model_type in FAMILIES):
        return
    reason = f": {OTHERS[model_type]}" if isinstance(model_type, str) and model_type in OTHERS else ""
    raise ConversionError(
        f"{path} cannot be converted, its `model_type` is {model_type!r}{reason}. What converts: {CONVERTIBLE}."
    )


def check_encoder(path: Path, config: Mapping[str, Any], architecture: str | None) -> None:
    """Refuse a model whose type is that of a family, but which is not an encoder like ALBERT."""
    positions = config.get("position_embedding_type") or "absolute"
    decoding = [name for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder") if config.get(name)]
    reason = None
    if positions != "absolute":
        reason = f"its `position_embedding_type` is {positions!r}, and ALBERT's positions are absolute"
    elif decoding:
        reason = f"`{decoding[0]}` is set, and ALBERT is an encoder"
    elif (architecture or "").endswith(("LMHeadModel", "ForCausalLM", "ForConditionalGeneration")):
        reason = f"{architecture} is a decoder, and ALBERT is an encoder"
    elif config.get("adapters"):
        reason = "`adapters` is set: first merge the adapters into the model, or remove them"
    if reason is not None:
        raise ConversionError(f"{path} cannot be converted, {reason}. What converts: {CONVERTIBLE}.")


def find_family(path: Path, model_type: str | None, architecture: str | None, names: Iterable[str]) -> Family:
    """The family that `model_type` names; if it is missing, the family of the class name or of the tensors' names."""
    start = (architecture or "").removeprefix("LSG")
    by_class = [family for family in FAMILIES.values() if start.startswith(family.class_name)]
    prefixes = {name.split(".")[0] + "." for name in names} & {family.prefix for family in FAMILIES.values()}
    if model_type is None:
        found = by_class or [family for family in FAMILIES.values() if family.prefix in prefixes]
        if not found:
            raise ConversionError(
                f"{path} names no `model_type`, and neither a class nor a tensor tells it: add it. What converts: "
                f"{CONVERTIBLE}."
            )
        return found[0]
    family = FAMILIES[model_type]
    if by_class and family not in by_class and by_class[0].class_name not in family.kin:
        raise ConversionError(
            f"{path} contradicts itself: its `model_type` is {model_type!r}, its class {architecture}. Correct it."
        )
    if prefixes and family.prefix not in prefixes:
        raise ConversionError(
            f"{path} contradicts the weights: its `model_type` is {model_type!r}, but their names begin with "
            f"{min(prefixes)!r}. Correct it."
        )
    return family


def make_plan(source: Source, options: ConversionOptions) -> Plan:
    """Decide how a source is converted.

    Raises:
        ValueError: it cannot be converted, or not with these options.
    """
    sizes = source_sizes(source)
    # An encoder of sentence-transformers has no global token beside [CLS]: short texts then have the source's embeddings.
    usual = {"mask_first_token": True} if (source.root / MODULES).is_file() else {}
    fields = usual | source.fields
    config = LSGAlbertConfig.from_dict(fields, max_position_embeddings=options.max_length, **options.pattern)
    full_length = LSGPattern.from_config(config).full_length
    if options.max_length < full_length:
        raise ConversionError(
            f"`max_length` ({options.max_length}) must be at least {full_length}, the length up to which all tokens see "
            f"each other with a `block_size` of {config.block_size}. Raise it, or choose a smaller `block_size`."
        )
    family, shapes = source.family, source.weights.shapes
    named = options.architecture or source.architecture or usual_architecture(family, shapes)
    architecture = lsg_architecture(named, family)
    is_own = options.architecture is None and source.architecture is not None
    heads = [head_of(name, family) for name in (named, source.architecture) if name is not None]
    account = match_tensors(shapes, family, architecture, sizes, is_own, heads)
    check_activation(source, account)
    global_table, words = (base_prefix(architecture) + table for table in (GLOBAL_TABLE, WORD_TABLE))
    is_lsg = global_table in account.copied
    named_lsg = source.config.get("base_model_prefix") == "lsg" or "LSG" in (source.architecture or "")
    if named_lsg and not is_lsg:
        raise ConversionError(f"{source.folder} is an LSG-ALBERT by its config.json, but lacks {global_table}.")
    account = settle_twins(account, source, config.tie_word_embeddings)
    source_dtype = source.weights[account.copied[words]].dtype
    return Plan(source, options, sizes, config, architecture, heads[0], account, source_dtype, is_lsg)


def check_activation(source: Source, account: Account) -> None:
    """Refuse a head for masked words whose activation differs from the layers', since in ALBERT they are the same."""
    family, activation = source.family, source.fields.get("hidden_act")
    has_head = any(part_of(name) == "predictions" for name in account.copied)
    if has_head and family.head_activation and activation not in (family.head_activation, "gelu_python"):
        raise ConversionError(
            f"{source.folder / 'config.json'}: `hidden_act` is {activation!r}, but {family.title}'s head for masked "
            f"words always has {family.head_activation!r}. ALBERT has one for both. Convert the encoder alone with "
            f"`--architecture {family.class_name}Model`."
        )


def usual_architecture(family: Family, names: Iterable[str]) -> str:
    """The class if config.json names none: the bare model, unless there is a head of pre-training."""
    has_head = any(part_of(target_name(name, family, "")) == "predictions" for name in names)
    head = family.default_head if has_head or family is ALBERT else "Model"
    return family.class_name + head


def settle_twins(account: Account, source: Source, ties_words: bool) -> Account:
    """Decide which values to use for parameters that the source has under two names.

    A decoder's weight that is a copy of the word embeddings is left out. Both names of a bias stay: before release 5,
    transformers' own ALBERT reads the bias from the second alone. If their values differ, those
    under the second name stay.

    Raises:
        ConversionError: the decoder's weight is tied to the word embeddings, but its values differ. Releases of
            transformers differ in which of the two they use.
    """
    copied, dropped = dict(account.copied), dict(account.dropped)
    for twin, first in TWINS.items():
        if not {twin, first} <= copied.keys() or (twin == DECODER and not ties_words):
            continue
        tensors = [source.weights[copied[name]] for name in (first, twin)]
        is_same = tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)
        if twin == DECODER and not is_same:
            raise ConversionError(
                f"{source.folder} contradicts itself: by its `tie_word_embeddings`, {copied[first]} and {copied[twin]} "
                "are one tensor, but their values differ. Set `tie_word_embeddings` to false in its config.json to keep "
                "both, or remove one of them."
            )
        if twin == DECODER:
            dropped[copied.pop(twin)] = TIED
        elif not is_same:
            dropped[copied[first]] = OVERRULED
            copied[first] = copied.pop(twin)
    return dataclasses.replace(account, copied=copied, dropped=dropped)


def source_sizes(source: Source) -> LSGAlbertConfig:
    """The source's own configuration. If a value is impossible, the error names its field."""
    fields = source.fields
    config, reason = try_config(fields)
    settings = {name: fields.get(name, kind()) for name, kind in RUN_SETTINGS.items()}
    wrong = [name for name, value in settings.items() if type(value) is not RUN_SETTINGS[name] or value < 0]
    if config is None and not any(f"`{name}`" in reason for name in fields):  # not a message of ours
        wrong = [name for name in fields if try_config({other: fields[other] for other in fields if other != name})[0]]
    reason = re.sub(r"`(\w+)`", lambda field: f"`{source.own_name(field[1])}`", reason)
    if wrong:
        name = source.own_name(wrong[0])
        raise ConversionError(
            f"{source.folder / 'config.json'}: `{name}` cannot be {source.config.get(name, fields[wrong[0]])!r}"
            f"{f' ({reason})' if reason else ''}. Leave the field out, or correct it."
        )
    if config is None:
        raise ConversionError(reason)
    return config


def try_config(fields: dict[str, Any]) -> tuple[LSGAlbertConfig | None, str]:
    """A configuration with these fields, or None and the reason why it is impossible."""
    try:
        return LSGAlbertConfig.from_dict(fields), ""
    except Exception as error:  # each release of transformers raises other errors for its own fields
        return None, one_line(error)


def load_tokenizer(target: Path, source: Source) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer, loaded from the target; None if there is none. It must be possible to load it."""
    if not (target / TOKENIZER_SETTINGS).is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about settings that the source does not have
            return AutoTokenizer.from_pretrained(target)
    except Exception as error:  # three libraries raise errors for damaged files
        raise ConversionError(f"The tokenizer of {source.folder} cannot be loaded: {one_line(error)}") from error


def with_token_ids(plan: Plan, tokenizer: PreTrainedTokenizerBase | None) -> Plan:
    """The plan, with the tokenizer's ids of the beginning, end and padding tokens in its configuration."""
    if tokenizer is None:
        return plan
    found = {
        "bos_token_id": (tokenizer.bos_token_id, tokenizer.cls_token_id),
        "eos_token_id": (tokenizer.eos_token_id, tokenizer.sep_token_id),
        "pad_token_id": (tokenizer.pad_token_id,),
    }
    config = copy.deepcopy(plan.config)
    for name, ids in found.items():
        known = [token_id for token_id in ids if token_id is not None and token_id < config.vocab_size]
        if known:
            setattr(config, name, known[0])
    return dataclasses.replace(plan, config=config)


def choose_tokens(plan: Plan, tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
    """The given tokens, or else the tokenizer's or the family's. A needed mask token must not be missing."""
    options, family = plan.options, plan.source.family
    known = [] if tokenizer is None else [tokenizer.bos_token_id, tokenizer.cls_token_id]
    candidates = [options.bos_token_id, *known, plan.sizes.bos_token_id, family.cls_id]
    bos = next(token_id for token_id in candidates if token_id is not None)
    mask = options.mask_token_id
    if mask is None:
        mask = family.mask_id if tokenizer is None else tokenizer.mask_token_id
    if mask is None and not options.random_global_init:
        raise ConversionError(
            "The source's tokenizer has no mask token: name another token with `--mask-token-id`, or "
            "use `--random-global-init`."
        )
    if tokenizer is None and plan.keeps_globals:  # nothing is made from them, and the comparison works with any ids
        bos, mask = (min(token_id, plan.config.vocab_size - 1) for token_id in (bos, mask))
    return Tokens(tokenizer, bos, mask)


def find_warnings(plan: Plan, tokens: Tokens) -> list[str]:
    """Warnings that the user should see before the work begins."""
    options, account, found = plan.options, plan.account, []
    if tokens.tokenizer is None and options.mask_token_id is None and not plan.keeps_globals:
        found.append(
            f"{plan.source.folder} has no tokenizer: the global tokens are made from the ids {tokens.bos} for [CLS] "
            f"and {tokens.mask} for [MASK]. To choose other ids, use `--bos-token-id` and `--mask-token-id`."
        )
    for name in ("keep_first_global_token", "resize_lsg"):
        if getattr(options, name) and not plan.is_lsg:
            found.append(f"`--{name.replace('_', '-')}` has no effect: the source is not an LSG model.")
    if plan.is_lsg and not plan.keeps_globals:
        found.append(
            "The source is an LSG model already, but its global tokens are made again. `--resize-lsg` keeps them."
        )
    if account.missing:
        found.append(f"The source has no {', '.join(account.missing)}: initialized at random. Train before use.")
    for name in [name for name, reason in account.dropped.items() if reason == OVERRULED]:
        found.append(
            f"{name} and {account.copied[BIAS]} are names of one parameter, but their values differ. The values of "
            "the second are used, as in transformers 5."
        )
    lost = [name for name, reason in account.dropped.items() if reason not in (BUFFER, TIED, OVERRULED)]
    if lost:
        found.append(f"These tensors are left out of the target: {', '.join(lost)}.")
    return found
