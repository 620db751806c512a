"""What the fine-tuning scripts beside this file share.

Rows of files and data sets, the options that all of them have, the Trainer's arguments, and training that goes on
from its last complete checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import random
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import distributed, nn
from transformers import PretrainedConfig, PreTrainedModel, Seq2SeqTrainingArguments, Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
RESAMPLES = 1000  # of the test documents, for the intervals
SAMPLE_SEED = 0  # of --limit-*: not the run's seed, so that runs with several seeds are scored on the same documents

# Where releases of transformers differ.
RELEASE = Version(transformers.__version__)
TOKENIZER_ARGUMENT = "processing_class" if RELEASE >= Version("4.46") else "tokenizer"  # of the Trainer
COUNT_ALL = {"average_tokens_across_devices": True} if RELEASE >= Version("4.48") else {}
csv.field_size_limit(2**31 - 1)  # whole documents are longer than the 131,072 characters of the default


class UsageError(ValueError):
    """Files, fields or numbers that cannot be used; the message is one line for the user."""


class Field(NamedTuple):
    """A field of the data: its name there, the types that its values may have, and what the user calls them."""

    name: str
    types: tuple[type, ...] = (str,)
    what: str = "text"


class Spread(NamedTuple):
    """A mean over the test documents, and the 95 % bootstrap interval around it."""

    mean: float
    low: float
    high: float


class Trained(NamedTuple):
    """What training leaves: the Trainer, its final state (see ``TrainerState``), where it went on from, its time."""

    trainer: Trainer
    state: dict[str, Any]
    checkpoint: Path | None
    seconds: float


# --- Files


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that no reader, and no kill in between, ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_results(output: Path, results: dict, table: str, documents: Iterable[dict]) -> None:
    """``predictions.jsonl`` (a line for each document), ``results.json`` and ``results.md``."""
    write_atomically(output / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in documents))
    write_atomically(output / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(output / "results.md", table)


def save_final(trainer: Trainer, output: Path) -> None:
    """The model and its tokenizer as ``final``, which is whole or not there. All processes call this."""
    partial, final = output / "final.partial", output / "final"
    trainer.model.config.use_cache = True  # transformers 5's Trainer has set it to False
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)


def last_checkpoint(output: Path) -> tuple[Path, dict] | None:
    """The newest complete checkpoint and its state: the Trainer writes ``trainer_state.json`` last."""
    found = output.glob("checkpoint-*/trainer_state.json")
    for path in sorted(found, key=lambda path: int(path.parent.name.split("-")[1]), reverse=True):
        try:
            return path.parent, json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:  # killed while it was written
            continue
    return None


def check_same_run(args: argparse.Namespace, free: Collection[str]) -> None:
    """Note the arguments beside the checkpoints, which those of another run must not be mixed with.

    Args:
        args: the command line; ``args.output`` is the folder.
        free: arguments that a run may be taken up again with other values of.
    """
    path = args.output / "arguments.json"
    given = {name: str(value) for name, value in vars(args).items() if name not in free}
    if path.is_file() and (last_checkpoint(args.output) or (args.output / "final").is_dir()):
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{name} {before.get(name)}, not {given[name]}" for name in given if given[name] != before.get(name)]
        if other:
            raise UsageError(f"{args.output} holds a run with other arguments: {'; '.join(other)}")
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(given, indent=1) + "\n")


# --- Data


def read_rows(path: Path, fields: Mapping[str, Field]) -> list[dict[str, Any]]:
    """The rows of a JSON lines or CSV file, plain or gzip, as ``{key: value}`` with the keys of `fields`."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    try:
        with opener(path, "rt", encoding="utf-8", newline="" if is_csv else None) as lines:
            numbered = csv_rows(lines, fields) if is_csv else json_rows(lines, path)
            return [pick_fields(row, fields, f"{path}, line {number}") for number, row in numbered]
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def json_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """Each line's number and value."""
    for number, line in enumerate(lines, start=1):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error})") from error


