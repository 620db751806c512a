"""The process of one contestant. It builds the model, checks its outputs, and measures single calls."""

import contextlib
import ctypes
import gc
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.utils import ModelOutput, logging

from benchmarks.cases import INFERENCE, Case, Size
from benchmarks.contestants import WrongOutput, find_contestant
from lsg_albert.lsg_compat import cached

LABELLED = 0.15  # the share of tokens in the masked-LM loss
IGNORED = -100
CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the second until 5.23
WORDS = "the river flows from mountains into sea ships go up down on it towns lie both sides".split()
FIRST_WORD = 5  # smaller ids are special tokens in some of the models
MEMORY_RESERVE = 2**29  # bytes that a case leaves for the rest of the machine


@dataclass(frozen=True)
class Setup:
    """The settings of a worker: the contestant's name, the sizes, the longest input in tokens, and the threads."""

    contestant: str
    size: Size
    positions: int
    threads: int


@dataclass(frozen=True)
class Call:
    """One call of the model: its time in seconds, its peak memory and its cache (see `Result`)."""

    seconds: float
    peak_bytes: int | None
    weights_bytes: int
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Failure:
    """The answer of a worker if a request fails."""

    error: str


def make_inputs(case: Case, size: Size, takes: str = "input_ids") -> dict[str, Any]:
    """Random inputs of a case, the same for every contestant, on the case's device.

    Args:
        case: the lengths of the documents, the mode (training has labels, "generate" has its options) and the device.
        size: the vocabulary and the width of the embeddings.
        takes: see `Contestant`.

    Returns:
        The keyword arguments of the model. There is a mask only if the documents differ in length.
    """
    generator = torch.Generator().manual_seed(0)
    if takes == "texts":
        return {"texts": [make_text(length, generator) for length in case.lengths]}
    if takes == "embeddings":
        batch, length = case.shape
        embeddings = torch.randn(batch * length, size.embedding, generator=generator)
        embeddings = embeddings.to(case.device, getattr(torch, case.dtype))
        # In a model the embeddings have a gradient.
        return {"embeddings": embeddings.requires_grad_(case.mode not in INFERENCE)}
    input_ids = torch.randint(FIRST_WORD, size.vocabulary, case.shape, generator=generator)
    real = torch.arange(case.shape[1]) < torch.tensor(case.lengths)[:, None]
    inputs = {"input_ids": input_ids.masked_fill(~real, 0)}
    if not real.all():
        inputs["attention_mask"] = real.long()
    if case.mode in ("training", "checkpointed"):
        labelled = (torch.rand(case.shape, generator=generator) < LABELLED) & real
        labelled[:, 0] = True  # otherwise, a tiny input may have no label
        inputs["labels"] = input_ids.masked_fill(~labelled, IGNORED)
    inputs = {name: tensor.to(case.device) for name, tensor in inputs.items()}
    return inputs | generation_options(case) if case.mode == "generate" else inputs


def make_text(length: int, generator: torch.Generator) -> str:
    """A text of `length` tokens of a BERT: random words of one token each, without the two special tokens."""
    words = torch.randint(len(WORDS), (max(1, length - 2),), generator=generator)
    return " ".join(WORDS[i] for i in words)


def generation_options(case: Case) -> dict[str, Any]:
    """The arguments of `generate` for exactly `new_tokens` tokens: greedy, or with beams."""
    exactly = {"min_new_tokens": case.new_tokens, "max_new_tokens": case.new_tokens}
    return {**exactly, "num_beams": case.beams, "do_sample": False, "return_dict_in_generate": True}


def make_model(setup: Setup, case: Case) -> nn.Module:
    """The contestant's model, with random weights of the case's dtype, on its device, in its mode."""
    contestant = find_contestant(setup.contestant)
    torch.manual_seed(0)
    size = setup.size if case.layers is None else replace(setup.size, layers=case.layers)
    model = contestant.make(size, setup.positions, "training" if case.mode == "checkpointed" else case.mode)
    model = model.to(case.device, getattr(torch, case.dtype)).train(case.mode not in INFERENCE)
    if case.mode == "checkpointed":
        name = next(name for name in CHECKPOINTING if hasattr(model, name))
        getattr(model, name)({"use_reentrant": False})
    if contestant.compiled:
        model.compile(dynamic=False)  # for this shape, as in a training with one shape
    return model


