"""The classification script on generated documents, with a small random model and the root's tokenizer."""

import csv
import gzip
import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")
pytest.importorskip("sklearn", reason="the script's metrics and baselines come from it")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from conftest import ROOT
from fine_tuning import UsageError, last_checkpoint
from helpers import example, write_repository
from lsg_albert import LSGAlbertForMaskedLM

SHORT, LONG = 12, 48  # tokens
RECIPE = "--batch-size 4 --lr 1e-2 --log-every 1 --save-every 3 --epochs 4 --patience 0".split()
WORDS = {"sea": "ship river island sailor".split(), "town": "street church window garden".split()}


@pytest.fixture(scope="module")
def script():
    return example("run_classification")


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    """A repository with a small random model that reads 48 tokens, and has dropout."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.05, "attention_probs_dropout_prob": 0.05}
    config = tiny_config(vocab_size=16000, max_position_embeddings=LONG, **dropout)
    folder = tmp_path_factory.mktemp("classification") / "repository"
    return write_repository(folder, LSGAlbertForMaskedLM(config))


def make_rows(number, seed):
    """Documents that begin alike: what their label is shows after the first 12 tokens only."""
    chosen = random.Random(seed)
    start = "nobody knows what this is about and how it will end".split()
    return [
        {"text": " ".join(start + chosen.choices(WORDS[label], k=chosen.randint(12, 40))), "label": label}
        for label in chosen.sample(["sea", "town"] * (number // 2), number)
    ]


TRAIN, TEST = make_rows(36, 1), make_rows(12, 2)


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    files = write_rows(folder / "train.jsonl.gz", TRAIN), write_rows(folder / "test.jsonl", TEST)
    return ["--train-file", files[0], "--test-file", files[1]]


def command(model, data, output, *options):
    return ["--model", str(model), *data, "--output", str(output), *RECIPE, *options]


@pytest.fixture(scope="module")
def finished(script, model, data, tmp_path_factory):
    """The output of an unbroken comparison."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    options = ["--max-length", str(SHORT), str(LONG), "--seeds", "1", "2", "--baseline"]
    assert script.main(command(model, data, output, *options)) == 0
    return output


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder):
    return [entry["loss"] for entry in read_json(folder / "result.json")["history"] if "loss" in entry]


def kill_at(step):
    """A training step that fails as Ctrl-C does, once `step` steps are done."""
    original = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    return training_step


# --- whole runs


def test_the_longer_input_learns_what_the_shorter_one_cannot_see(finished):
    systems = read_json(finished / "results.json")["systems"]
    assert systems["model, 48 tokens"]["accuracy"]["mean"] > 95
    assert systems["model, 12 tokens"]["accuracy"]["mean"] <= 50
    assert systems["TF-IDF + linear SVM, 48 tokens"]["accuracy"]["mean"] == 100
    assert systems["TF-IDF + linear SVM, whole text"]["accuracy"]["mean"] == 100
    assert systems["TF-IDF + linear SVM, 12 tokens"]["accuracy"]["mean"] == 50
    assert systems["most frequent label"]["accuracy"]["mean"] == 50


def test_a_comparison_reports_every_run_and_document(finished, model):
    results = read_json(finished / "results.json")
    assert results["documents"] == {"train": 32, "validation": 4, "test": 12}
    assert results["labels"] == {"sea": 16, "town": 16}
    assert str(model) in results["command"] and results["seeds"] == [1, 2] and len(results["runs"]) == 4
    lines = read_lines(finished / "predictions.jsonl")
    assert [line["label"] for line in lines] == [row["label"] for row in TEST]
    for system, scores in results["systems"].items():
        seeds = scores["accuracy"]["seeds"]
        for seed, value in seeds.items():
            name = system if seed == "-" else f"{system}, seed {seed}"
            assert value == pytest.approx(100 * np.mean([line["label"] == line[name] for line in lines]))
        assert scores["accuracy"]["mean"] == pytest.approx(np.mean([*seeds.values()]))
        if len(seeds) == 2:
            first, second = seeds.values()
            assert scores["accuracy"]["deviation"] == pytest.approx(abs(first - second) / 2**0.5)
    table = (finished / "results.md").read_text()
    assert table.count("| model, ") == 2 and table.count("| TF-IDF") == 3 and "12 test documents of 2 labels" in table
    assert table.count(" CPU") == 4


