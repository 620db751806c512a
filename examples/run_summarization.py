"""Fine-tune a sequence-to-sequence model for summarization, and score it beside the documents' first words.

    python examples/run_summarization.py --train-file train.jsonl.gz --test-file test.jsonl.gz --output runs/summaries
    python examples/run_summarization.py --dataset ccdv/arxiv-summarization --document-field article \\
        --summary-field abstract --max-target-length 256 --bf16 --gradient-checkpointing --output runs/arxiv

Needs `pip install ".[summarization]"`. Started again with the same arguments, a killed run goes on from its last
complete checkpoint with the same data in the same order. OUTPUT then holds `final` (the model and its tokenizer),
`results.json`, `results.md` and `predictions.jsonl` (each test document's summary and scores). With several GPUs:
`torchrun --nproc-per-node 4 examples/run_summarization.py ...`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from packaging.version import Version
from rouge_score.rouge_scorer import RougeScorer
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

ROOT = Path(__file__).resolve().parent.parent
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
SAMPLE_SEED = 0  # of --limit-*: not the run's seed, so that runs with several seeds are scored on the same documents
RESAMPLES = 1000  # of the test documents, for the intervals
# A run may be taken up again with other values of these; all others belong to its checkpoints.
FREE = {"output", "test_file", "limit_test", "beams", "no_repeat_ngrams", "eval_batch_size", "log_every", "save_every"}

# Where releases of transformers differ.
RELEASE = Version(transformers.__version__)
TOKENIZER_ARGUMENT = "processing_class" if RELEASE >= Version("4.46") else "tokenizer"  # of the Trainer
if RELEASE < Version("4.48"):
    # To resume, they read NumPy's random state by `torch.load`, which PyTorch 2.6 restricted.
    torch.serialization.add_safe_globals(
        [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # the first rebuilds an array
    )


class UsageError(ValueError):
    """Files, fields or numbers that cannot be used; the message is one line for the user."""


class Spread(NamedTuple):
    """A mean over the test documents, and the 95 % bootstrap interval around it."""

    mean: float
    low: float
    high: float


# --- Files


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that no reader, and no kill in between, ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def last_checkpoint(output: Path) -> tuple[Path, dict] | None:
    """The newest complete checkpoint and its state: the Trainer writes ``trainer_state.json`` last."""
    found = output.glob("checkpoint-*/trainer_state.json")
    for path in sorted(found, key=lambda path: int(path.parent.name.split("-")[1]), reverse=True):
        try:
            return path.parent, json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:  # killed while it was written
            continue
    return None


def check_same_run(args: argparse.Namespace) -> None:
    """Note the arguments beside the checkpoints, which those of another run must not be mixed with."""
    path = args.output / "arguments.json"
    given = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    if last_checkpoint(args.output) and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{name} {before.get(name)}, not {given[name]}" for name in given if given[name] != before.get(name)]
        if other:
            raise UsageError(f"{args.output} holds a run with other arguments: {'; '.join(other)}")
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(given, indent=1) + "\n")


# --- Data


def read_rows(path: Path, document_field: str, summary_field: str) -> list[dict[str, str]]:
    """The rows of a JSON lines file (plain or gzip) as ``{"document": ..., "summary": ...}``."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number}: not JSON ({error})") from error
            for field in (document_field, summary_field):
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise UsageError(f'{path}, line {number}: no text in a field "{field}"')
            rows.append({"document": row[document_field], "summary": row[summary_field]})
    return rows


def load_rows(args: argparse.Namespace, split: str) -> Sequence[dict[str, str]] | None:
    """A split, or the sample of it that was asked for; None where there is no such file or split."""
    if args.dataset is not None:
        rows = load_dataset_rows(args, split)
    else:
        path = getattr(args, f"{split}_file")
        rows = path and read_rows(path, args.document_field, args.summary_field)
    if rows is None:
        return None
    if not len(rows):
        raise UsageError(f"the {split} data is empty")
    limit = getattr(args, f"limit_{split}")
    if limit is None or limit >= len(rows):
        return rows
    chosen = random.Random(SAMPLE_SEED).sample(range(len(rows)), limit)
    return [rows[index] for index in chosen]


