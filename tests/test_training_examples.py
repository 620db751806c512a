"""The four examples that a user copies: whole runs, kills, and what they read, with small models and the root's tokenizer."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")
pytest.importorskip("sklearn", reason="the training examples score by it")
pytest.importorskip("rouge_score", reason="summarize.py scores by it")

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from conftest import ROOT
from helpers import example, write_repository
from lsg_albert import LSGAlbertForConditionalGeneration, LSGAlbertForMaskedLM

EXAMPLES = ("classify", "tag_tokens", "answer_questions", "summarize")
LENGTH = 48  # tokens that the small models read
RECIPE = (
    "--num_train_epochs 4 --learning_rate 1e-2 --logging_steps 1 --patience 9 --disable_tqdm true "
    "--dataloader_pin_memory false --use_cpu true"
).split()
OPTIONS = {"summarize": "--max_target_length 12 --beams 2".split()}
WORDS = {"sea": "ship river island sailor".split(), "town": "street church window garden".split()}

scripts = {name: example(name) for name in EXAMPLES}


def document(rng: random.Random, label: str) -> list[str]:
    """Words that begin alike: what they are about shows after the first 12 tokens only."""
    return "nobody knows what this is about and how it will end".split() + rng.choices(
        WORDS[label], k=rng.randint(12, 30)
    )


def make_row(name: str, rng: random.Random, label: str) -> dict:
    words = document(rng, label)
    text, answer = " ".join(words), words[-1]
    return {
        "classify": {"text": text, "label": label},
        "tag_tokens": {"tokens": words, "tags": [f"B-{label}" if word in WORDS[label] else "O" for word in words]},
        "answer_questions": {
            "context": text,
            "qas": [{"question": "which?", "answers": [{"text": answer, "answer_start": text.index(answer)}]}],
        },
        "summarize": {"document": text, "summary": f"the {label} ."},
    }[name]


def make_rows(name: str, number: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [make_row(name, rng, label) for label in rng.sample(["sea", "town"] * (number // 2), number)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def models(tiny_config, tmp_path_factory):
    """By the example's name, a repository with a small random model with dropout."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=16000, max_position_embeddings=LENGTH, hidden_dropout_prob=0.05)
    folder = tmp_path_factory.mktemp("models")
    encoder = write_repository(folder / "encoder", LSGAlbertForMaskedLM(config))
    seq2seq = write_repository(folder / "seq2seq", LSGAlbertForConditionalGeneration(config))
    return {name: seq2seq if name == "summarize" else encoder for name in EXAMPLES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """By the example's name, the options for 36 rows to train on and 12 to test on."""
    folder = tmp_path_factory.mktemp("data")
    files = {}
    for name in EXAMPLES:
        train = write_rows(folder / f"{name}-train.jsonl.gz", make_rows(name, 36, 1))
        test = write_rows(folder / f"{name}-test.jsonl", make_rows(name, 12, 2))
        files[name] = ["--train", str(train), "--test", str(test)]
    return files


@pytest.fixture(scope="module")
def command(models, data):
    """What to call an example with, after its name and an output folder."""

    def make(name: str, output: Path, *options: str) -> list[str]:
        arguments = ["--model", str(models[name]), *data[name], "--output_dir", str(output)]
        return [*arguments, *RECIPE, *OPTIONS.get(name, []), *options]

    return make


def history(output: Path) -> list[dict]:
    """What was logged, by the newest checkpoint."""
    texts = [path.read_text() for path in output.glob("checkpoint-*/trainer_state.json")]
    states = [json.loads(text) for text in texts if text.endswith("}\n")]
    return max(states, key=lambda state: state["global_step"])["log_history"]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in history(output) if "loss" in entry]


def results(output: Path) -> dict[str, float]:
    """The scores of the test rows, without what was measured in seconds."""
    found = json.loads((output / "test_results.json").read_text())
    return {name: value for name, value in found.items() if "second" not in name and "runtime" not in name}


