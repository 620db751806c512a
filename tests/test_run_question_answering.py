"""The question answering script on generated documents, with a small random model and the root's tokenizer."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")

import torch
from transformers import AutoTokenizer, Trainer

from conftest import ROOT
from fine_tuning import UsageError, load_rows
from helpers import example, write_repository
from lsg_albert import LSGAlbertForMaskedLM
from test_run_summarization import kill_at, write_rows

script = example("run_question_answering")
Answer, Question, Span = script.Answer, script.Question, script.Span
RECIPE = "--batch-size 8 --eval-batch-size 4 --lr 3e-3 --log-every 1 --save-every 500".split()
FILLERS = "The river flows from mountains into valleys where old trees grow and birds sing all day".split()


def generate_rows(count, words, seed):
    """Documents with one metal and, in two of three, one colour, each asked for; where there is no colour, nothing is."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        text = [rng.choice(FILLERS) for _ in range(words)]
        found = {"Metal?": rng.choice(["Gold", "Silver", "Iron"])}
        if number % 3:
            found["Color?"] = rng.choice(["red", "blue", "green"])
        for place, word in zip(rng.sample(range(words), len(found)), found.values(), strict=True):
            text[place] = word
        context = " ".join(text)
        row = {"context": context, "qas": []}
        for question in ("Metal?", "Color?"):
            answers = (
                [{"text": found[question], "answer_start": context.index(found[question])}]
                if question in found
                else []
            )
            row["qas"].append({"question": question, "answers": answers})
        rows.append(row)
    return rows


