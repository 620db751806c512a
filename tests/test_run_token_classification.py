"""The token classification script on generated documents, with a small random model and the root's tokenizer."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")

import torch
from transformers import AutoTokenizer, Trainer

from conftest import ROOT
from fine_tuning import load_rows
from helpers import example, write_repository
from lsg_albert import LSGAlbertForMaskedLM, LSGAlbertForTokenClassification
from test_run_summarization import kill_at, write_rows

script = example("run_token_classification")
Entity = script.Entity
RECIPE = "--batch-size 4 --eval-batch-size 2 --lr 1e-2 --log-every 1 --save-every 2".split()


def generate_rows(count, words, seed):
    """Documents of castles, where "old Jordan" is a person, and of rivers, where it is a place."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        others, type_ = rng.choice(
            [("castle gate wall knight".split(), "PER"), ("river boat sea fish".split(), "LOC")]
        )
        row = {"tokens": [], "tags": []}
        while len(row["tokens"]) < words:
            named = rng.random() < 0.2
            row["tokens"] += ["old", "Jordan"] if named else [rng.choice(others)]
            row["tags"] += [f"B-{type_}", f"I-{type_}"] if named else ["O"]
        rows.append(row)
    return rows


TRAIN, TEST = generate_rows(24, 40, 0), generate_rows(5, 90, 1)


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    """A repository with a small random model that reads 128 tokens, and has dropout."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=16000, max_position_embeddings=128, hidden_dropout_prob=0.1)
    folder = tmp_path_factory.mktemp("tokens") / "repository"
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


def test_a_run_learns_what_no_single_word_tells(model, data, tmp_path):
    assert script.main(command(model, data, tmp_path, "--steps", "60", "--save-every", "500")) == 0
    results = read_results(tmp_path)
    learned, looked_up = (found["all"]["f1"]["mean"] for found in results["systems"].values())
    assert learned > 95 and looked_up < 70
    assert results["words_not_read"] == results["entities_not_read"] == 0 and results["test_documents"] == 5
    assert results["systems"]["model"].keys() == {"all", "LOC", "PER"}
    wanted = [script.describe(script.entities(row["tags"]), row["tokens"]) for row in TEST]
    assert [row["references"] for row in read_predictions(tmp_path)] == wanted
    assert wanted[0][0].keys() == {"start", "stop", "type", "text"}
    assert "| model | LOC |" in (tmp_path / "results.md").read_text()
    saved = script.load_pretrained(script.AutoModelForTokenClassification, tmp_path / "final")
    assert saved.config.id2label == dict(enumerate(["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]))


def test_killed_and_resumed_run_equals_an_unbroken_one(model, data, tmp_path, monkeypatch):
    whole, broken = (command(model, data, tmp_path / name, "--steps", "4") for name in ("whole", "broken"))
    assert script.main(whole) == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", kill_at(3))
        script.main(broken)
    assert script.main(broken) == 0
    results = [read_results(tmp_path / name) for name in ("whole", "broken")]
    assert results[1]["resumed_from"] == "checkpoint-2"
    losses = [[entry["loss"] for entry in found["history"] if "loss" in entry] for found in results]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    assert results[0]["test_loss"] == results[1]["test_loss"] and results[0]["systems"] == results[1]["systems"]


@pytest.mark.parametrize("pieces", [False, True])
def test_what_is_not_read_counts_as_missed_and_pieces_read_it_all(model, data, tmp_path, pieces):
    options = ["--steps", "1", "--max-length", "20", "--limit-test", "2"] + ["--pieces"] * pieces
    assert script.main(command(model, data, tmp_path, *options, "--bf16", "--gradient-checkpointing")) == 0
    results = read_results(tmp_path)
    gold = sum(len(row["references"]) for row in read_predictions(tmp_path))
    assert results["systems"]["model"]["all"]["entities"] == gold
    assert (results["words_not_read"] == 0) == (results["entities_not_read"] == 0) == pieces
    if not pieces:
        assert results["words_not_read"] > results["words"] / 2
        found = [entity for row in read_predictions(tmp_path) for entity in row["predictions"]]
        assert all(entity["stop"] <= 18 for entity in found)
    assert f"{results['words_not_read']} of their" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_two_processes_train_together_and_score_each_document_once(model, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = command(model, data, tmp_path / "out", "--steps", "3")  # five test documents: the last batch is filled up
    done = subprocess.run(
        [*torchrun, str(ROOT / "examples" / "run_token_classification.py"), *run],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 test documents") == 1
    together = (tmp_path / "out" / "predictions.jsonl").read_text()
    assert script.main(run) == 0  # scores the finished run again, in one process
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == together


def test_tags_of_the_datasets_library_have_their_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    tags = getattr(datasets, "List", datasets.Sequence)(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    words = getattr(datasets, "List", datasets.Sequence)(datasets.Value("string"))
    columns = {"tokens": [["old", "Jordan", "sat"]], "ner_tags": [[1, 2, 0]]}
    split = datasets.Dataset.from_dict(columns, datasets.Features({"tokens": words, "ner_tags": tags}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=split))
    args = script.parse_args(["--dataset", "x", "--tags-field", "ner_tags", "--output", str(tmp_path)])
    rows = script.check_rows(load_rows(args, "train", script.data_fields(args)), "train")
    assert rows == [{"words": ["old", "Jordan", "sat"], "tags": ["B-PER", "I-PER", "O"]}]


# --- refusals

BAD_ROWS = {
    "row 1: 2 words and 1 tags": {"tokens": ["a", "b"], "tags": ["O"]},
    "row 1: 0 words and 0 tags": {"tokens": [], "tags": []},
    "row 1: 'PER' is no BIO tag": {"tokens": ["a"], "tags": ["PER"]},
    "row 1: 3 is no BIO tag": {"tokens": ["a"], "tags": [3]},
    "row 1: 7 is no word": {"tokens": [7], "tags": ["O"]},
    'no list of tags in a field "tags"': {"tokens": ["a"], "labels": ["O"]},
    "the train data has no word that the tokenizer knows": {"tokens": [""], "tags": ["B-PER"]},
    "the train data has no entities: all its tags are O": {"tokens": ["a"], "tags": ["O"]},
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_unusable_rows_are_named_in_one_line(model, tmp_path, capsys, message):
    path = write_rows(tmp_path / "bad.jsonl", [BAD_ROWS[message]])
    assert script.main(command(model, ["--train-file", str(path)], tmp_path / "out")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("run_token_classification: ")


def test_a_model_for_other_tags_is_refused_in_one_line(tiny_config, data, tmp_path, capsys):
    other = write_repository(tmp_path / "other", LSGAlbertForTokenClassification(tiny_config(vocab_size=16000)))
    assert script.main(command(other, data, tmp_path / "out")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"run_token_classification: cannot load {other}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "129"], "--max-length 129 is more than the model's 128 positions"),
        (["--max-length", "2"], "--max-length 2 leaves no room for words: it is to be 3 or more"),
        (["--eval-every", "2"], "--eval-every needs validation data"),
    ],
)
def test_impossible_options_are_refused_in_one_line(model, data, tmp_path, capsys, options, message):
    assert script.main(command(model, data, tmp_path, *options)) == 1
    *before, last = capsys.readouterr().err.splitlines()
    assert message in last and "Traceback" not in "".join(before)


# --- entities and scores by hand


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
    assert script.entities(tags.split()) == expected


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=30))
def test_entities_are_disjoint_in_order_and_hold_all_that_is_not_o(tags):
    found = script.entities(tags)
    inside = [index for entity in found for index in range(entity.start, entity.stop)]
    assert inside == [index for index, tag in enumerate(tags) if tag != "O"]
    assert all(tags[index][2:] == entity.type for entity in found for index in range(entity.start, entity.stop))
    assert {index for index, tag in enumerate(tags) if tag[0] == "B"} <= {entity.start for entity in found}


def test_scores_by_hand():
    """Of three entities two are found, one of them with a wrong end; another one is found where none is."""
    gold = [[Entity(0, 1, "PER"), Entity(2, 4, "PER")], [Entity(5, 6, "LOC")]]
    found = [[Entity(0, 1, "PER"), Entity(2, 3, "PER")], [Entity(7, 8, "PER")]]
    results = script.score_system(found, gold, ["LOC", "PER"])
    means = {name: [score[key]["mean"] for key in ("precision", "recall", "f1")] for name, score in results.items()}
    assert means["all"] == pytest.approx([100 / 3, 100 / 3, 100 / 3])
    assert means["PER"] == pytest.approx([100 / 3, 50, 40])
    assert means["LOC"] == [0, 0, 0] and results["all"]["entities"] == 3


def test_the_right_span_with_the_wrong_type_is_wrong():
    assert script.count_entities([Entity(0, 1, "LOC")], [Entity(0, 1, "PER")], ["LOC", "PER"]).tolist() == [
        [0, 1, 0],
        [0, 0, 1],
    ]


# --- words and tokens


def test_each_word_is_labelled_on_its_first_token(tokenizer):
    row = {"words": ["Uncharacteristically", "Zoë", "", "laughed"], "tags": ["O", "B-PER", "I-PER", "O"]}
    examples = script.Examples([row], tokenizer, ["O", "B-PER", "I-PER"], 64, False)
    features = examples[0]
    ids = tokenizer(" ".join(row["words"]))["input_ids"]
    assert features["input_ids"] == ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    labelled = {tokens[i]: label for i, label in enumerate(features["labels"]) if label != -100}
    assert all(token.startswith("▁") for token in labelled) and list(labelled.values()) == [0, 1, 0]
    assert features["labels"][0] == features["labels"][-1] == -100
    assert examples.tags(np.array([[1] * len(ids)])) == [["B-PER", "B-PER", None, "B-PER"]]


def test_a_tag_that_training_did_not_have_is_no_label(tokenizer):
    examples = script.Examples([{"words": ["a", "b"], "tags": ["B-NEW", "O"]}], tokenizer, ["O"], 64, False)
    assert sorted(examples[0]["labels"]) == [-100, -100, -100, 0]


def test_first_tokens_by_hand():
    assert script.first_tokens([None, 0, 0, 1, 3, 3, None]) == [1, 3, 4]
    assert script.first_tokens([]) == []


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 12))
def test_cut_makes_the_longest_consecutive_parts(sizes, room):
    parts = script.cut(sizes, room)
    assert [index for part in parts for index in range(*part)] == list(range(len(sizes)))
    totals = [sum(sizes[slice(*part)]) for part in parts]
    assert all(total <= room or part[1] - part[0] == 1 for total, part in zip(totals, parts, strict=True))
    assert all(total + sizes[part[1]] > room for total, part in zip(totals, parts[:-1], strict=False))


WORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(words=st.lists(WORD, min_size=1, max_size=30), length=st.integers(3, 20))
def test_pieces_read_every_word_that_has_tokens_once(tokenizer, words, length):
    """Whatever the words and the length: no piece is longer, and the labels are those of all words in order."""
    names = [f"B-{i}" for i in range(len(words))]
    examples = script.Examples([{"words": words, "tags": names}], tokenizer, names, length, True)
    features = [examples[i] for i in range(len(examples))]
    assert all(len(found["input_ids"]) <= length for found in features)
    labels = [label for found in features for label in found["labels"] if label != -100]
    assert labels == [i for i, size in enumerate(script.token_counts(words, tokenizer)) if size]
    padded = np.zeros((len(examples), length), dtype=int)
    for numbers, found in zip(padded, features, strict=True):
        numbers[: len(found["labels"])] = found["labels"]
    assert examples.tags(padded) == [[name if i in labels else None for i, name in enumerate(names)]]


def test_frequent_tags_are_each_words_own():
    rows = [{"words": ["a", "a", "b"], "tags": ["O", "B-X", "B-Y"]}, {"words": ["a"], "tags": ["B-X"]}]
    assert script.frequent_tags(rows) == {"a": "B-X", "b": "B-Y"}


def test_the_documented_commands_name_options_that_exist(capsys):
    for line in re.findall(r"python examples/run_token_classification\.py (.*)", script.__doc__):
        script.parse_args(line.split())