def predictions(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


def kill_at(step: int):
    """A training step that fails as Ctrl-C does, once `step` steps are done."""
    original = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    return training_step


# --- whole runs


@pytest.fixture(scope="module", params=EXAMPLES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def finished(name, command, tmp_path_factory):
    """The output of an unbroken run."""
    output = tmp_path_factory.mktemp("runs") / name
    scripts[name].main(command(name, output))
    return output


def test_a_run_scores_its_predictions(name, finished):
    found = results(finished)
    lines = predictions(finished)
    assert len(lines) == 12 and all({"reference", "prediction"} <= set(line) for line in lines)
    assert len(losses(finished)) == 4 * 8  # of 32 rows, 4 a step
    if name == "classify":
        right = np.mean([line["reference"] == line["prediction"] for line in lines])
        assert found["test_accuracy"] == pytest.approx(right) and right > 0.9
        assert all(line["prediction"] == max(line["scores"], key=line["scores"].get) for line in lines)
    else:
        pairs = [[line[side] for line in lines] for side in ("reference", "prediction")]
        scores = scripts[name].scores(*pairs)
        assert {f"test_{key}": value for key, value in scores.items()}.items() <= found.items()
        assert name != "tag_tokens" or scores["f1"] > 0.9


def test_a_killed_and_resumed_run_equals_an_unbroken_one(name, command, finished, tmp_path, monkeypatch, capsys):
    """Killed in the middle of the second epoch, and once more in the midst of saving."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", kill_at(11))
        scripts[name].main(command(name, tmp_path))
    for step, state in ((10, None), (11, '{\n  "best_metric": 1.0,\n  "glob')):  # as kills while it saves leave them
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    scripts[name].main(command(name, tmp_path))
    assert "resuming from step 8\n" in capsys.readouterr().out
    assert losses(tmp_path) == losses(finished)
    assert results(tmp_path) == results(finished) and predictions(tmp_path) == predictions(finished)


def test_a_finished_run_is_left_alone(name, command, finished, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "training_step", kill_at(0))
    scripts[name].main(command(name, finished))
    assert f"already done: {finished}" in capsys.readouterr().out


def test_the_saved_model_is_the_best_one(name, finished):
    """By its own code, whatever a release of transformers calls the weights in a file."""
    state = json.loads(
        max(finished.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime).read_text()
    )
    auto = getattr(scripts[name].transformers, {
        "classify": "AutoModelForSequenceClassification", "tag_tokens": "AutoModelForTokenClassification",
        "answer_questions": "AutoModelForQuestionAnswering", "summarize": "AutoModelForSeq2SeqLM",
    }[name])  # fmt: skip
    final, best = (
        auto.from_pretrained(folder, trust_remote_code=True).state_dict()
        for folder in (finished, state["best_model_checkpoint"])
    )
    assert all(torch.equal(final[key], best[key]) for key in best)
    assert AutoTokenizer.from_pretrained(finished).mask_token_id == 4
    assert json.loads((finished / "config.json").read_text()).get("use_cache", True)


def test_the_best_model_is_not_the_last_one(command, tmp_path):
    """Choosing the highest loss, so that the best epoch is an early one."""
    worst = ["--metric_for_best_model", "loss", "--greater_is_better", "true"]
    scripts["classify"].main(command("classify", tmp_path, *worst))
    losses = {entry["step"]: entry["eval_loss"] for entry in history(tmp_path) if "eval_loss" in entry}
    chosen = max(losses, key=losses.get)
    assert chosen < max(losses)
    load = AutoModelForSequenceClassification.from_pretrained
    final, best = (
        load(folder, trust_remote_code=True).state_dict() for folder in (tmp_path, tmp_path / f"checkpoint-{chosen}")
    )
    assert all(torch.equal(final[key], best[key]) for key in best)


@pytest.mark.parametrize("pieces", [False, True])
def test_words_beyond_the_length_are_missed_or_read_in_pieces(command, tmp_path, capsys, pieces):
    options = ["--max_length", "16", *["--pieces"] * pieces]
    scripts["tag_tokens"].main(command("tag_tokens", tmp_path, *options))
    beyond = [tag for line in predictions(tmp_path) for tag in line["prediction"][14:]]  # 16 with [CLS] and [SEP]
    assert len(beyond) > 50 and (set(beyond) == {"O"}) == (not pieces)
    found = results(tmp_path)
    assert (found["test_recall"] > 0.9) == pieces
    texts = int(re.search(r"32 rows to train on, as (\d+) texts", capsys.readouterr().out)[1])
    assert (texts == 32) == (not pieces)


def test_answers_beyond_the_length_are_not_trained_on_and_count_as_missed(command, tmp_path, capsys):
    options = ["--max_length", "20", "--max_steps", "2"]
    scripts["answer_questions"].main(command("answer_questions", tmp_path, *options))
    used, of = map(int, re.search(r"(\d+) of (\d+) questions", capsys.readouterr().out).groups())
    assert 0 < used < of == 32
    with pytest.raises(SystemExit, match="raise --max_length"):  # with all answers beyond
        scripts["answer_questions"].main(command("answer_questions", tmp_path / "none", "--max_length", "8"))
    assert all(len(line["prediction"].split()) <= 16 for line in predictions(tmp_path))


def test_training_stops_when_out_of_patience_and_one_class_for_all_is_told(command, tmp_path, capsys):
    """Of texts that are all cut after their first word, which is the same."""
    options = "--patience 2 --learning_rate 1e-12 --num_train_epochs 9 --metric_for_best_model accuracy --max_length 3"
    scripts["classify"].main(command("classify", tmp_path, *options.split()))
    assert len([entry for entry in history(tmp_path) if "eval_loss" in entry]) == 3  # the first, and two no better
    (label,) = {line["prediction"] for line in predictions(tmp_path)}
    assert f"warning: the model predicts '{label}' for every text" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES, ids=str)
def test_help_shows_the_row_and_every_default(name, capsys):
    with pytest.raises(SystemExit):
        scripts[name].main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert {"classify": '"label": ["weather", "sport"]', "tag_tokens": '"tags": ["B-PER", "I-PER", "O"]',
            "answer_questions": '"answer_start": 13', "summarize": '"summary": "A short one."'}[name] in text  # fmt: skip
    parser = scripts[name].HfArgumentParser(scripts[name].Options)
    assert all(action.help for action in parser._actions)
    assert "--max_length" in text and "(default: 3)" in text


@pytest.mark.parametrize("name", EXAMPLES, ids=str)
def test_documented_commands_name_options_that_exist(name):
    parser = scripts[name].HfArgumentParser(
        (scripts[name].Options, scripts[name].transformers.Seq2SeqTrainingArguments)
    )
    lines = re.findall(rf"python examples/{name}\.py ((?:.*\\\n)*.*)", scripts[name].__doc__)
    assert len(lines) == 2
    for line in lines:
        parser.parse_args_into_dataclasses([*line.replace("\\\n", " ").split(), "--use_cpu"])


def test_what_the_examples_share_is_the_same_in_all():
    """They stand alone, so that each has a copy; these must not drift apart."""
    texts = [(ROOT / "examples" / f"{name}.py").read_text() for name in EXAMPLES]
    blocks = [
        re.search(r"    # Before 4\.48.*?save_pretrained\(output\)\n", text, re.DOTALL).group() for text in texts
    ]
    blocks += [re.search(r"    states = output.*?print\(f\"resuming.*?\n", text, re.DOTALL).group() for text in texts]
    assert len(set(blocks)) == 2
    readers = [
        re.search(r"    with fsspec.open.*?for row in table\)\n", text, re.DOTALL).group()
        for text in (texts[0], texts[3])
    ]
    assert readers[0] == readers[1]
    assert not any(
        re.search(r"^(from|import) (examples|classify|tag_tokens|answer_q|summarize)", text, re.M) for text in texts
    )


def is_whole(path):
    """Whether a JSON file is there to its end: the Trainer does not write it at once."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


SIGNALS = {"classify": signal.SIGINT, "tag_tokens": signal.SIGKILL}  # Ctrl-C, and a kill that nothing can catch


def stop_by_signal(arguments: list[str], output: Path, number: int) -> tuple[int, str]:
    """Start a run in a process, and send the signal after its first epoch: its exit status and what it wrote of errors."""
    process = subprocess.Popen(
        arguments, cwd=output.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # processes in the background ignore it
    )  # fmt: skip
    while not is_whole(output / "checkpoint-8" / "trainer_state.json"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    printed = process.communicate(timeout=120)[1]
    return process.returncode, printed


@pytest.mark.slow
def test_a_stopped_run_goes_on_in_a_new_process(name, command, finished, tmp_path, monkeypatch):
    """Each example in another directory than its own, to the same result as an unbroken run in this process."""
    output = tmp_path / "out"
    arguments = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *command(name, output)]
    if name in SIGNALS:
        status, printed = stop_by_signal(arguments, output, SIGNALS[name])
        if name == "classify":
            assert status == 1 and "Traceback" not in printed
            assert printed.endswith("\nstopped: run the same command again to resume from the last checkpoint\n")
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "training_step", kill_at(11))
            scripts[name].main(command(name, output))
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    assert losses(output) == losses(finished) and predictions(output) == predictions(finished)


TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classify", "summarize"])
def test_two_processes_predict_each_row_once(name, command, tmp_path):
    """Batches of 5 for each process do not divide the 12 rows, so the last ones are filled up."""
    options = [*command(name, tmp_path / "out"), "--max_steps", "1", "--per_device_eval_batch_size", "5"]
    arguments = [*TWO_PROCESSES, str(ROOT / "examples" / f"{name}.py"), *options]
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(predictions(tmp_path / "out")) == 12


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="before, the Trainer cannot resume in several processes on CPUs, which Accelerate numbers",
)
def test_two_processes_resume_with_the_same_losses(command, tmp_path):
    options = [*command("tag_tokens", tmp_path / "out"), "--per_device_train_batch_size", "2"]
    arguments = [*TWO_PROCESSES, str(ROOT / "examples" / "tag_tokens.py"), *options]
    curves = []
    for _ in range(2):
        done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        curves.append(losses(tmp_path / "out"))
        (tmp_path / "out" / "test_results.json").unlink()
        shutil.rmtree(tmp_path / "out" / "checkpoint-32")
    assert "resuming from step 24\n" in done.stdout
    assert len(curves[0]) == 32 and curves[0] == curves[1]
