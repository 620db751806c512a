"""Run a training example with several lengths and seeds, compare it with baselines, and print a table.

    python -m experiments.study classify --output runs/topics --lengths 512 4096 --seeds 1 2 3 --baselines \\
        --train train.jsonl.gz --test test.jsonl.gz --bf16 --learning_rate 3e-4

All other options are those of the example. OUTPUT gets `results.json`, `results.md`, and a folder for each run. If a
study is started again with the same arguments, it keeps finished runs, and continues a killed run from its last
checkpoint. You may add lengths and seeds. With several GPUs, use `torchrun --nproc-per-node 4 -m experiments.study
...`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MultiLabelBinarizer
from torch import distributed, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import ModelOutput

from experiments.baselines import BASELINES
from experiments.chunks import merge_predictions, write_chunks
from pretraining.training_support import check_same_run, describe_machine, write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESAMPLES = 1000  # bootstrap samples of the test documents, for the intervals


def load_example(name: str) -> ModuleType:
    """Import a file of examples/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classification_scores(references: list, predictions: list) -> dict[str, float]:
    """Accuracy and F1 of labels or lists of labels. A list counts as right if all its labels are right."""
    averages = ["macro"]
    if isinstance(references[0], list):
        binarizer = MultiLabelBinarizer().fit([*references, *predictions])
        references, predictions = binarizer.transform(references), binarizer.transform(predictions)
        averages = ["micro", "macro"]
    f1 = {f"{name}_f1": float(f1_score(references, predictions, average=name, zero_division=0)) for name in averages}
    return {"accuracy": float(accuracy_score(references, predictions)), **f1}


def sample_lines(path: str, limit: int, folder: Path) -> str:
    """Write that many lines of a JSON lines file to a new file. They are random, but always the same."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n") + "\n" for line in file if line.strip()]
    chosen = random.Random(0).sample(range(len(lines)), min(limit, len(lines)))
    target = folder / f"{limit}-of-{Path(path).name.split('.')[0]}.jsonl"
    write_atomically(target, "".join(lines[index] for index in chosen).encode())
    return str(target)


def change_config(model: str, fields: dict, folder: Path) -> str:
    """Make a directory with the files of a model's directory, as links, and other values in its config.json.

    Raises:
        ValueError: config.json lacks a field, so the field's name may be wrong.
    """
    config = json.loads((Path(model) / "config.json").read_text())
    if unknown := fields.keys() - config.keys():
        raise ValueError(f"--config has {sorted(unknown)}, which {model}/config.json lacks; it has {sorted(config)}")
    write_atomically(folder / "config.json", json.dumps(config | fields, indent=2).encode())
    for path in Path(model).resolve().iterdir():
        with contextlib.suppress(FileExistsError):  # config.json, and links of an earlier start or another process
            if path.is_file():
                (folder / path.name).symlink_to(path)
    return str(folder)


@contextlib.contextmanager
def mean_pooling() -> Iterator[None]:
    """Make the classifiers that are loaded meanwhile classify the mean of a text's last hidden states, without their
    pooler. What they save does not know about it."""
    load = AutoModelForSequenceClassification.from_pretrained

    def pool(encoder: nn.Module, args: tuple, kwargs: dict, output: ModelOutput) -> ModelOutput:
        mask = (kwargs["attention_mask"] if "attention_mask" in kwargs else args[1])[..., None]
        output.pooler_output = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        return output

    def load_and_hook(*args: Any, **kwargs: Any) -> PreTrainedModel:
        model = load(*args, **kwargs)
        model.base_model.register_forward_hook(pool, with_kwargs=True)
        return model

    AutoModelForSequenceClassification.from_pretrained = load_and_hook
    try:
        yield
    finally:
        AutoModelForSequenceClassification.from_pretrained = load


def intervals(lines: Sequence[dict], score: Callable[[list, list], dict[str, float]]) -> dict[str, list[float]]:
    """The 95 % bootstrap interval of each score. Whole documents are resampled."""
    documents = {}
    for number, line in enumerate(lines):
        documents.setdefault(line.get("document", number), []).append(line)
    groups = list(documents.values())
    names = list(score(*columns(lines)))

    def statistic(chosen: np.ndarray, axis: int) -> np.ndarray:
        samples = [[line for index in row for line in groups[index]] for row in np.atleast_2d(chosen)]
        found = [score(*columns(sample)) for sample in samples]
        return np.array([[values.get(name, 0.0) for values in found] for name in names])

    options = {"method": "percentile", "n_resamples": RESAMPLES, "vectorized": True, "rng": 0}
    low, high = bootstrap((np.arange(len(groups)),), statistic, **options).confidence_interval
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)}


def columns(lines: Sequence[dict]) -> tuple[list, list]:
    return [line["reference"] for line in lines], [line["prediction"] for line in lines]


def summarize(runs: dict[str, list[dict]], score: Callable[[list, list], dict[str, float]]) -> dict[str, dict]:
    """For each score of a system: its mean over the seeds, each seed's value, and their standard deviation. With one
    seed, the bootstrap interval over the test documents replaces the deviation."""
    by_seed = {seed: score(*columns(lines)) for seed, lines in runs.items()}
    spread = intervals(next(iter(runs.values())), score) if len(runs) == 1 else {}
    summary = {}
    for name in dict.fromkeys(name for found in by_seed.values() for name in found):
        values = {seed: found.get(name, 0.0) for seed, found in by_seed.items()}
        deviation = float(np.std([*values.values()], ddof=1)) if len(values) > 1 else None
        mean = float(np.mean([*values.values()]))
        summary[name] = {"mean": mean, "deviation": deviation, "interval": spread.get(name), "seeds": values}
    return summary


def format_cell(found: dict | None) -> str:
    """A score in percent: with its interval, or as mean ± standard deviation and each seed's value."""
    if found is None:
        return ""
    if found["interval"]:
        return "{:.1f} ({:.1f}-{:.1f})".format(*(100 * value for value in (found["mean"], *found["interval"])))
    each = ", ".join(f"{100 * value:.1f}" for value in found["seeds"].values())
    return f"{100 * found['mean']:.1f} ± {100 * found['deviation']:.1f} ({each})"


