"""The scripts of examples/ with two processes on the CPU: the loss curve of one process, also after a kill."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")
pytest.importorskip("sklearn", reason="examples/run_classification.py scores by it")
pytest.importorskip("rouge_score", reason="examples/run_summarization.py scores by it")

import torch
import transformers
from packaging.version import Version

from conftest import ROOT
from helpers import write_repository
from lsg_albert import LSGAlbertForConditionalGeneration, LSGAlbertForMaskedLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("4.48"),
        reason="older releases of transformers do not count the tokens of a step",
    ),
]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
}
RECIPE = "--lr 1e-2 --log-every 1 --save-every 2 --eval-batch-size 2 --steps 6".split()
GLOBAL_BATCH = 4
WORDS = "king queen river mountain science music letter garden".split()


def text(index: int) -> list[str]:
    """Documents of different lengths, so that the processes have different numbers of tokens."""
    return ["the", *random.Random(index).choices(WORDS, k=4 + 3 * index), "."]


def question(words: list[str]) -> dict:
    context = " ".join(words)
    start = context.index(words[3])
    return {
        "id": context,
        "context": context,
        "question": "what is old ?",
        "answers": {"text": [words[3]], "answer_start": [start]},
    }


ROWS = {
    "run_classification": lambda words: {"text": " ".join(words), "label": len(words) % 2},
    "run_token_classification": lambda words: {
        "tokens": words,
        "tags": ["B-KING" if word == "king" else "O" for word in words],
    },
    "run_question_answering": question,
    "run_summarization": lambda words: {"document": " ".join(words), "summary": " ".join(words[:: len(words) // 3])},
}
OPTIONS = {
    "run_classification": ["--validation-fraction", "0"],
    "run_question_answering": ["--rows", "questions"],
    "run_summarization": ["--max-target-length", "12", "--label-smoothing", "0.1"],
}


@pytest.fixture(scope="module", params=ROWS)
def script(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def options(script, tiny_config, tmp_path_factory) -> list[str]:
    """Eight documents, two steps an epoch, and a small random model."""
    folder = tmp_path_factory.mktemp(script)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=16000, max_position_embeddings=64, classifier_dropout_prob=0.0)
    model_class = LSGAlbertForConditionalGeneration if script == "run_summarization" else LSGAlbertForMaskedLM
    model = write_repository(folder / "repository", model_class(config))
    rows = [ROWS[script](text(index)) for index in range(8)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--train-file", str(path), "--test-file", str(path), "--limit-test", "3"]
    return ["--model", str(model), *files, *RECIPE, *OPTIONS.get(script, [])]


def run(launcher: list[str], script: str, options: list[str], output: Path) -> subprocess.CompletedProcess:
    """Run the script, or a program of the launcher that runs it, with as many documents in a step in any case."""
    batch = GLOBAL_BATCH // (2 if launcher else 1)
    launcher = launcher if launcher[-1:] == [script] else [*launcher, str(ROOT / "examples" / f"{script}.py")]
    arguments = [sys.executable, *launcher, *options, "--batch-size", str(batch), "--output", str(output)]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)


def losses(output: Path) -> list[float]:
    """Those of each step, as the last checkpoint of the run has them."""
    (state,) = output.glob("**/checkpoint-6/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def test_two_processes_train_as_one_and_resume(script, options, tmp_path):
    """The second process is killed in the sixth step of the run that is resumed."""
    alone = run([], script, options, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    killer = [str(ROOT / "tests" / "killed_worker.py"), "training_step", "5", script]
    killed = run([*TORCHRUN, *killer], script, options, tmp_path / "together")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    resumed = run(TORCHRUN, script, options, tmp_path / "together")
    assert resumed.returncode == 0, resumed.stderr
    assert '"resumed_from": "checkpoint-4"' in (tmp_path / "together" / "results.json").read_text()
    curve = losses(tmp_path / "together")
    assert len(curve) == 6 and curve[0] != curve[-1]
    # Losses are rounded to 1e-4, and Adam turns a gradient near zero, whose sign is rounding, into a whole step of 1e-2.
    assert curve == pytest.approx(losses(tmp_path / "alone"), rel=1e-3, abs=1e-3)
