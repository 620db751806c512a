"""Measure where one layer of LSG-ALBERT spends its time.

    python -m benchmarks.profile_layer
    python -m benchmarks.profile_layer --dtype bfloat16 --selection pooling --mode backward

Run this from the repository's root. The layer is called as the model calls it. Every operator that runs is timed.
It is assigned to a part of the layer by the function of our `lsg_*` modules that calls it, by its name and by its
sizes. torch's profiler then measures the layer again, independently.
"""

import argparse
import functools
import inspect
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import DTYPES, SIZES, Case, Size
from benchmarks.contestants import OTHER_SELECTIONS, ours
from benchmarks.runner import describe_machine
from benchmarks.speed import describe, table
from benchmarks.worker import make_inputs, synchronize
from lsg_albert import lsg_encoder

Key = tuple[str, str, str]  # part of the layer, function, operator

ROWS = 15  # rows of the tables of functions and operators


class OperatorTimes(TorchDispatchMode):
    """Adds up the seconds of every operator that runs in this context, by part, function and operator."""

    def __init__(self, size: Size, device: str, functions: list[tuple[str, str]]):
        super().__init__()
        self.size, self.device, self.functions = size, device, functions
        self.seconds: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        synchronize(self.device)
        start = time.perf_counter()
        output = func(*args, **(kwargs or {}))
        synchronize(self.device)
        seconds = time.perf_counter() - start
        operator = func.overloadpacket.__name__
        sizes = {n for x in (*args, output) if isinstance(x, Tensor) for n in x.shape}
        function = self.functions[-1][1] if self.functions else "-"
        self.seconds[part_of(operator, sizes, self.functions, self.size), function, operator] += seconds
        return output


def part_of(operator: str, sizes: set[int], functions: list[tuple[str, str]], size: Size) -> str:
    """The part of the layer that an operator belongs to.

    Args:
        operator: its name without the namespace.
        sizes: of its tensors' dimensions.
        functions: (module, function) of our calls that are running, innermost last.
        size: of the model.
    """
    if any(module == "lsg_sparsity" for module, _ in functions):
        return "selection"
    if any("global" in function for _, function in functions):
        return "attention of the global tokens"
    if "scaled_dot_product" in operator or any("eager" in function for _, function in functions):
        return "attention kernel"
    if "layer_norm" in operator:
        return "norms"
    if operator in ("addmm", "mm", "linear", "linear_backward", "_linear_pointwise"):
        return "feed-forward" if size.feed_forward in sizes else "projections"
    if "gelu" in operator or (size.feed_forward in sizes and not functions):
        return "activation"
    if functions:
        return "window gathering and masks"
    return "residuals, copies and the rest"


def attention_modules() -> list[ModuleType]:
    """`lsg_attention` and the modules of its parts."""
    parts = ("functional", "cpu", "flex", "gather", "padding", "softmax", "sparsity")
    return [sys.modules[f"lsg_albert.lsg_{part}"] for part in parts]


@contextmanager
def watched_functions(modules: Sequence[ModuleType], user: ModuleType) -> Iterator[list[tuple[str, str]]]:
    """A list that always holds the running calls of these modules' functions, as (module, function).

    The functions are replaced everywhere in the modules and `user`, also in tables, and restored at the end.
    """
    going_on: list[tuple[str, str]] = []

    def watch(function: Callable) -> Callable:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            going_on.append((function.__module__.rpartition(".")[2], function.__name__))
            try:
                return function(*args, **kwargs)
            finally:
                going_on.pop()

        return watched

    names = {module.__name__ for module in modules}
    replaced = []
    for module in [*modules, user]:
        spaces = [vars(module), *(value for value in vars(module).values() if isinstance(value, dict))]
        for space in spaces[:1] + [space for space in spaces[1:] if all(map(callable, space.values()))]:
            for name, value in list(space.items()):
                if inspect.isfunction(value) and value.__module__ in names:
                    replaced.append((space, name, value))
                    space[name] = watch(value)
    try:
        yield going_on
    finally:
        for space, name, value in replaced:
            space[name] = value