def test_each_run_scores_its_documents_with_the_model_that_it_saves(finished, script):
    folder = finished / f"length-{LONG}" / "seed-2"
    saved = AutoModelForSequenceClassification.from_pretrained(folder / "final", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    assert saved.config.id2label == {0: "sea", 1: "town"} and saved.config.label2id == {"sea": 0, "town": 1}
    assert saved.config.problem_type == "single_label_classification"
    for line, row in list(zip(read_lines(folder / "predictions.jsonl"), TEST, strict=True))[:4]:
        inputs = tokenizer(row["text"], truncation=True, max_length=LONG, return_tensors="pt")
        scores = saved(**inputs).logits.softmax(-1)[0].tolist()
        assert [line["scores"]["sea"], line["scores"]["town"]] == pytest.approx(scores, abs=1e-5)
        assert line["prediction"] == ("sea" if scores[0] > scores[1] else "town") and line["label"] == row["label"]


def test_the_best_model_of_the_validation_is_kept(finished):
    for folder in finished.glob("length-*/seed-*"):
        result = read_json(folder / "result.json")
        values = {entry["step"]: entry["eval_macro_f1"] for entry in result["history"] if "eval_macro_f1" in entry}
        assert list(values) == [8, 16, 24, 32] and result["steps"] == 32
        assert result["best_step"] == max(values, key=values.get)  # the first of the best
        best, final = (folder / name for name in (f"checkpoint-{result['best_step']}", "final"))
        assert (best / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
        assert not (folder / "final.partial").exists()


@pytest.mark.parametrize("step", [2, 11, 16])
def test_killed_and_resumed_run_equals_an_unbroken_one(
    script, model, data, finished, tmp_path, monkeypatch, step, capsys
):
    """Killed before the first checkpoint, in the middle of the second epoch, and right after one."""
    run = command(model, data, tmp_path, "--max-length", str(LONG), "--seeds", "2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", kill_at(step))
        script.main(run)
    name = f"length-{LONG}/seed-2"
    half = tmp_path / name / "checkpoint-31"  # as a kill in the middle of saving leaves it
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global')
    assert script.main(run) == 0
    whole, broken = finished / name, tmp_path / name
    assert (
        read_json(broken / "result.json")["resumed_from"] == {2: None, 11: "checkpoint-9", 16: "checkpoint-16"}[step]
    )
    assert len(losses(whole)) == 32 and losses(whole) == losses(broken)
    assert (whole / "predictions.jsonl").read_text() == (broken / "predictions.jsonl").read_text()
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (whole, broken)]
    assert weights[0] == weights[1]


def test_finished_runs_are_kept_and_others_added(script, model, data, finished, tmp_path, monkeypatch):
    output = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr(Trainer, "training_step", kill_at(0))
    assert script.main(command(model, data, output, "--max-length", str(LONG), "--seeds", "2", "1")) == 0
    before, after = (read_json(folder / "results.json")["systems"] for folder in (finished, output))
    assert after == {"model, 48 tokens": before["model, 48 tokens"]}
    with pytest.raises(KeyboardInterrupt):
        script.main(command(model, data, output, "--max-length", str(LONG), "--seeds", "3"))


def test_a_folder_of_another_run_is_refused(script, model, data, finished, capsys):
    options = ["--max-length", str(LONG), "--seeds", "2", "--lr", "0.1"]
    assert script.main(command(model, data, finished, *options)) == 1
    assert "lr 0.01, not 0.1" in capsys.readouterr().err


def test_training_stops_when_out_of_patience_and_not_again_when_resumed(script, model, data, tmp_path, monkeypatch):
    options = ["--max-length", str(SHORT), "--patience", "2", "--eval-every", "2", "--epochs", "9", "--lr", "1e-9"]
    run = command(model, data, tmp_path, *options)
    assert script.main(run) == 0
    result = read_json(tmp_path / f"length-{SHORT}" / "seed-1" / "result.json")
    assert result["steps"] == 6 and result["best_step"] == 2  # nothing changes: two more validations, then the end
    (tmp_path / f"length-{SHORT}" / "seed-1" / "result.json").unlink()  # as a kill before the test leaves it
    monkeypatch.setattr(Trainer, "training_step", kill_at(6))
    assert script.main(run) == 0
    again = read_json(tmp_path / f"length-{SHORT}" / "seed-1" / "result.json")
    assert again["steps"] == 6 and again["predictions"] == result["predictions"]


def test_several_labels_at_once(script, model, tmp_path):
    """Whether a document is of the sea, of towns, of both or of neither."""
    chosen = random.Random(3)
    rows = []
    for _ in range(64):
        labels = [label for label in WORDS if chosen.random() < 0.5]
        words = [word for label in labels for word in chosen.choices(WORDS[label], k=8)] + ["nobody"] * 8
        rows.append({"text": " ".join(chosen.sample(words, len(words))), "label": labels})
    files = write_rows(tmp_path / "train.jsonl", rows[:48]), write_rows(tmp_path / "test.jsonl", rows[48:])
    run = command(model, ["--train-file", files[0], "--test-file", files[1]], tmp_path / "out")
    assert (
        script.main(
            [*run, "--baseline", "--class-weights", "--max-length", "32", "--best-by", "micro_f1", "--epochs", "6"]
        )
        == 0
    )
    systems = read_json(tmp_path / "out" / "results.json")["systems"]
    assert set(systems["model, 32 tokens"]) == {"accuracy", "micro_f1", "macro_f1"}
    assert systems["model, 32 tokens"]["micro_f1"]["mean"] > 80
    assert systems["TF-IDF + linear SVM, whole text"]["micro_f1"]["mean"] > 95
    lines = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert [line["label"] for line in lines] == [row["label"] for row in rows[48:]]
    right = [line["label"] == line["model, 32 tokens, seed 1"] for line in lines]
    assert systems["model, 32 tokens"]["accuracy"]["mean"] == pytest.approx(100 * np.mean(right))
    config = read_json(tmp_path / "out" / "length-32" / "seed-1" / "final" / "config.json")
    assert config["problem_type"] == "multi_label_classification"


def test_all_options_together(script, model, data, tmp_path):
    options = ["--validation-file", data[3], "--eval-every", "2", "--limit-validation", "5", "--limit-train", "8"]
    options += ["--limit-test", "3", "--gradient-accumulation", "2", "--bf16", "--gradient-checkpointing"]
    options += ["--class-weights", "--schedule", "cosine", "--seeds", "7", "--warmup", "1", "--best-by", "loss"]
    run = command(model, data, tmp_path, *options)
    assert script.main([*run, "--batch-size", "2", "--epochs", "2"]) == 0
    results = read_json(tmp_path / "results.json")
    assert results["documents"] == {"train": 8, "validation": 5, "test": 3}
    folder = tmp_path / f"length-{LONG}" / "seed-7"  # the model's own length
    assert last_checkpoint(folder)[1]["global_step"] == 4 and results["runs"][0]["seed"] == 7
    assert "loss" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_two_processes_train_together_and_write_once(script, model, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--limit-test", "7", "--baseline", "--batch-size", "2", "--seeds", "1", "2"]
    run = command(model, data, tmp_path / "out", *options)
    done = subprocess.run(
        [*torchrun, str(ROOT / "examples" / "run_classification.py"), *run],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 test documents") == 1
    together = read_json(tmp_path / "out" / "results.json")
    assert together["systems"]["model, 48 tokens"]["accuracy"]["mean"] > 95
    assert [made["steps"] for made in together["runs"]] == [32, 32]
    run[run.index(str(tmp_path / "out"))] = str(tmp_path / "alone")
    assert script.main([*run, "--batch-size", "4"]) == 0  # as many documents a step in one process
    alone = read_json(tmp_path / "alone" / "results.json")
    assert [len(made["history"]) for made in alone["runs"]] == [len(made["history"]) for made in together["runs"]]
    assert len(read_lines(tmp_path / "out" / "predictions.jsonl")) == 7


# --- data


def test_csv_and_json_lines_give_the_same_documents(script, tmp_path):
    rows = [{"body": f'A "quoted",\n text {i}', "kind": i % 3, "id": i} for i in range(9)]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "kind", "body"])
        writer.writeheader()
        writer.writerows(rows)
    fields = ["--text-field", "body", "--label-field", "kind", "--output", "x", "--validation-fraction", "0"]
    found = []
    for path in (write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.csv")):
        documents = script.load_documents(script.parse_args(["--train-file", path, "--test-file", path, *fields]))
        labels = script.find_labels(documents["train"])
        found.append(([(row["text"], labels.encode(row["label"])) for row in documents["train"]], labels))
    assert found[0] == found[1]
    assert found[0][1].names == ["0", "1", "2"] and found[0][0][4] == (rows[4]["body"], 1)


def test_labels_of_the_datasets_library_have_their_names(script, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["sea", "town"])
    several = getattr(datasets, "List", datasets.Sequence)(classes)
    columns = {"text": ["a", "b"], "label": [1, 0], "labels": [[0, 1], []]}
    features = datasets.Features({"text": datasets.Value("string"), "label": classes, "labels": several})
    split = datasets.Dataset.from_dict(columns, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=split, test=split))
    options = ["--dataset", "x", "--output", "y", "--validation-fraction", "0"]
    rows = script.load_documents(script.parse_args(options))
    assert list(rows["train"]) == [{"text": "a", "label": "town"}, {"text": "b", "label": "sea"}]
    rows = script.load_documents(script.parse_args([*options, "--label-field", "labels"]))
    assert [row["label"] for row in rows["test"]] == [["sea", "town"], []]


def test_integers_are_sorted_by_value_and_other_names_by_the_alphabet(script):
    rows = [{"label": label} for label in (10, 9, "-1", 9)]
    assert script.find_labels(rows) == (["-1", "9", "10"], False)
    rows = [{"label": label} for label in (["b"], [], ["c", "a"])]
    labels = script.find_labels(rows)
    assert labels == (["a", "b", "c"], True)
    assert labels.encode(["c", "a"]) == [1.0, 0.0, 1.0] and labels.decode([1, 0, 1]) == ["a", "c"]


def test_split_off_takes_each_labels_share(script):
    rows = [{"text": str(i), "label": "a" if i < 60 else "b" if i < 99 else "c"} for i in range(100)]
    kept, validation = script.split_off(rows, 0.1)
    assert len(validation) == 10 and sorted((row["text"] for row in kept + validation), key=int) == [
        row["text"] for row in rows
    ]
    counts = [sum(row["label"] == label for row in validation) for label in "abc"]
    assert counts == [6, 4, 0]  # the only "c" stays
    assert script.split_off(rows, 0.1) == (kept, validation)
    many = [{"text": str(i), "label": i // 2} for i in range(60)]
    assert len(script.split_off(many, 0.1)[1]) == 6  # although no label has ten documents
    different = [{"text": str(i), "label": [f"{i % 4}", f"{i}"]} for i in range(40)]
    assert len(script.split_off(different, 0.1)[1]) == 4  # although no two lists of labels are equal


def test_batches_hold_similar_lengths_and_every_document_once(script):
    lengths = random.Random(0).choices(range(1, 1000), k=403)
    order = script.shuffled_by_length(lengths, 4, random.Random(1))
    assert sorted(order) == list(range(403))
    assert order == script.shuffled_by_length(lengths, 4, random.Random(1))
    assert order != script.shuffled_by_length(lengths, 4, random.Random(2))
    batches = [[lengths[index] for index in order[start : start + 4]] for start in range(0, 400, 4)]
    assert np.mean([max(batch) - min(batch) for batch in batches]) < 40
    means = [np.mean(batch) for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3  # no drift from short to long


def test_texts_are_cut_where_the_model_stops_reading(script):
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    text = TEST[0]["text"]
    cut = script.cut_texts([text, "a ship"], tokenizer, SHORT)
    assert text.startswith(cut[0]) and cut[1] == "a ship"
    assert tokenizer(cut[0])["input_ids"] == tokenizer(text, truncation=True, max_length=SHORT)["input_ids"]


# --- loss and metrics


def test_label_weights_and_loss_by_hand(script):
    labels = script.Labels(["a", "b", "c"], several=False)
    weights = script.label_weights([0, 0, 0, 1], labels)
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1), 1])  # "c" is of no document
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]])
    loss = script.mean_loss(logits, torch.tensor([0, 1]), weights)
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    by_hand = -(4 / 6 * probabilities[0, 0].log() + 2 * probabilities[1, 1].log()) / 2
    assert loss.item() == pytest.approx(by_hand.item())
    same = script.mean_loss(logits, torch.tensor([0, 1]), torch.ones(3))
    assert same.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).item())


