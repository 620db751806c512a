"""What a conversion is going to do, decided before anything is made."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_lsg_albert import LSGAlbertConfig
from .account import BUFFER, DECODER, TIED, TWINS, Account, account_for, base_prefix, lsg_architecture
from .families import FAMILIES, Family
from .files import TOKENIZER_SETTINGS, ConversionError, SourceWeights, one_line, read_json
from .options import ConversionOptions
from .tensors import GLOBAL_TABLE, WORD_TABLE

# Fields of a config.json that say how a model was saved or run, not what it is.
NOT_KEPT = {"model_type", "architectures", "auto_map", "transformers_version", "transformers_weights", "_name_or_path"}
NOT_KEPT |= {"dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"}

RUN_SETTINGS = {"chunk_size_feed_forward": int, "output_attentions": bool, "output_hidden_states": bool}  # and types


@dataclass(frozen=True)
class Source:
    """A checkpoint in a directory."""

    folder: Path
    family: Family
    config: dict[str, Any]  # the config.json
    architecture: str | None  # as the config.json has it
    weights: SourceWeights

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the model under ALBERT's names."""
        kept = {name: value for name, value in self.config.items() if name not in NOT_KEPT}
        return {self.family.fields.get(name, name): value for name, value in kept.items()}


@dataclass(frozen=True)
class Plan:
    """The decisions that a source's config.json, the names and shapes of its tensors and the options lead to."""

    source: Source
    options: ConversionOptions
    sizes: LSGAlbertConfig  # of the source
    config: LSGAlbertConfig  # of the target
    architecture: str  # of the target
    account: Account
    source_dtype: torch.dtype
    is_lsg: bool  # whether the source is an LSG-ALBERT already

    @property
    def dtype(self) -> torch.dtype:
        """The type of the target's weights."""
        return self.source_dtype if self.options.dtype is None else getattr(torch, self.options.dtype)

    @property
    def keeps_globals(self) -> bool:
        """Whether the source's global tokens stay as they are."""
        return self.is_lsg and self.options.resize_lsg

    @property
    def keeps_first_global(self) -> bool:
        """Whether the first of them stays, while the others are made anew."""
        return self.is_lsg and self.options.keep_first_global_token and not self.options.resize_lsg


@dataclass(frozen=True)
class Tokens:
    """The tokens from which global tokens are made, and the tokenizer that has them."""

    tokenizer: PreTrainedTokenizerBase | None
    bos: int  # for the first global token
    mask: int | None  # for the others, None if they are made from random words


def read_source(folder: Path) -> Source:
    """Open a checkpoint of one of the families.

    Raises:
        ConversionError: there is no config.json, it is another model's, or the weights are not right.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} is no checkpoint: it has no config.json.")
    config = read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConversionError(f"{path} is not of an ALBERT: its `model_type` is {model_type!r}.")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConversionError(f"{path}: `architectures` must be a list of names of classes, got {architectures!r}.")
    if config.get("quantization_config"):
        raise ConversionError(f"{path}: `quantization_config` is set. Save the model without quantization first.")
    return Source(folder, FAMILIES[model_type], config, next(iter(architectures), None), SourceWeights(folder))


def make_plan(source: Source, options: ConversionOptions) -> Plan:
    """Decide what becomes of a source.

    Raises:
        ValueError: it cannot be converted, or not in this way.
    """
    sizes = source_sizes(source)
    config = LSGAlbertConfig.from_dict(source.fields, max_position_embeddings=options.max_length, **options.pattern)
    if options.max_length < 2 * config.block_size:
        raise ConversionError(
            f"`max_length` ({options.max_length}) must be at least two blocks, {2 * config.block_size} tokens: take "
            f"a longer one, or a `block_size` below {config.block_size}."
        )
    named = options.architecture or source.architecture
    architecture = lsg_architecture(named or "AlbertForPreTraining", source.family)
    is_own = options.architecture is None and source.architecture is not None
    account = account_for(source.weights.shapes, source.family, architecture, sizes, strict=is_own)
    global_table, words = (base_prefix(architecture) + table for table in (GLOBAL_TABLE, WORD_TABLE))
    is_lsg = global_table in account.copied
    named_lsg = source.config.get("base_model_prefix") == "lsg" or "LSG" in (source.architecture or "")
    if named_lsg and not is_lsg:
        raise ConversionError(f"{source.folder} is an LSG-ALBERT by its config.json, but lacks {global_table}.")
    if config.tie_word_embeddings:
        account = without_tied_decoder(account, source.weights)
    source_dtype = source.weights[account.copied[words]].dtype
    return Plan(source, options, sizes, config, architecture, account, source_dtype, is_lsg)


def without_tied_decoder(account: Account, weights: SourceWeights) -> Account:
    """Leave out the decoder's weight if it is a copy of the word embeddings.

    The bias's second name stays: before release 5, transformers' own ALBERT reads the bias from there alone.
    """
    decoder = account.copied.get(DECODER)
    if decoder is None or not torch.equal(weights[decoder], weights[account.copied[TWINS[DECODER]]]):
        return account
    copied = {name: source_name for name, source_name in account.copied.items() if name != DECODER}
    return Account(copied, account.dropped | {decoder: TIED}, account.missing)


def source_sizes(source: Source) -> LSGAlbertConfig:
    """The source's own configuration, refused with the name of the field if a value is impossible."""
    fields = source.fields
    config, reason = try_config(fields)
    settings = {name: fields.get(name, kind()) for name, kind in RUN_SETTINGS.items()}
    wrong = [name for name, value in settings.items() if type(value) is not RUN_SETTINGS[name] or value < 0]
    if config is None and not any(f"`{name}`" in reason for name in fields):  # not a message of ours
        wrong = [name for name in fields if try_config({other: fields[other] for other in fields if other != name})[0]]
    if wrong:
        raise ConversionError(
            f"{source.folder / 'config.json'}: `{wrong[0]}` cannot be {fields[wrong[0]]!r}"
            f"{f' ({reason})' if reason else ''}. Leave the field out, or correct it."
        )
    if config is None:
        raise ConversionError(reason)
    return config


