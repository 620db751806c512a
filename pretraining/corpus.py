"""Reading the training text: JSON lines (plain or gzip) with "id" and "text" fields, and lists of held-out ids."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


class CorpusError(ValueError):
    """The training text cannot be read or holds nothing to train on; the message is one line for the user."""


def read_ids(paths: Iterable[str | Path]) -> set[str]:
    """The ids in text files that hold one id per line."""
    ids: set[str] = set()
    for path in map(Path, paths):
        if not path.is_file():
            raise CorpusError(f"no such id list: {path}")
        ids.update(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return ids


def read_documents(paths: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """Yield ``(id, text)`` for every document, in file order."""
    for path in map(Path, paths):
        if not path.is_file():
            raise CorpusError(f"no such corpus file: {path}")
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            yield from _parse_lines(path, lines)


def _parse_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            yield str(row.get("id", f"{path.name}:{number}")), row["text"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f'{path}, line {number}: not a JSON object with a "text" field ({error})') from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that no reader, and no kill in between, ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
