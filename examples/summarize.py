"""Fine-tune a sequence-to-sequence model to summarize long documents. A row has a document and its summary:
{"document": "A long text ...", "summary": "A short one."}.

    python examples/summarize.py --train train.jsonl --test test.csv --output_dir runs/summaries
    python examples/summarize.py --train ccdv/arxiv-summarization:train --test ccdv/arxiv-summarization:test --bf16 \\
        --document_field article --summary_field abstract --max_target_length 256 --output_dir runs/arxiv

The output directory gets the best model, its scores and predictions.jsonl. The same command resumes a stopped run from
its last checkpoint. Needs `pip install ".[summarization]"`.
"""

import csv
import functools
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
from rouge_score.rouge_scorer import RougeScorer
from sklearn.model_selection import train_test_split
from transformers.hf_argparser import HfArg, HfArgumentParser

ROUGE = ("rouge1", "rouge2", "rougeL")
rouge = functools.cache(RougeScorer(ROUGE, use_stemmer=True).score)  # a study scores the same pairs many times


@dataclass
class Options:
    train: str = HfArg(help="file (.jsonl, .csv, .tsv, also .gz) or split on the Hub (NAME:SPLIT, NAME:SUBSET:SPLIT)")
    test: str = HfArg(help="the same, to score the best model")
    validation: str | None = HfArg(default=None, help="the same, to choose the best epoch; None: a tenth of --train")
    document_field: str = HfArg(default="document", help="field that holds the document")
    summary_field: str = HfArg(default="summary", help="field that holds the summary")
    model: str = HfArg(default=str(Path(__file__).resolve().parents[1]), help="directory or Hub id; its code is run")
    max_length: int | None = HfArg(default=None, help="tokens to read from a document; None: the model's maximum")
    max_target_length: int = HfArg(default=128, help="tokens of the longest summary")
    beams: int = HfArg(default=4, help="number of beams in the beam search")
    no_repeat_ngrams: int = HfArg(default=3, help="repeat no run of so many tokens; 0: allow repeats")
    patience: int = HfArg(default=3, help="evaluations without improvement before training stops")


def read(source: str) -> Iterator[tuple[int, dict | str]]:
    """Numbered lines of a JSON lines file, rows of a table (by their last line) or rows of a split on the Hub."""
    kind = source.lower().removesuffix(".gz").rpartition(".")[2]
    if kind not in ("json", "jsonl", "csv", "tsv"):
        yield from enumerate(load_dataset(*source.split(":")[:-1], split=source.split(":")[-1]), start=1)
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
    """Load documents with their summaries. Name the line of a row that would be misread, and exit."""
    rows, number = [], 1
    try:
        for number, row in read(source):
            row = json.loads(row) if isinstance(row, str) else row
            pair = row[options.document_field], row[options.summary_field]
            document, summary = (re.sub("[\ud800-\udfff]", "\ufffd", text) for text in pair)  # no lone surrogates
            if None in row or not document.strip() or not summary.strip():
                sys.exit(f"{source}, line {number}: more fields than line 1 (quote fields with commas), or empty text")
            rows.append({"document": document, "summary": summary})
    except csv.Error as error:
        sys.exit(f"{source}, after line {number}: {error}")
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{source}, line {number}: expected a document and summary as in --help ({error!r})")
    return rows or sys.exit(f"{source}: no rows")


def scores(references: list[str], predictions: list[str]) -> dict[str, float]:
    """F-measures of ROUGE, with stemming."""
    found = [rouge(*pair) for pair in zip(references, predictions, strict=True)]
    return {name: float(np.mean([each[name].fmeasure for each in found])) for name in ROUGE}


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((Options, transformers.Seq2SeqTrainingArguments), description=__doc__.split("\n\n")[0])
    parser.usage = "%(prog)s --train FILE --test FILE --output_dir DIRECTORY [--OPTION VALUE ...]"
    parser.set_defaults(
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=2, load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True, learning_rate=3e-4, per_device_train_batch_size=4,
        per_device_eval_batch_size=4, logging_steps=10, report_to="none", predict_with_generate=True,
    )  # fmt: skip
    options, training = parser.parse_args_into_dataclasses(argv)
    output = Path(training.output_dir)
    if (output / "test_results.json").exists():
        return print(f"already done: {output} (another run needs another --output_dir)")

    train, test = load(options.train, options), load(options.test, options)
    held_out = load(options.validation, options) if options.validation else None
    train, validation = (train, held_out) if held_out else train_test_split(train, test_size=0.1, random_state=0)

    states = output.glob("checkpoint-*/trainer_state.json")  # this file is whole only in a complete checkpoint
    steps = [int(path.parent.name.split("-")[1]) for path in states if path.read_text().endswith("}\n")]
    checkpoint = str(output / f"checkpoint-{max(steps)}") if steps else None
    print(f"resuming from step {max(steps)}" if steps else "training from the start")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    transformers.set_seed(training.seed)  # fixes the random weights of the new cross-attention
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint or options.model, trust_remote_code=True)
    longest = options.max_target_length + 1  # counts the token from which the decoder starts
    search = {"num_beams": options.beams, "no_repeat_ngram_size": options.no_repeat_ngrams}
    model.generation_config.update(max_length=longest, **search)
    length = options.max_length or model.config.max_position_embeddings

    def encode(row: dict) -> dict:
        """Tokenize a row. The decoder starts from [CLS], so the labels leave it out. They end with [SEP]."""
        inputs = tokenizer(row["document"], truncation=True, max_length=length, return_token_type_ids=False)
        labels = tokenizer(row["summary"], truncation=True, max_length=longest)["input_ids"][1:]
        return {**inputs, "labels": labels}

    data = [Dataset.from_list(rows).map(encode, remove_columns=list(rows[0])) for rows in (train, validation, test)]
    cut = sum(len(ids) >= length for ids in data[0]["input_ids"])
    print(f"{len(train)} rows to train on, {cut} of them cut at {length} tokens")
    trainer = transformers.Seq2SeqTrainer(
        model=model, args=training, train_dataset=data[0], eval_dataset=data[1],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
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
    ids = result.predictions[: len(test)]  # several processes repeat rows at the end, so that all have the same number
    ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
    predicted = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    references = [row["summary"] for row in test]
    metrics = result.metrics | {f"test_{name}": value for name, value in scores(references, predicted).items()}
    if len(set(predicted)) == 1 < len(predicted):
        print("warning: the model writes one summary for every document: train longer, or change --learning_rate")
    if trainer.is_world_process_zero():
        Dataset.from_dict({"reference": references, "prediction": predicted}).to_json(output / "predictions.jsonl")
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics, combined=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: run the same command again to resume from the last checkpoint")
