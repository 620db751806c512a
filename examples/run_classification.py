"""Fine-tune a classifier of documents, and compare the lengths that it may read.

    python examples/run_classification.py --train-file train.jsonl.gz --test-file test.jsonl.gz \\
        --max-length 512 4096 --seeds 1 2 3 --baseline --output runs/topics
    python examples/run_classification.py --dataset stanfordnlp/imdb --bf16 --output runs/imdb

Needs `pip install ".[fine-tuning]"`. A label is a string or an integer; lists of these make a classifier of
several labels at once. Every length is trained with every seed, and tested on the same documents; `--baseline` adds
linear classifiers of TF-IDF, which read the same first tokens and the whole text. OUTPUT then holds `results.json`,
`results.md` and `predictions.jsonl`, and `length-L/seed-S` for each run, with `final` (the model that was best on the
validation documents) and `predictions.jsonl` with scores. Started again with the same arguments, killed runs go on
from their last complete checkpoint, finished ones are not repeated, and others may be added. With several GPUs:
`torchrun --nproc-per-node 4 examples/run_classification.py ...`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from fine_tuning import (
    SAMPLE_SEED,
    TOKENIZER_ARGUMENT,
    Arguments,
    Field,
    UsageError,
    WholeCheckpoints,
    add_data_options,
    add_training_options,
    at_last_step,
    check_data_options,
    check_length,
    check_same_run,
    device_name,
    enable_gradient_checkpointing,
    load_pretrained,
    load_splits,
    make_parser,
    not_negative,
    positive,
    run_script,
    sample,
    save_final,
    train,
    training_keywords,
    versions,
    write_atomically,
    write_results,
)

METRICS = {"loss": "loss", "accuracy": "accuracy", "micro_f1": "micro F1", "macro_f1": "macro F1"}
READ_AT_ONCE = 1000  # documents that are tokenized together: lists of ids take eight times the memory of arrays
SORTED_BATCHES = 50  # that many are sorted by length together; all others meet at random
# A run may be taken up again with other values of these; all others belong to its checkpoints.
FREE = {"output", "baseline", "eval_batch_size", "log_every", "save_every"}


class Labels(NamedTuple):
    """The names of all labels, in the order of the model's logits; may a document have several of them?"""

    names: list[str]
    several: bool

    @property
    def problem_type(self) -> str:
        return "multi_label_classification" if self.several else "single_label_classification"

    def encode(self, label: str | int | list) -> int | list[float]:
        """The index of a label, or of several a vector of 0 and 1."""
        if not self.several:
            return self.names.index(str(label))
        present = {str(each) for each in label}
        return [float(name in present) for name in self.names]

    def decode(self, encoded: int | Sequence[float]) -> str | list[str]:
        """The name of a label, or of several a list of names."""
        if not self.several:
            return self.names[encoded]
        return [name for name, present in zip(self.names, encoded, strict=True) if present]


# --- Data


def data_fields(args: argparse.Namespace) -> dict[str, Field]:
    """The rows are ``{"text": ..., "label": ...}``, whatever the data calls these fields."""
    return {
        "text": Field(args.text_field),
        "label": Field(args.label_field, (str, int, list), "label (a string, an integer, or a list of these)"),
    }


def as_list(label: str | int | list) -> list:
    return label if isinstance(label, list) else [label]


def find_labels(rows: Sequence[Mapping[str, Any]]) -> Labels:
    """All labels of the rows: integers by their value, other names by the alphabet."""
    found = [row["label"] for row in rows]
    several = any(isinstance(label, list) for label in found)
    names = set()
    for label in found:
        if isinstance(label, list) != several:
            raise UsageError(f"some documents have a list of labels and others a single one, such as {label!r}")
        for name in as_list(label):
            if not isinstance(name, (str, int)) or name == "":
                raise UsageError(f"a label has to be a string or an integer, not {name!r}")
            names.add(str(name))
    if len(names) < 2:
        raise UsageError(f"at least 2 different labels are needed, but all documents have {sorted(names)}")
    are_integers = all(name.lstrip("-").isdecimal() for name in names)
    return Labels(sorted(names, key=int if are_integers else None), several)


