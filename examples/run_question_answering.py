"""Fine-tune a model to find the answers to questions in long documents, and score the spans that it finds.

    python examples/run_question_answering.py --train-file train.jsonl.gz --test-file test.jsonl.gz --output runs/qa
    python examples/run_question_answering.py --dataset rajpurkar/squad_v2 --rows questions --bf16 --output runs/squad

A row of a file is a document, `{"context": ..., "qas": [{"question": ..., "answers": [{"text": ..., "answer_start": ...}]}]}`;
with `--rows questions` it is a question, `{"context": ..., "question": ..., "answers": {"text": [...], "answer_start": [...]}}`,
as in SQuAD on the Hub. The question and the document are read in one pass of --max-length tokens, without a sliding
window. Questions whose answers lie beyond are left out of training, and count as missed in the scores. Where some
training questions have no answer, the model may also answer that there is none (the span is then [CLS]).

Needs `pip install ".[fine-tuning]"`. Started again with the same arguments, a killed run goes on from its last complete
checkpoint with the same data in the same order. OUTPUT then holds `final` (the model and its tokenizer), `results.json`,
`results.md` and `predictions.jsonl` (each test question's answer and scores). With several GPUs:
`torchrun --nproc-per-node 4 examples/run_question_answering.py ...`.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import string
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from fine_tuning import (
    TOKENIZER_ARGUMENT,
    Arguments,
    Field,
    UsageError,
    WholeCheckpoints,
    add_data_options,
    add_training_options,
    check_data_options,
    check_length,
    check_same_run,
    check_validation,
    describe_run,
    enable_gradient_checkpointing,
    load_pretrained,
    load_splits,
    make_parser,
    positive,
    ratio_spread,
    run_script,
    save_final,
    train,
    training_keywords,
    write_results,
)

METRICS = {"exact_match": "exact match", "f1": "F1", "overlap": "overlap"}
# A run may be taken up again with other values of these; all others belong to its checkpoints.
FREE = {"output", "test_file", "limit_test", "max_answer_length", "eval_batch_size", "log_every", "save_every"}


class Span(NamedTuple):
    """Characters of a context from `start` up to, but not including, `stop`."""

    start: int
    stop: int


class Answer(NamedTuple):
    """Characters of a context from `start` up to, but not including, `stop`, and what they are."""

    start: int
    stop: int
    text: str


class Question(NamedTuple):
    """A question about a row's context, and its answers: none if the context does not answer it."""

    row: int
    context: str
    text: str
    answers: tuple[Answer, ...]


class Reading(NamedTuple):
    """A question and as much of its context as fits, in tokens.

    Attributes:
        features: the model's inputs.
        offsets: each token's characters, those of the context for the tokens that are its.
        tokens: the positions of the context's tokens.
        cls: the position of [CLS], where "no answer" is.
        stop: how many characters of the context were read.
    """

    features: dict[str, list[int]]
    offsets: list[tuple[int, int]]
    tokens: range
    cls: int
    stop: int


# --- Spans of characters and of tokens


