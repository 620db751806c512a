"""Measure whether a model uses distant text: the first half of a document, or a name that was stated at the top.

    python -m pretraining.far_text CORPUS ... --exclude-ids HELD_OUT ... --model . --output runs/far_text

Both measurements compare the same predictions with and without the distant text, for every selection of sparse tokens.
The attention mask hides the first half; the statement with the name is left out. The script writes ``OUTPUT.json``
after every row, and ``OUTPUT.md`` at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import numpy as np
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from lsg_albert.lsg_pattern import SPARSITY_TYPES, LSGPattern
from pretraining.corpus import CorpusError, read_ids
from pretraining.extrapolation import SPECIAL, Segments, choose_segments, difference, evaluate, hide, metrics
from pretraining.masking import IGNORED, Masker
from pretraining.token_cache import load_tokens
from pretraining.training_support import describe_machine, write_atomically

STATEMENT, QUESTION = "The name of the old captain was {}.", "Remember that the name of the old captain was {}."
NAMES = "james mary george anna henry alice charles jane william robert edward emma thomas arthur john peter".split()


def second_half(segments: Segments, window: int) -> Segments:
    """The same text, but only tokens at least `window` tokens into its second half are predicted."""
    labels = segments.labels.copy()
    labels[:, : labels.shape[1] // 2 + window] = IGNORED
    return dataclasses.replace(segments, labels=labels)


def needle_segments(fillers: np.ndarray, tokenizer: PreTrainedTokenizerBase, stated: bool) -> Segments:
    """Texts of the fillers' length that end with a masked name; with `stated`, they begin with that name.

    Args:
        fillers: token ids, shape ``(segments, length)``.

    Raises:
        ValueError: a name is not a single piece of the vocabulary.
    """
    hidden, labels = [], []
    for index, filler in enumerate(fillers):
        name = NAMES[index % len(NAMES)]
        statement, question = (
            tokenizer(sentence.format(word), add_special_tokens=False)["input_ids"]
            for sentence, word in ((STATEMENT, name), (QUESTION, tokenizer.mask_token))
        )
        answer = tokenizer(name, add_special_tokens=False)["input_ids"]
        if len(answer) != 1:
            raise ValueError(f"the name {name!r} must be one piece of the vocabulary, but is {len(answer)} pieces.")
        text = np.array([*(statement if stated else []), *filler])[: len(filler) - len(question)]
        hidden.append(np.array([*text, *question]))
        labels.append(np.where(hidden[-1] == tokenizer.mask_token_id, answer[0], IGNORED))
    return Segments(np.stack(hidden), np.stack(labels))


def compare(with_text: np.ndarray, without: np.ndarray) -> dict[str, float]:
    """The metrics with and without the distant text, and how much this text changes the loss."""
    sides = {"with": metrics(with_text), "without": metrics(without)}
    row = {f"{name}_{side}": value for side, values in sides.items() for name, value in values.items()}
    return row | difference(with_text, without)


def format_table(report: dict) -> str:
    lines = []
    for name, title in (
        ("half", "the second half, with and without the first"),
        ("needle", "a name stated at the top"),
    ):
        lines += [
            f"### Predicting {title}",
            "",
            "| selection | loss with | loss without | difference (standard error) | top 1 with | top 1 without |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in report[name]:
            lines.append(
                "| {selection} | {loss_with:.3f} | {loss_without:.3f} | {difference:+.3f} ({standard_error:.3f}) | "
                "{top1_with:.1%} | {top1_without:.1%} |".format_map(row)
            )
        lines.append("")
    facts = (
        f"{report['segments']} held-out segments of {report['length']:,} tokens; {report['half'][0]['masked_tokens_with']:,} "
        f"masked tokens in second halves; seed {report['seed']}; float32 on {report['on']}; transformers "
        f"{report['transformers']}, PyTorch {report['torch']}."
    )
    return "\n".join(lines) + f"\n{facts}\n\n```text\n{report['command']}\n```\n"


def run(args: argparse.Namespace, command: str) -> dict:
    """Measure every selection. The report is written after each selection."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    corpora = [load_tokens(path, tokenizer, args.cache or args.output.parent / "tokens") for path in args.corpus]
    tokens = choose_segments(corpora, read_ids(args.exclude_ids), args.length - SPECIAL, args.segments, args.seed)
    segments = hide(tokens, Masker.for_tokenizer(tokenizer), args.seed)
    report = {"command": command, "seed": args.seed, "segments": args.segments, "length": args.length}
    report |= describe_machine() | {"half": [], "needle": []}
    ids = tokenizer.cls_token_id, tokenizer.sep_token_id
    needles = [needle_segments(tokens, tokenizer, stated) for stated in (True, False)]
    for selection in SPARSITY_TYPES:
        model = AutoModelForMaskedLM.from_pretrained(
            args.model, trust_remote_code=True, sparsity_type=selection
        ).eval()
        # The local window of a token begins less than `full_length` tokens before it.
        scored = second_half(segments, LSGPattern.from_config(model.config).full_length)
        sides = [evaluate(model, scored, 1, *ids, unseen) for unseen in (0, tokens.shape[1] // 2)]
        report["half"].append({"selection": selection} | compare(*sides))
        sides = [evaluate(model, needle, 1, *ids) for needle in needles]
        report["needle"].append({"selection": selection} | compare(*sides))
        print(report["half"][-1], report["needle"][-1], file=sys.stderr, flush=True)
        write_atomically(args.output.with_suffix(".json"), (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(args.output.with_suffix(".md"), format_table(report).encode())
    return report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("corpus", nargs="+", help="JSON lines (also .gz), text files or folders, or data sets")
    parser.add_argument("--exclude-ids", nargs="+", required=True, help="files with one held-out document id per line")
    parser.add_argument("--model", required=True, help="directory of an LSG-ALBERT with its tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="path of the reports, without .json and .md")
    parser.add_argument("--cache", type=Path, help="folder for tokenized text; None: the folder tokens beside OUTPUT")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a segment, [CLS] and [SEP] included")
    parser.add_argument("--segments", type=int, default=64, help="number of segments, drawn evenly from the corpora")
    parser.add_argument(
        "--seed", type=int, default=12_345, help="random seed for the choice of text and masked tokens"
    )
    args = parser.parse_args(argv)
    if args.length <= SPECIAL or args.segments < 1:
        parser.error(f"--length must be above {SPECIAL}, and --segments must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = shlex.join(["python", "-m", "pretraining.far_text", *(sys.argv[1:] if argv is None else argv)])
    try:
        report = run(args, command)
    except (CorpusError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
