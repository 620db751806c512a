"""Fine-tune a model to find the answers to questions in long documents. A row has a document and its questions, {"context":
"It rained in May.", "qas": [{"question": "When?", "answers": [{"text": "May", "answer_start": 13}]}]}, or as in SQuAD a
question: {"context": ..., "question": ..., "answers": {"text": ["May"], "answer_start": [13]}}. Empty lists mean no answer.

    python examples/answer_questions.py --train train.jsonl --test test.jsonl --output_dir runs/answers
    python examples/answer_questions.py --train rajpurkar/squad_v2:train --test rajpurkar/squad_v2:validation --bf16 \\
        --max_length 512 --output_dir runs/squad

Training skips answers beyond --max_length; the test counts them as missed. The directory gets the best model, scores and
predictions.jsonl. The same command resumes a killed run from its last checkpoint. Needs `pip install ".[fine-tuning]"`.
"""

import json
import re
import string
import sys
import unicodedata
from collections import Counter
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
    context_field: str = HfArg(default="context", help="field that holds the document")
    answerable_only: bool = HfArg(default=False, help="leave out questions without an answer")
    model: str = HfArg(default=str(Path(__file__).resolve().parents[1]), help="directory or Hub id; its code is run")
    max_length: int | None = HfArg(
        default=None, help="tokens of question and document together; None: the model's maximum"
    )
    max_answer_length: int = HfArg(default=64, help="tokens of the longest answer")
    patience: int = HfArg(default=3, help="evaluations without improvement before training stops")


