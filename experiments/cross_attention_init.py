"""How a new cross-attention should start: drawn at random, or as a copy of the self-attention before it.

An encoder's checkpoint becomes a sequence-to-sequence model and is trained for a while, once for each start, task and
seed, on the same batches; then the loss and the share of right next tokens on held-out texts are compared.

    python benchmarks/cross_attention_init.py TRAIN.jsonl TEST.jsonl --model . --output results.json

The files hold a JSON object with `document` and `summary` a line, gzipped or not. Tasks: "first" is the document's
first sentence, which is in reach of copying; "summary" is the summary.
"""

import argparse
import gzip
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

STARTS = ("random", "copy")
TASKS = ("first", "summary")


@dataclass(frozen=True)
class Case:
    task: str
    start: str
    seed: int


@dataclass(frozen=True)
class Result:
    case: Case
    step: int
    loss: float  # mean cross-entropy of a held-out token
    accuracy: float  # share of held-out tokens that are the most likely one, in percent
    seconds: float


def read_examples(path: Path, task: str) -> list[tuple[str, str]]:
    """Pairs of a source and a target text."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as lines:
        records = [json.loads(line) for line in lines]
    return [
        (record["document"], record["summary"] if task == "summary" else first_sentence(record["document"]))
        for record in records
    ]


def first_sentence(document: str) -> str:
    """The first sentence of the first paragraph that looks like prose rather than a heading."""
    paragraph = next((part for part in document.split("\n\n") if part.rstrip().endswith(".")), document)
    return re.split(r"(?<=[a-z)]\.)\s", paragraph, maxsplit=1)[0]


def make_model(path: str, case: Case) -> PreTrainedModel:
    """The checkpoint as a sequence-to-sequence model, with a cross-attention that starts as the case says."""
    model = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)
    decoder, groups = model.get_decoder(), model.get_encoder().encoder.albert_layer_groups
    torch.manual_seed(case.seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=model.config.initializer_range)
            else:
                parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
    if case.start == "copy":
        decoder.copy_self_attentions(groups)
    return model


def batches(
    examples: list[tuple[str, str]], tokenizer: transformers.PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[dict[str, Tensor]]:
    """Batches in the order of the examples."""
    for i in range(0, len(examples) - args.batch_size + 1, args.batch_size):
        sources, targets = zip(*examples[i : i + args.batch_size], strict=True)
        options = {"truncation": True, "padding": True, "return_tensors": "pt"}
        batch = dict(tokenizer(list(sources), max_length=args.source_length, **options))
        labels = tokenizer(list(targets), max_length=args.target_length, **options)
        yield {**batch, "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)}


@torch.no_grad()
def evaluate(model: PreTrainedModel, held_out: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Loss and accuracy in percent, by the token."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in held_out:
        output, real = model(**batch), batch["labels"] != -100
        loss += output.loss.item() * int(real.sum())
        right += int((output.logits.argmax(-1) == batch["labels"])[real].sum())
        count += int(real.sum())
    model.train()
    return loss / count, 100 * right / count


def measure(case: Case, args: argparse.Namespace) -> list[Result]:
    """Train the case, and evaluate it `args.evaluations` times on the way."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = read_examples(args.train, case.task)
    random.Random(case.seed).shuffle(train)
    train = train * (1 + args.steps * args.batch_size // len(train))
    held_out = list(batches(read_examples(args.test, case.task)[: args.test_examples], tokenizer, args))
    model = make_model(args.model, case).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup))
    )
    results, start = [], time.perf_counter()
    for step, batch in enumerate(batches(train, tokenizer, args), 1):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % (args.steps // args.evaluations) == 0:
            results.append(Result(case, step, *evaluate(model, held_out), time.perf_counter() - start))
            print(f"{case} step {step}: loss {results[-1].loss:.3f}, {results[-1].accuracy:.1f} %", flush=True)
        if step == args.steps:
            return results
    return results


def report(results: list[Result], args: argparse.Namespace) -> str:
    """A Markdown table: mean over the seeds, and each seed's last loss."""
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads; "
        f"{args.steps} steps of {args.batch_size} documents of {args.source_length} tokens, targets of "
        f"{args.target_length}, peak rate {args.lr}; {args.test_examples} held-out documents",
        "",
        "| task | start | step | loss | right tokens | loss of each seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task, step, start in sorted({(r.case.task, r.step, r.case.start) for r in results}):
        rows = [r for r in results if (r.case.task, r.step, r.case.start) == (task, step, start)]
        loss, accuracy = (statistics.mean(getattr(r, field) for r in rows) for field in ("loss", "accuracy"))
        each = ", ".join(f"{r.loss:.3f}" for r in rows)
        lines.append(f"| {task} | {start} | {step} | {loss:.3f} | {accuracy:.1f} % | {each} |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--model", default=".", help="a repository with an encoder")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--evaluations", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--source-length", type=int, default=192)
    parser.add_argument("--target-length", type=int, default=48)
    parser.add_argument("--test-examples", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    results = []
    for task in args.tasks:
        for seed in args.seeds:
            for start in STARTS:
                results += measure(Case(task, start, seed), args)
                if args.output is not None:
                    args.output.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print(report(results, args))


if __name__ == "__main__":
    main()
