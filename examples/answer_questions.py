"""Fine-tune a model to find the answers to questions in long documents. A row has a document and its questions, {"context":
"It rained in May.", "qas": [{"question": "When?", "answers": [{"text": "May", "answer_start": 13}]}]}, or as in SQuAD one
question: {"context": ..., "question": ..., "answers": {"text": ["May"], "answer_start": [13]}}. No answers: none is there.

    python examples/answer_questions.py --train train.jsonl --test test.jsonl --output_dir runs/answers
    python examples/answer_questions.py --train rajpurkar/squad_v2:train --test rajpurkar/squad_v2:validation --bf16 \\
        --max_length 512 --output_dir runs/squad

Answers beyond --max_length are not trained on, and count as missed. The directory gets the best model, its scores and
predictions.jsonl. A killed run goes on from its last checkpoint when it is started again. Needs
`pip install ".[fine-tuning]"`.
"""

import gzip
import json
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset, load_dataset
from sklearn.model_selection import train_test_split
from transformers.hf_argparser import HfArg, HfArgumentParser


@dataclass
class Options:
    train: str = HfArg(help="file (.jsonl, also .gz) or split on the Hub (NAME:SPLIT or NAME:SUBSET:SPLIT)")
    test: str = HfArg(help="the same, to score the best model on")
    validation: str | None = HfArg(
        default=None, help="the same, to choose the best epoch by; None: a tenth of --train"
    )
    context_field: str = HfArg(default="context", help="name of the document in a row")
    answerable_only: bool = HfArg(default=False, help="leave out questions without an answer")
    model: str = HfArg(default=str(Path(__file__).resolve().parents[1]), help="directory or Hub id; its code is run")
    max_length: int | None = HfArg(
        default=None, help="tokens of question and document; None: as many as the model can"
    )
    max_answer_length: int = HfArg(default=64, help="tokens of an answer")
    patience: int = HfArg(default=3, help="evaluations without a better one until training stops")


def load(source: str, options: Options) -> list[dict]:
    """Questions with their documents and answers, which are checked to be where they are said to be."""
    if source.lower().endswith((".jsonl", ".json", ".gz")):
        with (gzip.open if source.lower().endswith(".gz") else open)(source, "rt", encoding="utf-8-sig") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    else:
        rows = load_dataset(*source.split(":")[:-1], split=source.split(":")[-1])
    questions = []
    for number, row in enumerate(rows, start=1):
        context = row.get(options.context_field)
        for qa in row.get("qas", [row]):
            answers = qa.get("answers")
            if isinstance(answers, dict):  # of lists, as on the Hub
                answers = [
                    {"text": t, "answer_start": s}
                    for t, s in zip(*(answers[k] for k in ("text", "answer_start")), strict=True)
                ]
            if (
                not isinstance(context, str)
                or not isinstance(qa.get("question"), str)
                or not isinstance(answers, list)
            ):
                sys.exit(
                    f'{source}, row {number}: a "{options.context_field}", a "question" and a list of "answers" are wanted'
                )
            for answer in answers:
                begin = answer["answer_start"]
                if not answer["text"] or context[begin : begin + len(answer["text"])] != answer["text"]:
                    sys.exit(
                        f"{source}, row {number}: at {begin} the document has {context[begin : begin + 20]!r}, not {answer['text']!r}"
                    )
            if answers or not options.answerable_only:
                questions.append(
                    {"document": number, "context": context, "question": qa["question"], "answers": answers}
                )
    return questions


