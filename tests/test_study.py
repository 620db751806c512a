"""The study of several runs of an example, with a small random model and the root's tokenizer."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")
pytest.importorskip("sklearn", reason="the baselines and scores come from it")
pytest.importorskip("scipy", reason="the intervals come from it")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from conftest import ROOT
from experiments import baselines, chunks, cross_attention_init, study
from helpers import example, write_repository
from lsg_albert import LSGAlbertForMaskedLM
from pretraining import extrapolation, pretrain_mlm, train_tokenizer
from test_training_examples import LENGTH, RECIPE, kill_at, make_rows, scripts, write_rows

SHORT = 12  # tokens, of which no label shows


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """The thousand are for results that are read, not for whole runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RESAMPLES", 20)
        yield


@pytest.fixture(scope="module")
def command(tiny_config, tmp_path_factory):
    """The study's arguments for an example."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("study")
    config = tiny_config(vocab_size=16000, max_position_embeddings=LENGTH, hidden_dropout_prob=0.05)
    model = write_repository(folder / "model", LSGAlbertForMaskedLM(config))

    def make(output, *options, name="classify"):
        train = write_rows(folder / f"{name}-train.jsonl.gz", make_rows(name, 36, 1))
        test = write_rows(folder / f"{name}-test.jsonl", make_rows(name, 12, 2))
        files = ["--model", str(model), "--train", str(train), "--test", str(test)]
        return [name, "--output", str(output), *options, *files, *RECIPE]

    return make


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert study.main(command(output, "--lengths", str(SHORT), str(LENGTH), "--baselines")) == 0
    return output


def read(output):
    return json.loads((output / "results.json").read_text())


def test_the_longer_input_learns_what_the_shorter_one_cannot_see(finished):
    systems = read(finished)["systems"]
    accuracy = {name: scores["accuracy"]["mean"] for name, scores in systems.items()}
    assert accuracy["model, 48 tokens"] > 0.9 and accuracy["model, 12 tokens"] <= 0.6
    assert accuracy["TF-IDF + linear SVM, 48 tokens"] == accuracy["TF-IDF + linear SVM, whole text"] == 1
    assert accuracy["TF-IDF + linear SVM, 12 tokens"] == accuracy["most frequent label"] == 0.5


def test_finished_runs_are_kept_and_others_added(command, finished, monkeypatch):
    monkeypatch.setattr(Trainer, "training_step", kill_at(0))
    assert study.main(command(finished, "--lengths", str(LENGTH))) == 0
    assert list(read(finished)["systems"]) == ["model, 48 tokens"]
    with pytest.raises(KeyboardInterrupt):
        study.main(command(finished, "--lengths", str(LENGTH), "--seeds", "3"))


def test_results_hold_every_run_and_its_scores(command, tmp_path):
    options = ["--lengths", "16", "24", "--seeds", "1", "2"]
    assert study.main([*command(tmp_path, *options), "--max_steps", "2"]) == 0
    results = read(tmp_path)
    runs = [(16, 1, 2), (16, 2, 2), (24, 1, 2), (24, 2, 2)]
    assert [(made["length"], made["seed"], made["steps"]) for made in results["runs"]] == runs
    for length in (16, 24):
        found = results["systems"][f"model, {length} tokens"]["accuracy"]
        for seed in ("1", "2"):
            path = tmp_path / f"length-{length}" / f"seed-{seed}" / "test_results.json"
            assert found["seeds"][seed] == pytest.approx(json.loads(path.read_text())["test_accuracy"])
        first, second = found["seeds"].values()
        assert found["deviation"] == pytest.approx(abs(first - second) / 2**0.5)
    table = (tmp_path / "results.md").read_text()
    assert "12 test rows" in table and "| accuracy |" in table and results["command"] in table


def test_a_folder_of_another_study_is_refused(command, finished, capsys):
    assert study.main([*command(finished, "--lengths", str(LENGTH)), "--weight_decay", "0.1"]) == 1
    assert "holds a run with other arguments" in capsys.readouterr().err


def test_limits_draw_the_same_rows_and_the_other_examples_have_their_baselines(command, tmp_path):
    options = ["--lengths", "32", "--limit-train", "8", "--limit-test", "4", "--baselines"]
    assert study.main([*command(tmp_path, *options, name="tag_tokens"), "--max_steps", "2"]) == 0
    results = read(tmp_path)
    assert results["lines"] == 4 and set(results["systems"]) == {"model, 32 tokens", "each word's most frequent tag"}
    found = results["systems"]["each word's most frequent tag"]["f1"]
    assert found["mean"] > 0.9 and found["interval"][0] <= found["mean"] <= found["interval"][1]
    rows = [json.loads(line) for line in (tmp_path / "8-of-tag_tokens-train.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row in make_rows("tag_tokens", 36, 1) for row in rows)


def test_chunks_show_what_one_short_input_cannot_see(command, tmp_path):
    assert study.main(command(tmp_path, "--lengths", str(SHORT), "--chunks", "--baselines")) == 0
    results = read(tmp_path)
    assert results["lines"] == 12 and results["systems"][f"model, chunks of {SHORT} tokens"]["accuracy"]["mean"] > 0.9
    assert results["systems"][f"TF-IDF + linear SVM, {SHORT} tokens"]["accuracy"]["mean"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / f"length-{SHORT}" / "seed-1" / "predictions.jsonl").open()]
    assert len(rows) > 24  # chunks


def test_chunks_of_a_document_are_all_in_one_split(command, tmp_path):
    options = ["--lengths", str(SHORT), "--chunks", "--max_steps", "2"]
    assert study.main(command(tmp_path, *options)) == 0
    texts = {}
    for split in ("train", "validation", "test"):
        lines = (tmp_path / f"{split}-chunks-{SHORT}.jsonl").read_text().splitlines()
        texts[split] = "".join(json.loads(line)["text"].replace(" ", "") for line in lines)
    for seed, number, splits in ((1, 36, ("train", "validation")), (2, 12, ("test",))):
        documents = [row["text"].replace(" ", "") for row in make_rows("classify", number, seed)]
        assert [sum(text in texts[split] for split in texts) for text in documents] == [1] * number
        assert sum(map(len, documents)) == sum(len(texts[split]) for split in splits)


def test_fields_of_the_config_are_replaced_in_the_runs_only(command, tmp_path, capsys):
    options = ["--lengths", "16", "--max_steps", "2", "--config"]
    arguments = command(tmp_path / "out", *options, '{"num_global_tokens": 3}')
    assert study.main(arguments) == 0
    source, made = arguments[arguments.index("--model") + 1], tmp_path / "out" / "length-16" / "seed-1"
    configs = [json.loads((folder / "config.json").read_text()) for folder in (Path(source), made)]
    assert [config["num_global_tokens"] for config in configs] == [1, 3]
    assert study.main(arguments) == 0
    assert study.main(command(tmp_path / "out", *options, "{}")) == 1
    assert study.main(command(tmp_path / "other", *options, '{"global_tokens": 3}')) == 1
    errors = capsys.readouterr().err
    assert "holds a run with other arguments" in errors and "--config has ['global_tokens'], which" in errors


def test_mean_pooling_classifies_the_mean_of_the_real_tokens(command, tmp_path):
    """Of what a run saves, which is loaded here without the hook."""
    options = ["--lengths", str(LENGTH), "--mean-pooling", "--max_steps", "2"]
    assert study.main(command(tmp_path, *options)) == 0
    output = tmp_path / f"length-{LENGTH}" / "seed-1"
    model = AutoModelForSequenceClassification.from_pretrained(output, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    for row, line in zip(make_rows("classify", 12, 2), (output / "predictions.jsonl").open(), strict=True):
        states = model.base_model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state
        found = dict(zip(model.config.id2label.values(), model.classifier(states.mean(1))[0].tolist(), strict=True))
        assert json.loads(line)["scores"] == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("option", ["--chunks", "--mean-pooling"])
def test_only_classifiers_read_chunks_and_pool(option, command, tmp_path, capsys):
    assert study.main(command(tmp_path, option, name="tag_tokens")) == 1
    assert "--chunks and --mean-pooling are for classify, not for tag_tokens" in capsys.readouterr().err


COMMANDS = {
    **{name: script.main for name, script in scripts.items()},
    "study": study.main,
    "cross_attention_init": cross_attention_init.main,
    "pretrain_mlm": pretrain_mlm.parse_args,
    "train_tokenizer": train_tokenizer.parse_args,
    "extrapolation": extrapolation.parse_args,
    "fill_mask": lambda argv: example("fill_mask").parse_args(argv),
    "plot_attention": lambda argv: example("plot_attention").parse_args(argv),
    "widget": lambda argv: example("widget").main(argv),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text_and_shows_its_default(command, monkeypatch):
    parsers = []

    def stop(parser, *_, **__):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(SystemExit):
        COMMANDS[command]([])
    (parser,) = parsers
    assert [action.dest for action in parser._actions if not action.help] == []
    assert issubclass(parser.formatter_class, argparse.ArgumentDefaultsHelpFormatter)


def test_a_cross_attention_can_start_in_two_ways(tmp_path, tiny_config, capsys):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=16000, max_position_embeddings=LENGTH)
    model = write_repository(tmp_path / "model", LSGAlbertForMaskedLM(config))
    rows = [write_rows(tmp_path / f"{name}.jsonl", make_rows("summarize", 8, 1)) for name in ("train", "test")]
    options = "--steps 2 --evaluations 1 --seeds 0 --tasks first --source-length 24 --target-length 8 --batch-size 2"
    output = tmp_path / "results.json"
    cross_attention_init.main([*map(str, rows), "--model", str(model), "--output", str(output), *options.split()])
    found = json.loads(output.read_text())
    assert [(result["case"]["start"], result["step"]) for result in found] == [("random", 2), ("copy", 2)]
    assert found[0]["loss"] != found[1]["loss"] and "| first | copy | 2 |" in capsys.readouterr().out


# --- scores


def test_intervals_are_what_resampled_documents_give(monkeypatch):
    monkeypatch.setattr(study, "RESAMPLES", 1000)
    rng = np.random.default_rng(1)
    right = rng.random(400) < 0.3
    lines = [{"reference": 1, "prediction": int(each)} for each in right]
    low, high = study.intervals(lines, lambda wanted, made: {"accuracy": np.mean(np.equal(wanted, made))})["accuracy"]
    half = 1.96 * right.std() / 20  # of the normal approximation
    assert low == pytest.approx(right.mean() - half, abs=0.01) and high == pytest.approx(right.mean() + half, abs=0.01)
    lines = [{"document": i // 40, **line} for i, line in enumerate(lines)]
    wide = study.intervals(lines, lambda wanted, made: {"accuracy": np.mean(np.equal(wanted, made))})["accuracy"]
    means = right.reshape(10, 40).mean(1)  # of the documents that are resampled
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * means.std() / 10**0.5, rel=0.3)


def test_classification_scores_by_hand():
    """Of "a": 2 of 3 found and 2 of 4 right; of "b": 1 of 2 and 1 of 2, and none of "c"."""
    scores = study.classification_scores(list("aaabbc"), list("aabbaa"))
    assert scores == pytest.approx({"accuracy": 3 / 6, "macro_f1": np.mean([2 * 2 / 7, 2 * 1 / 4, 0])})
    scores = study.classification_scores([["a"], ["a", "b"], []], [["a"], ["a"], ["a"]])
    assert scores == pytest.approx({"accuracy": 1 / 3, "micro_f1": 4 / 6, "macro_f1": (0.8 + 0) / 2})


# --- chunks


def test_texts_are_cut_where_the_model_stops_reading():
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    text = "nobody knows what this is about and how it will end in the uncharacteristically long run"
    cut, *others = chunks.cut_texts([text, "a ship", ""], tokenizer, SHORT)
    assert len(cut) > 1 and others == [["a ship"], [""]]
    assert "".join(cut).replace(" ", "") == text.replace(" ", "")
    assert tokenizer(cut[0])["input_ids"] == tokenizer(text, truncation=True, max_length=SHORT)["input_ids"]


def test_predictions_of_chunks_are_merged_by_hand():
    cut = [["one", "two"], ["three"]]
    lines = [{"reference": label, "prediction": "?", "scores": {"a": a, "b": b}}
             for label, a, b in [("a", 3, 0), ("a", -1, 1), ("a", -1, -2)]]  # fmt: skip
    merged = chunks.merge_predictions(lines, cut)
    assert [(line["reference"], line["prediction"]) for line in merged] == [("a", "a"), ("a", "a")]
    assert merged[0]["scores"] == {"a": 1, "b": 0.5}
    merged = chunks.merge_predictions([line | {"reference": ["b"]} for line in lines], cut)
    assert [line["prediction"] for line in merged] == [["a", "b"], []]
    with pytest.raises(ValueError):
        chunks.merge_predictions(lines[:2], cut)


# --- baselines


def test_linear_baselines_of_several_labels():
    rows = [{"text": f"{word} of the day", "label": labels} for word, labels in
            [("ship", ["sea"]), ("street", ["town"]), ("ship street", ["sea", "town"]), ("nothing", [])] * 5]  # fmt: skip
    found = baselines.classify(rows, rows[:4], AutoTokenizer.from_pretrained(ROOT), [8])
    assert [sorted(labels) for labels in found["TF-IDF + linear SVM, whole text"]] == [
        row["label"] for row in rows[:4]
    ]


def test_frequent_tags_and_leads_by_hand():
    train = [{"words": ["a", "a", "b"], "tags": ["O", "B-X", "B-Y"]}, {"words": ["a"], "tags": ["B-X"]}]
    made = baselines.tag_tokens(train, [{"words": ["b", "c", "a"]}])
    assert made == {"each word's most frequent tag": [["B-Y", "O", "B-X"]]}
    made = baselines.summarize([{"summary": "one two three"}, {"summary": "one"}], [{"document": "The cat\n\nsat."}])
    assert made == {"lead-2 words": ["The cat"]}


@pytest.mark.slow
def test_two_processes_study_together_and_write_once(command, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "experiments.study"]
    options = command(tmp_path / "out", "--lengths", str(LENGTH), "--baselines")
    done = subprocess.run(
        [sys.executable, *launcher, *options], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 test rows") == 1
    assert read(tmp_path / "out")["systems"]["model, 48 tokens"]["accuracy"]["mean"] > 0.9