def split_off(rows: Sequence[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Split rows in two, the second with that fraction of each label's documents, the same ones in every run.

    What rounding leaves over goes on to the next label, so that small classes are not left out together. A label's
    only document stays in the first part. Documents with lists of labels are split as they come: few lists are equal.
    """
    by_label: dict[str, list[int]] = {}
    for index in random.Random(SAMPLE_SEED).sample(range(len(rows)), len(rows)):
        label = rows[index]["label"]
        by_label.setdefault("" if isinstance(label, list) else json.dumps(label), []).append(index)
    taken: set[int] = set()
    due = 0.5  # half of one, so that the sum is rounded
    for label in sorted(by_label):
        due += fraction * len(by_label[label])
        number = min(int(due), len(by_label[label]) - 1)
        taken.update(by_label[label][:number])
        due -= number
    kept = [row for index, row in enumerate(rows) if index not in taken]
    return kept, [rows[index] for index in sorted(taken)]


def load_documents(args: argparse.Namespace) -> dict[str, Sequence[dict[str, Any]]]:
    """The documents to train on, to validate on (perhaps none) and to test on."""
    rows = load_splits(args, data_fields(args))
    if rows["test"] is None:
        raise UsageError("no test data: --test-file is needed, or a --dataset with a split named test")
    if rows["validation"] is None and args.validation_fraction:
        rows["train"], validation = split_off(rows["train"], args.validation_fraction)
        if not validation:
            raise UsageError(
                f"--validation-fraction {args.validation_fraction} of {len(rows['train'])} documents is none; "
                "give more, or 0 to train without validation"
            )
        rows["validation"] = sample(validation, args.limit_validation)
    return rows | {"validation": rows["validation"] or []}


class Documents(Dataset):
    """Token ids and labels of the rows.

    Args:
        rows: with "text" and "label".
        labels: all labels.
        tokenizer: cuts each text after its first ``max_length`` tokens, [CLS] and [SEP] included.
        max_length: in tokens.
        by_length: sort them by length, for batches with little padding; ``order`` has the rows' indices.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        labels: Labels,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        by_length: bool = False,
    ):
        ids: list[np.ndarray] = []
        for start in range(0, len(rows), READ_AT_ONCE):
            texts = [rows[index]["text"] for index in range(len(rows))[start : start + READ_AT_ONCE]]
            found = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            ids += [np.asarray(each, dtype=np.int32) for each in found]
        self.order = sorted(range(len(ids)), key=lambda index: len(ids[index])) if by_length else range(len(ids))
        self.ids = [ids[index] for index in self.order]
        self.labels = [labels.encode(rows[index]["label"]) for index in self.order]
        self.lengths = [len(found) for found in self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index].tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self.labels[index]}


def shuffled_by_length(lengths: Sequence[int], batch_size: int, generator: random.Random) -> list[int]:
    """Indices in a random order in which each `batch_size` in a row have similar lengths; the last may be fewer."""
    indices = generator.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(indices), SORTED_BATCHES * batch_size):
        part = sorted(indices[start : start + SORTED_BATCHES * batch_size], key=lambda index: lengths[index])
        batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    return [index for batch in generator.sample(whole, len(whole)) + rest for index in batch]


class ByLength(Sampler[int]):
    """`shuffled_by_length`, anew in every epoch of the Trainer.

    The order comes from the seed and the epoch alone, so that a resumed run goes on in the same one.
    """

    def __init__(self, trainer: Trainer, lengths: Sequence[int]):
        self.trainer, self.lengths = trainer, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        arguments = self.trainer.args
        generator = random.Random(f"{arguments.seed} {epoch}")
        together = arguments.train_batch_size * arguments.world_size
        return iter(shuffled_by_length(self.lengths, together, generator))


# --- Loss and metrics


def label_weights(encoded: Sequence[int | Sequence[float]], labels: Labels) -> Tensor:
    """Weights that let rare labels count as much as frequent ones, of the documents' encoded labels: (labels,).

    Of a single label: documents / (labels * documents with it), which is 1 in the mean over the documents. Of several
    labels: the weight of the documents that have it, which is documents without it / documents with it. A label of no
    document gets weight 1, which then weighs nothing.
    """
    if labels.several:
        present = torch.tensor(encoded).sum(0)
        weights = (len(encoded) - present) / present
    else:
        present = torch.bincount(torch.tensor(encoded), minlength=len(labels.names)).float()
        weights = len(encoded) / ((present > 0).sum() * present)
    return torch.where(present > 0, weights, 1.0)