TRAIN, TEST = generate_rows(60, 30, 0), generate_rows(6, 30, 1)


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    """A repository with a small random model that reads 128 tokens."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=16000, max_position_embeddings=128)
    folder = tmp_path_factory.mktemp("questions") / "repository"
    return write_repository(folder, LSGAlbertForMaskedLM(config))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [
        "--train-file", str(write_rows(folder / "train.jsonl.gz", TRAIN)),
        "--test-file", str(write_rows(folder / "test.jsonl", TEST)),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


def command(model, data, output, *options):
    return ["--model", str(model), *data, "--output", str(output), *RECIPE, *options]


def read_results(output):
    return json.loads((output / "results.json").read_text())


def read_predictions(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


# --- whole runs


def test_a_run_learns_to_answer_and_that_there_is_no_answer(model, data, tmp_path):
    assert script.main(command(model, data, tmp_path, "--steps", "200")) == 0
    results = read_results(tmp_path)
    assert {name: found["questions"] for name, found in results["scores"].items()} == {
        "all": 12, "with an answer": 10, "without an answer": 2
    }  # fmt: skip
    assert results["scores"]["all"]["exact_match"]["mean"] > 80 and results["may_answer_none"]
    assert results["test_questions_not_read"] == results["train_questions_not_read"] == 0
    lines = read_predictions(tmp_path)
    assert [line["question"] for line in lines] == ["Metal?", "Color?"] * 6
    for line in lines:
        if line["prediction"] is not None:
            assert TEST[line["document"]]["context"][line["prediction_start"] :].startswith(line["prediction"])
    for name in script.METRICS:
        mean = 100 * np.mean([line[name] for line in lines])
        assert results["scores"]["all"][name]["mean"] == pytest.approx(mean)
    assert "| without an answer | 2 |" in (tmp_path / "results.md").read_text()


def test_killed_and_resumed_run_equals_an_unbroken_one(model, data, tmp_path, monkeypatch):
    options = ["--steps", "4", "--save-every", "2", "--limit-train", "20", "--limit-test", "2"]
    whole, broken = (command(model, data, tmp_path / name, *options) for name in ("whole", "broken"))
    assert script.main(whole) == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", kill_at(3))
        script.main(broken)
    assert script.main(broken) == 0
    results = [read_results(tmp_path / name) for name in ("whole", "broken")]
    assert results[1]["resumed_from"] == "checkpoint-2" and results[0]["scores"] == results[1]["scores"]
    losses = [[entry["loss"] for entry in found["history"] if "loss" in entry] for found in results]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    lines = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("whole", "broken")]
    assert lines[0] == lines[1]


def test_answers_beyond_the_length_are_not_trained_on_and_count_as_missed(model, data, tmp_path):
    options = ["--steps", "1", "--max-length", "24", "--answerable-only", "--bf16", "--gradient-checkpointing"]
    options += ["--validation-file", data[1], "--eval-every", "1"]
    assert script.main(command(model, data, tmp_path, *options)) == 0
    results = read_results(tmp_path)
    assert results["train_questions"] == 100 and 20 < results["train_questions_not_read"] < 80
    lines = read_predictions(tmp_path)
    unread = [line for line in lines if not line["read"]]
    assert len(lines) == 10 and len(unread) == results["test_questions_not_read"] > 0
    assert all(line[name] == 0 for line in unread for name in script.METRICS)
    assert not results["may_answer_none"] and all(line["prediction"] for line in lines)
    assert list(results["scores"]) == ["all"]
    assert np.isfinite([entry["eval_loss"] for entry in results["history"] if "eval_loss" in entry]).all()


def test_rows_of_questions_are_the_same_as_rows_of_documents(tmp_path):
    """Answers as lists of their parts, which is how SQuAD is stored on the Hub."""
    flat = [
        {
            "context": row["context"],
            "question": qa["question"],
            "answers": {name: [answer[name] for answer in qa["answers"]] for name in ("text", "answer_start")},
        }
        for row in TEST
        for qa in row["qas"]
    ]
    files = [("documents", TEST), ("questions", flat)]
    read = []
    for form, rows in files:
        path = write_rows(tmp_path / f"{form}.jsonl", rows)
        args = script.parse_args(["--train-file", str(path), "--output", "x", "--rows", form])
        read.append(script.read_questions(load_rows(args, "train", script.data_fields(args)), "train", False))
    assert [question[1:] for question in read[0]] == [question[1:] for question in read[1]]
    assert [question.row for question in read[0]] == [number // 2 for number in range(12)]


@pytest.mark.parametrize("answers", [{"text": ["a"], "answer_start": []}, {"text": "a", "answer_start": 0}, {}, None])
def test_answers_that_are_no_lists_are_refused(answers):
    with pytest.raises(UsageError, match='here: no list of "answers"'):
        script.read_answers("a b", answers, "here")


# --- refusals

TEXT = "Rain fell on the sea."
BAD_ROWS = {
    'line 1: no text in a field "context"': {"text": TEXT, "qas": []},
    'line 1: no list of questions in a field "qas"': {"context": TEXT, "qas": {}},
    'row 1, question 1: no text in a field "question"': {"context": TEXT, "qas": [{"answers": []}]},
    "the train data has no questions": {"context": TEXT, "qas": []},
    'row 1, question 1: no list of "answers"': {"context": TEXT, "qas": [{"question": "?"}]},
    """{'text': 'Rain'} is no answer; it is to have a "text" and its "answer_start\"""": {
        "context": TEXT,
        "qas": [{"question": "?", "answers": [{"text": "Rain"}]}],
    },
    "character 1 of the context begins 'ain ', not the answer 'Rain'": {
        "context": TEXT,
        "qas": [{"question": "?", "answers": [{"text": "Rain", "answer_start": 1}]}],
    },
    "no answer of the train data lies within --max-length 12 tokens": {
        "context": "Rain fell on the sea. " * 5 + "Snow!",
        "qas": [{"question": "?", "answers": [{"text": "Snow", "answer_start": 110}]}],
    },
    "--max-length 12 leaves no room for the document of row 1 of the train data: a question has 20 tokens, 12 too many": {
        "context": TEXT,
        "qas": [{"question": "rain " * 20, "answers": []}],
    },
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_unusable_rows_are_named_in_one_line(model, tmp_path, capsys, message):
    path = write_rows(tmp_path / "bad.jsonl", [BAD_ROWS[message]])
    run = command(model, ["--train-file", str(path)], tmp_path / "out", "--max-length", "12")
    assert script.main(run) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("run_question_answering: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "129"], "--max-length 129 is more than the model's 128 positions"),
        (["--eval-every", "2"], "--eval-every needs validation data"),
    ],
)
def test_impossible_options_are_refused_in_one_line(model, data, tmp_path, capsys, options, message):
    assert script.main(command(model, data, tmp_path, *options)) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


# --- spans


def reading_of(context, tokenizer, max_length=512):
    return script.read(Question(0, context, "What is it?", ()), tokenizer, max_length)


