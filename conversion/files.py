"""The files of checkpoints: tensors are read one at a time, and a directory appears only when it is complete."""

import contextlib
import glob
import json
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .families import FAMILIES

TOKENIZER_SETTINGS = "tokenizer_config.json"
TOKENIZER_FILES = {name: None for family in FAMILIES.values() for name in family.vocabularies}
TOKENIZER_FILES |= dict.fromkeys(("merges.txt", "bpe.codes", "special_tokens_map.json", "added_tokens.json"))
TOKENIZER_FILES = (*TOKENIZER_FILES, TOKENIZER_SETTINGS)
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
MODULES = "modules.json"  # of sentence-transformers: the list of the encoder and the modules after it
MODULE_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
ROUTES = "router_config.json"  # of a module that contains other modules
ENCODERS = ("Transformer", "MLMTransformer")  # sparse encoders have the latter before release 5.4
NO_ENCODERS = {  # other types of the first module, and what they are
    "CLIPModel": ", which also reads images",
    "WordEmbeddings": ", a table of words",
    "StaticEmbedding": ", a table of tokens",
    "BoW": ", which counts words",
    "Router": ", which holds several models: convert each from its own folder",
    "Asym": ", which holds several models: convert each from its own folder",
}
ADAPTER = "adapter_config.json"  # the file of an adapter of PEFT
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LOCK, REPLACED = "lock", "replaced"  # names beside the directory that is written


class ConversionError(ValueError):
    """The conversion is impossible. The message says in one line which file, option or directory is wrong."""