def format_table(results: dict) -> str:
    """The results as Markdown tables."""
    systems = results["systems"]
    lines = ["| score | " + " | ".join(systems) + " |", "| --- " * (1 + len(systems)) + "|"]
    for name in dict.fromkeys(name for scores in systems.values() for name in scores):
        cells = [format_cell(scores.get(name)) for scores in systems.values()]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    runs = ["| tokens | seed | steps | best step | seconds |", "| --- " * 5 + "|"]
    row = "| {length:,} | {seed} | {steps} | {best_step} | {seconds:,.0f} |"
    runs += [row.format_map(each) for each in results["runs"]]
    facts = (
        f"{results['lines']:,} test rows; scores in percent. One seed: 95 % bootstrap intervals over documents.\n"
        "Several seeds: mean ± standard deviation, and each seed's value."
    )
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join([*lines, "", facts, "", *runs, "", machine, "", f"```text\n{results['command']}\n```", ""])


def describe_run(output: Path, length: int, seed: int) -> dict:
    """The facts about a run for the results."""
    states = [json.loads(path.read_text()) for path in output.glob("checkpoint-*/trainer_state.json")]
    state = max(states, key=lambda state: state["global_step"])
    return {
        "length": length, "seed": seed, "steps": state["global_step"], "history": state["log_history"],
        "best_step": int(Path(state["best_model_checkpoint"]).name.split("-")[1]),
        "seconds": json.loads((output / "seconds.json").read_text()),
    }  # fmt: skip


