"""Reading the training text from files, folders or data sets, and choosing the documents that are held out.

A source is a JSON lines file (plain or gzip) with "text" fields and optional "id" fields; a text file with one
document; a folder of text files; or a name or folder for `datasets.load_dataset`, ``NAME`` or ``NAME:CONFIGURATION``,
with a "text" column in its training split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

LINES = (".jsonl", ".json", ".gz")


class CorpusError(ValueError):
    """The training text cannot be read or is empty. The message is one line for the user."""


def read_ids(paths: Iterable[str | Path]) -> set[str]:
    """The ids in text files that hold one id per line."""
    ids: set[str] = set()
    for path in map(Path, paths):
        if not path.is_file():
            raise CorpusError(f"no such id list: {path}")
        ids.update(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return ids


def is_drawn(doc_id: str, share: float) -> bool:
    """Whether a document is in a share of all documents, from 0 to 1. Its id alone decides, so the share is fixed."""
    return int.from_bytes(hashlib.sha256(doc_id.encode()).digest()[:8], "big") < share * 2**64


def read_documents(sources: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """Yield ``(id, text)`` for every document, in the sources' order."""
    for source in map(str, sources):
        path, texts = Path(source), text_files(source)
        try:
            for file in texts:
                name = file.relative_to(path).as_posix() if path.is_dir() else file.name
                yield name, file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{file}: not UTF-8 ({error})") from error
        if path.is_file() and not texts:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
                yield from _parse_lines(path, lines)
        elif not texts:
            for number, row in enumerate(load_split(source)):
                yield str(row.get("id", f"train:{number}")), row["text"]


def fingerprint(source: str | Path) -> list:
    """A value that changes when the documents of a source change: the files' names, sizes and times."""
    path = Path(source)
    files = text_files(source) or ([path] if path.is_file() else None)
    if files is None:
        split = load_split(str(source))
        return [str(source), split.num_rows, [file["filename"] for file in split.cache_files]]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def text_files(source: str | Path) -> list[Path]:
    """The text file, or all text files below the folder; none for other kinds of sources."""
    path = Path(source)
    if path.is_dir():
        return sorted(path.rglob("*.txt"))
    return [path] if path.suffix == ".txt" and path.is_file() else []


def load_split(source: str):
    """The training split of a data set of the `datasets` library."""
    if Path(source).suffix in (*LINES, ".txt"):
        raise CorpusError(f"no such corpus file: {source}")
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f'{source} is not a file, and data sets need `datasets`: pip install ".[train]"') from error
    name, _, config = source.partition(":")
    try:
        split = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # loaders raise many kinds of errors
        reason = " ".join(str(error).split())
        raise CorpusError(f"{source}: neither a file nor a data set that could be loaded ({reason})") from error
    if "text" not in split.column_names:
        raise CorpusError(f'{source}: no "text" column, but {", ".join(split.column_names)}')
    return split


def _parse_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield str(row.get("id", f"{path.name}:{number}")), row["text"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f'{path}, line {number}: not a JSON object with a "text" field ({error})') from error