def mean_loss(logits: Tensor, encoded: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of (documents,) indices, or binary cross-entropy of a (documents, labels) matrix of 0 and 1.

    Its mean is over the documents, not over their weights: in a batch with a single label these would cancel out.
    """
    logits = logits.float()
    if encoded.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, encoded, pos_weight=weights)
    return F.cross_entropy(logits, encoded, weight=weights, reduction="sum") / len(encoded)


def decide(logits: np.ndarray, several: bool) -> np.ndarray:
    """The (documents,) index of the likeliest label, or a matrix of 0 and 1: the labels more likely than not."""
    return (logits > 0).astype(np.int64) if several else logits.argmax(-1)


def score(encoded: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Metrics in percent of (documents,) indices or (documents, labels) matrices of 0 and 1.

    With several labels, "accuracy" is of the documents whose labels are all right. With one, micro F1 is the accuracy
    once more and left out.
    """
    averages = ["micro", "macro"] if np.ndim(encoded) == 2 else ["macro"]
    f1 = {f"{name}_f1": 100 * f1_score(encoded, predicted, average=name, zero_division=0) for name in averages}
    return {"accuracy": 100 * float(accuracy_score(encoded, predicted))} | {k: float(v) for k, v in f1.items()}


def evaluations_since_best(history: Sequence[Mapping[str, float]], metric: str) -> int:
    """How many validations came after the first one that had the best value; 0 without any."""
    values = [entry[f"eval_{metric}"] for entry in history if f"eval_{metric}" in entry]
    if not values:
        return 0
    return len(values) - 1 - values.index(min(values) if metric == "loss" else max(values))


def is_finished(state: Mapping[str, Any], args: argparse.Namespace) -> bool:
    """Has a run come to its last step, or out of patience?"""
    out_of_patience = args.patience and evaluations_since_best(state["log_history"], args.best_by) >= args.patience
    return at_last_step(state) or bool(out_of_patience)


# --- Model and Trainer


class Validation(TrainerCallback):
    """Save a checkpoint at each validation, validate once more at the end, and stop when out of patience.

    The patience is read off the history, which is part of the checkpoints: a resumed run stops where it would have.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if at_last_step(vars(state)):
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        control.should_save = True
        if is_finished(vars(state), self.args):
            control.should_training_stop = True


class DocumentTrainer(WholeCheckpoints, Trainer):
    """A Trainer with weighted labels and batches of documents of similar lengths."""

    def __init__(self, *, weights: Tensor, **options: Any):
        super().__init__(**options)
        self.weights = weights
        # The loss is a batch's mean, so that the Trainer has to divide it by the batches that make a step.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = mean_loss(outputs.logits, inputs["labels"], self.weights.to(outputs.logits.device))
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=ByLength(self, self.train_dataset.lengths),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


def load_model(path: str | Path, labels: Labels) -> PreTrainedModel:
    """The model with a head for these labels, whose names are part of its configuration."""
    return load_pretrained(
        AutoModelForSequenceClassification,
        path,
        id2label=dict(enumerate(labels.names)),
        label2id={name: index for index, name in enumerate(labels.names)},
        problem_type=labels.problem_type,
        ignore_mismatched_sizes=True,  # the head of another classification is replaced; all else is as configured
    )


def training_arguments(args: argparse.Namespace) -> Arguments:
    return Arguments(
        **training_keywords(args), metric_for_best_model=args.best_by, greater_is_better=args.best_by != "loss"
    )


def build_trainer(
    args: argparse.Namespace,
    arguments: Arguments,
    examples: Mapping[str, Documents],
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
) -> DocumentTrainer:
    """The Trainer with the model of that path, whose head is drawn by the seed where it has none."""
    set_seed(args.seed)
    model = load_model(path, labels)
    enable_gradient_checkpointing(model, args)
    weights = torch.ones(len(labels.names))
    if args.class_weights:
        weights = label_weights(examples["train"].labels, labels)

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        return score(evaluated.label_ids, decide(evaluated.predictions, labels.several))

    return DocumentTrainer(
        weights=weights,
        model=model,
        args=arguments,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"] if len(examples["validation"]) else None,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        callbacks=[Validation(args)] if args.eval_every else [],
        **{TOKENIZER_ARGUMENT: tokenizer},
    )


def steps_per_epoch(documents: int, arguments: Arguments) -> int:
    batches = -(-documents // (arguments.train_batch_size * arguments.world_size))
    return max(1, batches // arguments.gradient_accumulation_steps)


def predict(trainer: Trainer, documents: Documents) -> tuple[np.ndarray, float]:
    """Logits in the order of the rows, (documents, labels), and the loss."""
    output = trainer.predict(documents)
    logits = np.empty((len(documents), output.predictions.shape[-1]), dtype=np.float32)
    logits[documents.order] = output.predictions[: len(documents)]  # several processes may fill up the last batch
    return logits, output.metrics["test_loss"]


def probabilities(logits: np.ndarray, labels: Labels) -> np.ndarray:
    """Of each label for itself where there may be several, else of one of them: (documents, labels)."""
    logits = torch.from_numpy(logits)
    return (logits.sigmoid() if labels.several else logits.softmax(-1)).numpy()


# --- A run, and the baselines


def run_once(
    args: argparse.Namespace, rows: Mapping[str, Sequence[dict]], labels: Labels, tokenizer: PreTrainedTokenizerBase
) -> dict:
    """Train and test with one length and one seed, or read what a finished run has left.

    Args:
        args: the command line with ``output``, ``max_length`` and ``seed`` of this run.
        rows: the documents of the splits.
        labels: all labels.
        tokenizer: the model's.

    Returns: what `results.json` says of the run: scores in percent, the labels predicted for the test documents, and
        how it was made.
    """
    first = training_arguments(args).process_index == 0
    if first:
        check_same_run(args, FREE)
    done = args.output / "result.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    examples = {
        split: Documents(rows[split], labels, tokenizer, args.max_length, by_length=split != "train") for split in rows
    }
    args = argparse.Namespace(**vars(args))
    args.eval_every = validation_steps(args, examples)
    arguments = training_arguments(args)

    def build(path: str | Path) -> DocumentTrainer:
        return build_trainer(args, arguments, examples, labels, tokenizer, path)

    trained = train(
        args.output, lambda checkpoint: build(checkpoint or args.model), lambda state: is_finished(state, args)
    )
    trainer, best = trained.trainer, trained.state["best_model_checkpoint"]
    if best is not None:
        trainer = build(args.output / Path(best).name)
    save_final(trainer, args.output)
    started = time.perf_counter()
    logits, loss = predict(trainer, examples["test"])
    predicted = decide(logits, labels.several)
    result = score(np.asarray([labels.encode(row["label"]) for row in rows["test"]]), predicted) | {
        "max_length": args.max_length,
        "seed": args.seed,
        "test_loss": loss,
        "steps": trained.state["global_step"],
        "best_step": int(Path(best).name.split("-")[1]) if best else trained.state["global_step"],
        "tokens_read": float(np.mean(examples["train"].lengths)),
        "texts_cut": float(np.mean(np.asarray(examples["train"].lengths) == args.max_length)),
        "resumed_from": trained.checkpoint and trained.checkpoint.name,  # then the training time is that of the rest
        "seconds": {"train": trained.seconds, "test": time.perf_counter() - started},
        "device": device_name(),
        "versions": versions() | {"scikit-learn": sklearn.__version__},
        "predictions": [labels.decode(each) for each in predicted.tolist()],
        "history": trained.state["log_history"],
    }
    if first:
        write_run(args.output, result, rows["test"], probabilities(logits, labels), labels)
    return result


def validation_steps(args: argparse.Namespace, examples: Mapping[str, Documents]) -> int:
    """The steps between validations, by default an epoch; 0 without validation documents."""
    if not len(examples["validation"]):
        return 0
    return args.eval_every or steps_per_epoch(len(examples["train"]), training_arguments(args))


def write_run(
    output: Path, result: dict, rows: Sequence[Mapping[str, Any]], scores: np.ndarray, labels: Labels
) -> None:
    """A line for each test document with the probabilities, and then the result, which says that the run is done."""
    lines = [
        {"document": index, "label": row["label"], "prediction": result["predictions"][index]}
        | {"scores": dict(zip(labels.names, np.round(scores[index].astype(float), 6).tolist(), strict=True))}
        for index, row in enumerate(rows)
    ]
    write_atomically(output / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_atomically(output / "result.json", json.dumps(result, indent=1) + "\n")


def cut_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """What of each text a model reads that takes so many tokens."""
    offsets = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)["offset_mapping"]
    return [text[: max(end for _, end in found)] for text, found in zip(texts, offsets, strict=True)]


def linear_predictions(
    texts: Mapping[str, Sequence[str]], encoded: Sequence[int | Sequence[float]], labels: Labels, balanced: bool
) -> np.ndarray:
    """What a linear support vector machine on TF-IDF (logarithmic counts) predicts for the "test" texts."""
    classifier = LinearSVC(class_weight="balanced" if balanced else None, random_state=0)
    pipeline = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), OneVsRestClassifier(classifier) if labels.several else classifier
    )
    try:
        return pipeline.fit(texts["train"], np.asarray(encoded).astype(int)).predict(texts["test"])
    except ValueError as error:  # no words, or a single label
        raise UsageError(f"--baseline cannot be trained on these documents: {error}") from error


def run_baselines(
    args: argparse.Namespace,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, dict]:
    """Scores and predictions of the linear classifiers of each length and of the whole text, by their names.

    They are trained on the documents that the models are trained on: without those of the validation. A first one
    always says the most frequent label (of several labels: those of more than half of the documents).
    """
    encoded = {split: [labels.encode(row["label"]) for row in rows[split]] for split in ("train", "test")}
    whole = {split: [row["text"] for row in rows[split]] for split in encoded}
    dummy = DummyClassifier(strategy="most_frequent").fit(whole["train"], np.asarray(encoded["train"]).astype(int))
    predicted = {"most frequent label": (None, dummy.predict(whole["test"]))}
    for length in [*args.max_length, None]:
        texts = whole if length is None else {key: cut_texts(whole[key], tokenizer, length) for key in whole}
        name = "TF-IDF + linear SVM, " + ("whole text" if length is None else f"{length:,} tokens")
        predicted[name] = length, linear_predictions(texts, encoded["train"], labels, args.class_weights)
    return {
        name: score(np.asarray(encoded["test"]), made)
        | {"max_length": length, "predictions": [labels.decode(each) for each in made.tolist()]}
        for name, (length, made) in predicted.items()
    }


# --- Results


def summarize(runs: Mapping[str, Mapping[str, Any]]) -> dict:
    """A system's scores over its seeds: each one's, their mean, and their standard deviation (None for one alone)."""
    names = [name for name in METRICS if all(name in run for run in runs.values())]
    values = {name: {seed: run[name] for seed, run in runs.items()} for name in names}
    return {
        name: {
            "mean": float(np.mean([*found.values()])),
            "deviation": float(np.std([*found.values()], ddof=1)) if len(found) > 1 else None,
            "seeds": found,
        }
        for name, found in values.items()
    }


def format_cell(scores: Mapping[str, Any]) -> str:
    if scores["deviation"] is None:
        return f"{scores['mean']:.2f}"
    values = ", ".join(f"{value:.2f}" for value in scores["seeds"].values())
    return f"{scores['mean']:.2f} ± {scores['deviation']:.2f} ({values})"


def format_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    names = list(next(iter(results["systems"].values())))
    lines = ["| system | " + " | ".join(METRICS[name] for name in names) + " |", "| --- " * (1 + len(names)) + "|"]
    for system, scores in results["systems"].items():
        lines.append(f"| {system} | " + " | ".join(format_cell(scores[name]) for name in names) + " |")
    documents = results["documents"]
    validated = f"; the best model by {METRICS[results['best_by']]} on these" if documents["validation"] else ""
    facts = (
        f"{documents['test']:,} test documents of {len(results['labels'])} labels; in percent, and of the models "
        f"mean ± standard deviation over the seeds\nand each seed's value. {documents['train']:,} documents to train on, "
        f"{documents['validation']:,} to validate on{validated}.\n\n"
        "| tokens | seed | mean tokens read | texts cut | steps | best step | training (s) | testing (s) | on |\n"
        + "| --- " * 9
        + "|"
    )
    for run in results["runs"]:
        rest = f", from {run['resumed_from']} on" if run["resumed_from"] else ""
        facts += (
            f"\n| {run['max_length']:,} | {run['seed']} | {run['tokens_read']:,.0f} | {100 * run['texts_cut']:.0f} % "
            f"| {run['steps']:,} | {run['best_step']:,} | {run['seconds']['train']:,.0f}{rest} "
            f"| {run['seconds']['test']:,.0f} | {run['device']} |"
        )
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(lines) + f"\n\n{facts}\n\n{software}\n\n```text\n{results['command']}\n```\n"


def run(args: argparse.Namespace, command: str) -> str | None:
    """All lengths with all seeds, and the baselines; the table, or None in a process other than the first."""
    config = load_pretrained(AutoConfig, args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.max_length = [check_length("--max-length", length, config) for length in args.max_length or [None]]
    special = tokenizer.num_special_tokens_to_add()
    if min(args.max_length) <= special:
        raise UsageError(
            f"--max-length {min(args.max_length)} leaves no room for text beside {special} special tokens"
        )
    arguments = training_arguments(argparse.Namespace(**vars(args), seed=args.seeds[0]))
    with arguments.main_process_first(desc="reading the data"):
        rows = load_documents(args)
    labels = find_labels([row for split in rows.values() for row in split])
    if args.best_by == "micro_f1" and not labels.several:
        raise UsageError("--best-by micro_f1 is for lists of labels; of single ones it is the accuracy")
    first = arguments.process_index == 0
    frequencies = Counter(str(name) for row in rows["train"] for name in as_list(row["label"]))
    unseen = [name for name in labels.names if not frequencies[name]]
    if unseen and first:
        print(f"run_classification: no document to train on has the labels {unseen}", file=sys.stderr)
    baselines = run_baselines(args, rows, labels, tokenizer) if args.baseline and first else {}
    runs = []
    for length in args.max_length:
        for seed in args.seeds:
            given = {name: value for name, value in vars(args).items() if name != "seeds"}
            output = args.output / f"length-{length}" / f"seed-{seed}"
            one = argparse.Namespace(**given | {"output": output, "max_length": length, "seed": seed})
            runs.append(run_once(one, rows, labels, tokenizer))
    if not first:
        return None
    systems = {
        f"model, {length:,} tokens": {str(made["seed"]): made for made in runs if made["max_length"] == length}
        for length in args.max_length
    } | {name: {"-": made} for name, made in baselines.items()}
    results = {
        "command": command,
        "systems": {name: summarize(found) for name, found in systems.items()},
        "documents": {split: len(found) for split, found in rows.items()},
        "labels": {name: frequencies[name] for name in labels.names},  # documents to train on that have it
        "seeds": args.seeds,
        "best_by": args.best_by,
        "device": device_name(),
        "versions": versions() | {"scikit-learn": sklearn.__version__},
        "runs": [{name: value for name, value in made.items() if name != "predictions"} for made in runs],
    }
    documents = [
        {"document": index, "label": row["label"]}
        | {
            f"{name}, seed {seed}" if seed != "-" else name: made["predictions"][index]
            for name, found in systems.items()
            for seed, made in found.items()
        }
        for index, row in enumerate(rows["test"])
    ]
    table = format_table(results)
    write_results(args.output, results, table, documents)
    return table


# --- Command line


def fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return float(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    data = add_data_options(parser, ["text", "label"])
    data.add_argument(
        "--max-length", type=positive, nargs="+", help="tokens, one or more; None: the model's positions"
    )
    data.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.1,
        help="of the training data, where there is none to validate",
    )
    training = add_training_options(parser, several_seeds=True, no_steps="an epoch")
    training.add_argument("--class-weights", action="store_true", help="rare labels count as much as frequent ones")
    training.add_argument(
        "--patience", type=not_negative, default=5, help="validations without a better one; 0: no end"
    )
    training.add_argument("--best-by", choices=METRICS, default="macro_f1", help="of the validation")
    parser.add_argument("--baseline", action="store_true", help="linear classifiers of TF-IDF beside the models")
    args = parser.parse_args(argv)
    check_data_options(parser, args)
    args.seeds = [*dict.fromkeys(args.seeds)]
    args.max_length = args.max_length and [*dict.fromkeys(args.max_length)]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("run_classification", lambda command: run(args, command), argv)


if __name__ == "__main__":
    sys.exit(main())