def layer_call(case: Case, size: Size, selection: str, implementation: str) -> Callable[[], None]:
    """A function that runs one layer on states from the model, in the case's mode."""
    torch.manual_seed(0)
    contestant = ours("", sparsity_type=selection, attn_implementation=implementation)
    model = contestant.make(size, max(case.lengths), "forward")
    model = model.to(case.device, getattr(torch, case.dtype)).train(case.mode != "forward")
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    args, kwargs = arguments_of(
        layer, model, make_inputs(Case("ours", "forward", case.lengths, case.dtype, case.device), size)
    )

    def call() -> None:
        with torch.set_grad_enabled(case.mode != "forward"):
            output = layer(*args, **kwargs)
            if case.mode != "forward":
                states = output[0] if isinstance(output, tuple) else output
                states.backward(torch.ones_like(states))
                layer.zero_grad(set_to_none=True)

    return call


@torch.no_grad()
def arguments_of(layer: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[tuple, dict]:
    """The arguments of the model's first call of its layer. The states need gradients, as in training."""
    calls: list[tuple[tuple, dict]] = []
    hook = layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(**inputs)
    hook.remove()
    args, kwargs = calls[0]
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs


def time_calls(call: Callable[[], None], device: str, rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def time_operators(call: Callable[[], None], size: Size, device: str, rounds: int) -> dict[Key, float]:
    """Median seconds of each part, function and operator in `rounds` calls."""
    runs = []
    with watched_functions(attention_modules(), lsg_encoder) as functions:
        for _ in range(rounds):
            with OperatorTimes(size, device, functions) as times:
                call()
            runs.append(times.seconds)
    keys = {key for run in runs for key in run}
    return {key: statistics.median(run[key] for run in runs) for key in keys}


def summed(seconds: dict[Key, float], columns: slice) -> list[tuple[Key, float]]:
    """Seconds added up over the other columns of the keys, largest first."""
    sums: Counter = Counter()
    for key, value in seconds.items():
        sums[key[columns]] += value
    return sums.most_common()


def report(seconds: dict[Key, float], plain: float) -> str:
    """The tables of parts, and of functions and operators. `plain` is the seconds of an uninstrumented call."""
    total = sum(seconds.values())
    parts = [[*key, f"{value * 1e3:.1f}", f"{value / total:.0%}"] for key, value in summed(seconds, slice(0, 1))]
    parts += [["all operators", f"{total * 1e3:.1f}", ""], ["the layer, not watched", f"{plain * 1e3:.1f}", ""]]
    operators = [
        [*key, f"{value * 1e3:.1f}", f"{value / total:.0%}"] for key, value in summed(seconds, slice(0, 3))[:ROWS]
    ]
    return "\n".join(
        [
            table(["part", "ms", "share"], parts),
            table(["part", "function", "operator", "ms", "share"], operators, text_columns=3),
        ]
    )


def profiler_table(call: Callable[[], None], device: str) -> str:
    """The table of torch's profiler for one call, by operator."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        call()
        synchronize(device)
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=50)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--batch", type=int, default=1, help="documents (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the layer (default: float32)")
    parser.add_argument("--mode", choices=("forward", "backward"), default="forward", help="backward includes forward")
    parser.add_argument("--selection", choices=("norm", *OTHER_SELECTIONS), default="norm", help="(default: norm)")
    parser.add_argument("--implementation", default="sdpa", help="attention (default: sdpa)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device (default: cpu)")
    parser.add_argument("--size", choices=SIZES, default="base", help="size of the model (default: base)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads (default: all cores)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    case = Case("ours", args.mode, (args.length,) * args.batch, args.dtype, args.device)
    print(describe(describe_machine(args.device, args.threads), {"layer of": case, "selection": args.selection}))
    call = layer_call(case, size, args.selection, args.implementation)
    time_calls(call, args.device, 1)
    plain = statistics.median(time_calls(call, args.device, args.rounds))
    text = report(time_operators(call, size, args.device, args.rounds), plain)
    print(text)
    print(profiler_table(call, args.device))
    return text


if __name__ == "__main__":
    main()