def load_dataset_rows(args: argparse.Namespace, split: str) -> Sequence[dict[str, str]] | None:
    """A split of a data set of the `datasets` library, which reads its rows from disk when they are asked for."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError('--dataset needs the `datasets` library: pip install ".[summarization]"') from error
    splits = datasets.load_dataset(args.dataset, args.config)
    if split not in splits:
        return None
    names = {args.document_field: "document", args.summary_field: "summary"}
    for field in names:
        if field not in splits[split].column_names:
            raise UsageError(f'{args.dataset} has no field "{field}", but {", ".join(splits[split].column_names)}')
    return splits[split].select_columns(list(names)).rename_columns(names)


class Examples(Dataset):
    """Token ids and labels of the rows, made when asked for.

    The labels are the summary and [SEP]; there is no [CLS], since that is what the decoder starts from.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        max_source_length: int,
        max_target_length: int,
    ):
        self.rows, self.tokenizer = rows, tokenizer
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        source = self.tokenizer(row["document"], truncation=True, max_length=self.max_source_length)
        target = self.tokenizer(
            row["summary"], add_special_tokens=False, truncation=True, max_length=self.max_target_length - 1
        )
        return {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "labels": [*target["input_ids"], self.tokenizer.eos_token_id],
        }


# --- Scores


def sentences(text: str) -> list[str]:
    """A plain split after full stops, question and exclamation marks, and at line ends."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\s*\n\s*", text.strip()) if part]


def mean_words(texts: Iterable[str]) -> float:
    return float(np.mean([len(text.split()) for text in texts]))


def lead(document: str, words: int) -> str:
    """The first words of a document."""
    return " ".join(document.split()[:words])


def rouge(predictions: Iterable[str], references: Iterable[str]) -> dict[str, list[float]]:
    """F-measures of every pair, in percent, with stemming; ROUGE-Lsum goes by `sentences`."""
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score(*("\n".join(sentences(text)) for text in (target, made))) for made, target in pairs]
    return {name: [100 * score[name].fmeasure for score in scores] for name in ROUGE}


def spread(values: Sequence[float]) -> Spread:
    """The mean of the documents' values; the interval is that of the means of resampled documents."""
    values = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return Spread(float(values.mean()), float(low), float(high))


def summarize_scores(texts: Sequence[str], scores: dict[str, list[float]]) -> dict:
    """What the results say of one system: the mean length of its summaries and its scores."""
    return {"words": mean_words(texts)} | {name: spread(values)._asdict() for name, values in scores.items()}


# --- Model and Trainer


def check_lengths(args: argparse.Namespace, config: PretrainedConfig) -> None:
    """Complete the lengths from the model's, which they may not exceed."""
    longest = getattr(config, "max_position_embeddings", None)
    if args.max_source_length is None:
        if longest is None:
            raise UsageError("the model has no greatest length: --max-source-length is needed")
        args.max_source_length = longest
    for name in ("max_source_length", "max_target_length"):
        if longest is not None and getattr(args, name) > longest:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {getattr(args, name)} is more than the model's {longest} positions")


def load_model(path: str | Path, args: argparse.Namespace) -> PreTrainedModel:
    """The model, which generates as the command line says, also after it was saved."""
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load {path}: {' '.join(str(error).split())}") from error
    check_lengths(args, model.config)
    model.generation_config.update(
        max_length=args.max_target_length + 1,  # with the token that the decoder starts from
        num_beams=args.beams,
        no_repeat_ngram_size=args.no_repeat_ngrams,
    )
    return model


def training_arguments(args: argparse.Namespace) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        learning_rate=args.lr,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup,
        label_smoothing_factor=args.label_smoothing,
        optim="adamw_torch_fused",
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=args.log_every,
        save_steps=args.save_every,
        save_total_limit=2,
        eval_strategy="steps" if args.eval_every else "no",
        eval_steps=args.eval_every or None,
        predict_with_generate=True,
        seed=args.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


