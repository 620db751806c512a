"""Fill the masked words of a long document.

    python examples/fill_mask.py examples/long_document.txt
    python examples/fill_mask.py my_document.txt --words 10 --top-k 3

Where the text has no [MASK], words spread over it are masked first, and shown beside the predictions. Everything stays
on this machine when --model is a directory; by default it is the repository that this file stands in.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 6  # words shown on each side of a masked one


class Masked(NamedTuple):
    """A masked token: its index among the tokens, and the words that may fill it with their probabilities."""

    index: int
    predictions: list[tuple[str, float]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, help="a text file in UTF-8")
    parser.add_argument("--model", default=str(ROOT), help="directory or Hub id (default: this repository)")
    parser.add_argument("--top-k", type=int, default=5, help="predictions per masked word (default: 5)")
    parser.add_argument("--words", type=int, default=5, help="words to mask where the text has no [MASK] (default: 5)")
    args = parser.parse_args(argv)
    for name in ("top_k", "words"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def mask_words(text: str, count: int, mask_token: str) -> tuple[str, list[str]]:
    """Mask `count` words of four letters or more, evenly spread over the text: the text, and the words in order."""
    words = list(re.finditer(r"\b[a-z]{4,}\b", text))
    count = min(count, len(words))
    chosen = [words[(2 * i + 1) * len(words) // (2 * count)] for i in range(count)]
    for word in reversed(chosen):
        text = text[: word.start()] + mask_token + text[word.end() :]
    return text, [word.group() for word in chosen]


def contexts(text: str, mask_token: str) -> list[str]:
    """The words around each mask."""
    parts = text.split(mask_token)
    return [
        " ".join([*before.split()[-CONTEXT:], mask_token, *after.split()[:CONTEXT]])
        for before, after in zip(parts, parts[1:], strict=False)
    ]


@torch.no_grad()
def fill(model, tokenizer, text: str, top_k: int) -> tuple[int, list[Masked]]:
    """The number of tokens read, and the predictions for each mask among them."""
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=model.config.max_position_embeddings)
    logits = model(**inputs).logits[0]
    found = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    masked = []
    for index in found:
        scores, ids = logits[index].softmax(-1).topk(min(top_k, logits.shape[-1]))
        words = [tokenizer.decode([token_id]).strip() for token_id in ids.tolist()]
        masked.append(Masked(index, list(zip(words, scores.tolist(), strict=True))))
    return inputs["input_ids"].shape[1], masked


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.perf_counter()

    def progress(message: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {message}", file=sys.stderr, flush=True)

    try:
        text = args.document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        print(f"fill_mask: cannot read {args.document}: {error}", file=sys.stderr)
        return 1
    progress(f"loading the model from {args.model}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForMaskedLM.from_pretrained(args.model, trust_remote_code=True).eval()
    except (OSError, ValueError) as error:
        print(f"fill_mask: cannot load --model {args.model}: {error}", file=sys.stderr)
        return 1

    answers: list[str] = []
    if tokenizer.mask_token not in text:
        text, answers = mask_words(text, args.words, tokenizer.mask_token)
    shown = contexts(text, tokenizer.mask_token)
    if not shown:
        print(f"fill_mask: {args.document} has no {tokenizer.mask_token} and no word to mask", file=sys.stderr)
        return 1
    length = len(tokenizer(text, verbose=False)["input_ids"])
    progress(f"reading {min(length, model.config.max_position_embeddings):,} of {length:,} tokens")
    began = time.perf_counter()
    read, masked = fill(model, tokenizer, text, args.top_k)
    seconds = time.perf_counter() - began
    progress("done")

    print(f"{args.document.name}: {read:,} tokens in one pass, {seconds:.2f} s, {len(masked)} masked")
    for number, (place, context) in enumerate(zip(masked, shown, strict=False)):
        print(f"\ntoken {place.index + 1:,}: ... {context} ...")
        if answers:
            print(f"    masked word: {answers[number]}")
        print("    " + "   ".join(f"{word} {score:.1%}" for word, score in place.predictions))
    if len(masked) < len(shown):
        print(f"\n{len(shown) - len(masked)} more masks lie beyond the {read:,} tokens that the model reads.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
