"""Fine-tune a model to tag words, such as names, in long documents. A row has words and a BIO tag for each word:
{"tokens": ["Old", "Jordan", "sat"], "tags": ["B-PER", "I-PER", "O"]}.

    python examples/tag_tokens.py --train train.jsonl --test test.jsonl --output_dir runs/names
    python examples/tag_tokens.py --train eriktks/conll2003:train --test eriktks/conll2003:test --tags_field ner_tags \\
        --bf16 --output_dir runs/conll

The output directory gets the best model, its scores and predictions.jsonl. The same command resumes a stopped run from
its last checkpoint. Needs `pip install ".[fine-tuning]"`.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import torch
import transformers
from datasets import Dataset, load_dataset
from sklearn.model_selection import train_test_split
from transformers.hf_argparser import HfArg, HfArgumentParser


@dataclass
class Options:
    train: str = HfArg(help="file (.jsonl, also .gz) or split on the Hub (NAME:SPLIT or NAME:SUBSET:SPLIT)")
    test: str = HfArg(help="the same, to score the best model")
    validation: str | None = HfArg(default=None, help="the same, to choose the best epoch; None: a tenth of --train")
    tokens_field: str = HfArg(default="tokens", help="field that holds the list of words")
    tags_field: str = HfArg(default="tags", help="field that holds the list of tags")
    model: str = HfArg(default=str(Path(__file__).resolve().parents[1]), help="directory or Hub id; its code is run")
    max_length: int | None = HfArg(default=None, help="tokens to read at once; None: the model's maximum")
    pieces: bool = HfArg(default=False, help="read longer documents in pieces instead of cutting them")
    patience: int = HfArg(default=3, help="evaluations without improvement before training stops")


def load(source: str, options: Options) -> list[dict]:
    """Load words and tags from a JSON lines file or a split on the Hub. Name the line of any other row, and exit."""
    rows, number = [], 1
    try:
        if source.lower().endswith((".jsonl", ".json", ".gz")):
            with fsspec.open(source, "rt", encoding="utf-8-sig", compression="infer") as file:
                found = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
        else:
            data = load_dataset(*source.split(":")[:-1], split=source.split(":")[-1])
            to_names = getattr(getattr(data.features[options.tags_field], "feature", None), "int2str", list)
            found = enumerate((row | {options.tags_field: to_names(row[options.tags_field])} for row in data), start=1)
        for number, row in found:
            row = json.loads(row) if isinstance(row, str) else row
            words = [re.sub("[\ud800-\udfff]", "\ufffd", word) for word in row[options.tokens_field]]
            tags = [re.fullmatch("O|[BI]-.+", tag).group() for tag in row[options.tags_field]]
            if not 0 < len(words) == len(tags):
                sys.exit(f"{source}, line {number}: {len(words)} words and {len(tags)} tags; each word needs a tag")
            rows.append({"words": words, "tags": tags})
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{source}, line {number}: not a list of words and a list of tags (O, B-TYPE, I-TYPE): {error!r}")
    return rows or sys.exit(f"{source}: no rows")


def entities(tags: list[str]) -> list[tuple[int, int, str]]:
    """The first word, one past the last, and the type of each entity. An I- tag that continues none begins one."""
    found = []
    for place, tag in enumerate(tags):
        if tag[0] == "I" and found and found[-1][1:] == (place, tag[2:]):
            found[-1] = (found[-1][0], place + 1, tag[2:])
        elif tag != "O":
            found.append((place, place + 1, tag[2:]))
    return found


def scores(references: list[list[str]], predictions: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all entities and for each type. An entity must have the right words and type."""
    pair = references, predictions
    gold, made = ({(i, *each) for i, tags in enumerate(rows) for each in entities(tags)} for rows in pair)
    result = {}
    for kind in ["", *sorted({each[-1] for each in gold | made})]:
        wanted, found = ({each for each in group if kind in ("", each[-1])} for group in (gold, made))
        right, end = len(wanted & found), f"_{kind}" if kind else ""
        result |= {f"precision{end}": right / max(len(found), 1), f"recall{end}": right / max(len(wanted), 1)}
        result[f"f1{end}"] = 2 * right / max(len(wanted) + len(found), 1)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((Options, transformers.TrainingArguments), description=__doc__.split("\n\n")[0])
    parser.usage = "%(prog)s --train FILE --test FILE --output_dir DIRECTORY [--OPTION VALUE ...]"
    parser.set_defaults(
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=2, load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True, learning_rate=3e-4, per_device_train_batch_size=4,
        per_device_eval_batch_size=4, logging_steps=10, report_to="none",
    )  # fmt: skip
    options, training = parser.parse_args_into_dataclasses(argv)
    output = Path(training.output_dir)
    if (output / "test_results.json").exists():
        return print(f"already done: {output} (another run needs another --output_dir)")

    train, test = load(options.train, options), load(options.test, options)
    held_out = load(options.validation, options) if options.validation else None
    train, validation = (train, held_out) if held_out else train_test_split(train, test_size=0.1, random_state=0)
    types = sorted({tag[2:] for row in train + validation + test for tag in row["tags"] if tag != "O"})
    if not types:
        sys.exit("no row has an entity: all tags are O, and none is B-TYPE or I-TYPE")
    names = ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]

    states = output.glob("checkpoint-*/trainer_state.json")  # this file is whole only in a complete checkpoint
    steps = [int(path.parent.name.split("-")[1]) for path in states if path.read_text().endswith("}\n")]
    checkpoint = str(output / f"checkpoint-{max(steps)}") if steps else None
    print(f"resuming from step {max(steps)}" if steps else "training from the start")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    transformers.set_seed(training.seed)  # fixes the random weights of the new head
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        checkpoint or options.model, trust_remote_code=True, ignore_mismatched_sizes=True,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    length = options.max_length or model.config.max_position_embeddings

    def encode(rows: list[dict]) -> Dataset:
        """Tokenize documents or their pieces. A word's first token gets its number and tag; others get -1 and -100."""
        features = []
        for number, row in enumerate(rows):
            first = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=length).encodings[0]
            seen = {None}
            for piece in [first, *first.overflowing] if options.pieces else [first]:
                words = [-1 if word in seen or seen.add(word) else word for word in piece.word_ids]
                labels = [names.index(row["tags"][word]) if word >= 0 else -100 for word in words]
                features.append({"input_ids": piece.ids, "labels": labels, "words": words, "row": number})
        return Dataset.from_list(features)

    data = [encode(rows) for rows in (train, validation, test)]
    print(f"{len(train)} rows to train on, as {len(data[0])} texts of up to {length} tokens; types: {types}")
    trainer = transformers.Trainer(
        model=model, args=training, train_dataset=data[0], eval_dataset=data[1],
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer),
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
    predicted = [["O"] * len(row["words"]) for row in test]  # words that were not read stay O
    for piece, numbers in zip(data[2], result.predictions, strict=True):
        for word, number in zip(piece["words"], numbers, strict=False):  # numbers are padded
            if word >= 0:
                predicted[piece["row"]][word] = names[number]
    references = [row["tags"] for row in test]
    if not any(map(entities, predicted)):
        print("warning: the model finds no entity at all: train longer, or change --learning_rate")
    if trainer.is_world_process_zero():
        Dataset.from_dict({"reference": references, "prediction": predicted}).to_json(output / "predictions.jsonl")
    metrics = result.metrics | {f"test_{name}": value for name, value in scores(references, predicted).items()}
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics, combined=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: run the same command again to resume from the last checkpoint")