def csv_rows(lines: Iterable[str], fields: Mapping[str, Field]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row's last line and its values by the names in the first line; a field of no strings holds JSON."""
    reader = csv.DictReader(lines)
    holds_json = {field.name for field in fields.values() if str not in field.types}
    for row in reader:
        for name in holds_json & row.keys():
            try:
                row[name] = json.loads(row[name] or "")
            except json.JSONDecodeError:
                row[name] = None
        yield reader.line_num, row


def pick_fields(row: Any, fields: Mapping[str, Field], place: str) -> dict[str, Any]:
    """The values of the fields that were asked for, all of the right types."""
    for field in fields.values():
        if not isinstance(row, dict) or not isinstance(row.get(field.name), field.types):
            raise UsageError(f'{place}: no {field.what} in a field "{field.name}"')
    return {key: row[field.name] for key, field in fields.items()}


def load_rows(args: argparse.Namespace, split: str, fields: Mapping[str, Field]) -> Sequence[dict[str, Any]] | None:
    """A split, or the sample of it that was asked for; None where there is no such file or split."""
    if args.dataset is not None:
        rows = load_dataset_rows(args.dataset, args.config, split, fields)
    else:
        path = getattr(args, f"{split}_file")
        rows = path and read_rows(path, fields)
    if rows is None:
        return None
    if not len(rows):
        raise UsageError(f"the {split} data is empty")
    return sample(rows, getattr(args, f"limit_{split}"))


def load_splits(args: argparse.Namespace, fields: Mapping[str, Field]) -> dict[str, Sequence[dict[str, Any]] | None]:
    """All splits; there must be one to train on."""
    rows = {split: load_rows(args, split, fields) for split in SPLITS}
    if rows["train"] is None:
        raise UsageError(f"{args.dataset} has no split named train")
    return rows


def check_validation(args: argparse.Namespace, rows: Mapping[str, Any]) -> None:
    """Refuse to validate on nothing, of a script that splits nothing off its training data."""
    if args.eval_every and rows["validation"] is None:
        raise UsageError("--eval-every needs validation data")


def sample(rows: Sequence, limit: int | None) -> Sequence:
    """At most `limit` of the rows, at random but always the same ones."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = random.Random(SAMPLE_SEED).sample(range(len(rows)), limit)
    return [rows[index] for index in chosen]


def load_dataset_rows(
    dataset: str, config: str | None, split: str, fields: Mapping[str, Field]
) -> Sequence[dict[str, Any]] | None:
    """A split of a data set of the `datasets` library, which reads its rows from disk when they are asked for."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError("--dataset needs the `datasets` library: pip install datasets") from error
    splits = datasets.load_dataset(dataset, config)
    if split not in splits:
        return None
    names = {field.name: key for key, field in fields.items()}
    for name in names:
        if name not in splits[split].column_names:
            raise UsageError(f'{dataset} has no field "{name}", but {", ".join(splits[split].column_names)}')
    rows = splits[split].select_columns(list(names)).rename_columns(names)
    classes = {key: class_names(feature) for key, feature in rows.features.items() if class_names(feature)}
    return rows.with_transform(lambda batch: name_classes(batch, classes)) if classes else rows


def class_names(feature: Any) -> list[str] | None:
    """The names of a column of ``datasets.ClassLabel``, or of lists of these; None for other columns."""
    feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return getattr(feature, "names", None)


def name_classes(batch: Mapping[str, list], classes: Mapping[str, list[str]]) -> dict[str, list]:
    """Put names in place of class indices; None in place of -1, which stands for no class."""

    def name(value: int | list, names: list[str]) -> Any:
        if isinstance(value, list):
            return [name(each, names) for each in value]
        return None if value is None or value < 0 else names[value]

    return {
        key: [name(value, classes[key]) for value in values] if key in classes else values
        for key, values in batch.items()
    }


# --- Model and Trainer


def load_pretrained(auto_class: type, path: str | Path, **options: Any) -> PreTrainedModel:
    """A model with its own code, by one of transformers' ``AutoModelFor...`` classes."""
    try:
        return auto_class.from_pretrained(path, trust_remote_code=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"cannot load {path}: {' '.join(str(error).split())}") from error


def check_length(option: str, length: int | None, config: PretrainedConfig) -> int:
    """A length in tokens, by default the model's positions, of which it may not have fewer."""
    longest = getattr(config, "max_position_embeddings", None)
    if length is None and longest is None:
        raise UsageError(f"the model has no greatest length: {option} is needed")
    if length is not None and longest is not None and length > longest:
        raise UsageError(f"{option} {length} is more than the model's {longest} positions")
    return longest if length is None else length


def training_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of ``TrainingArguments`` for the options of `add_training_options`; a script adds its own."""
    return {
        "output_dir": str(args.output),
        "num_train_epochs": args.epochs,
        "max_steps": args.steps or -1,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation,
        "learning_rate": args.lr,
        "lr_scheduler_type": args.schedule,
        "warmup_steps": args.warmup,
        "optim": "adamw_torch_fused",
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": args.log_every,
        "save_steps": args.save_every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if args.eval_every else "no",
        "eval_steps": args.eval_every or None,
        "seed": args.seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
    } | COUNT_ALL


def enable_gradient_checkpointing(model: PreTrainedModel, args: argparse.Namespace) -> None:
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def at_last_step(state: Mapping[str, Any]) -> bool:
    return state["global_step"] >= state["max_steps"]


def allow_numpy_states() -> None:
    """Let older releases resume: they read NumPy's random state by `torch.load`, which PyTorch 2.6 restricted.

    Just before it is needed, since other libraries clear the list of what is allowed.
    """
    if RELEASE < Version("4.48"):
        rebuild = np.empty(0).__reduce__()[0]
        torch.serialization.add_safe_globals([rebuild, np.ndarray, np.dtype, type(np.dtype(np.uint32))])


def train(
    output: Path, build: Callable[[Path | None], Trainer], finished: Callable[[Mapping], bool] = at_last_step
) -> Trained:
    """Train to the end, from the last complete checkpoint in `output` if there is one.

    Args:
        output: the Trainer's ``output_dir``.
        build: makes the Trainer. It has to load the weights from the checkpoint that it is given: transformers 5.0.0
            saves some under names that its own ``load_state_dict`` in the Trainer passes over.
        finished: says of a checkpoint's state that nothing is left to train; the Trainer would go one step too far.
    """
    checkpoint, state = last_checkpoint(output) or (None, None)
    trainer = build(checkpoint)
    started = time.perf_counter()
    if state is None or not finished(state):
        allow_numpy_states()
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        state = vars(trainer.state)
    return Trained(trainer, state, checkpoint, time.perf_counter() - started)


# --- Several processes: their steps are those of one with the whole batch


class OnPlainCPU:
    """Mixin of `TrainingArguments`: with several processes, Accelerate numbers CPUs too. Until 5.0 at least, the Trainer
    resumes with that number, at which PyTorch cannot load anything."""

    @property
    def device(self) -> torch.device:
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


class Arguments(OnPlainCPU, TrainingArguments):
    """`TrainingArguments` from whose checkpoints several processes can go on."""


class Seq2SeqArguments(OnPlainCPU, Seq2SeqTrainingArguments):
    """The same of `Seq2SeqTrainingArguments`."""


class WholeCheckpoints:
    """Mixin of a Trainer whose checkpoints are complete, for all processes, once they hold ``trainer_state.json``."""

    def _save_rng_state(self, output_dir: str) -> None:  # the last that each process saves before
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


class MeanOverTokens(WholeCheckpoints):
    """Mixin of a Trainer whose loss is a step's mean over all labelled tokens, in whichever batch or process they are.

    Labels are (batch, tokens), -100 where there is none. Before transformers 4.48, whose Trainer does not count the
    tokens of all processes, it is the mean of the processes' or the batches' means.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = True  # the Trainer is to count the tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(
            outputs["logits"].flatten(0, 1).float(),
            inputs["labels"].flatten(),
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if num_items_in_batch is None or not model.training:
            loss = loss / (inputs["labels"] != -100).sum()
        else:  # gradients are the mean of those of the processes
            processes = self.accelerator.num_processes if COUNT_ALL else 1
            loss = loss * processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


# --- Results


def ratio_spread(parts: Sequence[float], wholes: Sequence[float]) -> Spread:
    """The sum of the parts by that of the wholes, in percent (0 of 0: 0); both have a value for each test document.

    The interval is that of resampled documents, not of what was counted in them, which is alike within a document.
    """
    pairs = np.stack([parts, wholes], axis=1).astype(np.float64)
    chosen = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    sums = np.concatenate([pairs.sum(0)[None], pairs[chosen].sum(1)])
    ratios = 100 * np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)
    low, high = np.percentile(ratios[1:], [2.5, 97.5])
    return Spread(float(ratios[0]), float(low), float(high))


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def describe_run(args: argparse.Namespace, command: str, trained: Trained) -> dict[str, Any]:
    """What the results say of a run, whatever was learned."""
    return {
        "command": command,
        "seed": args.seed,
        "steps": trained.state["global_step"],
        "resumed_from": trained.checkpoint and trained.checkpoint.name,  # then the training time is that of the rest
        "train_seconds": trained.seconds,
        "device": device_name(),
        "versions": versions(),
        "history": trained.state["log_history"],
    }


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


