"""Repositories like the root's with small random models, what transformers logged, and code run in a new process."""

import contextlib
import importlib.util
import inspect
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import ModelOutput

from lsg_albert.lsg_compat import CACHE_FIELD

ROOT = Path(__file__).resolve().parent.parent
CODE = [path.name for pattern in ("configuration_*.py", "modeling_*.py", "lsg_*.py") for path in ROOT.glob(pattern)]
TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json")

# Without a terminal a question of "run remote code?" fails, and so does whatever reaches for the network.
_NEW_PROCESS = """
import socket, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(f"reached for the network: {event} {args}")
sys.addaudithook(refuse)
"""


def example(name: str) -> ModuleType:
    """A script of examples/, by its path there without ``.py``, as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What releases of transformers name differently. Newer names come first; older ones are announced as going.


def cache_of(output: ModelOutput) -> Any:
    """The cache in what a model or `generate` returned."""
    return getattr(output, CACHE_FIELD)


def checkpoint_activations(model: PreTrainedModel, **kwargs: Any) -> None:
    """Let a model's layers compute their activations again; keywords are those of `torch.utils.checkpoint`."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model, next(name for name in names if hasattr(model, name)))(kwargs or None)


def checkpointing_arguments(**kwargs: Any) -> dict[str, Any]:
    """The training arguments that ask for the same."""
    known = inspect.signature(TrainingArguments).parameters
    name = next(f"{kind}_checkpointing" for kind in ("activation", "gradient") if f"{kind}_checkpointing" in known)
    return {name: True, **({f"{name}_kwargs": kwargs} if kwargs else {})}


def write_repository(folder: Path, model: PreTrainedModel) -> Path:
    """A repository like the root's: its Python files and tokenizer, and the configuration and weights of `model`."""
    model.save_pretrained(folder)
    for name in (*CODE, *TOKENIZER):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@contextlib.contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """The warnings and errors that transformers and our code log meanwhile."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    # Those of our modules pass on to the root what they log; that of transformers does where `CI` is set.
    library = logging.getLogger("transformers")
    loggers = [logging.getLogger()] if library.propagate else [logging.getLogger(), library]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def run_in_new_process(code: str, *args: object, cwd: Path, modules_cache: Path) -> subprocess.CompletedProcess:
    """Run Python code offline in a process that knows neither this checkout nor this one's copies of the code."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules_cache), "PYTHONSAFEPATH": "1"}
    env.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, "-c", _NEW_PROCESS + code, *map(str, args)],
        cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