def read(question: Question, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Reading:
    """The question first, then the context, which is cut where `max_length` tokens in all are reached."""
    encoding = tokenizer(
        question.text, question.context, truncation="only_second", max_length=max_length, return_offsets_mapping=True
    )
    sequences, offsets = encoding.sequence_ids(), encoding["offset_mapping"]
    features = {name: values for name, values in encoding.items() if name != "offset_mapping"}
    tokens = range(sequences.index(1), len(sequences) - sequences[::-1].index(1)) if 1 in sequences else range(0)
    cut = len(sequences) == max_length and len(tokens) > 0
    stop = offsets[tokens[-1]][1] if cut else len(question.context)
    return Reading(features, offsets, tokens, features["input_ids"].index(tokenizer.cls_token_id), stop)


def readable(context: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """The context up to the end of the word that its token number `max_length` is in, beyond which it is never read.

    Most of a very long document's time would go into tokens that are cut off, once for each of its questions.
    """
    offsets = tokenizer(
        context, add_special_tokens=False, truncation=True, max_length=max_length, return_offsets_mapping=True
    )["offset_mapping"]
    space = re.compile(r"\s").search(context, offsets[-1][1]) if len(offsets) == max_length else None
    return context[: space.start()] if space else context


def answer_tokens(reading: Reading, answer: Answer) -> tuple[int, int] | None:
    """The first and the last token of an answer; None if it was not read to its end."""
    if answer.stop > reading.stop:
        return None
    inside = [
        i for i in reading.tokens if reading.offsets[i][0] < answer.stop and reading.offsets[i][1] > answer.start
    ]
    return (inside[0], inside[-1]) if inside else None


def answer_text(context: str, reading: Reading, first: int, last: int) -> Span | None:
    """The characters of the tokens from the first to the last, without space around; None if there are no others.

    They are characters of the text as it was written: the tokenizer lower-cases what it reads and takes off its accents,
    but an accent that is a character of its own is no token's, and stays with its letter here.
    """
    start, stop = reading.offsets[first][0], reading.offsets[last][1]
    while stop < len(context) and unicodedata.combining(context[stop]):
        stop += 1
    text = context[start:stop]
    start, stop = stop - len(text.lstrip()), start + len(text.rstrip())
    return Span(start, stop) if start < stop else None


def best_span(starts: np.ndarray, ends: np.ndarray, max_tokens: int) -> tuple[int, int, float]:
    """The first and the last token of the best answer, and its score, the sum of these two tokens' scores.

    Args:
        starts, ends: scores of the context's tokens (tokens,), one or more.
        max_tokens: of an answer.
    """
    best = (0, 0, -np.inf)
    for further in range(min(max_tokens, len(starts))):  # tokens after the first
        sums = starts[: len(starts) - further] + ends[further:]
        first = int(sums.argmax())
        if sums[first] > best[2]:
            best = (first, first + further, float(sums[first]))
    return best


def find_answer(
    context: str, reading: Reading, starts: np.ndarray, ends: np.ndarray, max_tokens: int, may_be_none: bool
) -> Span | None:
    """The best answer, or None where "no answer" is allowed and has a higher score.

    Args:
        starts, ends: scores of all tokens (tokens,), padding allowed.
    """
    if not reading.tokens:
        return None
    chosen = slice(reading.tokens.start, reading.tokens.stop)
    first, last, score = best_span(starts[chosen], ends[chosen], max_tokens)
    if may_be_none and starts[reading.cls] + ends[reading.cls] > score:
        return None
    return answer_text(context, reading, reading.tokens[first], reading.tokens[last])


# --- Data


def data_fields(args: argparse.Namespace) -> dict[str, Field]:
    """The rows are ``{"context": ..., "qas": [...]}`` or ``{"context": ..., "question": ..., "answers": ...}``."""
    context = {"context": Field(args.context_field)}
    if args.rows == "documents":
        return context | {"qas": Field(args.qas_field, (list,), "list of questions")}
    return context | {
        "question": Field(args.question_field),
        "answers": Field(args.answers_field, (list, dict), "answers"),
    }


def list_answers(text: Any, answer_start: Any, **others: Any) -> list[dict[str, Any]] | None:
    """A list of answers from the lists of their parts, as SQuAD has them on the Hub; None if they are no such lists."""
    if not isinstance(text, list) or not isinstance(answer_start, list) or len(text) != len(answer_start):
        return None
    return [{"text": each, "answer_start": start} for each, start in zip(text, answer_start, strict=True)]


def read_answers(context: str, answers: Any, place: str) -> tuple[Answer, ...]:
    """The answers, which are in the context where they say."""
    if isinstance(answers, dict):
        answers = list_answers(**{"text": None, "answer_start": None} | answers)
    if not isinstance(answers, list):
        raise UsageError(f'{place}: no list of "answers"; for a question without an answer it is to be empty')
    checked = []
    for answer in answers:
        text, start = (answer.get(name) if isinstance(answer, dict) else None for name in ("text", "answer_start"))
        if not isinstance(text, str) or not text or not isinstance(start, int) or start < 0:
            raise UsageError(f'{place}: {answer!r} is no answer; it is to have a "text" and its "answer_start"')
        stop = start + len(text)
        if context[start:stop] != text:
            found = context[start:stop]
            raise UsageError(f"{place}: character {start} of the context begins {found!r}, not the answer {text!r}")
        checked.append(Answer(start, stop, text))
    return tuple(checked)


def read_questions(rows: Sequence[dict[str, Any]], split: str, answerable_only: bool) -> list[Question]:
    """The questions of all rows, in order."""
    questions = []
    for number, row in enumerate(rows):
        qas = row.get("qas", [row])
        for index, qa in enumerate(qas, start=1):
            place = f"{split} data, row {number + 1}" + (f", question {index}" if "qas" in row else "")
            if not isinstance(qa, dict) or not isinstance(qa.get("question"), str):
                raise UsageError(f'{place}: no text in a field "question"')
            answers = read_answers(row["context"], qa.get("answers"), place)
            if answers or not answerable_only:
                questions.append(Question(number, row["context"], qa["question"], answers))
    if not questions:
        raise UsageError(f"the {split} data has no questions" + (" with answers" if answerable_only else ""))
    return questions


def fit_questions(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str
) -> list[Question]:
    """The questions with what is readable of their contexts; each must leave room for some of it."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - 1
    contexts, fitted = {}, []
    for question in questions:
        size = len(tokenizer(question.text, add_special_tokens=False)["input_ids"])
        if size > room:
            raise UsageError(
                f"--max-length {max_length} leaves no room for the document of row {question.row + 1} of the {split} data:"
                f" a question has {size} tokens, {size - room} too many"
            )
        if question.row not in contexts:
            contexts[question.row] = readable(question.context, tokenizer, max_length)
        fitted.append(question._replace(context=contexts[question.row]))
    return fitted


class Examples(Dataset):
    """Token ids of questions and contexts, made when asked for.

    Args:
        positions: the first and the last token of each question's answer, for the loss; None: without.
        not_read: how many more questions there were, whose answers lie beyond.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        positions: Sequence[tuple[int, int]] | None = None,
        not_read: int = 0,
    ):
        self.questions, self.tokenizer, self.max_length = questions, tokenizer, max_length
        self.positions, self.not_read = positions, not_read

    def __len__(self) -> int:
        return len(self.questions)

    def read(self, index: int) -> Reading:
        return read(self.questions[index], self.tokenizer, self.max_length)

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = self.read(index).features
        if self.positions is None:
            return features
        start, end = self.positions[index]
        return features | {"start_positions": start, "end_positions": end}


def target(question: Question, reading: Reading) -> tuple[int, int] | None:
    """The tokens to be found: those of the first answer that was read, or [CLS] for none; None if none was read."""
    if not question.answers:
        return reading.cls, reading.cls
    found = (answer_tokens(reading, answer) for answer in question.answers)
    return next((tokens for tokens in found if tokens is not None), None)


def with_targets(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str
) -> Examples:
    """The questions that can be learned from."""
    targets = [target(question, read(question, tokenizer, max_length)) for question in questions]
    pairs = [pair for pair in zip(questions, targets, strict=True) if pair[1] is not None]
    if not pairs:
        raise UsageError(f"no answer of the {split} data lies within --max-length {max_length} tokens")
    kept, positions = zip(*pairs, strict=True)
    return Examples(kept, tokenizer, max_length, positions, len(questions) - len(kept))


# --- Scores, by SQuAD's definitions


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and space between words."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalize(prediction) == normalize(answer))


def word_f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall of the words, in whatever order."""
    made, wanted = normalize(prediction).split(), normalize(answer).split()
    if not made or not wanted:
        return float(made == wanted)
    common = (Counter(made) & Counter(wanted)).total()
    return 2 * common / (len(made) + len(wanted))


def score(question: Question, found: Span | None, was_read: bool) -> dict[str, float]:
    """Each metric from 0 to 1, by the answer that fits best.

    The overlap is 1 where the answer found and one to be found have a character in common. Of a question without an
    answer all are 1 if none was found, and of one whose answers were not read, 0.
    """
    if not question.answers:
        return dict.fromkeys(METRICS, float(found is None))
    if not was_read or found is None:
        return dict.fromkeys(METRICS, 0.0)
    made = question.context[slice(*found)]
    return {
        "exact_match": max(exact_match(made, answer.text) for answer in question.answers),
        "f1": max(word_f1(made, answer.text) for answer in question.answers),
        "overlap": float(any(found.start < answer.stop and answer.start < found.stop for answer in question.answers)),
    }


def summarize_scores(questions: Sequence[Question], values: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The number of questions and the means of their scores in percent, with intervals over documents."""
    _, rows = np.unique([question.row for question in questions], return_inverse=True)
    sums = {name: np.bincount(rows, [value[name] for value in values]) for name in METRICS}
    means = {name: ratio_spread(found, np.bincount(rows))._asdict() for name, found in sums.items()}
    return {"questions": len(questions)} | means


def score_groups(questions: Sequence[Question], values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """The scores of all questions and, where there are both, of those with and without an answer."""
    groups = {"all": [*range(len(questions))]}
    groups["with an answer"] = [i for i in groups["all"] if questions[i].answers]
    groups["without an answer"] = [i for i in groups["all"] if not questions[i].answers]
    if not groups["with an answer"] or not groups["without an answer"]:
        groups = {"all": groups["all"]}
    return {
        name: summarize_scores([questions[i] for i in chosen], [values[i] for i in chosen])
        for name, chosen in groups.items()
    }


def score_test(
    trainer: Trainer, examples: Examples, max_answer_length: int, may_be_none: bool
) -> tuple[dict, list[dict]]:
    """The scores of the answers that the model finds: a summary, and each question's answer and its own."""
    started = time.perf_counter()
    starts, ends = trainer.predict(examples).predictions
    seconds = time.perf_counter() - started
    values, rows = [], []
    for index, question in enumerate(examples.questions):
        reading = examples.read(index)
        was_read = target(question, reading) is not None
        context = question.context
        found = find_answer(context, reading, starts[index], ends[index], max_answer_length, may_be_none)
        values.append(score(question, found, was_read))
        rows.append(
            {
                "document": question.row,
                "question": question.text,
                "prediction": found and context[slice(*found)],
                "prediction_start": found and found.start,
                "references": [answer.text for answer in question.answers],
                "read": was_read,
            }
            | values[-1]
        )
    results = {
        "scores": score_groups(examples.questions, values),
        "test_documents": len({question.row for question in examples.questions}),
        "test_questions_not_read": sum(not row["read"] for row in rows),
        "test_seconds": seconds,
    }
    return results, rows


def format_table(results: dict) -> str:
    """The results as Markdown."""
    lines = ["| questions | number | " + " | ".join(METRICS.values()) + " |", "| --- " * (2 + len(METRICS)) + "|"]
    for group, found in results["scores"].items():
        cells = ["{mean:.1f} ({low:.1f}-{high:.1f})".format_map(found[name]) for name in METRICS]
        lines.append(f"| {group} | {found['questions']:,} | " + " | ".join(cells) + " |")
    facts = (
        f"{results['test_documents']:,} test documents, of which {results['max_length']:,} tokens were read with each "
        f"question;\nthe answers to {results['test_questions_not_read']:,} questions lie beyond, and count as missed "
        f"(training left out {results['train_questions_not_read']:,}\nof {results['train_questions']:,} for that). In "
        f"percent, with 95 % bootstrap intervals over documents; answers have {results['max_answer_length']} tokens at "
        f"most.\n{results['steps']:,} steps, seed {results['seed']}; {results['train_seconds']:,.0f} s of training and "
        f"{results['test_seconds']:,.0f} s of testing on {results['device']}."
    )
    return "\n".join(lines) + f"\n\n{facts}\n\n```text\n{results['command']}\n```\n"


# --- Model and Trainer


class AnswerTrainer(WholeCheckpoints, Trainer):
    """A Trainer whose loss looks at the tokens of each text only, so that it does not matter how far a batch is padded."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        # The loss is a batch's mean, so that the Trainer has to divide it by the batches that make a step.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        targets = inputs.pop("start_positions"), inputs.pop("end_positions")
        outputs = model(**inputs)
        padding = inputs["attention_mask"] == 0
        first, last = (
            nn.functional.cross_entropy(outputs[name].float().masked_fill(padding, -math.inf), target)
            for name, target in zip(("start_logits", "end_logits"), targets, strict=True)
        )
        loss = (first + last) / 2
        return (loss, outputs) if return_outputs else loss


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which must be able to say where in the text a token is."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not tokenizer.is_fast:
        raise UsageError(f"--model {args.model} has no fast tokenizer (tokenizer.json), which says where tokens are")
    return tokenizer


def build_examples(
    args: argparse.Namespace, rows: Mapping[str, Sequence[dict[str, Any]] | None], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Examples | None]:
    """The questions of each split: of the test data all, of the others those that can be learned from."""
    examples = {}
    for split, found in rows.items():
        if found is None:
            examples[split] = None
            continue
        questions = read_questions(found, split, args.answerable_only)
        questions = fit_questions(questions, tokenizer, args.max_length, split)
        make = Examples if split == "test" else functools.partial(with_targets, split=split)
        examples[split] = make(questions, tokenizer, args.max_length)
    return examples


def build_trainer(
    args: argparse.Namespace,
    arguments: Arguments,
    examples: Mapping[str, Examples | None],
    model_path: str | Path,
) -> Trainer:
    """Model and Trainer."""
    set_seed(args.seed)
    model = load_pretrained(AutoModelForQuestionAnswering, model_path)
    enable_gradient_checkpointing(model, args)
    tokenizer = examples["train"].tokenizer
    return AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        **{TOKENIZER_ARGUMENT: tokenizer},
    )


def run(args: argparse.Namespace, command: str) -> str | None:
    """Train, save, test; the table of results, or None without test data or in a process other than the first."""
    arguments = Arguments(**training_keywords(args))
    with arguments.main_process_first(desc="reading the data"):
        rows = load_splits(args, data_fields(args))
    check_validation(args, rows)
    args.max_length = check_length("--max-length", args.max_length, load_pretrained(AutoConfig, args.model))
    examples = build_examples(args, rows, load_tokenizer(args))
    if arguments.process_index == 0:
        check_same_run(args, FREE)
    trained = train(args.output, lambda checkpoint: build_trainer(args, arguments, examples, checkpoint or args.model))
    trainer = trained.trainer
    save_final(trainer, args.output)
    if rows["test"] is None:
        return None
    learned = examples["train"]
    may_be_none = not all(question.answers for question in learned.questions)
    scored, answers = score_test(trainer, examples["test"], args.max_answer_length, may_be_none)
    if not trainer.is_world_process_zero():
        return None
    results = (
        scored
        | describe_run(args, command, trained)
        | {
            "train_documents": len(rows["train"]),
            "train_questions": len(learned) + learned.not_read,
            "train_questions_not_read": learned.not_read,
            "max_length": args.max_length,
            "max_answer_length": args.max_answer_length,
            "may_answer_none": may_be_none,
        }
    )
    table = format_table(results)
    write_results(args.output, results, table, answers)
    return table


# --- Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    data = add_data_options(parser, ["context", "qas", "question", "answers"])
    data.add_argument("--rows", choices=("documents", "questions"), default="documents", help="what a row is")
    data.add_argument("--answerable-only", action="store_true", help="leave out questions without an answer")
    data.add_argument(
        "--max-length", type=positive, help="tokens of question and document; None: the model's positions"
    )
    data.add_argument("--max-answer-length", type=positive, default=64, help="tokens")
    add_training_options(parser)
    args = parser.parse_args(argv)
    check_data_options(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("run_question_answering", lambda command: run(args, command), argv)


if __name__ == "__main__":
    sys.exit(main())
