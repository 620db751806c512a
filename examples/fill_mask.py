"""Fill the masked words of a long document.

    python examples/fill_mask.py examples/long_document.txt
    python examples/fill_mask.py my_document.txt --words 10 --top-k 3

If the text has no [MASK], the script masks some words spread over the text, and shows them beside the predictions. If
--model is a directory, nothing leaves this machine. By default, --model is the repository that holds this file.
"""

import argparse
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 6  # words shown on each side of a masked one


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("document", type=Path, help="a text file in UTF-8")
    parser.add_argument("--model", default=str(ROOT), help="directory or Hub id; its code is run")
    parser.add_argument("--top-k", type=int, default=5, help="predictions per masked word")
    parser.add_argument("--words", type=int, default=5, help="words to mask if the text has no [MASK]")
    args = parser.parse_args(argv)
    for name in ("top_k", "words"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def mask_words(text: str, count: int, mask_token: str) -> tuple[str, list[str]]:
    """Mask `count` words of four or more letters, spread evenly over the text. Return text and words."""
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
    from transformers import pipeline  # takes seconds: first check the arguments

    try:
        fill_mask = pipeline("fill-mask", model=args.model, trust_remote_code=True)
    except (OSError, ValueError) as error:
        print(f"fill_mask: cannot load --model {args.model}: {error}", file=sys.stderr)
        return 1

    tokenizer, limit = fill_mask.tokenizer, fill_mask.model.config.max_position_embeddings
    answers: list[str] = []
    if tokenizer.mask_token not in text:
        text, answers = mask_words(text, args.words, tokenizer.mask_token)
    shown = contexts(text, tokenizer.mask_token)
    if not shown:
        print(f"fill_mask: {args.document} has no {tokenizer.mask_token} and no word to mask", file=sys.stderr)
        return 1
    cut = {"truncation": True, "max_length": limit}
    ids, length = tokenizer(text, **cut)["input_ids"], len(tokenizer(text, verbose=False)["input_ids"])
    masked = [place for place, token in enumerate(ids, start=1) if token == tokenizer.mask_token_id]
    progress(f"reading {len(ids):,} of {length:,} tokens")
    began = time.perf_counter()
    guesses = fill_mask(text, top_k=args.top_k, tokenizer_kwargs=cut) if masked else []
    seconds = time.perf_counter() - began
    progress("done")

    print(f"{args.document.name}: {len(ids):,} tokens in one pass, {seconds:.2f} s, {len(masked)} masked")
    guesses = [guesses] if len(masked) == 1 else guesses  # a single mask gives a flat list
    for number, (place, context) in enumerate(zip(masked, shown, strict=False)):
        print(f"\ntoken {place:,}: ... {context} ...")
        if answers:
            print(f"    masked word: {answers[number]}")
        print("    " + "   ".join(f"{guess['token_str'].strip()} {guess['score']:.1%}" for guess in guesses[number]))
    if len(masked) < len(shown):
        print(f"\n{len(shown) - len(masked)} more masks lie beyond the {len(ids):,} tokens that the model reads.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
