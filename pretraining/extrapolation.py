"""Measure how well ALBERT reads long texts: as it is, with stretched positions, converted, and trained further.

    python -m pretraining.extrapolation CORPUS ... --exclude-ids HELD_OUT ... --albert runs/b/final \\
        --converted runs/extended --trained . --output runs/extrapolation

Every row of the table reads the same held-out text with the same words masked. The text is cut into segments, which 1,
2, 4 or 8 pieces fill exactly. So rows differ only in how far each token can see. The script writes ``OUTPUT.json``
after every row, and ``OUTPUT.md`` at the end.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AlbertForMaskedLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from lsg_albert.lsg_pattern import SPARSITY_TYPES
from pretraining.corpus import CorpusError, read_ids
from pretraining.masking import IGNORED, Masker
from pretraining.pretrain_mlm import masked_lm_forward, score
from pretraining.token_cache import TokenizedDocuments, load_tokens
from pretraining.training_support import describe_machine, write_atomically

PIECES = (8, 4, 2, 1)  # numbers of pieces that a segment is cut into
SPECIAL = 2  # special tokens of each piece: [CLS] and [SEP]


@dataclass(frozen=True)
class Row:
    """A model, how it is loaded, and the number of pieces that it reads."""

    name: str
    path: str
    pieces: int
    selection: str | None = None  # None: transformers' own ALBERT, with full attention

    def load(self) -> PreTrainedModel:
        if self.selection is None:
            return AlbertForMaskedLM.from_pretrained(self.path).eval()
        options = {"trust_remote_code": True, "sparsity_type": self.selection}
        return AutoModelForMaskedLM.from_pretrained(self.path, **options).eval()


@dataclass(frozen=True)
class Segments:
    """Text with some tokens hidden.

    Args:
        hidden: shape ``(segments, length)``, with masks or other tokens in place of the chosen tokens.
        labels: shape ``(segments, length)``, the chosen tokens, -100 elsewhere.
    """

    hidden: np.ndarray
    labels: np.ndarray


def segment_length(short: int) -> int:
    """The tokens of a segment: ``PIECES[0]`` pieces of ``short`` tokens, without their [CLS] and [SEP]."""
    return PIECES[0] * (short - SPECIAL)


def segment_starts(documents: TokenizedDocuments, held_out: set[str], length: int) -> list[np.ndarray]:
    """For each held-out document, the starts of all whole segments that fit into it."""
    bounds = zip(documents.ids, documents.offsets[:-1], documents.offsets[1:], strict=True)
    return [np.arange(begin, end - length + 1, length) for name, begin, end in bounds if name in held_out]


def choose_segments(
    corpora: Iterable[TokenizedDocuments], held_out: set[str], length: int, number: int, seed: int
) -> np.ndarray:
    """`number` segments of `length` tokens, drawn evenly from the corpora, shape ``(number, length)``.

    Raises:
        CorpusError: the held-out documents do not hold so many.
    """
    rng = np.random.default_rng((seed, 0))
    corpora = list(corpora)
    shares = np.diff(np.linspace(0, number, len(corpora) + 1).round().astype(int))
    chosen = []
    for documents, share in zip(corpora, shares, strict=True):
        starts = np.concatenate([np.zeros(0, dtype=np.int64), *segment_starts(documents, held_out, length)])
        if len(starts) < share:
            raise CorpusError(f"the held-out documents hold {len(starts)} segments of {length} tokens, not {share}")
        chosen += [documents.tokens[start : start + length] for start in rng.permutation(starts)[:share]]
    return np.stack(chosen).astype(np.int64)


def hide(tokens: np.ndarray, masker: Masker, seed: int) -> Segments:
    """Choose and hide tokens of segments of shape ``(segments, length)``, the same ones for every model."""
    hidden, labels = np.empty_like(tokens), np.empty_like(tokens)
    for index, segment in enumerate(tokens):
        rng = np.random.default_rng((seed, 1, index))
        chosen = masker.choose(segment, rng)
        hidden[index] = masker.hide(segment, chosen, rng)
        labels[index] = np.where(chosen, segment, IGNORED)
    return Segments(hidden, labels)


def cut(segment: np.ndarray, pieces: int, first: int, last: int) -> Tensor:
    """A segment ``(length,)`` as ``(pieces, length / pieces + 2)``, each piece between `first` and `last`."""
    return torch.from_numpy(
        np.pad(segment.reshape(pieces, -1), ((0, 0), (1, 1)), constant_values=((0, 0), (first, last)))
    )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, segments: Segments, pieces: int, cls_id: int, sep_id: int, unseen: int = 0
) -> np.ndarray:
    """Sums of loss, top-1 and top-5 hits, and the number of targets, of each segment: shape ``(segments, 4)``.

    Args:
        unseen: the number of tokens at the start of each piece, after [CLS], that the attention mask hides.
    """
    sums = []
    for hidden, labels in zip(segments.hidden, segments.labels, strict=True):
        input_ids, targets = cut(hidden, pieces, cls_id, sep_id), cut(labels, pieces, IGNORED, IGNORED)
        mask = torch.ones_like(input_ids) if unseen else None
        if unseen:
            mask[:, 1 : 1 + unseen] = 0
        outputs = masked_lm_forward(model, input_ids, targets, attention_mask=mask)
        sums.append(score(outputs["logits"], outputs["targets"]))
    return torch.stack(sums).numpy()


def metrics(sums: np.ndarray) -> dict[str, float]:
    """The mean loss and the share of hits over all targets."""
    loss, top1, top5, targets = sums.sum(0).tolist()
    return {"loss": loss / targets, "top1": top1 / targets, "top5": top5 / targets, "masked_tokens": int(targets)}


def difference(sums: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The difference in loss from the reference row, with its standard error over the segments."""
    mean = (sums[:, 0].sum() - reference[:, 0].sum()) / sums[:, 3].sum()
    residual = sums[:, 0] - reference[:, 0] - mean * sums[:, 3]
    error = np.sqrt((residual**2).sum() * len(sums) / max(len(sums) - 1, 1)) / sums[:, 3].sum()
    return {"difference": float(mean), "standard_error": float(error)}


