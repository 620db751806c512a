"""What a conversion is going to do, found out before any weights are read."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_lsg_albert import LSGAlbertConfig
from .account import Account, account_for, base_prefix, lsg_architecture
from .families import FAMILIES, Family
from .files import ConversionError, SourceWeights, copy_tokenizer, one_line, read_json
from .options import ConversionOptions
from .tensors import GLOBAL_TABLE, WORD_TABLE

# Fields of a config.json that say how it was saved, not what the model is.
NOT_KEPT = {"auto_map", "architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version"}


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
        names = {name: self.family.fields.get(name, name) for name in self.config if name not in NOT_KEPT}
        return {albert_name: self.config[name] for name, albert_name in names.items()}


@dataclass(frozen=True)
class Plan:
    """The decisions of a conversion."""

    source: Source
    options: ConversionOptions
    tokenizer: PreTrainedTokenizerBase | None  # the source's, with the target's length
    sizes: LSGAlbertConfig  # of the source
    config: LSGAlbertConfig  # of the target
    architecture: str  # of the target
    account: Account
    source_dtype: torch.dtype
    bos_token_id: int  # the tokens from which the global tokens are made
    mask_token_id: int | None
    is_lsg: bool  # whether the source is an LSG-ALBERT already

    @property
    def dtype(self) -> torch.dtype:
        """The type of the target's weights."""
        return self.source_dtype if self.options.dtype is None else getattr(torch, self.options.dtype)

    @property
    def keep_globals(self) -> bool:
        """Whether the source's global tokens stay as they are."""
        return self.is_lsg and self.options.resize_lsg

    @property
    def keep_first_global(self) -> bool:
        """Whether the first of them stays, while the others are made anew."""
        return self.is_lsg and self.options.keep_first_global_token and not self.options.resize_lsg

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the work begins."""
        found = []
        if self.tokenizer is None and self.options.mask_token_id is None:
            found.append(
                f"{self.source.folder} has no tokenizer: the global tokens are made from the ids {self.bos_token_id} "
                f"for [CLS] and {self.mask_token_id} for [MASK]. `--bos-token-id` and `--mask-token-id` name others."
            )
        if self.options.keep_first_global_token and not self.is_lsg:
            found.append("`--keep-first-global-token` has no effect: the source is not an LSG model.")
        if self.options.resize_lsg and not self.is_lsg:
            found.append("`--resize-lsg` has no effect: the source is not an LSG model.")
        if self.is_lsg and not self.keep_globals:
            found.append(
                "The source is an LSG model already, and its global tokens are made anew. `--resize-lsg` keeps them."
            )
        if self.account.missing:
            names = ", ".join(self.account.missing)
            found.append(f"The source has no {names}: drawn at random, train them before use.")
        if self.account.lost:
            found.append(f"Left out of the target: {', '.join(self.account.lost)}.")
        return found


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
    return Source(folder, FAMILIES[model_type], config, next(iter(architectures), None), SourceWeights(folder))


def take_tokenizer(source: Source, target: Path, max_length: int) -> PreTrainedTokenizerBase | None:
    """Copy the source's tokenizer into the target and load it from there; None if there is none.

    Raises:
        ConversionError: it cannot be loaded.
    """
    if not copy_tokenizer(source.folder, target, source.family.vocabularies, max_length):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of settings that the source leaves open
            return AutoTokenizer.from_pretrained(target)
    except Exception as error:  # of three libraries, for damaged files
        raise ConversionError(f"The tokenizer of {source.folder} cannot be loaded: {one_line(error)}") from error


def make_plan(source: Source, tokenizer: PreTrainedTokenizerBase | None, options: ConversionOptions) -> Plan:
    """Decide what becomes of a source.

    Raises:
        ConversionError: it cannot be converted, or not in this way.
    """
    sizes = LSGAlbertConfig.from_dict(source.fields)  # which checks the source's fields too
    config = LSGAlbertConfig.from_dict(source.fields, max_position_embeddings=options.max_length, **options.pattern)
    if options.max_length < 2 * config.block_size:
        raise ConversionError(
            f"`max_length` ({options.max_length}) must be at least two blocks, {2 * config.block_size} tokens: take "
            f"a longer one, or a `block_size` below {config.block_size}."
        )
    architecture = lsg_architecture(
        options.architecture or source.architecture or "AlbertForPreTraining", source.family
    )
    is_own = options.architecture is None and source.architecture is not None
    account = account_for(source.weights.shapes, source.family, architecture, sizes, strict=is_own)
    prefix = base_prefix(architecture)
    is_lsg = prefix + GLOBAL_TABLE in account.copied
    named_lsg = source.config.get("base_model_prefix") == "lsg" or "LSG" in (source.architecture or "")
    if named_lsg and not is_lsg:
        raise ConversionError(
            f"{source.folder} is an LSG-ALBERT by its config.json, but lacks {prefix + GLOBAL_TABLE}."
        )
    return Plan(
        source=source,
        options=options,
        tokenizer=tokenizer,
        sizes=sizes,
        config=config,
        architecture=architecture,
        account=account,
        source_dtype=source.weights[account.copied[prefix + WORD_TABLE]].dtype,
        bos_token_id=choose_bos_token(options, tokenizer, sizes, source.family),
        mask_token_id=choose_mask_token(options, tokenizer, source.family),
        is_lsg=is_lsg,
    )


def choose_bos_token(
    options: ConversionOptions, tokenizer: PreTrainedTokenizerBase | None, config: LSGAlbertConfig, family: Family
) -> int:
    """The token of the first global token: the first that is known of those given, the tokenizer's and the model's."""
    known = [] if tokenizer is None else [tokenizer.bos_token_id, tokenizer.cls_token_id]
    candidates = [options.bos_token_id, *known, config.bos_token_id, family.cls_id]
    return next(token_id for token_id in candidates if token_id is not None)


def choose_mask_token(
    options: ConversionOptions, tokenizer: PreTrainedTokenizerBase | None, family: Family
) -> int | None:
    """The token of the other global tokens: the one given, the tokenizer's, or the family's; None if random words are.

    Raises:
        ConversionError: the tokenizer has none, and one is needed.
    """
    if options.mask_token_id is not None:
        return options.mask_token_id
    if tokenizer is None:
        return family.mask_id
    if tokenizer.mask_token_id is None and not options.random_global_init:
        raise ConversionError(
            "The source's tokenizer has no mask token: name another with `--mask-token-id`, or take "
            "`--random-global-init`."
        )
    return tokenizer.mask_token_id