def run(args: argparse.Namespace, rest: list[str], command: str) -> str | None:
    """Run the study. Returns the table, or None in processes other than the first."""
    example = load_example(args.example)
    parser = example.HfArgumentParser(example.Options)
    options, _ = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    if (args.chunks or args.mean_pooling) and args.example != "classify":
        raise ValueError(f"--chunks and --mean-pooling are for classify, not for {args.example}")
    is_first = int(os.environ.get("RANK", "0")) == 0
    if is_first:
        given = {name: getattr(args, name) for name in ("example", "config", "chunks", "mean_pooling")}
        check_same_run(args.output, given | {"options": rest, "limits": [args.limit_train, args.limit_test]})
    if args.config:
        options.model = change_config(options.model, args.config, args.output / "model")
    for split, limit in (("train", args.limit_train), ("test", args.limit_test)):
        if limit:
            setattr(options, split, sample_lines(getattr(options, split), limit, args.output))
    rest = [*rest, "--model", options.model, "--train", options.train, "--test", options.test]
    if args.chunks or args.baselines:
        train, test = example.load(options.train, options), example.load(options.test, options)
        if options.validation is None:  # the same split as in the example
            train, validation = train_test_split(train, test_size=0.1, random_state=0)
        else:
            validation = example.load(options.validation, options)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    files, chunks = {}, {}
    if args.chunks:
        splits = {"train": train, "validation": validation, "test": test}
        for length in args.lengths:
            files[length], chunks[length] = write_chunks(splits, tokenizer, length, args.output)
    runs = [(args.output / f"length-{n}" / f"seed-{seed}", n, seed) for n in args.lengths for seed in args.seeds]
    for output, length, seed in runs:
        started = time.perf_counter()
        this = ["--max_length", str(length), "--seed", str(seed), "--output_dir", str(output)]
        with mean_pooling() if args.mean_pooling else contextlib.nullcontext():
            example.main([*rest, *files.get(length, []), *this])
        if is_first and not (output / "seconds.json").exists():  # for a resumed run, the seconds after the resumption
            write_atomically(output / "seconds.json", json.dumps(time.perf_counter() - started).encode())
    if not is_first:
        return None
    systems = {}
    for output, length, seed in runs:
        lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
        if args.chunks:
            lines = merge_predictions(lines, chunks[length])
        system = f"model, {'chunks of ' * args.chunks}{length:,} tokens"
        systems.setdefault(system, {})[str(seed)] = lines
    if args.baselines:
        for name, predictions in BASELINES[args.example](train, test, tokenizer, args.lengths).items():
            systems[name] = {"-": [line | {"prediction": made} for line, made in zip(lines, predictions, strict=True)]}
    score = getattr(example, "scores", classification_scores)
    results = {
        "command": command,
        "systems": {name: summarize(found, score) for name, found in systems.items()},
        "lines": len(lines),
        "runs": [describe_run(*each) for each in runs],
        "machine": describe_machine(),
    }
    table = format_table(results)
    write_atomically(args.output / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(args.output / "results.md", table.encode())
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("example", choices=list(BASELINES), help="the example; its own options follow")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and the results")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096], help="one run for each value of --max_length"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one run for each value of --seed")
    parser.add_argument("--baselines", action="store_true", help="also score baselines")
    parser.add_argument(
        "--chunks", action="store_true",
        help="classify: read whole documents in chunks of each length, and decide by the mean of their logits",
    )  # fmt: skip
    parser.add_argument(
        "--mean-pooling", action="store_true", help="classify: use the mean of the last hidden states, not [CLS] alone"
    )
    parser.add_argument("--config", type=json.loads, help="JSON object of fields of the model's config to replace")
    parser.add_argument("--limit-train", type=int, help="number of random lines of the training file to use")
    parser.add_argument("--limit-test", type=int, help="number of random lines of the test file to use")
    args, rest = parser.parse_known_args(argv)
    command = shlex.join(["python", "-m", "experiments.study", *(sys.argv[1:] if argv is None else argv)])
    try:
        table = run(args, rest, command)
    except (OSError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    if table is not None:
        print(table)
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads may abort an interpreter that ends before them
    return 0


if __name__ == "__main__":
    sys.exit(main())