def run_model(model: nn.Module, inputs: dict[str, Any], mode: str) -> Tensor | ModelOutput:
    """The timed call. Returns the states (batch, length, hidden), the loss after its backward pass, what `generate`
    returns, or the vectors (texts, dim) of "embed"."""
    if mode == "generate":
        return model.generate(**inputs)
    if mode == "embed":
        return model(**inputs)
    if mode == "forward":
        with torch.no_grad():
            return model(**inputs).last_hidden_state
    loss = loss_of_states(model, inputs) if mode == "backward" else model(**inputs).loss
    loss.backward()
    return loss.detach()


def loss_of_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A loss for the backward pass: a fixed projection of all real tokens' states, averaged."""
    states = model(**inputs).last_hidden_state
    if "attention_mask" in inputs:
        states = states[inputs["attention_mask"].bool()]
    return (states @ torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype, device=states.device)).mean()


def clear_gradients(model: nn.Module, inputs: dict[str, Any]) -> None:
    model.zero_grad(set_to_none=True)
    if "embeddings" in inputs:
        inputs["embeddings"].grad = None


def check_outputs(
    output: Tensor | ModelOutput, model: nn.Module, inputs: dict[str, Any], mode: str, size: Size
) -> None:
    """Raise `WrongOutput` unless the output and all gradients are finite and the output has the right shape."""
    if mode == "generate":
        check_generated(output.sequences, model, inputs)
        return
    if mode == "embed":
        if output.ndim != 2 or len(output) != len(inputs["texts"]) or not output.isfinite().all():
            raise WrongOutput(f"{len(inputs['texts'])} texts gave no finite vectors, but {tuple(output.shape)}")
        return
    shape = (*next(iter(inputs.values())).shape[: 2 if "input_ids" in inputs else 1], size.hidden)
    if mode == "forward" and output.shape != shape:
        raise WrongOutput(f"the output has the shape {tuple(output.shape)}, not {shape}")
    if not output.isfinite().all():
        raise WrongOutput("the output is not finite")
    if mode not in INFERENCE:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if not gradients:
            raise WrongOutput("no parameter has a gradient")
        wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if wrong:
            raise WrongOutput(f"gradients that are not finite: {', '.join(wrong[:3])}")