def recover(context, answer, tokenizer):
    """The text of the tokens that an answer is trained on."""
    reading = reading_of(context, tokenizer)
    return context[slice(*script.answer_text(context, reading, *script.answer_tokens(reading, answer)))]


@pytest.mark.parametrize(
    ("before", "answer", "after"),
    [
        ("It was ", "Straße 5", " in BERLIN."),
        ("Die ", "Ärzte", ", sagte İpek, kommen."),
        ("A cafe\u0301 and a ", "re\u0301sume\u0301", " for e\u0301te\u0301."),  # accents as characters of their own
        ("An ", "ÉLÈVE", " wrote."),
        ("He took ", "½ ﬁg", " and ﬂed."),  # one character that is several to the model
        ("Some ", "β-lactam", " (10 µg)"),
        ("The  answer\u00a0is ", "forty\n\ntwo", "  ,\tyes"),
        ("In ", "你好", " \U0001f600 it stood."),
        ("End: ", "nai\u0308", ""),
    ],
)
def test_answers_are_recovered_as_they_were_written(tokenizer, before, answer, after):
    place = Answer(len(before), len(before) + len(answer), answer)
    assert recover(before + answer + after, place, tokenizer) == answer


WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=20)


@settings(deadline=None, max_examples=150)
@given(words=WORDS, data=st.data())
def test_positions_hold_the_answers_characters_and_no_other_words(tokenizer, words, data):
    """Whatever the text: the tokens of an answer of whole words are those of all its characters that the model sees."""
    context = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    start = len(" ".join(words[:first])) + (first > 0)
    text = " ".join(words[first : last + 1])
    answer = Answer(start, start + len(text), text)
    reading = reading_of(context, tokenizer)
    seen = {i for token in reading.tokens for i in range(*reading.offsets[token])}
    tokens = script.answer_tokens(reading, answer)
    assert (tokens is None) == seen.isdisjoint(range(*answer[:2]))
    if tokens is not None and not context[answer.start].isspace():
        found = script.answer_text(context, reading, *tokens)
        spaces = {i for i, character in enumerate(context) if character.isspace()}
        assert seen & set(range(*found)) - spaces == seen & set(range(*answer[:2])) - spaces


@settings(deadline=None, max_examples=60)
@given(
    words=WORDS,
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 9),
    max_length=st.integers(12, 40),
    may_be_none=st.booleans(),
)
@case(words=["\n\n"], seed=0, max_tokens=1, max_length=40, may_be_none=False)
def test_what_is_found_is_a_trimmed_part_of_what_was_read(tokenizer, words, seed, max_tokens, max_length, may_be_none):
    context = " ".join(words)
    reading = reading_of(context, tokenizer, max_length)
    starts, ends = np.random.default_rng(seed).normal(size=(2, max_length + 3)).astype(np.float32)
    found = script.find_answer(context, reading, starts, ends, max_tokens, may_be_none)
    blank = any(character.isspace() for word in words for character in word)  # some kinds of space are tokens
    assert found is not None or may_be_none or not reading.tokens or blank
    if found is not None:
        text = context[slice(*found)]
        assert text and text == text.strip() and 0 <= found.start < found.stop <= len(context)
        assert found.start < reading.stop


@settings(deadline=None)
@given(
    st.integers(1, 14).flatmap(lambda n: st.tuples(*[st.lists(st.integers(-9, 9), min_size=n, max_size=n)] * 2)),
    st.integers(1, 16),
)
def test_best_span_is_the_best_of_all(scores, max_tokens):
    starts, ends = (np.array(values, dtype=np.float32) for values in scores)
    first, last, score = script.best_span(starts, ends, max_tokens)
    pairs = [(i, j) for i, j in itertools.product(range(len(starts)), repeat=2) if i <= j < i + max_tokens]
    assert (first, last) in pairs and score == starts[first] + ends[last] == max(starts[i] + ends[j] for i, j in pairs)