def clean(text: str) -> str:
    """Replace halves of surrogate pairs, which tokenizers refuse."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def load(source: str, options: Options) -> list[dict]:
    """Load questions with their documents and answers. Check that each answer stands at its `answer_start`."""
    questions, number = [], 1
    try:
        if source.lower().endswith((".jsonl", ".json", ".gz")):
            with fsspec.open(source, "rt", encoding="utf-8-sig", compression="infer") as file:
                rows = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
        else:
            rows = enumerate(load_dataset(*source.split(":")[:-1], split=source.split(":")[-1]), start=1)
        for number, row in rows:
            row = json.loads(row) if isinstance(row, str) else row
            context = clean(row[options.context_field])
            for qa in row.get("qas", [row]):
                answers = qa["answers"]
                if isinstance(answers, dict):  # of lists, as in SQuAD
                    pairs = zip(answers["text"], answers["answer_start"], strict=True)
                    answers = [{"text": text, "answer_start": start} for text, start in pairs]
                answers = [answer | {"text": clean(answer["text"])} for answer in answers]
                for answer in answers:
                    if not answer["text"] or not context.startswith(answer["text"], answer["answer_start"]):
                        raise ValueError(f"the document does not have {answer} at its answer_start")
                if answers or not options.answerable_only:
                    question = {"document": number, "context": context, "question": clean(qa["question"])}
                    questions.append(question | {"answers": answers})
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{source}, line {number}: expected a document with questions and answers ({error!r})")
    return questions or sys.exit(f"{source}: no questions")


def encode(row: dict, tokenizer, length: int) -> tuple[dict, list[tuple[int, int] | None], int]:
    """The model's inputs for a question and its document, the characters of the document that each token covers (None for
    other tokens), and the number of characters that were read."""
    pair = row["question"], row["context"]
    found = tokenizer(*pair, truncation="only_second", max_length=length, return_offsets_mapping=True)
    offsets = zip(found.pop("offset_mapping"), found.sequence_ids(), strict=True)
    spans = [characters if sequence == 1 else None for characters, sequence in offsets]
    is_cut = len(spans) == length
    return dict(found), spans, max((span[1] for span in spans if span), default=0) if is_cut else len(row["context"])


def answer_tokens(answer: dict, spans: list[tuple[int, int] | None], stop: int) -> tuple[int, int] | None:
    """The first and last token of an answer; None if the cut removed a part of it."""
    begin, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    inside = [i for i, span in enumerate(spans) if span and span[0] < end and span[1] > begin]
    return (inside[0], inside[-1]) if inside and end <= stop else None


def answer_text(context: str, begin: int, end: int) -> str:
    """The text from `begin` to `end`, with any combining accents after it: these belong to no token."""
    while end < len(context) and unicodedata.combining(context[end]):
        end += 1
    return context[begin:end].strip()


def words(text: str | None) -> list[str | None]:
    """Words as SQuAD compares them: in lower case, without punctuation and articles. "No answer" is the word None."""
    if text is None:
        return [None]
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(made: list[str | None], wanted: list[str | None]) -> float:
    return float(made == wanted) or 2 * (Counter(made) & Counter(wanted)).total() / (len(made) + len(wanted))


def scores(references: list[list[str]], predictions: list[str | None]) -> dict[str, float]:
    """Exact match and F1 of words, against the best reference. Where there is no reference, None is right."""
    exact, overlap = [], []
    for texts, made in zip(references, map(words, predictions), strict=True):
        wanted = [words(text) for text in texts or [None]]
        exact.append(made in wanted)
        overlap.append(max(f1(made, answer) for answer in wanted))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def best_span(starts: np.ndarray, ends: np.ndarray, longest: int) -> tuple[float, int, int]:
    """The highest sum of a start score and an end score, with the first and last token of that span."""
    sums = [starts[: len(starts) - more] + ends[more:] for more in range(min(longest, len(starts)))]
    best = [(float(found.max()), int(found.argmax()), int(found.argmax()) + more) for more, found in enumerate(sums)]
    return max(best, default=(-np.inf, 0, 0))


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
    if options.validation is None:  # whole documents: one question may reveal the answer to another
        _, held_out = train_test_split(sorted({row["document"] for row in train}), test_size=0.1, random_state=0)
        validation = [row for row in train if row["document"] in held_out]
        train = [row for row in train if row["document"] not in held_out]
    else:
        validation = load(options.validation, options)

    states = output.glob("checkpoint-*/trainer_state.json")  # this file is whole only in a complete checkpoint
    steps = [int(path.parent.name.split("-")[1]) for path in states if path.read_text().endswith("}\n")]
    checkpoint = str(output / f"checkpoint-{max(steps)}") if steps else None
    print(f"resuming from step {max(steps)}" if steps else "training from the start")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    transformers.set_seed(training.seed)  # fixes the random weights of the new head
    path = checkpoint or options.model
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(path, trust_remote_code=True)
    length = options.max_length or model.config.max_position_embeddings

    def learnable(rows: list[dict]) -> Dataset:
        """Questions with the tokens of the first answer that was not cut, or [CLS] if there is no answer."""
        features = []
        for row in rows:
            inputs, spans, stop = encode(row, tokenizer, length)
            found = [answer_tokens(answer, spans, stop) for answer in row["answers"]] or [(0, 0)]
            for start, end in [pair for pair in found if pair][:1]:
                features.append(inputs | {"start_positions": start, "end_positions": end})
        print(f"using {len(features)} of {len(rows)} questions; the answers to the others are beyond {length} tokens")
        return Dataset.from_list(features) if features else sys.exit("no question to learn from: raise --max_length")

    trainer = transformers.Trainer(
        model=model, args=training, train_dataset=learnable(train), eval_dataset=learnable(validation),
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

    read = [encode(row, tokenizer, length) for row in test]
    result = trainer.predict(Dataset.from_list([inputs for inputs, _, _ in read]))
    may_be_none = not all(row["answers"] for row in train)
    predicted = []
    for row, (_, spans, _), starts, ends in zip(test, read, *result.predictions, strict=True):
        inside = [i for i, span in enumerate(spans) if span]
        score, first, last = best_span(starts[inside], ends[inside], options.max_answer_length)
        text = answer_text(row["context"], spans[inside[first]][0], spans[inside[last]][1]) if inside else None
        predicted.append(None if may_be_none and starts[0] + ends[0] > score else text)
    references = [[answer["text"] for answer in row["answers"]] for row in test]
    metrics = result.metrics | {f"test_{name}": value for name, value in scores(references, predicted).items()}
    columns = {"document": [row["document"] for row in test], "reference": references, "prediction": predicted}
    if trainer.is_world_process_zero():
        Dataset.from_dict(columns).to_json(output / "predictions.jsonl")
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics, combined=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: run the same command again to resume from the last checkpoint")