def try_config(fields: dict[str, Any]) -> tuple[LSGAlbertConfig | None, str]:
    """A configuration with these fields, or None and the reason why there is none."""
    try:
        return LSGAlbertConfig.from_dict(fields), ""
    except Exception as error:  # each release of transformers has others for its own fields
        return None, one_line(error)


def load_tokenizer(target: Path, source: Source) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer as the target has it, None if there is none; refused if it cannot be loaded."""
    if not (target / TOKENIZER_SETTINGS).is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of settings that the source leaves open
            return AutoTokenizer.from_pretrained(target)
    except Exception as error:  # of three libraries, for damaged files
        raise ConversionError(f"The tokenizer of {source.folder} cannot be loaded: {one_line(error)}") from error


def choose_tokens(plan: Plan, tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
    """The tokens that are given, the tokenizer's, or the family's; refused if there is no mask token but need of one."""
    options, family = plan.options, plan.source.family
    known = [] if tokenizer is None else [tokenizer.bos_token_id, tokenizer.cls_token_id]
    candidates = [options.bos_token_id, *known, plan.sizes.bos_token_id, family.cls_id]
    bos = next(token_id for token_id in candidates if token_id is not None)
    mask = options.mask_token_id
    if mask is None:
        mask = family.mask_id if tokenizer is None else tokenizer.mask_token_id
    if mask is None and not options.random_global_init:
        raise ConversionError(
            "The source's tokenizer has no mask token: name another with `--mask-token-id`, or take "
            "`--random-global-init`."
        )
    return Tokens(tokenizer, bos, mask)


def find_warnings(plan: Plan, tokens: Tokens) -> list[str]:
    """What the user should know before the work begins."""
    options, account, found = plan.options, plan.account, []
    if tokens.tokenizer is None and options.mask_token_id is None:
        found.append(
            f"{plan.source.folder} has no tokenizer: the global tokens are made from the ids {tokens.bos} for [CLS] "
            f"and {tokens.mask} for [MASK]. `--bos-token-id` and `--mask-token-id` name others."
        )
    for name in ("keep_first_global_token", "resize_lsg"):
        if getattr(options, name) and not plan.is_lsg:
            found.append(f"`--{name.replace('_', '-')}` has no effect: the source is not an LSG model.")
    if plan.is_lsg and not plan.keeps_globals:
        found.append(
            "The source is an LSG model already, and its global tokens are made anew. `--resize-lsg` keeps them."
        )
    if account.missing:
        found.append(f"The source has no {', '.join(account.missing)}: drawn at random, train them before use.")
    lost = [name for name, reason in account.dropped.items() if reason not in (BUFFER, TIED)]
    if lost:
        found.append(f"Left out of the target: {', '.join(lost)}.")
    return found
