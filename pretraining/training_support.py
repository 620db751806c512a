"""Helpers for pre-training and the studies: files are written as a whole, and only complete checkpoints are used."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is never half written, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # each process has its own name
    partial.write_bytes(content)
    os.replace(partial, path)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files as they are, because transformers 5 would save them without ``spiece.model``."""
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_same_run(output: Path, arguments: dict) -> None:
    """Store the arguments of the run in a folder, so that runs with other arguments are not mixed with it.

    Raises:
        ValueError: the folder holds a run with other arguments.
    """
    path, given = output / "arguments.json", json.loads(json.dumps(arguments, default=str))
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else given
    other = [f"{name} {before.get(name)}, not {given[name]}" for name in given if given[name] != before.get(name)]
    if other:
        raise ValueError(f"{output} holds a run with other arguments: {'; '.join(other)}")
    write_atomically(path, (json.dumps(given, indent=1) + "\n").encode())


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once every process has saved its part: the Trainer itself does not wait for the others."""

    def on_save(self, args, state, control, **kwargs):
        from accelerate import PartialState  # imported here, as only training needs it

        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            Path(args.output_dir, f"checkpoint-{state.global_step}", "complete").touch()


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that `MarkComplete` has marked, or None."""
    found = [path.parent for path in output.glob("checkpoint-*/complete")]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


class Arguments(TrainingArguments):
    """Training arguments whose CPU device has no number. With several processes, Accelerate numbers CPUs too. Until
    5.0 at least, the Trainer resumes with such a device, which PyTorch cannot load tensors on."""

    @property
    def device(self) -> torch.device:
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def describe_machine() -> dict[str, str]:
    """The device, and the versions of the libraries."""
    cpu = f"{platform.machine()} CPU with {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"transformers": transformers.__version__, "torch": torch.__version__, "on": device}