def build_trainer(
    args: argparse.Namespace,
    arguments: Seq2SeqTrainingArguments,
    rows: dict[str, Sequence[dict[str, str]] | None],
    model_path: str | Path,
) -> Seq2SeqTrainer:
    """Model, data and Trainer; without a metric of its own, it evaluates by the loss alone, which is quick."""
    set_seed(args.seed)
    model = load_model(model_path, args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lengths = args.max_source_length, args.max_target_length
    examples = {split: found and Examples(found, tokenizer, *lengths) for split, found in rows.items()}
    return Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        **{TOKENIZER_ARGUMENT: tokenizer},
    )


def generate(trainer: Seq2SeqTrainer, examples: Examples) -> tuple[list[str], float]:
    """A summary for each example, and the loss on the summaries that were to be written."""
    output = trainer.predict(examples)
    tokenizer = examples.tokenizer
    ids = output.predictions[: len(examples)]  # with several processes, the last batch may have been filled up
    ids = np.where(ids < 0, tokenizer.pad_token_id, ids)  # padded with -100
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return texts, output.metrics["test_loss"]


# --- Results


def format_table(results: dict) -> str:
    """The results as Markdown."""
    lines = ["| system | words | " + " | ".join(ROUGE.values()) + " |", "| --- " * (2 + len(ROUGE)) + "|"]
    for system, scores in results["systems"].items():
        cells = ["{mean:.2f} ({low:.2f}-{high:.2f})".format_map(scores[name]) for name in ROUGE]
        lines.append(f"| {system} | {scores['words']:.0f} | " + " | ".join(cells) + " |")
    facts = (
        f"{results['test_documents']:,} test documents; F-measures in percent with stemming, means and 95 % bootstrap\n"
        f"intervals; the reference summaries have {results['reference_words']:.0f} words. "
        f"{results['steps']:,} steps, seed {results['seed']}, test loss {results['test_loss']:.3f};\n"
        f"{results['seconds']['train']:,.0f} s of training and {results['seconds']['test']:,.0f} s of testing on "
        f"{results['device']}."
    )
    return "\n".join(lines) + f"\n\n{facts}\n\n```text\n{results['command']}\n```\n"