def test_the_question_comes_first_and_is_no_answer(tokenizer):
    context = "Gold lies in the river."
    reading = script.read(Question(0, context, "Is it gold?", ()), tokenizer, 64)
    ids = reading.features["input_ids"]
    assert ids == tokenizer("Is it gold?", context)["input_ids"]
    assert tokenizer.decode(ids[reading.tokens.start : reading.tokens.stop]) == "gold lies in the river."
    assert reading.cls == 0 and reading.stop == len(context)
    starts = np.zeros(len(ids), dtype=np.float32)
    starts[: reading.tokens.start] = 9  # on the question
    found = script.find_answer(context, reading, starts, starts, 5, False)
    assert context[slice(*found)] == "Gold"
    assert script.find_answer(context, reading, starts, starts, 5, True) is None  # [CLS] is better


def test_answers_are_read_up_to_the_cut(tokenizer):
    """Of five words the last fits in but for its end."""
    context = "one two three four uncharacteristically"
    whole = reading_of(context, tokenizer)
    assert len(whole.tokens) > 5
    cut = reading_of(context, tokenizer, len(whole.features["input_ids"]) - 1)
    four, five = Answer(14, 18, "four"), Answer(19, len(context), context[19:])
    assert script.answer_tokens(cut, four) == script.answer_tokens(whole, four)
    assert script.answer_tokens(cut, five) is None and script.answer_tokens(whole, five)[1] == whole.tokens[-1]
    question = Question(0, context, "What is it?", (five, four))
    assert script.target(question, cut) == script.answer_tokens(cut, four)  # the first answer that was read
    assert script.target(Question(0, context, "?", ()), cut) == (0, 0)


@settings(deadline=None, max_examples=60)
@given(words=WORDS, max_length=st.integers(12, 30))
def test_leaving_out_what_is_never_read_changes_no_reading(tokenizer, words, max_length):
    context = " ".join(words * 3)
    short = script.readable(context, tokenizer, max_length)
    assert context.startswith(short)
    whole, part = (reading_of(text, tokenizer, max_length) for text in (context, short))
    assert part == whole if len(whole.features["input_ids"]) == max_length else short == context


def test_each_document_is_shortened_for_its_questions(tokenizer):
    rows = [{"context": text, "qas": [{"question": "?", "answers": []}] * 2} for text in ("a b c " * 9, "d e f " * 9)]
    questions = script.read_questions(rows, "train", False)
    fitted = script.fit_questions(questions, tokenizer, 9, "train")
    assert [question.context for question in fitted] == ["a b c " * 2 + "a b c"] * 2 + ["d e f " * 2 + "d e f"] * 2


def test_a_context_without_tokens_has_no_answer(tokenizer):
    reading = reading_of("  ", tokenizer)
    scores = np.zeros(len(reading.features["input_ids"]))
    assert len(reading.tokens) == 0 and script.find_answer("  ", reading, scores, scores, 5, False) is None


# --- scores by hand, with the values of SQuAD's own script


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The Black-Cat!", "a blackcat", 1, 1),
        ("cat sat down", "the cat sat", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("dog dog", "dog", 0, 2 * 0.5 * 1 / 1.5),
        ("dog", "cat", 0, 0),
        ("the", "an", 1, 1),
        ("the", "cat", 0, 0),
        ("Theban", "ban", 0, 0),
    ],
)
def test_exact_match_and_f1_by_hand(prediction, answer, exact, f1):
    assert script.exact_match(prediction, answer) == exact and script.word_f1(prediction, answer) == pytest.approx(f1)


def test_scores_are_those_of_the_best_answer():
    question = Question(
        0, "It rained in May and in June 1900.", "When?", (Answer(13, 16, "May"), Answer(24, 33, "June 1900"))
    )
    assert script.score(question, Span(24, 28), True) == {"exact_match": 0, "f1": pytest.approx(2 / 3), "overlap": 1}
    assert script.score(question, Span(13, 16), True) == {"exact_match": 1, "f1": 1, "overlap": 1}
    assert script.score(question, Span(0, 2), True) == {"exact_match": 0, "f1": 0, "overlap": 0}
    assert set(script.score(question, Span(13, 16), False).values()) == {0}
    assert set(script.score(question, None, True).values()) == {0}
    unanswerable = question._replace(answers=())
    assert set(script.score(unanswerable, None, True).values()) == {1}
    assert set(script.score(unanswerable, Span(0, 2), True).values()) == {0}


def test_the_documented_commands_name_options_that_exist():
    commands = re.findall(r"python examples/run_question_answering\.py (.*)", script.__doc__)
    assert len(commands) == 2
    for line in commands:
        script.parse_args(line.split())
