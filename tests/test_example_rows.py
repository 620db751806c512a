"""What the training examples read: rows of every kind of file, and the refusal of what would be read wrongly."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("datasets", reason="the training examples need it; it is no dependency of the models")
pytest.importorskip("sklearn", reason="the training examples score by it")
pytest.importorskip("rouge_score", reason="summarize.py scores by it")

import datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import ROOT
from helpers import example

classify, tag_tokens, answer_questions, summarize = (
    example(name) for name in ("classify", "tag_tokens", "answer_questions", "summarize")
)
BOM = b"\xef\xbb\xbf"
FIELDS = {
    "text_field": "text", "label_field": "label", "document_field": "text", "summary_field": "label",
    "tokens_field": "tokens", "tags_field": "tags", "context_field": "context", "answerable_only": False,
}  # fmt: skip
OPTIONS = SimpleNamespace(**FIELDS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


def load(script, path, content=None, **fields):
    """The rows of a file with this content; of a data set where there is none."""
    if content is not None:
        path.write_bytes(content)
    return script.load(str(path), SimpleNamespace(**FIELDS | fields))


def refusal(script, path, content, capsys, **fields) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(SystemExit) as raised:
        load(script, path, content, **fields)
    message = raised.value.code
    assert isinstance(message, str) and str(path) in message and "\n" not in message
    return message


# --- files of texts and labels

GOOD = {
    "rows.jsonl": b'{"text": "a, b", "label": "x"}\n{"text": "c\\nd", "label": "--1"}\n',
    "bom.jsonl": BOM + b'{"text": "a, b", "label": "x"}\n{"text": "c\\nd", "label": "--1"}\n',
    "blank.jsonl": b'{"text": "a, b", "label": "x"}\r\n\n{"text": "c\\nd", "label": "--1"}\n\n \n',
    "more.jsonl": b'{"text": "a, b", "label": "x", "id": 1}\n{"text": "c\\nd", "label": "--1", "id": "2019-01-01"}\n',
    "rows.csv": b'text,label\n"a, b",x\n"c\nd",--1\n',
    "ROWS.CSV": BOM + b'text,label\r\n"a, b",x\r\n"c\nd",--1\r\n\r\n',
    "rows.tsv": b'label\ttext\nx\ta, b\n--1\t"c\nd"\n',
    "rows.csv.gz": gzip.compress(b'text,label\n"a, b",x\n"c\nd",--1\n', mtime=0),
    "ROWS.JSONL.GZ": gzip.compress(b'{"text": "a, b", "label": "x"}\n{"text": "c\\nd", "label": "--1"}\n', mtime=0),
}


@pytest.mark.parametrize("name", GOOD)
def test_rows_of_every_kind_of_file(tmp_path, name):
    expected = [{"text": "a, b", "label": "x"}, {"text": "c\nd", "label": "--1"}]
    assert load(classify, tmp_path / name, GOOD[name]) == expected
    expected = [{"document": row["text"], "summary": row["label"]} for row in expected]
    assert load(summarize, tmp_path / name) == expected


def test_what_looks_like_a_number_a_date_or_nothing_stays_what_was_written(tmp_path):
    """All of these are read as something else by pandas and by the readers of `datasets`."""
    labels = ["007", "NA", "null", "1.0", "2019-01-01", "True"]
    content = "text,label\n" + "".join(f"None,{label}\n" for label in labels)
    rows = load(classify, tmp_path / "rows.csv", content.encode())
    assert rows == [{"text": "None", "label": label} for label in labels]
    content = "".join(json.dumps({"text": "2019-01-01", "label": label}) + "\n" for label in labels)
    rows = load(classify, tmp_path / "rows.jsonl", content.encode())
    assert rows == [{"text": "2019-01-01", "label": label} for label in labels]


def test_labels_are_strings_integers_and_lists(tmp_path):
    content = b'{"text": "a", "label": 3}\n{"text": "b", "label": ["x", 4]}\n{"text": "c", "label": []}\n'
    rows = load(classify, tmp_path / "rows.jsonl", content)
    assert [row["label"] for row in rows] == ["3", ["x", "4"], []]


def test_long_fields_and_lone_surrogates_are_read(tmp_path):
    rows = load(classify, tmp_path / "rows.csv", b"text,label\n" + b"long " * 100_000 + b",x\n")
    assert len(rows[0]["text"]) == 500_000
    rows = load(classify, tmp_path / "rows.jsonl", b'{"text": "a\\ud83d b\\ud83d\\ude00", "label": "x"}\n')
    assert rows[0]["text"] == "a\ufffd b\U0001f600"
    assert AutoTokenizer.from_pretrained(ROOT)(rows[0]["text"])["input_ids"]
    rows = load(tag_tokens, tmp_path / "rows.jsonl", b'{"tokens": ["\\ud83d"], "tags": ["O"]}\n')
    assert rows == [{"words": ["\ufffd"], "tags": ["O"]}]
    rows = load(summarize, tmp_path / "rows.jsonl", b'{"text": "a", "label": "\\udc00"}\n')
    assert rows == [{"document": "a", "summary": "\ufffd"}]


BAD = {
    "an unquoted comma": ("rows.csv", b"text,label\na,x\nb, c,y\n", "line 3: more fields than line 1"),
    "an unquoted comma in the first row": ("rows.csv", b"text,label\nb, c,y\na,x\n", "line 2: more fields than line 1"),
    "an unquoted comma in each row": ("rows.csv", b"text,label\na,b,x\nb,c,y\n", "in double quotes"),
    "a row behind a line break": ("rows.csv", b'text,label\n"a\nb",x\nb,c,y\n', "line 4: more fields"),
    "a missing field": ("rows.csv", b"text,label\na\n", "line 2"),
    "a quote that is not closed": ("rows.csv", b'text,label\nb,y\n"a,x\nb,y\n', "after line 2: unexpected end of data"),
    "text behind a quote": ("rows.csv", b'text,label\na,x\n"b" c,y\n', "after line 2: ',' expected"),
    "a column named twice": ("rows.csv", b"text,label,label\na,x,y\n", "line 1: a column is named twice"),
    "a list in a table": ("rows.csv", b'text,label\na,"[""x"", ""y""]"\n', "line 2: '[\"x\", \"y\"]' is not a label (JSON lines may have lists of labels)"),
    "a vector": ("rows.jsonl", b'{"text": "a", "label": [1, 0, 0]}\n', "line 1: [1, 0, 0] is not a label"),
    "no label": ("rows.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2"),
    "an empty label": ("rows.jsonl", b'{"text": "a", "label": ""}\n', "line 1: '' is not a label"),
    "a number": ("rows.jsonl", b'{"text": "a", "label": 0.5}\n', "line 1: 0.5 is not a label"),
    "no text": ("rows.jsonl", b'\n{"text": null, "label": "x"}\n', "line 2"),
    "no JSON": ("rows.jsonl", b'{"text": "a", "label": "x"}\n{"text\n', "line 2"),
    "no object": ("rows.jsonl", b"[1]\n", "line 1"),
    "an empty file": ("rows.csv", b"", "no rows"),
    "no file": ("rows.csv", None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_would_be_read_wrongly_is_refused_with_its_line(tmp_path, capsys, what):
    name, content, expected = BAD[what]
    assert expected in refusal(classify, tmp_path / name, content, capsys)


@pytest.mark.parametrize(
    "what", ["an unquoted comma", "a missing field", "a column named twice", "no JSON", "no text"]
)
def test_summaries_are_refused_alike(tmp_path, capsys, what):
    name, content, expected = BAD[what]
    assert expected.split(":")[0] in refusal(summarize, tmp_path / name, content, capsys)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["x", ["x", "y"]], "a list in each row or in none"),
        (["x", "x"], "two labels or more"),
        ([[0, 1], [1, 0], [0, 1]], "no vectors of 0 and 1"),
    ],
    ids=str,
)
def test_labels_that_do_not_fit_together_are_refused(tmp_path, labels, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    arguments = ["--train", str(path), "--validation", str(path), "--test", str(path), "--use_cpu"]
    with pytest.raises(SystemExit, match=message):
        classify.main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_splits_of_the_datasets_library_have_their_names(monkeypatch):
    classes = datasets.ClassLabel(names=["sea", "town"])
    several = getattr(datasets, "List", datasets.Sequence)
    columns = {
        "text": ["a", "b"], "label": [1, 0], "labels": [[0, 1], []], "tokens": [["c"], ["d", "e"]], "tags": [[0], [1, 0]]
    }  # fmt: skip
    tags = several(datasets.ClassLabel(names=["O", "B-x"]))
    text = datasets.Value("string")
    features = {"text": text, "label": classes, "labels": several(classes), "tokens": several(text), "tags": tags}
    split = datasets.Dataset.from_dict(columns, datasets.Features(features))
    asked = []
    for script in (classify, tag_tokens):
        monkeypatch.setattr(
            script, "load_dataset", lambda *names, split, found=split: asked.append((names, split)) or found
        )
    assert classify.load("a/b:train", OPTIONS) == [{"text": "a", "label": "town"}, {"text": "b", "label": "sea"}]
    rows = classify.load("a/b:c:test", SimpleNamespace(**FIELDS | {"label_field": "labels"}))
    assert [row["label"] for row in rows] == [["sea", "town"], []]
    rows = tag_tokens.load("a/b:c:test", OPTIONS)
    assert rows == [{"words": ["c"], "tags": ["O"]}, {"words": ["d", "e"], "tags": ["B-x", "O"]}]
    assert asked == [(("a/b",), "train"), (("a/b", "c"), "test"), (("a/b", "c"), "test")]


# --- words and tags


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 1: 2 words and 1 tags"),
        ({"tokens": [], "tags": []}, "line 1: 0 words and 0 tags"),
        ({"tokens": ["a"], "tags": ["PER"]}, "line 1: not a list of words"),
        ({"tokens": ["a"], "tags": [3]}, "line 1: not a list of words"),
        ({"tokens": [7], "tags": ["O"]}, "line 1: not a list of words"),
        ({"tokens": ["a"], "labels": ["O"]}, "line 1: not a list of words"),
    ],
    ids=str,
)
def test_tags_that_do_not_fit_are_refused(tmp_path, capsys, row, message):
    assert message in refusal(tag_tokens, tmp_path / "rows.jsonl", json.dumps(row).encode(), capsys)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O", [(1, 3, "PER")]),
        ("B-PER B-PER", [(0, 1, "PER"), (1, 2, "PER")]),
        ("B-PER I-LOC I-LOC", [(0, 1, "PER"), (1, 3, "LOC")]),
        ("I-PER O I-PER I-PER", [(0, 1, "PER"), (2, 4, "PER")]),
        ("B-a-b I-a-b I-a", [(0, 2, "a-b"), (2, 3, "a")]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_by_hand(tags, expected):
    assert tag_tokens.entities(tags.split()) == expected


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=30))
def test_entities_are_disjoint_in_order_and_hold_all_that_is_not_o(tags):
    found = tag_tokens.entities(tags)
    inside = [index for start, stop, _ in found for index in range(start, stop)]
    assert inside == [index for index, tag in enumerate(tags) if tag != "O"]
    assert all(tags[index][2:] == kind for start, stop, kind in found for index in range(start, stop))
    assert {index for index, tag in enumerate(tags) if tag[0] == "B"} <= {start for start, _, _ in found}


def test_entity_scores_by_hand():
    """Of three entities one is found, one with a wrong end and one with a wrong type; another is found where none is."""
    gold = ["B-x O B-x I-x O B-y".split(), ["O"]]
    made = ["B-x O B-x O O B-x".split(), ["B-y"]]
    scores = tag_tokens.scores(gold, made)
    assert (scores["precision"], scores["recall"]) == pytest.approx((1 / 4, 1 / 3))
    assert (scores["f1"], scores["f1_x"], scores["f1_y"]) == pytest.approx((2 / 7, 2 / 5, 0))
    assert (scores["precision_x"], scores["recall_x"], scores["recall_y"]) == pytest.approx((1 / 3, 1 / 2, 0))


# --- questions

TEXT = "Rain fell on the sea."
QUESTION = {"question": "What?", "answers": [{"text": "Rain", "answer_start": 0}]}


def test_rows_of_questions_are_the_same_as_rows_of_documents(tmp_path):
    """Answers as lists of their parts, which is how SQuAD is stored on the Hub."""
    documents = load(answer_questions, tmp_path / "a.jsonl", json.dumps({"context": TEXT, "qas": [QUESTION]}).encode())
    flat = {"context": TEXT, "question": "What?", "answers": {"text": ["Rain"], "answer_start": [0]}}
    assert load(answer_questions, tmp_path / "b.jsonl", BOM + json.dumps(flat).encode() + b"\n\n") == documents
    assert documents == [{"document": 1, "context": TEXT, **QUESTION}]
    none = {"context": TEXT, "question": "Why?", "answers": {"text": [], "answer_start": []}}
    content = json.dumps(none).encode()
    assert load(answer_questions, tmp_path / "c.jsonl", content)[0]["answers"] == []
    with pytest.raises(SystemExit, match="no questions"):
        load(answer_questions, tmp_path / "c.jsonl", content, answerable_only=True)


@pytest.mark.parametrize(
    "row",
    [
        {"text": TEXT, "qas": [QUESTION]},
        {"context": 5, "qas": [QUESTION]},
        {"context": TEXT, "qas": [{"answers": []}]},
        {"context": TEXT, "qas": [{"question": "?"}]},
        {"context": TEXT, "qas": [{"question": "?", "answers": [{"text": "Rain"}]}]},
        {"context": TEXT, "qas": [{"question": "?", "answers": [{"text": "Rain", "answer_start": 1}]}]},
        {"context": TEXT, "question": "?", "answers": {"text": ["Rain"], "answer_start": []}},
        [1],
    ],
    ids=str,
)
def test_questions_that_do_not_fit_are_refused(tmp_path, capsys, row):
    assert "line 1" in refusal(answer_questions, tmp_path / "rows.jsonl", json.dumps(row).encode(), capsys)


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
    """With the values of SQuAD's own script."""
    assert answer_questions.scores([[answer]], [prediction]) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_the_answer_that_fits_best_counts_and_none_is_an_answer():
    assert answer_questions.scores([["May", "June 1900"]], ["June"])["f1"] == pytest.approx(2 / 3)
    assert answer_questions.scores([["May"], []], [None, None]) == {"exact_match": 0.5, "f1": 0.5}
    assert (
        answer_questions.scores([[]], ["May"]) == answer_questions.scores([[]], ["the"]) == {"exact_match": 0, "f1": 0}
    )
    assert answer_questions.scores([["May"]], [None]) == {"exact_match": 0, "f1": 0}


