"""Documents as token ids, which are computed once per source and kept on disk, and cut into training pieces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pretraining.corpus import CorpusError, fingerprint, read_documents
from pretraining.training_support import write_atomically


@dataclass(frozen=True)
class TokenizedDocuments:
    """Token ids of many documents in one array, without special tokens.

    Args:
        tokens: shape ``(total,)``.
        offsets: shape ``(documents + 1,)``; document ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``.
        ids: the documents' ids.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ids: list[str]


def tokenize_document(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize paragraph by paragraph: line breaks are word breaks, and short texts keep memory low."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return []
    return [token for ids in tokenizer(lines, add_special_tokens=False)["input_ids"] for token in ids]


def tokenize_source(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> TokenizedDocuments:
    """Tokenize every document of a source, see `pretraining.corpus`."""
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    arrays, ids = [], []
    for doc_id, text in tqdm(read_documents([source]), desc=f"tokenizing {Path(source).name}", unit="document"):
        arrays.append(np.asarray(tokenize_document(text, tokenizer), dtype=dtype))
        ids.append(doc_id)
    if not sum(map(len, arrays)):
        raise CorpusError(f"{source}: no text")
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return TokenizedDocuments(np.concatenate(arrays), offsets, ids)


def _cache_key(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A key that changes with the vocabulary and with the documents."""
    key = [fingerprint(source), sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def load_tokens(source: str | Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenizedDocuments:
    """The tokens of a source. They are read from the cache in ``folder``, or computed and saved there."""
    stem = folder / f"{Path(source).name}-{_cache_key(source, tokenizer)}"
    tokens, index = Path(f"{stem}.tokens.npy"), Path(f"{stem}.json")
    if not index.is_file():
        documents = tokenize_source(source, tokenizer)
        array = BytesIO()
        np.save(array, documents.tokens)
        # never in place: another process that filled the cache at the same time has already mapped the file
        write_atomically(tokens, array.getvalue())
        content = {"offsets": documents.offsets.tolist(), "ids": documents.ids}
        write_atomically(index, json.dumps(content).encode())  # last: its presence shows a complete cache
    content = json.loads(index.read_text())
    return TokenizedDocuments(np.load(tokens, mmap_mode="r"), np.asarray(content["offsets"]), content["ids"])


def piece_starts(length: int, size: int) -> np.ndarray:
    """Where a document of ``length`` tokens is cut into pieces of at most ``size`` tokens, shape ``(pieces,)``.

    The starts are spread evenly and neighbours overlap a little, so that a document of at least ``size`` tokens
    gives full pieces only. Then there is no padding, and the model needs no mask.
    """
    if length == 0:
        return np.zeros(0, dtype=np.int64)
    pieces = -(-length // size)
    return np.linspace(0, max(length - size, 0), pieces).round().astype(np.int64)


def cut_pieces(documents: TokenizedDocuments, size: int, keep: Iterable[bool]) -> np.ndarray:
    """``(start, end)`` of every piece of the kept documents, shape ``(pieces, 2)``. No piece is in two documents."""
    cuts = [np.zeros((0, 2), dtype=np.int64)]
    for begin, end, kept in zip(documents.offsets[:-1], documents.offsets[1:], keep, strict=True):
        if kept:
            starts = begin + piece_starts(int(end - begin), size)
            cuts.append(np.stack([starts, np.minimum(starts + size, end)], axis=1))
    return np.concatenate(cuts)
