"""Pre-training with two processes on the CPU: the loss curve and the weights of one process, also after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor

from conftest import ROOT
from helpers import write_repository
from lsg_albert import LSGAlbertForMaskedLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("4.48"),
        reason="the training script needs transformers 4.48 or newer",
    ),
]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
RECIPE = "--steps 6 --max-length 40 --lr 1e-2 --warmup 2 --log-every 1 --save-every 2 --eval-tokens 120".split()
SIZES = "--hidden-size 16 --layers 2 --heads 2 --intermediate-size 16 --embedding-size 8 --positions 64".split()
GLOBAL_BATCH = 4
WORDS = "king queen river mountain science music letter garden winter summer house window".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Twelve documents of different lengths, so that batches have different numbers of masked tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": word, "text": f"the {word} and a {word}. " * (1 + i)} for i, word in enumerate(WORDS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.txt").write_text("house\nwindow\nmusic\n")
    return [str(folder / "corpus.jsonl"), "--exclude-ids", str(folder / "held_out.txt")]


@pytest.fixture(scope="module")
def plain_albert() -> list[str]:
    return [*SIZES, "--tokenizer", str(ROOT)]


@pytest.fixture(scope="module")
def lsg_albert(tiny_config, tmp_path_factory) -> list[str]:
    """A repository with a small model, whose code is run from there; 40 tokens are five of its blocks."""
    torch.manual_seed(0)
    model = LSGAlbertForMaskedLM(tiny_config(vocab_size=16000, max_position_embeddings=64))
    return ["--model", str(write_repository(tmp_path_factory.mktemp("model") / "repository", model))]


def command(corpus: list[str], model: list[str], output: Path, processes: int, accumulation: int = 1) -> list[str]:
    """The training script, with the same number of samples in a step however they are spread."""
    batch = ["--batch-size", str(GLOBAL_BATCH // processes // accumulation)]
    batch += ["--gradient-accumulation", str(accumulation)]
    launcher = TORCHRUN if processes > 1 else []
    script = ["-m", "pretraining.pretrain_mlm"]
    return [sys.executable, *launcher, *script, *corpus, *model, "--output", str(output), *RECIPE, *batch]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def history(output: Path) -> dict:
    return json.loads((output / "history.json").read_text())


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in history(output)["history"] if "loss" in entry]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "final" / "model.safetensors")


def assert_same_training(output: Path, expected: Path) -> None:
    """The same curve, weights and evaluation, but for sums in another order.

    Adam turns a gradient near zero, whose sign is rounding, into a whole step; so weights are compared on average.
    """
    assert len(losses(expected)) == 6
    torch.testing.assert_close(torch.tensor(losses(output)), torch.tensor(losses(expected)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(history(output)["final"], history(expected)["final"], rtol=1e-4, atol=1e-5)
    found, wanted = weights(output), weights(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).abs().mean() < 1e-6, name


@pytest.fixture(scope="module")
def one_process(corpus, plain_albert, tmp_path_factory) -> Path:
    """The output of an unbroken run of one process."""
    output = tmp_path_factory.mktemp("one_process")
    run(command(corpus, plain_albert, output, processes=1))
    return output


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one(corpus, plain_albert, one_process, tmp_path, accumulation):
    done = run(command(corpus, plain_albert, tmp_path, processes=2, accumulation=accumulation))
    assert_same_training(tmp_path, one_process)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    assert [json.loads(line) for line in lines] == [history(one_process)["final"]]


def test_two_processes_train_an_lsg_model_as_one(corpus, lsg_albert, tmp_path):
    for processes in (1, 2):
        run(command(corpus, lsg_albert, tmp_path / str(processes), processes))
    assert_same_training(tmp_path / "2", tmp_path / "1")