def words(text: str) -> list[str]:
    """As SQuAD compares them: in lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(made: list[str], wanted: list[str]) -> float:
    common = (Counter(made) & Counter(wanted)).total()
    return 2 * common / (len(made) + len(wanted)) if made and wanted else float(made == wanted)


def scores(references: list[list[str]], predictions: list[str | None]) -> dict[str, float]:
    """Exact match and F1 of words, by the answer that fits best; None is right where there is no answer."""
    pairs = [
        (words(made or ""), [*map(words, texts)] or [[]]) for texts, made in zip(references, predictions, strict=True)
    ]
    exact = [made in texts for made, texts in pairs]
    overlap = [max(f1(made, text) for text in texts) for made, texts in pairs]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def best_span(starts: np.ndarray, ends: np.ndarray, longest: int) -> tuple[float, int, int]:
    """The highest sum of a first and a last token's score, and these tokens."""
    sums = [starts[: len(starts) - more] + ends[more:] for more in range(min(longest, len(starts)))]
    return max(
        (float(found.max()), int(found.argmax()), int(found.argmax()) + more) for more, found in enumerate(sums)
    )


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((Options, transformers.TrainingArguments), description=__doc__)
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
    if options.validation is None:  # by documents, of which a question may tell the answer to another
        _, held_out = train_test_split(sorted({row["document"] for row in train}), test_size=0.1, random_state=0)
        validation = [row for row in train if row["document"] in held_out]
        train = [row for row in train if row["document"] not in held_out]
    else:
        validation = load(options.validation, options)

    saved = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    checkpoint = str(saved[-1].parent) if saved else None  # the Trainer writes that file last
    print(f"resuming from {checkpoint}" if checkpoint else "training from the start")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    transformers.set_seed(training.seed)  # for the weights of the new head
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(
        checkpoint or options.model, trust_remote_code=True
    )
    length = options.max_length or model.config.max_position_embeddings

    def encode(row: dict):
        """The tokens, and by position the characters of the document that a token stands for, None elsewhere."""
        pair = row["question"], row["context"]
        found = tokenizer(*pair, truncation="only_second", max_length=length, return_offsets_mapping=True)
        offsets = zip(found.pop("offset_mapping"), found.sequence_ids(), strict=True)
        return dict(found), [characters if sequence == 1 else None for characters, sequence in offsets]

    def learnable(rows: list[dict]) -> Dataset:
        """The questions, with the tokens of the first answer that was read whole, or [CLS] where there is none."""
        features = []
        for row in rows:
            inputs, spans = encode(row)
            targets = [] if row["answers"] else [(0, 0)]
            for answer in row["answers"]:
                begin, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                inside = [i for i, span in enumerate(spans) if span and span[0] < end and span[1] > begin]
                if inside and spans[inside[-1]][1] >= end:
                    targets.append((inside[0], inside[-1]))
            if targets:
                features.append({**inputs, "start_positions": targets[0][0], "end_positions": targets[0][1]})
        print(
            f"{len(features)} of {len(rows)} questions are used; the answers of the others are beyond {length} tokens"
        )
        return Dataset.from_list(features)

    trainer = transformers.Trainer(
        model=model, args=training, train_dataset=learnable(train), eval_dataset=learnable(validation),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[transformers.EarlyStoppingCallback(options.patience)],
    )  # fmt: skip
    # Before 4.48, transformers reads NumPy's random state by torch.load, which PyTorch 2.6 restricted.
    torch.serialization.add_safe_globals([np.empty(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.UInt32DType])
    trainer.train(resume_from_checkpoint=checkpoint)
    # The Trainer of transformers 5.0 leaves out layer norms when it loads the best model.
    model.load_state_dict(type(model).from_pretrained(trainer.state.best_model_checkpoint).state_dict())
    trainer.save_model()
    tokenizer.save_pretrained(output)

    read = [encode(row) for row in test]
    result = trainer.predict(Dataset.from_list([inputs for inputs, _ in read]))
    may_be_none = not all(row["answers"] for row in train)
    predicted = []
    for row, (_, spans), starts, ends in zip(test, read, *result.predictions, strict=True):
        inside = [i for i, span in enumerate(spans) if span]
        score, first, last = best_span(starts[inside], ends[inside], options.max_answer_length)
        text = row["context"][spans[inside[first]][0] : spans[inside[last]][1]].strip()
        predicted.append(None if may_be_none and starts[0] + ends[0] > score else text)
    references = [[answer["text"] for answer in row["answers"]] for row in test]
    metrics = result.metrics | {f"test_{name}": value for name, value in scores(references, predicted).items()}
    columns = {"document": [row["document"] for row in test], "reference": references, "prediction": predicted}
    Dataset.from_dict(columns).to_json(output / "predictions.jsonl")
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics, combined=False)


if __name__ == "__main__":
    main()
