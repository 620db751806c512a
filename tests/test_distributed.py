"""Pre-training with two processes on the CPU: the loss curve and the weights of one process, also after a kill."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")

import torch
import transformers
from packaging.version import Version
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForMaskedLM

from conftest import ROOT
from helpers import CODE, write_repository
from lsg_albert import LSGAlbertForMaskedLM
from pretraining.pretrain_mlm import keep_one_bias, last_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("4.48"),
        reason="the training script needs transformers 4.48 or newer",
    ),
]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
RECIPE = "--max_steps 6 --max_length 40 --learning_rate 1e-2 --warmup_steps 2 --logging_steps 1 --save_steps 2 --eval_tokens 120".split()
SIZES = "--hidden_size 16 --layers 2 --heads 2 --intermediate_size 16 --embedding_size 8 --positions 64".split()
GLOBAL_BATCH = 4
WORDS = "king queen river mountain science music letter garden winter summer house window".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Twelve documents of different lengths, so that batches have different numbers of masked tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": word, "text": f"the {word} and a {word}. " * (1 + i)} for i, word in enumerate(WORDS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.txt").write_text("house\nwindow\nmusic\n")
    return [str(folder / "corpus.jsonl"), "--exclude_ids", str(folder / "held_out.txt")]


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
    batch = ["--per_device_train_batch_size", str(GLOBAL_BATCH // processes // accumulation)]
    batch += ["--gradient_accumulation_steps", str(accumulation)]
    launcher = TORCHRUN if processes > 1 else []
    script = ["-m", "pretraining.pretrain_mlm"]
    return [sys.executable, *launcher, *script, *corpus, *model, "--output_dir", str(output), *RECIPE, *batch]


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
    """Those of the final model, which loads as it is, and brings its own code if it has any."""
    assert {path.name for path in (output / "final").glob("*.py")} in (set(), set(CODE))
    model, report = AutoModelForMaskedLM.from_pretrained(
        output / "final", trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.state_dict()


def assert_same_training(output: Path, expected: Path) -> None:
    """The same curve, weights and evaluation, but for sums in another order.

    Adam turns a gradient near zero, whose sign is rounding, into a whole step; so weights are compared on average, and
    not the biases of keys, which have no gradient: they add the same to all of a query's scores.
    """
    assert len(losses(expected)) == 6
    torch.testing.assert_close(torch.tensor(losses(output)), torch.tensor(losses(expected)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(history(output)["final"], history(expected)["final"], rtol=1e-4, atol=1e-5)
    found, wanted = weights(output), weights(expected)
    assert found.keys() == wanted.keys()
    for name in (name for name in wanted if not name.endswith("key.bias")):
        assert (found[name] - wanted[name]).abs().mean() < 1e-6, name


@pytest.fixture(scope="module")
def one_process(corpus, plain_albert, tmp_path_factory) -> Path:
    """The output of an unbroken run of one process."""
    output = tmp_path_factory.mktemp("one_process")
    run(command(corpus, plain_albert, output, processes=1))
    return output


@pytest.fixture(scope="module")
def one_lsg_process(corpus, lsg_albert, tmp_path_factory) -> Path:
    """The same of an LSG model."""
    output = tmp_path_factory.mktemp("one_lsg_process")
    run(command(corpus, lsg_albert, output, processes=1))
    return output


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one(corpus, plain_albert, one_process, tmp_path, accumulation):
    done = run(command(corpus, plain_albert, tmp_path, processes=2, accumulation=accumulation))
    assert_same_training(tmp_path, one_process)
    assert json.loads(done.stdout) == history(tmp_path)["final"]  # printed once


@pytest.fixture(scope="module")
def two_processes_with_dropout(corpus, plain_albert, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("two_processes")
    run([*command(corpus, plain_albert, output, processes=2), "--dropout", "0.1"])
    return output


def test_two_processes_train_an_lsg_model_as_one(corpus, lsg_albert, one_lsg_process, tmp_path):
    run(command(corpus, lsg_albert, tmp_path, processes=2))
    assert_same_training(tmp_path, one_lsg_process)


# --- kills


@pytest.mark.parametrize(("method", "step"), [("training_step", 5), ("_save_rng_state", 4)])
def test_a_killed_worker_costs_no_step(corpus, plain_albert, two_processes_with_dropout, tmp_path, method, step):
    """The second process is killed in the middle of a step, or before its part of a checkpoint is saved."""
    arguments = [*command(corpus, plain_albert, tmp_path, processes=2), "--dropout", "0.1"]
    script = arguments.index("pretraining.pretrain_mlm") - 1  # after the launcher's -m
    killer = [str(ROOT / "tests" / "killed_worker.py"), method, str(step)]
    killed = subprocess.run(
        [*arguments[:script], *killer, *arguments[script + 1 :]],
        env={**os.environ, **ENVIRONMENT}, cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr and not (tmp_path / "final").exists()
    complete = last_checkpoint(tmp_path)
    assert complete == str(tmp_path / ("checkpoint-4" if method == "training_step" else "checkpoint-2"))
    run(arguments)
    assert losses(tmp_path) == losses(two_processes_with_dropout)
    found, wanted = weights(tmp_path), weights(two_processes_with_dropout)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- FSDP

fsdp = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="of the releases that were tried, only 5.23.0 saves models and optimizers of FSDP's version 2",
)


def fsdp_command(corpus: list[str], model: list[str], output: Path, folder: Path, **settings: object) -> list[str]:
    """The training script as `accelerate launch` runs it with version 2 of FSDP, in two processes."""
    settings = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **settings}
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "use_cpu": True, "num_machines": 1}
    config |= {"num_processes": 2, "mixed_precision": "no", "main_process_port": 0, "fsdp_config": settings}
    (folder / "fsdp.json").write_text(json.dumps(config))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(folder / "fsdp.json")]
    arguments = command(corpus, model, output, processes=2)
    arguments = arguments[arguments.index("pretraining.pretrain_mlm") :]
    return [sys.executable, *launcher, str(ROOT / "tests" / "fsdp_on_cpu.py"), *arguments]


@pytest.fixture(scope="module", params=["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def fsdp_run(request, corpus, plain_albert, tmp_path_factory) -> tuple[list[str], Path]:
    """A command that was run, and its output."""
    folder = tmp_path_factory.mktemp("fsdp")
    arguments = fsdp_command(corpus, plain_albert, folder / "out", folder, fsdp_state_dict_type=request.param)
    run(arguments)
    saved = {"FULL_STATE_DICT": "pytorch_model_fsdp.bin", "SHARDED_STATE_DICT": "pytorch_model_fsdp_0"}
    assert (folder / "out" / "checkpoint-4" / saved[request.param]).exists()  # else it was DDP
    return arguments, folder / "out"


@fsdp
def test_fsdp_trains_as_one_process(fsdp_run, one_process):
    assert_same_training(fsdp_run[1], one_process)


@fsdp
def test_fsdp_resumes(fsdp_run, one_process):
    arguments, output = fsdp_run
    for path in (output / "checkpoint-6" / "complete", output / "history.json"):
        path.unlink()
    shutil.rmtree(output / "final")
    run(arguments)
    assert_same_training(output, one_process)


@fsdp
def test_fsdp_trains_an_lsg_model_as_one_process(corpus, lsg_albert, one_lsg_process, tmp_path):
    run(fsdp_command(corpus, lsg_albert, tmp_path / "out", tmp_path))
    assert_same_training(tmp_path / "out", one_lsg_process)


@fsdp
def test_fsdp_refuses_an_optimizer_of_whole_matrices(corpus, plain_albert, tmp_path):
    arguments = fsdp_command(corpus, plain_albert, tmp_path / "out", tmp_path)
    refused = subprocess.run([*arguments, "--muon"], env={**os.environ, **ENVIRONMENT}, cwd=ROOT, capture_output=True,
        text=True, timeout=200)  # fmt: skip
    assert refused.returncode and "--muon cannot be used with FSDP" in refused.stderr


def test_a_sharded_model_is_saved_with_its_own_code(lsg_albert, tmp_path):
    """Not with PyTorch's, whose `fully_shard` changes its class."""
    model = AutoModelForMaskedLM.from_pretrained(lsg_albert[1], trust_remote_code=True)
    weights = model.state_dict()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        keep_one_bias(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert isinstance(model, FSDPModule)
        model.save_pretrained(tmp_path, state_dict=weights)
    finally:
        distributed.destroy_process_group()
    assert {path.name for path in tmp_path.glob("*.py")} == set(CODE)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LSGAlbertForMaskedLM"]
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_lsg_albert.LSGAlbertForMaskedLM"
