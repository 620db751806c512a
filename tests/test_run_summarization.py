"""The summarization script on a few generated documents, with a small random model and the root's tokenizer."""

import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")
pytest.importorskip("rouge_score", reason="the script's scores come from it")

import torch
from transformers import AutoTokenizer, Seq2SeqTrainer

from conftest import ROOT
from fine_tuning import UsageError, last_checkpoint, load_rows
from helpers import example, write_repository
from lsg_albert import LSGAlbertForConditionalGeneration

RECIPE = "--steps 6 --batch-size 2 --max-target-length 12 --lr 1e-2 --warmup 2 --log-every 1 --save-every 2".split()
TESTING = "--beams 2 --eval-batch-size 2".split()


@pytest.fixture(scope="module")
def script():
    return example("run_summarization")


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    """A repository with a small random model that reads 64 tokens, and has dropout."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = tiny_config(vocab_size=16000, max_position_embeddings=64, **dropout)
    folder = tmp_path_factory.mktemp("summarization") / "repository"
    return write_repository(folder, LSGAlbertForConditionalGeneration(config))


WORDS = "king queen river mountain science music letter garden winter summer house window".split()
ROWS = [{"document": f"The {word} was old. " + f"Nobody saw a {word}. " * i, "summary": f"Old {word}."} for i, word in enumerate(WORDS)]  # fmt: skip


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight documents to train on, four to test on."""
    folder = tmp_path_factory.mktemp("data")
    return [
        "--train-file", str(write_rows(folder / "train.jsonl.gz", ROWS[:8])),
        "--test-file", str(write_rows(folder / "test.jsonl", ROWS[8:])),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(script, model, data, tmp_path_factory):
    """The output of an unbroken run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert script.main(command(model, data, output)) == 0
    return output


def command(model, data, output, *options):
    return ["--model", str(model), *data, "--output", str(output), *RECIPE, *TESTING, *options]


def read_results(output):
    return json.loads((output / "results.json").read_text())


def kill_at(step):
    """A training step that fails as Ctrl-C does, once `step` steps are done."""
    original = Seq2SeqTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    return training_step


# --- whole runs


def test_a_run_trains_tests_and_saves(finished, model):
    results = read_results(finished)
    assert results["steps"] == 6 and results["train_documents"] == 8 and results["test_documents"] == 4
    assert results["max_source_length"] == 64 and results["resumed_from"] is None
    assert str(model) in results["command"] and results["seed"] == 1
    assert set(results["systems"]) == {"model", "lead-2 words"}
    lines = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines] == [row["summary"] for row in ROWS[8:]]
    for system, scores in results["systems"].items():
        for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
            values = [line[system][name] for line in lines]
            assert scores[name]["mean"] == pytest.approx(np.mean(values))
            assert min(values) - 1e-9 <= scores[name]["low"] <= scores[name]["high"] <= max(values) + 1e-9
    table = (finished / "results.md").read_text()
    assert "| model |" in table and "| lead-2 words |" in table and "4 test documents" in table


def test_the_saved_model_generates_as_the_command_line_said(finished):
    from transformers import AutoModelForSeq2SeqLM

    saved = AutoModelForSeq2SeqLM.from_pretrained(finished / "final", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    assert saved.generation_config.num_beams == 2 and saved.generation_config.max_length == 13
    first = json.loads((finished / "predictions.jsonl").read_text().splitlines()[0])
    ids = saved.eval().generate(**tokenizer(ROWS[8]["document"], return_tensors="pt", return_token_type_ids=False))
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == first["prediction"]


def test_killed_and_resumed_run_equals_an_unbroken_one(script, model, data, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Seq2SeqTrainer, "training_step", kill_at(5))
        script.main(command(model, data, tmp_path))
    (tmp_path / "checkpoint-5").mkdir()  # as a kill in the middle of saving leaves it
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text('{"global')
    assert script.main(command(model, data, tmp_path)) == 0
    whole, broken = read_results(finished), read_results(tmp_path)
    assert broken["resumed_from"] == "checkpoint-4" and whole["systems"] == broken["systems"]
    losses = [[entry["loss"] for entry in results["history"] if "loss" in entry] for results in (whole, broken)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    assert (finished / "predictions.jsonl").read_text() == (tmp_path / "predictions.jsonl").read_text()
    weights = [script.load_model(path / "final", script.parse_args(command(model, data, path))).state_dict()
               for path in (finished, tmp_path)]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_run_is_scored_again_without_training(script, model, data, finished, tmp_path, monkeypatch):
    output = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", kill_at(6))
    assert script.main(command(model, data, output, "--limit-test", "3")) == 0
    results = read_results(output)
    assert results["test_documents"] == 3 and results["steps"] == 6
    whole = {line for line in (finished / "predictions.jsonl").read_text().splitlines()}
    assert {line for line in (output / "predictions.jsonl").read_text().splitlines()} < whole


def test_a_folder_of_another_run_is_refused(script, model, data, finished, capsys):
    assert script.main(command(model, data, finished, "--lr", "0.1")) == 1
    assert "lr 0.01, not 0.1" in capsys.readouterr().err


def test_all_options_together(script, model, data, tmp_path):
    train, test = data[1], data[3]
    options = ["--validation-file", test, "--eval-every", "1", "--limit-validation", "2", "--limit-train", "4"]
    options += ["--label-smoothing", "0.1", "--gradient-accumulation", "2", "--bf16", "--gradient-checkpointing"]
    options += ["--max-source-length", "20", "--no-repeat-ngrams", "0", "--schedule", "cosine", "--seed", "5"]
    options += ["--max-target-length", "9"]
    run = ["--model", str(model), "--train-file", train, "--output", str(tmp_path), "--epochs", "2"]
    assert script.main([*run, "--batch-size", "1", *options]) == 0
    assert not (tmp_path / "results.json").exists()  # no test data
    state = last_checkpoint(tmp_path)[1]
    assert state["global_step"] == 4
    assert len([entry for entry in state["log_history"] if "eval_loss" in entry]) == 4


@pytest.mark.slow
def test_two_processes_train_together_and_score_each_document_once(script, model, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--limit-test", "3"]  # so that the last batch is filled up
    run = command(model, data, tmp_path / "out", *options)
    done = subprocess.run(
        [*torchrun, str(ROOT / "examples" / "run_summarization.py"), *run], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 test documents") == 1
    together = (tmp_path / "out" / "predictions.jsonl").read_text()
    assert script.main(run) == 0  # scores the finished run again, in one process
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == together


def test_a_folder_for_the_datasets_library(script, model, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"article": row["document"], "abstract": row["summary"], "id": i} for i, row in enumerate(ROWS)]
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", rows[:8])
    write_rows(tmp_path / "data" / "test.jsonl", rows[8:])
    data = ["--dataset", str(tmp_path / "data"), "--document-field", "article", "--summary-field", "abstract"]
    args = script.parse_args(command(model, data, tmp_path / "out"))
    assert (
        list(load_rows(args, "train", script.data_fields(args))) == ROWS[:8]
        and load_rows(args, "validation", script.data_fields(args)) is None
    )
    assert script.main(command(model, data, tmp_path / "out", "--steps", "1", "--limit-test", "2")) == 0
    assert read_results(tmp_path / "out")["test_documents"] == 2
    data[-1] = "summary"
    args = script.parse_args(command(model, data, tmp_path / "out"))
    with pytest.raises(UsageError, match='no field "summary", but article, abstract, id'):
        load_rows(args, "train", script.data_fields(args))


# --- data


def test_labels_end_with_sep_and_have_no_cls(script):
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    row = {"document": "The river flows to the sea. " * 9, "summary": "A river flows."}
    whole = script.Examples([row], tokenizer, 512, 512)[0]
    text = tokenizer("A river flows.", add_special_tokens=False)["input_ids"]
    assert whole["labels"] == [*text, tokenizer.sep_token_id]
    assert whole["input_ids"] == tokenizer(row["document"])["input_ids"]
    cut = script.Examples([row], tokenizer, 8, 3)[0]
    assert cut["labels"] == [*text[:2], tokenizer.sep_token_id]
    assert cut["input_ids"] == [*whole["input_ids"][:7], tokenizer.sep_token_id] and len(cut["attention_mask"]) == 8


def test_limits_draw_the_same_rows_whatever_the_seed(script, data):
    samples = []
    for seed in ("1", "2"):
        args = script.parse_args([*data, "--output", "x", "--limit-train", "5", "--seed", seed])
        samples.append(load_rows(args, "train", script.data_fields(args)))
    assert samples[0] == samples[1] and len(samples[0]) == 5
    assert all(row in ROWS[:8] for row in samples[0])


BAD_FILES = {
    "no such file": None,
    "the train data is empty": "",
    "line 1: not JSON": "{",
    'line 2: no text in a field "summary"': json.dumps(ROWS[0]) + '\n{"document": "a", "text": "b"}\n',
    'line 1: no text in a field "document"': '{"document": null, "summary": "b"}\n',
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_unusable_files_are_named_in_one_line(script, model, tmp_path, capsys, message):
    path = tmp_path / "bad.jsonl"
    if BAD_FILES[message] is not None:
        path.write_text(BAD_FILES[message])
    assert script.main(command(model, ["--train-file", str(path)], tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-source-length", "65"], "--max-source-length 65 is more than the model's 64 positions"),
        (["--max-target-length", "65"], "--max-target-length 65 is more than the model's 64 positions"),
        (["--eval-every", "2"], "--eval-every needs validation data"),
        (["--model", "/nowhere"], "cannot load /nowhere"),
    ],
)
def test_impossible_options_are_refused_in_one_line(script, model, data, tmp_path, capsys, options, message):
    assert script.main(command(model, data, tmp_path, *options)) == 1
    *before, last = capsys.readouterr().err.splitlines()
    assert message in last and last.startswith("run_summarization: ") and "Traceback" not in "".join(before)


def test_the_command_line_wants_one_source_of_data(script, capsys):
    for options in ([], ["--train-file", "a", "--dataset", "b"], ["--dataset", "b", "--test-file", "a"]):
        with pytest.raises(SystemExit):
            script.parse_args(["--output", "x", *options])
    assert "--train-file and --dataset" in capsys.readouterr().err


# --- scores


def test_lead_baseline_by_hand(script):
    """Of "the cat sat" against "the cat ran off": 2 of 3 and 2 of 4 words, 1 of 2 and 1 of 3 pairs of words."""
    assert script.lead("The cat\n\nsat down. Then it ran.", 3) == "The cat sat"
    scores = script.rouge([script.lead("The cat\n\nsat down. Then it ran.", 3)], ["the cat ran off"])
    assert scores["rouge1"] == [pytest.approx(100 * 2 * 2 / (3 + 4))]
    assert scores["rouge2"] == [pytest.approx(100 * 2 * 1 / (2 + 3))]
    assert scores["rougeL"] == scores["rouge1"]


def test_rouge_lsum_goes_by_sentences(script):
    """The sentences in the other order: all words are found sentence by sentence, but only half of them in a row."""
    scores = script.rouge(["A dog ran. The cat sat."], ["The cat sat. A dog ran."])
    assert scores["rougeLsum"] == [pytest.approx(100)] and scores["rougeL"] == [pytest.approx(50)]
    assert script.sentences("Title\n\nOne is 1.5 long. Two? Three!\n") == [
        "Title",
        "One is 1.5 long.",
        "Two?",
        "Three!",
    ]


def test_spread_is_the_mean_and_what_resampling_gives(script):
    assert script.spread([3.0, 3.0, 3.0]) == (3, 3, 3)
    values = np.random.default_rng(1).normal(10, 2, size=400)
    mean, low, high = script.spread(values)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20  # of the normal approximation
    assert low == pytest.approx(mean - half, abs=0.05) and high == pytest.approx(mean + half, abs=0.05)
