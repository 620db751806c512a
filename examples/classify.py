"""Fine-tune a classifier of long documents. A row has a text and a label. JSON lines may have a list of labels:
{"text": "A storm came up ...", "label": "weather"} or {"text": "The match was put off ...", "label": ["weather", "sport"]}.

    python examples/classify.py --train train.jsonl --test test.csv --output_dir runs/topics
    python examples/classify.py --train stanfordnlp/imdb:train --test stanfordnlp/imdb:test --bf16 --output_dir runs/imdb

The output directory gets the best model, its scores and predictions.jsonl. The same command resumes a stopped run from
its last checkpoint. Needs `pip install ".[fine-tuning]"`.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import torch
import transformers
from datasets import Dataset, load_dataset
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from transformers.hf_argparser import HfArg, HfArgumentParser


@dataclass
class Options:
    train: str = HfArg(help="file (.jsonl, .csv, .tsv, also .gz) or split on the Hub (NAME:SPLIT, NAME:SUBSET:SPLIT)")
    test: str = HfArg(help="the same, to score the best model")
    validation: str | None = HfArg(default=None, help="the same, to choose the best epoch; None: a tenth of --train")
    text_field: str = HfArg(default="text", help="field that holds the text")
    label_field: str = HfArg(default="label", help="field that holds the label or the list of labels")
    model: str = HfArg(default=str(Path(__file__).resolve().parents[1]), help="directory or Hub id; its code is run")
    max_length: int | None = HfArg(default=None, help="tokens to read from a text; None: the model's maximum")
    patience: int = HfArg(default=3, help="evaluations without improvement before training stops")


def read(source: str, label_field: str) -> Iterator[tuple[int, dict | str]]:
    """Numbered lines of a JSON lines file, rows of a table (by their last line) or rows of a split on the Hub."""
    kind = source.lower().removesuffix(".gz").rpartition(".")[2]
    if kind not in ("json", "jsonl", "csv", "tsv"):
        data = load_dataset(*source.split(":")[:-1], split=source.split(":")[-1])
        feature = data.features.get(label_field)
        to_name = getattr(getattr(feature, "feature", feature), "int2str", lambda label: label)
        yield from enumerate((row | {label_field: to_name(row.get(label_field))} for row in data), start=1)
        return
    with fsspec.open(source, "rt", encoding="utf-8-sig", newline="", compression="infer") as file:
        if kind.startswith("json"):
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            return
        csv.field_size_limit(2**31 - 1)  # a document may be longer than the default limit
        table = csv.DictReader(file, delimiter="\t" if kind == "tsv" else ",", strict=True)
        if len(set(table.fieldnames or [])) < len(table.fieldnames or []):
            sys.exit(f"{source}, line 1: a column is named twice")
        yield from ((table.line_num, row) for row in table)


def load(source: str, options: Options) -> list[dict]:
    """Load texts with their label or labels, as strings. Name the line of a row that would be misread, and exit."""
    rows, number = [], 1
    try:
        for number, row in read(source, options.label_field):
            row = json.loads(row) if isinstance(row, str) else row
            text, label = row[options.text_field], row[options.label_field]
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # half of a surrogate pair is not a character
            if None in row:
                sys.exit(f"{source}, line {number}: more fields than line 1; put a field with commas in double quotes")
            labels = label if isinstance(label, list) else [label]
            names = {str(each) for each in labels if isinstance(each, str | int)}
            if len(names) < len(labels) or any(re.fullmatch(r"(\[.*])?", name) for name in names):
                sys.exit(f"{source}, line {number}: {label!r} is not a label (JSON lines may have lists of labels)")
            rows.append({"text": text, "label": list(map(str, labels)) if labels is label else str(label)})
    except csv.Error as error:
        sys.exit(f"{source}, after line {number}: {error}")
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{source}, line {number}: expected a text and a label as shown by --help ({error!r})")
    return rows or sys.exit(f"{source}: no rows")


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((Options, transformers.TrainingArguments), description=__doc__.split("\n\n")[0])
    parser.usage = "%(prog)s --train FILE --test FILE --output_dir DIRECTORY [--OPTION VALUE ...]"
    parser.set_defaults(
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="macro_f1", restore_callback_states_from_checkpoint=True, learning_rate=1e-4,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, logging_steps=10, report_to="none",
    )  # fmt: skip
    options, training = parser.parse_args_into_dataclasses(argv)
    output = Path(training.output_dir)
    if (output / "test_results.json").exists():
        return print(f"already done: {output} (another run needs another --output_dir)")

    train, test = load(options.train, options), load(options.test, options)
    held_out = load(options.validation, options) if options.validation else None
    train, validation = (train, held_out) if held_out else train_test_split(train, test_size=0.1, random_state=0)
    labels = [row["label"] for row in train + validation + test]
    several = isinstance(labels[0], list)
    names = sorted({name for label in labels for name in (label if isinstance(label, list) else [label])})
    if len({type(label) for label in labels}) > 1 or len(names) < 2 or (several and names == ["0", "1"]):
        sys.exit(f"need two labels or more, a list in each row or in none, and no vectors of 0 and 1; found {names}")

    states = output.glob("checkpoint-*/trainer_state.json")  # this file is whole only in a complete checkpoint
    steps = [int(path.parent.name.split("-")[1]) for path in states if path.read_text().endswith("}\n")]
    checkpoint = str(output / f"checkpoint-{max(steps)}") if steps else None
    print(f"resuming from step {max(steps)}" if steps else "training from the start")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    transformers.set_seed(training.seed)  # fixes the random weights of the new head
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoint or options.model, trust_remote_code=True, ignore_mismatched_sizes=True,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
        problem_type="multi_label_classification" if several else "single_label_classification",
    )  # fmt: skip
    length = options.max_length or model.config.max_position_embeddings

    def encode(row: dict) -> dict:
        label = [float(name in row["label"]) for name in names] if several else names.index(row["label"])
        return {**tokenizer(row["text"], truncation=True, max_length=length), "labels": label}

    def decide(scores: np.ndarray) -> np.ndarray:
        return scores > 0 if several else scores.argmax(-1)

    def compute_metrics(found: transformers.EvalPrediction) -> dict[str, float]:
        made = decide(found.predictions)
        f1 = f1_score(found.label_ids, made, average="macro", zero_division=0)
        return {"accuracy": accuracy_score(found.label_ids, made), "macro_f1": f1}

    splits = train, validation, test
    data = [Dataset.from_list(rows).map(encode, remove_columns=["text", "label"]) for rows in splits]
    cut = sum(len(ids) >= length for ids in data[0]["input_ids"])
    print(f"{len(train)} rows to train on, {cut} of them cut at {length} tokens; labels: {', '.join(names)}")
    trainer = transformers.Trainer(
        model=model, args=training, train_dataset=data[0], eval_dataset=data[1], compute_metrics=compute_metrics,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[transformers.EarlyStoppingCallback(options.patience)],
    )  # fmt: skip
    # Before 4.48, transformers reads NumPy's random state with torch.load. Since PyTorch 2.6, this needs permission.
    torch.serialization.add_safe_globals([np.empty(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.UInt32DType])
    trainer.train(resume_from_checkpoint=checkpoint)
    # The Trainer of transformers 5.0 leaves out layer norms when it loads the best model.
    model.load_state_dict(type(model).from_pretrained(trainer.state.best_model_checkpoint).state_dict())
    model.config.use_cache = True  # the Trainer of transformers 5 sets it to False
    trainer.save_model()
    tokenizer.save_pretrained(output)

    result = trainer.predict(data[2])
    made = decide(result.predictions)
    predicted = [[names[i] for i in np.flatnonzero(row)] if several else names[row] for row in made]
    if all(label == predicted[0] for label in predicted):
        print(f"warning: the model predicts {predicted[0]!r} for every text; train longer, or change --learning_rate")
    scores = [dict(zip(names, row.tolist(), strict=True)) for row in result.predictions]  # the logits
    columns = {"reference": [row["label"] for row in test], "prediction": predicted, "scores": scores}
    if trainer.is_world_process_zero():
        Dataset.from_dict(columns).to_json(output / "predictions.jsonl")
    trainer.log_metrics("test", result.metrics)
    trainer.save_metrics("test", result.metrics, combined=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: run the same command again to resume from the last checkpoint")