@settings(deadline=None)
@given(
    st.integers(1, 14).flatmap(lambda n: st.tuples(*[st.lists(st.integers(-9, 9), min_size=n, max_size=n)] * 2)),
    st.integers(1, 16),
)
def test_best_span_is_the_best_of_all(scores, longest):
    starts, ends = (np.array(values, dtype=np.float32) for values in scores)
    score, first, last = answer_questions.best_span(starts, ends, longest)
    pairs = [(i, j) for i in range(len(starts)) for j in range(i, min(i + longest, len(starts)))]
    assert (first, last) in pairs and score == starts[first] + ends[last] == max(starts[i] + ends[j] for i, j in pairs)


def read_answer(context: str, answer: dict, tokenizer, length: int = 512) -> str | None:
    """The text of the tokens that an answer is trained on."""
    row = {"question": "What is it?", "context": context}
    _, spans, stop = answer_questions.encode(row, tokenizer, length)
    tokens = answer_questions.answer_tokens(answer, spans, stop)
    return tokens and answer_questions.answer_text(context, spans[tokens[0]][0], spans[tokens[1]][1])


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
    place = {"text": answer, "answer_start": len(before)}
    assert read_answer(before + answer + after, place, tokenizer) == answer


WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=20)


@settings(deadline=None, max_examples=100)
@given(words=WORDS, data=st.data())
def test_positions_hold_the_answers_characters_and_no_other_words(tokenizer, words, data):
    """Whatever the text: the tokens of an answer of whole words are those of all its characters that the model sees."""
    context = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    start = len(" ".join(words[:first])) + (first > 0)
    text = " ".join(words[first : last + 1])
    place = {"text": text, "answer_start": start}
    _, spans, stop = answer_questions.encode({"question": "What?", "context": context}, tokenizer, 512)
    seen = {i for span in spans if span for i in range(*span)}
    tokens = answer_questions.answer_tokens(place, spans, stop)
    wanted = set(range(start, start + len(text)))
    assert (tokens is None) == seen.isdisjoint(wanted)
    if tokens is not None:
        found = {i for span in spans[tokens[0] : tokens[1] + 1] for i in range(*span)}
        spaces = {i for i, character in enumerate(context) if character.isspace()}
        assert seen & found - spaces == seen & wanted - spaces


def test_answers_are_read_up_to_the_cut(tokenizer):
    """Of five words the last fits in but for its end."""
    context = "one two three four uncharacteristically"
    four, five = {"text": "four", "answer_start": 14}, {"text": context[19:], "answer_start": 19}
    whole = len(tokenizer("What is it?", context)["input_ids"])
    assert read_answer(context, five, tokenizer, whole + 1) == context[19:]
    assert read_answer(context, five, tokenizer, whole - 1) is None
    assert read_answer(context, four, tokenizer, whole - 1) == "four"
    assert read_answer("  ", {"text": " ", "answer_start": 0}, tokenizer) is None


# --- summaries


def test_rouge_by_hand():
    """Of "the cat sat" against "the cat ran off": 2 of 3 and 2 of 4 words, 1 of 2 and 1 of 3 pairs of words."""
    scores = summarize.scores(["the cat ran off", "a"], ["The cat sat", "a"])
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx((2 * 2 / (3 + 4) + 1) / 2)
    assert scores["rouge2"] == pytest.approx(2 * 1 / (2 + 3) / 2)
