"""Compare two starts of a new cross-attention: random weights, or those of the self-attention before it.

A sequence-to-sequence model is made from an encoder's checkpoint and trained on the same batches, once for each start,
task and seed. Then the loss and the share of right next tokens on held-out texts are compared.

    python -m experiments.cross_attention_init TRAIN.jsonl TEST.jsonl --model . --output results.json

Each line of the files is a JSON object with `document` and `summary`; the files may be gzipped. The model writes the
document's first sentence in the task "first", which needs only copying, and the summary in the task "summary".
"""

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pretraining.training_support import describe_machine, write_atomically

STARTS, TASKS = ("random", "copy"), ("first", "summary")


def read_examples(path: str, task: str) -> list[tuple[str, str]]:
    """Pairs of a source and a target text."""
    rows = load_dataset("json", data_files=path, split="train")
    return [
        (row["document"], row["summary"] if task == "summary" else first_sentence(row["document"])) for row in rows
    ]


def first_sentence(document: str) -> str:
    """The first sentence of the first paragraph that looks like prose rather than a heading."""
    paragraph = next((part for part in document.split("\n\n") if part.rstrip().endswith(".")), document)
    return re.split(r"(?<=[a-z)]\.)\s", paragraph, maxsplit=1)[0]


def make_model(path: str, start: str, seed: int) -> PreTrainedModel:
    """The checkpoint as a sequence-to-sequence model, with a cross-attention that starts as `start` says."""
    model = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)
    decoder, groups = model.get_decoder(), model.get_encoder().encoder.albert_layer_groups
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=model.config.initializer_range)
            else:
                parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
    if start == "copy":
        decoder.copy_self_attentions(groups)
    return model


def batches(
    examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[dict[str, Tensor]]:
    """Batches in the order of the examples."""
    for i in range(0, len(examples) - args.batch_size + 1, args.batch_size):
        sources, targets = zip(*examples[i : i + args.batch_size], strict=True)
        options = {"truncation": True, "padding": True, "return_tensors": "pt"}
        batch = dict(tokenizer(list(sources), max_length=args.source_length, **options))
        labels = tokenizer(list(targets), max_length=args.target_length, **options)
        yield {**batch, "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)}


@torch.no_grad()
def evaluate(model: PreTrainedModel, held_out: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean cross-entropy of held-out tokens, and the percentage of them that the model ranks first."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in held_out:
        output, real = model(**batch), batch["labels"] != -100
        loss += output.loss.item() * int(real.sum())
        right += int((output.logits.argmax(-1) == batch["labels"])[real].sum())
        count += int(real.sum())
    model.train()
    return {"loss": loss / count, "accuracy": 100 * right / count}


def measure(case: dict[str, str | int], args: argparse.Namespace) -> Iterator[dict]:
    """Train the case (task, start, seed), and evaluate it `args.evaluations` times during training."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = read_examples(args.train, case["task"])
    random.Random(case["seed"]).shuffle(train)
    train = (train * (1 + args.steps * args.batch_size // len(train)))[: args.steps * args.batch_size]
    held_out = list(batches(read_examples(args.test, case["task"])[: args.test_examples], tokenizer, args))
    model = make_model(args.model, case["start"], case["seed"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup))
    )
    start = time.perf_counter()
    for step, batch in enumerate(batches(train, tokenizer, args), 1):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % (args.steps // args.evaluations) == 0:
            yield {"case": case, "step": step, **evaluate(model, held_out), "seconds": time.perf_counter() - start}


def report(results: list[dict], args: argparse.Namespace) -> str:
    """A Markdown table with the means over the seeds, and each seed's loss."""
    lines = [
        f"{describe_machine()}; {args.steps} steps of {args.batch_size} documents of {args.source_length} tokens, "
        f"targets of {args.target_length}, peak rate {args.lr}; {args.test_examples} held-out documents",
        "",
        "| task | start | step | loss | right tokens | loss of each seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task, step, start in sorted({(r["case"]["task"], r["step"], r["case"]["start"]) for r in results}):
        rows = [r for r in results if (r["case"]["task"], r["step"], r["case"]["start"]) == (task, step, start)]
        loss, accuracy = (statistics.mean(r[name] for r in rows) for name in ("loss", "accuracy"))
        each = ", ".join(f"{r['loss']:.3f}" for r in rows)
        lines.append(f"| {task} | {start} | {step} | {loss:.3f} | {accuracy:.1f} % | {each} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("train", help='JSON lines with "document" and "summary"')
    parser.add_argument("test", help="held-out file of the same form")
    parser.add_argument("--model", default=".", help="a repository with an encoder")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="texts to write")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one training for each seed")
    parser.add_argument("--steps", type=int, default=300, help="steps of a training")
    parser.add_argument("--evaluations", type=int, default=3, help="number of evaluations during a training")
    parser.add_argument("--batch-size", type=int, default=8, help="documents per step")
    parser.add_argument("--source-length", type=int, default=192, help="tokens per document")
    parser.add_argument("--target-length", type=int, default=48, help="tokens per target text")
    parser.add_argument("--test-examples", type=int, default=96, help="number of held-out documents")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results = []
    for task in args.tasks:
        for seed in args.seeds:
            for start in STARTS:
                for found in measure({"task": task, "start": start, "seed": seed}, args):
                    results.append(found)
                    print(found, flush=True)
                    if args.output is not None:
                        write_atomically(args.output, (json.dumps(results, indent=1) + "\n").encode())
    print(report(results, args))


if __name__ == "__main__":
    main()