# --- Command line


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def not_negative(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return int(text)


def above_zero(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return float(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--model`` and ``--output``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="directory or Hub id; its own code is run if it has any")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, final model and results")
    return parser


def add_data_options(parser: argparse.ArgumentParser, fields: Sequence[str]) -> argparse._ArgumentGroup:
    """Files or a data set, ``--NAME-field`` for each of the fields (its default is NAME), and samples."""
    group = parser.add_argument_group("data (--train-file or --dataset)")
    for split in SPLITS:
        group.add_argument(f"--{split}-file", type=Path, help="JSON lines or CSV (.jsonl, .csv, also with .gz)")
    group.add_argument("--dataset", help="a name or folder that `datasets.load_dataset` takes")
    group.add_argument("--config", help="configuration of the --dataset")
    for name in fields:
        group.add_argument(f"--{name}-field", default=name)
    for split in SPLITS:
        group.add_argument(f"--limit-{split}", type=positive, help="rows at random, always the same ones")
    return group


def check_data_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.train_file is None) == (args.dataset is None):
        parser.error("one of --train-file and --dataset is needed")
    if args.dataset is not None and (args.validation_file or args.test_file):
        parser.error("--dataset brings its own validation and test splits")


def add_training_options(
    parser: argparse.ArgumentParser, several_seeds: bool = False, no_steps: str = "none"
) -> argparse._ArgumentGroup:
    """What `training_keywords` reads; a script changes defaults by ``parser.set_defaults``.

    Args:
        parser: takes the options in a group of their own, which is returned.
        several_seeds: ``--seeds`` in place of ``--seed``; the script then sets ``args.seed`` for each run.
        no_steps: what ``--eval-every 0`` stands for.
    """
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=above_zero, default=3.0)
    group.add_argument("--steps", type=positive, help="in place of --epochs")
    group.add_argument("--batch-size", type=positive, default=4, help="documents per step and process")
    group.add_argument("--gradient-accumulation", type=positive, default=1, help="batches that make a step")
    group.add_argument("--lr", type=above_zero, default=1e-4)
    group.add_argument("--warmup", type=not_negative, default=0, help="steps")
    group.add_argument("--schedule", choices=SCHEDULES, default="linear", help="of the learning rate")
    group.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory for more time")
    if several_seeds:
        group.add_argument("--seeds", type=int, nargs="+", default=[1], help="a run for each, one after another")
    else:
        group.add_argument("--seed", type=int, default=1)
    group.add_argument("--log-every", type=positive, default=50, help="steps")
    group.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
    group.add_argument("--eval-every", type=not_negative, default=0, help=f"steps between validations; 0: {no_steps}")
    group.add_argument("--eval-batch-size", type=positive, default=4, help="documents per batch and process")
    return group


def run_script(name: str, run: Callable[[str], str | None], argv: Sequence[str] | None) -> int:
    """Run a script's work and print the table that it returns, or what the user has to change; the exit status.

    Args:
        name: the script's, without ``.py``.
        run: takes the command as the user may type it again.
        argv: the arguments; None: those of this process.
    """
    command = shlex.join(["python", f"examples/{name}.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        table = run(command)
    except (UsageError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    if table is not None:
        print(table)
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads may abort an interpreter that ends before them
    return 0