def score_test(trainer: Seq2SeqTrainer, examples: Examples, lead_words: int) -> tuple[dict, list[dict]]:
    """The scores of the model and of the lead baseline on the same documents: a summary, and each document's own."""
    references = [row["summary"] for row in examples.rows]
    started = time.perf_counter()
    made, loss = generate(trainer, examples)
    seconds = time.perf_counter() - started
    texts = {"model": made, f"lead-{lead_words} words": [lead(row["document"], lead_words) for row in examples.rows]}
    scores = {system: rouge(found, references) for system, found in texts.items()}
    results = {
        "systems": {system: summarize_scores(texts[system], scores[system]) for system in texts},
        "reference_words": mean_words(references),
        "test_documents": len(references),
        "test_loss": loss,
        "test_seconds": seconds,
    }
    documents = [
        {"prediction": made[i], "reference": references[i]}
        | {system: {name: values[i] for name, values in found.items()} for system, found in scores.items()}
        for i in range(len(references))
    ]
    return results, documents


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def run(args: argparse.Namespace, command: str) -> dict | None:
    """Train, save, test; returns the results, or None without test data or in a process other than the first."""
    arguments = training_arguments(args)
    with arguments.main_process_first(desc="reading the data"):
        rows = {split: load_rows(args, split) for split in ("train", "validation", "test")}
    if rows["train"] is None:
        raise UsageError(f"{args.dataset} has no split named train")
    if args.eval_every and rows["validation"] is None:
        raise UsageError("--eval-every needs validation data")
    if arguments.process_index == 0:
        check_same_run(args)
    checkpoint, state = last_checkpoint(args.output) or (None, {"global_step": 0, "max_steps": 1})
    # The weights come from the checkpoint here already: transformers 5.0.0 saves some under names that its own
    # `load_state_dict` in the Trainer passes over.
    trainer = build_trainer(args, arguments, rows, checkpoint or args.model)
    started = time.perf_counter()
    if state["global_step"] < state["max_steps"]:  # else the Trainer would go one step too far
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        state = vars(trainer.state)
    train_seconds = time.perf_counter() - started
    trainer.save_model(str(args.output / "final"))
    if rows["test"] is None:
        return None
    lead_words = round(mean_words(row["summary"] for row in rows["train"]))
    tested = Examples(rows["test"], trainer.train_dataset.tokenizer, args.max_source_length, args.max_target_length)
    scored, documents = score_test(trainer, tested, lead_words)
    if not trainer.is_world_process_zero():
        return None
    results = scored | {
        "command": command,
        "seed": args.seed,
        "steps": state["global_step"],
        "train_documents": len(rows["train"]),
        "max_source_length": args.max_source_length,
        "max_target_length": args.max_target_length,
        "resumed_from": checkpoint and checkpoint.name,  # then the training time is that of the rest
        "seconds": {"train": train_seconds, "test": scored.pop("test_seconds")},
        "device": device_name(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "history": state["log_history"],
    }
    write_atomically(args.output / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in documents))
    write_atomically(args.output / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(args.output / "results.md", format_table(results))
    return results


# --- Command line


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT), help="directory or Hub id; its own code is run if it has any")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, final model and results")
    _add_data_options(parser.add_argument_group("data (--train-file or --dataset)"))
    _add_training_options(parser.add_argument_group("training"))
    _add_generation_options(parser.add_argument_group("generation and evaluation"))
    args = parser.parse_args(argv)
    if (args.train_file is None) == (args.dataset is None):
        parser.error("one of --train-file and --dataset is needed")
    if args.dataset is not None and (args.validation_file or args.test_file):
        parser.error("--dataset brings its own validation and test splits")
    return args


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    for split in ("train", "validation", "test"):
        group.add_argument(f"--{split}-file", type=Path, help="JSON lines (.jsonl, .jsonl.gz)")
    group.add_argument("--dataset", help="a name or folder that `datasets.load_dataset` takes")
    group.add_argument("--config", help="configuration of the --dataset")
    group.add_argument("--document-field", default="document")
    group.add_argument("--summary-field", default="summary")
    for split in ("train", "validation", "test"):
        group.add_argument(f"--limit-{split}", type=positive, help="rows at random, always the same ones")
    group.add_argument("--max-source-length", type=positive, help="tokens; None: the model's positions")
    group.add_argument("--max-target-length", type=positive, default=128, help="tokens, the final [SEP] included")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=float, default=3.0)
    group.add_argument("--steps", type=positive, help="in place of --epochs")
    group.add_argument("--batch-size", type=positive, default=4, help="documents per step and process")
    group.add_argument("--gradient-accumulation", type=positive, default=1, help="batches that make a step")
    group.add_argument("--lr", type=float, default=1e-4)
    group.add_argument("--warmup", type=int, default=0, help="steps")
    group.add_argument("--schedule", choices=SCHEDULES, default="linear", help="of the learning rate")
    group.add_argument("--label-smoothing", type=float, default=0.0)
    group.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory for more time")
    group.add_argument("--seed", type=int, default=1)
    group.add_argument("--log-every", type=positive, default=50, help="steps")
    group.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
    group.add_argument("--eval-every", type=int, default=0, help="steps between validation losses; 0: none")


def _add_generation_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--beams", type=positive, default=4)
    group.add_argument("--no-repeat-ngrams", type=int, default=3, help="no n tokens twice in a summary; 0: no rule")
    group.add_argument("--eval-batch-size", type=positive, default=4, help="documents per batch and process")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = shlex.join(["python", "examples/run_summarization.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        results = run(args, command)
    except (UsageError, OSError) as error:
        print(f"run_summarization: {error}", file=sys.stderr)
        return 1
    if results is not None:
        print(format_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