def fetch_source(source: str, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a checkpoint: `source` itself, or a copy of the Hub's repository of that name in the cache.

    Raises:
        ConversionError: there is no such directory, and no such repository can be reached.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ConversionError(f"`revision` is for sources on the Hub, but {source} is a directory.")
        return Path(source)
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise ConversionError(f"{source} is neither a directory nor the name of a repository on the Hub.")
    wanted = ["config.json", ADAPTER, *TOKENIZER_FILES, MODULE_SETTINGS[1]]
    options = {"revision": revision, "token": token}
    try:
        folder = Path(snapshot_download(source, allow_patterns=["README.md", MODULES, MODULE_SETTINGS[0]], **options))
        encoder, modules = encoder_folder(folder), module_folders(folder)
        place = f"{encoder.name}/" if encoder != folder else ""
        for weights in (["model*.safetensors", SAFETENSORS_INDEX], ["pytorch_model*.bin", PICKLE_INDEX]):
            patterns = [place + name for name in wanted + weights]
            snapshot_download(source, allow_patterns=patterns, ignore_patterns=f"{place}*/*", **options)
            if any(encoder.glob(weights[0])):
                break
        if modules:
            snapshot_download(source, allow_patterns=[f"{module}/*" for module in modules], **options)
    except ConversionError:
        raise
    except Exception as error:  # network errors: each release of huggingface_hub has its own
        reason = one_line(error)
        raise ConversionError(f"{source} is not a directory, and loading it from the Hub failed: {reason}") from error
    return folder


def one_line(error: BaseException) -> str:
    """The message of an exception, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ConversionError: the file does not hold a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path} is damaged: it does not hold a JSON object.")
    return values


def write_json(path: Path, values: dict) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class SourceWeights:
    """The tensors of a checkpoint by name. A tensor is mapped from its file when it is needed, and freed with its last
    reference. Only pickles of PyTorch before 1.6 are read as a whole.

    Raises:
        ConversionError: there are no weights, or a file with weights is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.skipped: dict[str, int] = {}  # the number of first rows of a table that are left out
        self._pickled: dict[str, Tensor] = {}
        for path, names in find_weights(folder).items():
            found = self._open_pickle(path) if path.suffix == ".bin" else self._open_safetensors(path)
            missing = sorted(set(names) - set(found))
            if missing:
                raise ConversionError(f"{path} is damaged: it lacks {missing[0]}, which its index lists.")
            self.shapes.update(found)
            self.files.update(dict.fromkeys(found, path))

    def _open_safetensors(self, path: Path) -> dict[str, tuple[int, ...]]:
        try:
            with safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConversionError(f"{path} is damaged: {one_line(error)}") from error

    def _open_pickle(self, path: Path) -> dict[str, tuple[int, ...]]:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            reason = one_line(error).split(". ")[0]
            raise ConversionError(f"{path} is damaged, or holds more than weights: {reason}.") from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ConversionError(f"{path} is damaged: it is not a dictionary of tensors.")
        self._pickled.update(tensors)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.whole(name)
        return tensor[self.skipped[name] :] if name in self.skipped else tensor

    def whole(self, name: str) -> Tensor:
        """A tensor including the rows that `skip_rows` leaves out."""
        if name in self._pickled:
            return self._pickled[name].detach()
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def skip_rows(self, name: str, count: int) -> None:
        """Leave out the first rows of a table from now on."""
        rows, *others = self.shapes[name]
        self.skipped[name] = min(count, rows)
        self.shapes[name] = (rows - self.skipped[name], *others)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """The shape of `whole(name)`."""
        if name not in self.skipped:
            return self.shapes[name]
        rows, *others = self.shapes[name]
        return (rows + self.skipped[name], *others)


def read_checked(weights: SourceWeights, name: str) -> Tensor:
    """A tensor of the source; `ConversionError` unless it holds finite floating-point numbers."""
    tensor = weights[name]
    if not tensor.is_floating_point():
        raise ConversionError(f"{weights.files[name]} is damaged: {name} has the type {tensor.dtype}.")
    if not torch.stack(tensor.aminmax()).isfinite().all():  # unlike other ways, this copies nothing
        count = int((~tensor.isfinite()).sum())
        values = f"{count} of {tensor.numel()} values that are NaN or infinite"
        raise ConversionError(f"{weights.files[name]} is damaged: {name} has {values}.")
    return tensor


def find_weights(folder: Path) -> dict[Path, list[str]]:
    """The files with a checkpoint's weights, and the tensors that an index lists for each. If there are several kinds
    of files, the kind that transformers looks for first is used.

    Raises:
        ConversionError: there are no such files, or one that the index lists is missing.
    """
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return {folder / single: []}
        if (folder / index).is_file():
            shards: dict[Path, list[str]] = {}
            weight_map = read_json(folder / index).get("weight_map")
            if not weight_map or not isinstance(weight_map, dict):
                raise ConversionError(f"{folder / index} is damaged: it has no `weight_map`.")
            for name, file_name in weight_map.items():
                shards.setdefault(folder / str(file_name), []).append(name)
            for path in shards:
                if not path.is_file():
                    raise ConversionError(f"{path} is missing, but {index} lists it.")
            return shards
    others = [name for name in ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index") if (folder / name).exists()]
    hint = f" {others[0]} belongs to another framework: load and save it with PyTorch first." if others else ""
    raise ConversionError(f"{folder} has no weights: neither {SAFETENSORS} nor {PICKLE}, whole or in shards.{hint}")


def write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_size: str = "5GB") -> None:
    """Write tensors as safetensors, in several files with an index if `max_shard_size` requires it.

    Raises:
        OSError: the disk is full, or the folder is not writable.
    """
    shards = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file_name, names in tqdm(shards.filename_to_tensors.items(), "writing", unit="file", disable=None):
        path = folder / file_name
        path.touch()
        mode = path.stat().st_mode  # safetensors makes files that only their owner may read
        try:
            save_file({name: tensors[name].contiguous() for name in names}, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {one_line(error)}") from error
        path.chmod(mode)
    if shards.is_sharded:
        write_json(folder / SAFETENSORS_INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def copy_code(folder: Path) -> list[str]:
    """Copy the modeling file and all files that it imports, directly or indirectly; return their names."""
    package = Path(__file__).resolve().parent.parent
    names, waiting = [], ["modeling_lsg_albert"]
    while waiting:
        path = package / f"{waiting.pop()}.py"
        if path.name not in names:
            names.append(path.name)
            waiting += re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
            shutil.copyfile(path, folder / path.name)
    return sorted(names)


def copy_tokenizer(
    source: Path, target: Path, vocabularies: Mapping[str, str], max_length: int, named: str | None = None
) -> str | None:
    """Copy the tokenizer's files. Only its maximum length and the name of its class change.

    Only ALBERT's class stays in tokenizer_config.json. If that file names a class other than the model's, transformers
    5.0 makes a generic tokenizer. It does use the class that config.json names.

    Args:
        source, target: directories.
        vocabularies: files that hold a vocabulary, and the class that reads each if no other file names one.
        max_length: tokens of the longest text.
        named: the class in the source's config.json.

    Returns:
        The class, or None if there is no tokenizer.
    """
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    classes = [tokenizer_class for name, tokenizer_class in vocabularies.items() if name in found]
    if not classes:
        return None
    for name in found:
        shutil.copyfile(source / name, target / name)
    settings = read_json(source / TOKENIZER_SETTINGS) if TOKENIZER_SETTINGS in found else {}
    tokenizer_class = str(settings.pop("tokenizer_class", None) or named or classes[0])
    if tokenizer_class.startswith("Albert"):
        settings["tokenizer_class"] = tokenizer_class
    write_json(target / TOKENIZER_SETTINGS, {**settings, "model_max_length": max_length})
    return tokenizer_class


def read_modules(source: Path) -> list[dict[str, Any]]:
    """The modules of a sentence-transformers model, with the encoder first; none for other models.

    Raises:
        ConversionError: modules.json is damaged, or names a folder outside the model or an unsupported module.
    """
    path = source / MODULES
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        if not modules or not all(isinstance(module[name], str) for module in modules for name in ("path", "type")):
            raise TypeError
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{path} is damaged: it is not a list of modules with a `path` and a `type`.") from error
    reason = why_not_carried(source, modules)
    if reason is not None:
        raise ConversionError(f"{path} cannot be converted: {reason}.")
    return modules


def why_not_carried(source: Path, modules: list[dict[str, Any]]) -> str | None:
    """Why a list of modules cannot be converted; None if it can."""
    outside = [module["path"] for module in modules if not re.fullmatch(r"[\w-][\w.-]*|", module["path"])]
    if outside:
        return f"{outside[0]!r} is not a folder in the model"
    types = [module["type"] for module in modules]
    for path in (source / module["path"] / ROUTES for module in modules):
        types += read_json(path).get("types", {}).values() if path.is_file() else []
    own = [name for name in types if not name.startswith("sentence_transformers.")]
    if own:
        return f"the code of {own[0]} cannot be copied. To convert the encoder alone, remove {MODULES}"
    first = types[0].rpartition(".")[2]
    if first not in ENCODERS:
        return f"it begins with {first}{NO_ENCODERS.get(first, '')}; it must begin with a Transformer"
    return None


def encoder_folder(source: Path) -> Path:
    """The encoder's folder: the directory itself, or a folder in it as in early sentence-transformers models.

    Raises:
        ConversionError: modules.json is wrong, or there is an adapter instead of a model.
    """
    modules = read_modules(source)
    folder = source / modules[0]["path"] if modules else source
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise ConversionError(
            f"{folder} has an adapter of PEFT for {base}, not a whole model. Load it with peft's AutoPeftModel, call "
            "`merge_and_unload()`, save the returned model, and convert that."
        )
    return folder


def module_folders(source: Path) -> list[str]:
    """The folders of the modules after the encoder; none if the model is not from sentence-transformers."""
    return [module["path"] for module in read_modules(source)[1:] if module["path"]]


def copy_modules(source: Path, target: Path, max_length: int) -> None:
    """Copy all parts of a sentence-transformers model but its encoder, and set its maximum length.

    Args:
        source, target: directories; in the target, the encoder has no folder of its own.
        max_length: tokens of the longest text.
    """
    modules = read_modules(source)
    if not modules:
        return
    text = json.dumps([modules[0] | {"path": ""}, *modules[1:]], indent=2)
    (target / MODULES).write_text(text + "\n", encoding="utf-8")
    for folder in module_folders(source):
        if (source / folder).is_dir():  # a module without settings, such as the normalization, may have none
            shutil.copytree(source / folder, target / folder)
    for folder in {source, encoder_folder(source)}:
        for path in (path for pattern in MODULE_SETTINGS for path in folder.glob(pattern)):
            write_json(target / path.name, with_length(read_json(path), max_length))


def with_length(settings: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Settings of sentence-transformers with another maximum length, which they may have on any level."""
    changed = dict(settings)
    for name, value in settings.items():
        if isinstance(value, dict):
            changed[name] = with_length(value, max_length)
        elif isinstance(value, int) and name in ("max_seq_length", "model_max_length", "max_length"):
            changed[name] = max_length
    return changed


@contextlib.contextmanager
def whole_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new directory to write into. At the end it becomes `target`; after an exception it is removed.

    The new directory lies in a hidden directory beside `target`. An old `target` is moved there too. A killed process
    leaves only the hidden directory. The next call removes it, and puts the old `target` back if it is still there.

    Raises:
        ConversionError: `target` exists, and `overwrite` is False or not safe.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    check_target(target, overwrite)
    workshop = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    workshop.mkdir()
    try:
        with FileLock(workshop / LOCK):
            partial = workshop / "new"
            partial.mkdir()
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
            check_target(target, overwrite)  # someone else may have created it meanwhile
            if target.exists():
                target.rename(workshop / REPLACED)
            partial.rename(target)
            sync(target.parent)
    finally:
        clear(workshop, target)


def recover(target: Path) -> None:
    """Clean up after killed conversions to `target`. The directories of running conversions are left alone."""
    for workshop in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        with contextlib.suppress(Timeout, FileNotFoundError), FileLock(workshop / LOCK, timeout=0):
            clear(workshop, target)


def clear(workshop: Path, target: Path) -> None:
    """Remove the hidden directory of a conversion. The old target is put back unless there is a new one."""
    replaced = workshop / REPLACED
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    shutil.rmtree(workshop, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists; with `overwrite`, refuse only a target that is not a model."""
    if not target.exists():
        return
    if not overwrite:
        raise ConversionError(f"{target} exists. Choose another target, or replace this one with `--overwrite`.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise ConversionError(f"{target} is not replaced: it is not a model's directory, it has no config.json.")


def sync(path: Path) -> None:
    """Make sure that a file or directory is on the disk, not only in the system's memory."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
