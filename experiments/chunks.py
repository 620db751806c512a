"""Documents in chunks: cut them, write a row for each chunk, and merge the predictions for chunks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from pretraining.training_support import write_atomically


def cut_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[str]]:
    """The consecutive chunks of each text that a model with that maximum length can read. Where a cut is inside a word,
    the tokens of its halves may differ from those of the word."""
    options = {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    found = tokenizer(list(texts), truncation=True, max_length=max_length, **options)
    chunks = [[] for _ in texts]
    for number, offsets in zip(found["overflow_to_sample_mapping"], found["offset_mapping"], strict=True):
        start = min((start for start, end in offsets if end), default=0)  # special tokens end at 0
        chunks[number].append(texts[number][start : max(end for _, end in offsets)])
    return chunks


def write_chunks(
    splits: dict[str, Sequence[dict]], tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path
) -> tuple[list[str], list[list[str]]]:
    """Write each split as JSON lines, with a row for each chunk that has the label of its document. Returns the
    options that make `examples/classify.py` read these files, and the chunks of the split "test"."""
    options = ["--text_field", "text", "--label_field", "label"]
    for split, rows in splits.items():
        chunks = cut_texts([row["text"] for row in rows], tokenizer, max_length)
        pairs = [(chunk, row["label"]) for row, cut in zip(rows, chunks, strict=True) for chunk in cut]
        lines = [json.dumps({"text": chunk, "label": label}) + "\n" for chunk, label in pairs]
        path = folder / f"{split}-chunks-{max_length}.jsonl"
        write_atomically(path, "".join(lines).encode())
        options += [f"--{split}", str(path)]
    return options, chunks


def merge_predictions(lines: Sequence[dict], chunks: Sequence[Sequence[str]]) -> list[dict]:
    """The prediction for each document, by the mean of its chunks' logits: the label with the largest mean, or, with
    several labels, those with a positive one.

    Raises:
        ValueError: there is not one line for each chunk.
    """
    numbers = [number for number, cut in enumerate(chunks) for _ in cut]
    documents = defaultdict(list)
    for number, line in zip(numbers, lines, strict=True):
        documents[number].append(line)
    merged = []
    for found in documents.values():
        scores = {name: fmean(line["scores"][name] for line in found) for name in found[0]["scores"]}
        reference = found[0]["reference"]
        positive = [name for name, score in scores.items() if score > 0]
        prediction = positive if isinstance(reference, list) else max(scores, key=scores.get)
        merged.append({"reference": reference, "prediction": prediction, "scores": scores})
    return merged