def table_rows(albert: str, converted: str, trained: str | None) -> list[Row]:
    """(a) ALBERT at its length, (b) stretched, (c) converted with every selection, (d) after training."""
    rows = [
        Row("a: ALBERT, as trained", albert, PIECES[0]),
        Row("b: ALBERT, positions stretched, full attention", converted, PIECES[-1]),
    ]
    rows += [Row("c: converted", converted, pieces, kind) for kind in SPARSITY_TYPES for pieces in PIECES[1:]]
    if trained is not None:
        rows += [Row("d: converted and trained on", trained, pieces, "norm") for pieces in PIECES]
    return rows


def format_table(report: dict) -> str:
    lines = [
        "| model | selection | tokens at a time | loss | against a (standard error) | top 1 | top 5 | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        lines.append(
            "| {name} | {selection} | {tokens:,} | {loss:.3f} | {difference:+.3f} ({standard_error:.3f}) | {top1:.1%} | "
            "{top5:.1%} | {seconds:.0f} |".format_map(row | {"selection": row["selection"] or "-"})
        )
    facts = (
        f"{report['segments']} held-out segments of {report['segment_length']:,} tokens, "
        f"{report['rows'][0]['masked_tokens']:,} masked tokens, the same in every row; seed {report['seed']}; "
        f"float32 on {report['on']}; transformers {report['transformers']}, PyTorch {report['torch']}; "
        f"{sum(row['seconds'] for row in report['rows']):,.0f} s in all."
    )
    return "\n".join(lines) + f"\n\n{facts}\n\n```text\n{report['command']}\n```\n"


def run(args: argparse.Namespace, command: str) -> dict:
    """Evaluate all rows. The report is written after each row."""
    tokenizer = AutoTokenizer.from_pretrained(args.albert)
    folder = args.cache or args.output.parent / "tokens"
    corpora = [load_tokens(path, tokenizer, folder) for path in args.corpus]
    length = segment_length(args.short)
    tokens = choose_segments(corpora, read_ids(args.exclude_ids), length, args.segments, args.seed)
    segments = hide(tokens, Masker.for_tokenizer(tokenizer), args.seed)
    report = {
        "command": command,
        "seed": args.seed,
        "segments": args.segments,
        "segment_length": length,
        **describe_machine(),
        "rows": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    reference = None
    for row in table_rows(args.albert, args.converted, args.trained):
        started = time.perf_counter()
        sums = evaluate(row.load(), segments, row.pieces, tokenizer.cls_token_id, tokenizer.sep_token_id)
        reference = sums if reference is None else reference
        tokens_read = {"tokens": length // row.pieces + SPECIAL, "seconds": time.perf_counter() - started}
        report["rows"].append(asdict(row) | tokens_read | metrics(sums) | difference(sums, reference))
        print(report["rows"][-1], file=sys.stderr, flush=True)
        write_atomically(args.output.with_suffix(".json"), (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(args.output.with_suffix(".md"), format_table(report).encode())
    return report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("corpus", nargs="+", help="JSON lines (also .gz), text files or folders, or data sets")
    parser.add_argument("--exclude-ids", nargs="+", required=True, help="files with one held-out document id per line")
    parser.add_argument("--albert", required=True, help="directory of the short ALBERT, with its tokenizer")
    parser.add_argument("--converted", required=True, help="directory that `lsg-albert convert` made from it")
    parser.add_argument("--trained", help="directory of the converted model after further training")
    parser.add_argument("--output", type=Path, required=True, help="path of the reports, without .json and .md")
    parser.add_argument("--cache", type=Path, help="folder for tokenized text; None: the folder tokens beside OUTPUT")
    parser.add_argument(
        "--short", type=int, default=512, help="number of tokens that the short ALBERT reads at a time"
    )
    parser.add_argument(
        "--segments", type=int, default=64, help="number of segments, each of eight pieces of the short length"
    )
    parser.add_argument(
        "--seed", type=int, default=12_345, help="random seed for the choice of text and masked tokens"
    )
    args = parser.parse_args(argv)
    if args.short <= SPECIAL or args.segments < 1:
        parser.error(f"--short must be above {SPECIAL}, --segments at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = shlex.join(["python", "-m", "pretraining.extrapolation", *(sys.argv[1:] if argv is None else argv)])
    try:
        report = run(args, command)
    except (CorpusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
