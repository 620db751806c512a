"""Conversion of whole checkpoints: a directory or a repository on the Hub becomes a directory with an LSG-ALBERT."""

import inspect
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .checkpoint_files import (
    ConversionError,
    SourceWeights,
    copy_code,
    copy_tokenizer,
    fetch_source,
    one_line,
    read_json,
    whole_directory,
    write_json,
    write_weights,
)
from .configuration_lsg_albert import AUTO_MAP, LSGAlbertConfig
from .conversion_checks import (
    BUFFERS,
    DECODER,
    TWINS,
    Account,
    Comparison,
    SourceTensors,
    Verification,
    account_for,
    base_prefix,
    draw_missing,
    lsg_architecture,
    read_checked,
)
from .conversion_report import Report, model_card
from .convert_albert_to_lsg import GLOBAL_TABLE, POSITION_TABLE, WORD_TABLE, convert_state_dict

logger = logging.getLogger(__name__)

ALBERT_CLS_ID, ALBERT_MASK_ID = 2, 4  # in ALBERT's own vocabularies
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def lsg_parameters() -> dict[str, inspect.Parameter]:
    """What an LSG configuration has and ALBERT's has not, as in the signature of its class."""
    parameters = inspect.signature(LSGAlbertConfig.__init__).parameters
    names = list(parameters)
    return {name: parameters[name] for name in names[names.index("block_size") : names.index("base_model_prefix")]}


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    max_length: int = 4096,
    architecture: str | None = None,
    random_global_init: bool = False,
    global_positional_stride: int = 64,
    keep_first_global_token: bool = False,
    resize_lsg: bool = False,
    use_token_type: bool = True,
    seed: int = 0,
    dtype: str | None = None,
    bos_token_id: int | None = None,
    mask_token_id: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    max_shard_size: str = "5GB",
    push_to_hub: str | None = None,
    private: bool = False,
    **parameters: Any,
) -> Report:
    """Make an LSG-ALBERT from an ALBERT, or another one from an LSG-ALBERT. The source is only read.

    Args:
        source: a directory, or the name of a repository on the Hub.
        target: the directory to make. It appears whole, or not at all.
        max_length: the longest text that the result reads, in tokens; at least two blocks.
        architecture: the class of the result, `AlbertForX` or `LSGAlbertForX`. By default the source's. Of a head that
            the source lacks the weights are drawn, and one that this class has not is left out.
        random_global_init: make the global tokens from random words instead of the mask token.
        global_positional_stride: distance in positions between one global token and the next.
        keep_first_global_token: keep the first global token of an LSG-ALBERT, where the others are made anew.
        resize_lsg: keep all global tokens of an LSG-ALBERT, and only change its positions.
        use_token_type: add the first token type to the global tokens.
        seed: of all that is drawn: random words, positions below 512, a new head.
        dtype: of the result, "float32", "float16" or "bfloat16". By default the source's.
        bos_token_id, mask_token_id: tokens to make the global tokens from. By default those of the source's tokenizer.
        revision, token: of a source on the Hub; `token` also of the repository to push to.
        overwrite: replace the directory `target` if it is a model's.
        verify: compare the result with the source; fail if it is not lossless in the setting in which it must be.
        max_shard_size: weights above are written as several files.
        push_to_hub: name of the repository on the Hub to upload the result to.
        private: whether that repository, if it is new, is a private one.
        parameters: of `LSGAlbertConfig`, such as `block_size=64`; by default an LSG source's own, or the class's.

    Returns:
        What was done and measured.

    Raises:
        ValueError: an option, the source or the target is not right; `ConversionError` if it is a file.
        OSError: a place cannot be read or written.
    """
    unknown = parameters.keys() - lsg_parameters().keys()
    if unknown:
        raise TypeError(f"convert_checkpoint() has no argument {sorted(unknown)[0]!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    target = Path(target).resolve()
    folder = fetch_source(str(source), revision, token)
    check_apart(folder, target)
    with whole_directory(target, overwrite) as partial:
        conversion = _Conversion(folder, partial, max_length, architecture, dtype, parameters)
        conversion.find_token_ids(bos_token_id, mask_token_id, random_global_init)
        conversion.choose_globals(random_global_init, resize_lsg, keep_first_global_token)
        conversion.write_weights(global_positional_stride, use_token_type, seed, max_shard_size)
        report = conversion.report(str(source), str(target), seed)
        if verify:
            report.comparison = conversion.verify()
        (partial / "README.md").write_text(model_card(report, folder), encoding="utf-8")
    if push_to_hub is not None:
        report.pushed_to = push(target, push_to_hub, token, private)
    return report


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


def read_source_config(folder: Path) -> dict[str, Any]:
    """The config.json of an ALBERT.

    Raises:
        ConversionError: there is none, or it is another model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} is no checkpoint: it has no config.json.")
    config = read_json(path)
    if config.get("model_type") != "albert":
        raise ConversionError(f"{path} is not of an ALBERT: its `model_type` is {config.get('model_type')!r}.")
    return config


def drop_tied_decoder(tensors: dict[str, Tensor], account: Account) -> None:
    """Take the decoder's weight out of `tensors`, and into the account, if it is a copy of the word embeddings.

    The bias's second name stays: before release 5, transformers' own ALBERT reads the bias from there alone.
    """
    name = TWINS[DECODER]
    if DECODER in tensors and torch.equal(tensors[DECODER], tensors[name]):
        del tensors[DECODER]
        account.dropped[account.copied.pop(DECODER)] = f"the same as {name}, to which it is tied"


def count_parameters(tensors: dict[str, Tensor]) -> int:
    """The number of values in all tensors; the decoder's bias counts once."""
    return sum(tensor.numel() for name, tensor in tensors.items() if name != "predictions.decoder.bias")


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


class _Conversion:
    """One conversion under way, from a directory into a directory; the steps are called in order."""

    def __init__(
        self,
        source: Path,
        target: Path,
        max_length: int,
        architecture: str | None,
        dtype: str | None,
        parameters: dict[str, Any],
    ):
        self.source, self.target = source, target
        self.warnings: list[str] = []
        self.source_config = read_source_config(source)
        self.source_architecture = (self.source_config.get("architectures") or [None])[0]
        self.is_own_architecture = architecture is None and self.source_architecture is not None
        self.architecture = lsg_architecture(architecture or self.source_architecture or "AlbertForPreTraining")

        own = {"auto_map", "architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version"}
        kept = {name: value for name, value in self.source_config.items() if name not in own}
        self.source_size = LSGAlbertConfig.from_dict(dict(kept))  # checks the source's fields too
        self.config = LSGAlbertConfig.from_dict(kept, max_position_embeddings=max_length, **parameters)
        if max_length < 2 * self.config.block_size:
            raise ConversionError(
                f"`max_length` ({max_length}) must be at least two blocks, {2 * self.config.block_size} tokens: take "
                f"a longer one, or a `block_size` below {self.config.block_size}."
            )

        self.weights = SourceWeights(source)
        self.account: Account = account_for(
            self.weights.shapes, self.architecture, self.source_size, self.is_own_architecture
        )
        prefix = base_prefix(self.architecture)
        self.global_table, self.position_table, self.word_table = (
            prefix + table for table in (GLOBAL_TABLE, POSITION_TABLE, WORD_TABLE)
        )
        named_lsg = self.source_config.get("base_model_prefix") == "lsg" or "LSG" in (self.source_architecture or "")
        self.is_lsg = self.global_table in self.account.copied
        if named_lsg and not self.is_lsg:
            raise ConversionError(f"{source} is an LSG-ALBERT by its config.json, but lacks {self.global_table}.")
        self.source_dtype = self.weights[self.account.copied[self.word_table]].dtype
        self.dtype = self.source_dtype if dtype is None else DTYPES[dtype]
        self.write_config()
        self.code = copy_code(target)
        self.tokenizer = self.load_tokenizer() if copy_tokenizer(source, target, max_length) else None

    def warn(self, message: str) -> None:
        """Say it now, and in the report."""
        logger.warning(message)
        self.warnings.append(message)

    def write_config(self) -> None:
        """Write the config.json of the target, with every LSG parameter in it."""
        config = self.config.to_diff_dict()
        config.update({name: getattr(self.config, name) for name in lsg_parameters()})
        for name in ("dtype", "_name_or_path", "_attn_implementation_autoset"):
            config.pop(name, None)
        config |= {
            "architectures": [self.architecture],
            "auto_map": AUTO_MAP,
            "base_model_prefix": "lsg",
            "max_position_embeddings": self.config.max_position_embeddings,
            "model_type": "albert",
            "torch_dtype": str(self.dtype).removeprefix("torch."),  # the name that all releases of transformers read
        }
        write_json(self.target / "config.json", dict(sorted(config.items())))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as the target has it.

        Raises:
            ConversionError: it cannot be loaded.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of settings that the source leaves open
                return AutoTokenizer.from_pretrained(self.target)
        except Exception as error:  # of three libraries, for damaged files
            raise ConversionError(f"The tokenizer of {self.source} cannot be loaded: {one_line(error)}") from error

    def find_token_ids(self, bos_token_id: int | None, mask_token_id: int | None, random_globals: bool) -> None:
        """Choose the tokens that the global tokens are made from: those given, the tokenizer's, or ALBERT's."""
        tokenizer, config_id = self.tokenizer, self.source_size.bos_token_id
        if bos_token_id is None and tokenizer is not None:
            bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        if bos_token_id is None:
            bos_token_id = ALBERT_CLS_ID if config_id is None else config_id
        if mask_token_id is None and tokenizer is not None:
            mask_token_id = tokenizer.mask_token_id
            if mask_token_id is None and not random_globals:
                raise ConversionError(
                    "The source's tokenizer has no mask token: name another with `--mask-token-id`, or take "
                    "`--random-global-init`."
                )
        elif mask_token_id is None:
            mask_token_id = ALBERT_MASK_ID
            self.warn(
                f"{self.source} has no tokenizer: the global tokens are made from the ids {bos_token_id} for [CLS] "
                f"and {mask_token_id} for [MASK]. `--bos-token-id` and `--mask-token-id` name others."
            )
        self.bos_token_id, self.mask_token_id = bos_token_id, mask_token_id

    def choose_globals(self, random_globals: bool, resize_lsg: bool, keep_first: bool) -> None:
        """Decide what becomes of global tokens that the source has, or which it gets."""
        self.random_globals, self.keep_globals = random_globals, resize_lsg and self.is_lsg
        self.keep_first = keep_first and self.is_lsg and not self.keep_globals
        if keep_first and not self.is_lsg:
            self.warn("`--keep-first-global-token` has no effect: the source is not an LSG model.")
        if resize_lsg and not self.is_lsg:
            self.warn("`--resize-lsg` has no effect: the source is not an LSG model.")
        if self.is_lsg and not self.keep_globals:
            self.warn(
                "The source is an LSG model already, and its global tokens are made anew. `--resize-lsg` keeps them."
            )

    def write_weights(self, stride: int, use_token_type: bool, seed: int, max_shard_size: str) -> None:
        """Convert the weights and write them."""
        tensors = {}
        for name, source_name in tqdm(self.account.copied.items(), "reading", unit="tensor", disable=None):
            tensors[name] = read_checked(self.weights, source_name)
        self.lost = [name for name in self.account.dropped if not name.endswith(BUFFERS)]
        if self.config.tie_word_embeddings:
            drop_tied_decoder(tensors, self.account)
        self.parameters_before = count_parameters(tensors)
        self.source_max_length = len(tensors[self.position_table])
        self.drawn = draw_missing(self.account, self.architecture, self.source_size, seed)
        if self.drawn:
            self.warn(f"The source has no {', '.join(self.drawn)}: drawn at random, train them before use.")
        if self.lost:
            self.warn(f"Left out of the target: {', '.join(self.lost)}.")
        tensors = convert_state_dict(
            tensors | {name: tensor.to(self.source_dtype) for name, tensor in self.drawn.items()},
            max_length=self.config.max_position_embeddings,
            bos_token_id=self.bos_token_id,
            mask_token_id=self.mask_token_id,
            stride=stride,
            use_token_type=use_token_type,
            random_globals=self.random_globals,
            keep_globals=self.keep_globals,
            keep_first_global=self.keep_first,
            seed=seed,
        )
        self.parameters_after = count_parameters(tensors)
        self.stride, self.use_token_type = stride, use_token_type
        if self.dtype != self.source_dtype:
            for name in tensors:
                tensors[name] = tensors[name].to(self.dtype)
        size, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(self.target).free
        if size > free:
            raise OSError(f"{self.target.parent} is too full: the weights take {size:,} bytes, and {free:,} are free.")
        write_weights(self.target, tensors, max_shard_size)

    def verify(self) -> Comparison:
        """Compare source and target; see `Verification`."""
        return Verification(
            source=SourceTensors(self.weights, self.account.copied, self.drawn),
            source_config=self.source_config,
            target=self.target,
            architecture=self.architecture,
            dtype=self.dtype,
            bos_token_id=self.bos_token_id,
            mask_token_id=self.mask_token_id,
            tokenizer=self.tokenizer,
            is_lsg=self.is_lsg,
            global_is_cls=self.use_token_type and not self.is_lsg,
        ).compare()

    def describe_globals(self) -> str:
        """How the table of global tokens was made, in words."""
        if self.keep_globals:
            return "the source's"
        words = "random words" if self.random_globals else f"token {self.mask_token_id} ([MASK])"
        types = "token type 0" if self.use_token_type else "no token type"
        first = "the first is the source's" if self.keep_first else f"the first from token {self.bos_token_id} ([CLS])"
        return f"{first}, the others from {words}, with positions {self.stride} apart and {types}"

    def report(self, source: str, target: str, seed: int) -> Report:
        """What was done."""
        commit = self.source.name if self.source.parent.name == "snapshots" else None
        return Report(
            source=source,
            source_commit=commit,
            source_architecture=self.source_architecture,
            source_is_lsg=self.is_lsg,
            target=target,
            architecture=self.architecture,
            dtype=str(self.dtype).removeprefix("torch."),
            source_max_length=self.source_max_length,
            max_length=self.config.max_position_embeddings,
            parameters_before=self.parameters_before,
            parameters_after=self.parameters_after,
            lsg_parameters={name: getattr(self.config, name) for name in lsg_parameters()},
            global_tokens=self.describe_globals(),
            bos_token_id=self.bos_token_id,
            mask_token_id=self.mask_token_id,
            seed=seed,
            has_tokenizer=self.tokenizer is not None,
            dropped=self.account.dropped,
            drawn=list(self.drawn),
            warnings=self.warnings,
            versions={"transformers": transformers.__version__, "torch": torch.__version__},
        )