def test_label_weights_and_loss_of_several_labels_by_hand(script):
    labels = script.Labels(["a", "b", "c"], several=True)
    weights = script.label_weights([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], labels)
    assert weights.tolist() == pytest.approx([1 / 3, 3, 1])
    loss = script.mean_loss(torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]), weights)
    yes = [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0.5]
    assert loss.item() == pytest.approx(-(np.log(yes[0]) / 3 + 3 * np.log(yes[1]) + np.log(1 - yes[2])) / 3)


def test_batches_that_make_a_step_train_as_one_batch(script, model, tmp_path, monkeypatch):
    """The gradients of 2 x 2 documents are those of 4, whatever a release of transformers divides them by."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # older releases keep another test's --bf16 there
    weights, grown = [], []
    args = script.parse_args(["--train-file", "x", "--output", "y", "--class-weights"])
    args.seed = 1
    labels = script.Labels(["sea", "town"], several=False)
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    rows = [next(row for row in TRAIN if row["label"] == label) for label in ("sea", "town", "town", "town")]
    examples = {"train": script.Documents(rows, labels, tokenizer, LONG), "validation": ()}
    for size in (4, 2):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(size)), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True,
            remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = script.build_trainer(args, arguments, examples, labels, tokenizer, model)
        trainer.model.config.attention_probs_dropout_prob = 0.0
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = trainer.model.classifier.weight.detach().clone()
        trainer.train()
        weights.append(trainer.model.classifier.weight.detach())
        grown.append((weights[-1] - before).abs().max().item())
    assert min(grown) > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_metrics_by_hand(script):
    """Of "a": 2 of 3 found and 2 of 3 right; of "b": 1 of 2 and 1 of 2, and none of "c"."""
    scores = script.score(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0]))
    f1 = [2 * 2 / (3 + 4), 2 * 1 / (2 + 2), 0]
    assert scores == pytest.approx({"accuracy": 50, "macro_f1": 100 * np.mean(f1)})


def test_metrics_of_several_labels_by_hand(script):
    encoded = np.array([[1, 0], [1, 1], [0, 0]])
    predicted = script.decide(np.array([[3.0, -1.0], [2.0, -2.0], [0.1, -0.1]]), several=True)
    assert predicted.tolist() == [[1, 0], [1, 0], [1, 0]]
    scores = script.score(encoded, predicted)
    expected = {"accuracy": 100 / 3, "micro_f1": 100 * 4 / 6, "macro_f1": 100 * (0.8 + 0) / 2}
    assert scores == pytest.approx(expected)


def test_patience_counts_validations_after_the_first_best(script):
    history = [{"eval_loss": 3, "eval_accuracy": 1}, {"loss": 9}, {"eval_loss": 2, "eval_accuracy": 5}]
    history += [{"eval_loss": 1, "eval_accuracy": 5}]
    assert script.evaluations_since_best(history, "loss") == 0
    assert script.evaluations_since_best(history, "accuracy") == 1
    assert script.evaluations_since_best([{"loss": 1}], "accuracy") == 0


# --- what cannot be


BAD_FILES = {
    "no such file": None,
    "the train data is empty": "",
    "line 1: not JSON": "{",
    'line 1: no text in a field "text"': '{"text": 5, "label": "a"}\n',
    'line 2: no label (a string, an integer, or a list of these) in a field "label"': json.dumps(TRAIN[0]) + '\n{"text": "a", "label": null}\n',
    "a label has to be a string or an integer, not 0.5": '{"text": "a", "label": [0.5]}\n' * 20,
    "at least 2 different labels": '{"text": "a", "label": ["x"]}\n' * 20,
    "--validation-fraction 0.1 of 2 documents is none": "".join(json.dumps(row) + "\n" for row in TRAIN[:2]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_FILES)
def test_unusable_files_are_named_in_one_line(script, model, tmp_path, capsys, message):
    path = tmp_path / "bad.jsonl"
    if BAD_FILES[message] is not None:
        path.write_text(BAD_FILES[message])
    assert script.main(command(model, ["--train-file", str(path), "--test-file", str(path)], tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "12", "49"], "--max-length 49 is more than the model's 48 positions"),
        (["--max-length", "2"], "--max-length 2 leaves no room for text"),
        (["--best-by", "micro_f1"], "--best-by micro_f1 is for lists of labels"),
        (["--model", "/nowhere"], "cannot load /nowhere"),
        (["--validation-file", "/nowhere"], "no such file: /nowhere"),
    ],
)
def test_impossible_options_are_refused_in_one_line(script, model, data, tmp_path, capsys, options, message):
    assert script.main(command(model, data, tmp_path, *options)) == 1
    *before, last = capsys.readouterr().err.splitlines()
    assert message in last and last.startswith("run_classification: ") and "Traceback" not in "".join(before)


def test_test_data_is_needed(script, model, data, tmp_path, capsys):
    assert script.main(command(model, data[:2], tmp_path / "out")) == 1
    assert "no test data: --test-file is needed" in capsys.readouterr().err


def test_labels_without_a_document_to_train_on_are_told(script, model, data, tmp_path, capsys):
    test = write_rows(tmp_path / "test.jsonl", [{"text": "a", "label": "sky"}, TEST[0]])
    run = command(model, [*data[:2], "--test-file", test], tmp_path / "out", "--steps", "1", "--limit-train", "8")
    assert script.main(run) == 0
    assert "no document to train on has the labels ['sky']" in capsys.readouterr().err


def test_lists_and_single_labels_do_not_mix(script):
    with pytest.raises(UsageError, match="others a single one, such as 'a'"):
        script.find_labels([{"label": ["a", "b"]}, {"label": "a"}])