@torch.no_grad()
def check_generated(sequences: Tensor, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Raise `WrongOutput` unless all tokens were generated (batch, 1 + new tokens), from finite scores.

    The scores are computed without a cache. So without beams, each token must have the best of them, up to rounding.
    """
    shape = (len(inputs["input_ids"]), 1 + inputs["max_new_tokens"])
    if sequences.shape != shape:
        raise WrongOutput(f"the generated ids have the shape {tuple(sequences.shape)}, not {shape}")
    scores = model(input_ids=inputs["input_ids"], decoder_input_ids=sequences[:, :-1]).logits
    if not scores.isfinite().all():
        raise WrongOutput("the scores of the generated tokens are not finite")
    if inputs["num_beams"] == 1:
        tolerance = torch.finfo(scores.dtype).eps ** 0.5 * scores.std()
        scores[..., model.generation_config.eos_token_id] = -torch.inf  # `generate` was not allowed to stop
        missed = (scores.amax(-1) - scores.gather(-1, sequences[:, 1:, None])[..., 0]).max()
        if missed > tolerance:
            raise WrongOutput(f"a generated token misses the best score by {missed:.1e}, more than {tolerance:.1e}")


def bytes_of_cache(output: Any) -> int | None:
    """The keys and values that a model holds at the end of `generate`; None without an `EncoderDecoderCache`."""
    caches = [x for x in output.values() if isinstance(x, EncoderDecoderCache)] if isinstance(output, dict) else []
    if not caches:
        return None
    parts = (caches[0].self_attention_cache, caches[0].cross_attention_cache)
    return sum(x.nbytes for part in parts for i in range(len(part)) for x in cached(part, i) or ())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bytes_of_weights(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def process_status(field: str) -> int | None:
    """Bytes of a field of Linux' /proc/self/status, such as VmRSS (resident), VmHWM (its peak) or VmData."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split() for line in lines if line.startswith(f"{field}:")]
    return int(values[0][1]) * 1024 if values else None


class Memory:
    """Peak memory beyond a base: of this process on the CPU, of torch's allocator on a GPU; None if unknown."""

    def __init__(self, device: str):
        self.device = device
        self.base = self._now()

    def _now(self) -> int | None:
        return torch.cuda.memory_allocated() if self.device == "cuda" else process_status("VmRSS")

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS

    def peak_beyond_base(self) -> int | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.base
        peak = process_status("VmHWM")
        if peak is None or self.base is None:
            # Not Linux: only the peak since the process began would be known, not that of this call.
            return None
        return max(0, peak - self.base)


def free_memory() -> None:
    """Free unused memory, also to the operating system, so that the next case begins as this one did."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def limit_memory() -> None:
    """Limit this process to the available memory. If it needs more, torch then raises an error; otherwise the kernel
    would kill this process or another."""
    available = available_memory()
    used = process_status("VmData")
    if available is None or used is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + max(0, available - MEMORY_RESERVE), hard))


def available_memory() -> int | None:
    """The bytes that Linux can provide without swapping."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


class Measuring:
    """The state of a worker: one model at a time, and the inputs and memory of the cases that are being measured."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.contestant = find_contestant(setup.contestant)
        self.checked = False
        self.model_key: tuple | None = None
        self.model: nn.Module | None = None
        self.inputs: dict[Case, dict[str, Tensor]] = {}
        self.memory: dict[Case, Memory] = {}

    def prepare(self, case: Case) -> Call:
        """The first call of a case, which warms up and whose outputs are checked."""
        if case.device == "cpu":
            limit_memory()
        if not self.checked and self.contestant.check is not None:
            self.contestant.check(self.setup.size, case.device)
        self.checked = True
        key = (case.mode, case.dtype, case.device, case.layers)
        if key != self.model_key:
            self.forget_model()
            self.model = make_model(self.setup, case)
            self.model_key = key
        if self.contestant.before_case is not None:
            self.contestant.before_case(self.model)
        self.inputs[case] = make_inputs(case, self.setup.size, self.contestant.takes)
        free_memory()
        self.memory[case] = Memory(case.device)
        if self.contestant.compiles:
            self.measure(case)
        call = self.measure(case, check=True)
        # Measure the base again: it now includes memory that libraries keep, which does not belong to this case.
        free_memory()
        self.memory[case] = Memory(case.device)
        return call

    def measure(self, case: Case, check: bool = False) -> Call:
        """Time one call with its inputs on the device. The output is complete when the time ends."""
        model, inputs, memory = self.model, self.inputs[case], self.memory[case]
        if len(self.inputs) > 1:
            free_memory()  # memory left by another case would count as this case's
        memory.reset_peak()
        synchronize(case.device)
        with self.contestant.context():
            start = time.perf_counter()
            output = run_model(model, inputs, case.mode)
            synchronize(case.device)
            seconds = time.perf_counter() - start
        peak_bytes = memory.peak_beyond_base()
        if check:
            check_outputs(output, model, inputs, case.mode, self.setup.size)
        clear_gradients(model, inputs)
        return Call(seconds, peak_bytes, bytes_of_weights(model), bytes_of_cache(output))

    def forget_case(self, case: Case) -> None:
        """Free the memory of a case; the model stays for the next one."""
        self.inputs.pop(case, None)
        self.memory.pop(case, None)
        if self.model is not None:
            self.model.zero_grad(set_to_none=True)
        free_memory()

    def forget_model(self) -> None:
        self.model = self.model_key = None
        free_memory()


def short_text(error: BaseException) -> str:
    """The kind of an error and the beginning of its text, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}".rstrip(": ")


def serve(connection: Connection, setup: Setup) -> None:
    """Answer requests (name of a method of `Measuring`, case) until the other end hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, the kernel kills this process first
    gc.freeze()  # garbage collection is fast if it skips the libraries' objects, which stay anyway
    torch.set_num_threads(setup.threads)
    logging.set_verbosity_error()
    measuring = None
    for request, case in _requests(connection):
        try:
            measuring = measuring or Measuring(setup)
            answer = getattr(measuring, request)(case)
        except Exception as error:  # any error is reported as this contestant's failure
            answer = Failure(short_text(error))
        if isinstance(answer, Failure) and measuring is not None:
            measuring.forget_case(case)
        connection.send(answer)


def _requests(connection: Connection) -> Iterator[tuple[str, Case]]:
    with contextlib.suppress(EOFError):
        while True:
            yield connection.recv()
