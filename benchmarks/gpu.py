"""Measure our model, ALBERT's flash attention and peers on a CUDA device, each with the largest batch that fits.

    python -m benchmarks.gpu --name h200
    python -m benchmarks.gpu --name h200 --modes training --lengths 4096,16384 --contestants ours,albert-flash

Run this from the repository's root. Batches fill the card, so only one contestant is on it at a time, from start to
end. The script writes `benchmarks/results/NAME.json` after every case and `NAME.md` at the end. With the same name, it
continues where it stopped. `python -m benchmarks.speed --device cuda` compares small batches in interleaved rounds.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import product

import torch

from benchmarks.cases import Case, Result, Size
from benchmarks.contestants import contestant_names, find_contestant
from benchmarks.runner import Store, Workers, describe_machine, measure_group, write_atomically
from benchmarks.speed import (
    TIMED,
    add_plan_arguments,
    add_size_argument,
    count_calls,
    describe,
    describe_plan,
    format_bytes,
    format_ratio,
    format_seconds,
    make_plan,
    table,
)
from benchmarks.worker import Failure, synchronize
from lsg_albert.lsg_pattern import LSGPattern

LENGTHS = (4096, 8192, 16384, 32768)
DTYPE = "bfloat16"
CONTESTANTS = "ours,ours-compiled,ours-flex,ours-flex-compiled,albert-flash,modernbert,longformer"
OURS = ("ours", "ours-compiled", "ours-flex", "ours-flex-compiled")
# These compile for every batch size that they try, so they begin with the largest batch of "ours".
SAME_BATCH_AS_OURS = OURS[1:]
MATRIX = 8192  # rows and columns of the matrices for measuring the card's rate


def case_of(name: str, mode: str, length: int, batch: int, device: str) -> Case:
    return Case(name, mode, (length,) * batch, DTYPE, device)


def is_out_of_memory(error: str) -> bool:
    return any(sign in error.lower() for sign in ("out of memory", "outofmemory", "can't allocate", "signal 9"))


def largest_batch(
    workers: Workers, name: str, mode: str, length: int, device: str, most_tokens: int, start: int | None = None
) -> tuple[int, list[Result]] | str:
    """The largest batch that fits, among the powers of two up to `most_tokens`, or among `start` and its halves.

    Returns:
        The batch, and the results of all batches that fitted, one call each; or the reason why there is no batch.
    """
    batch, fitting, error = start or 1, [], "no batch fits"
    while batch >= 1 and batch * length <= max(most_tokens, length):
        case = case_of(name, mode, length, batch, device)
        answer = workers.ask("prepare", case)
        if not isinstance(answer, Failure):
            workers.ask("finish", case)
            fitting.append(Result(case, {0: answer.seconds}, answer.peak_bytes, answer.weights_bytes))
            if start is not None:
                break
            batch *= 2
            continue
        error = answer.error
        if not is_out_of_memory(error):
            return error
        if start is None:
            break
        batch //= 2
    return (len(fitting[-1].case.lengths), fitting) if fitting else error


def measure_filled(
    workers: Workers, store: Store, name: str, mode: str, length: int, args: argparse.Namespace
) -> None:
    """Find the largest batch and measure it. Keep its result, and that of the smallest batch for its memory."""
    start = None
    if name in SAME_BATCH_AS_OURS:
        twin = store.groups.get(group_name("ours", mode, length), [])
        start = next((len(result.case.lengths) for result in twin[-1:] if result.error is None), None)
    found = largest_batch(workers, name, mode, length, args.device, args.most_tokens, start)
    if isinstance(found, str):
        results = [Result(case_of(name, mode, length, 1, args.device), {}, error=found, code=store.code)]
        print(f"  FAILED: {found}")
    else:
        batch, fitting = found
        filled = measure_group(workers, [case_of(name, mode, length, batch, args.device)], store.code)
        smallest = [result for result in fitting[:1] if len(result.case.lengths) == 1 and batch > 1]
        results = smallest + filled
    store.add(group_name(name, mode, length), results)


def group_name(name: str, mode: str, length: int) -> str:
    return f"{name} {mode} {length}"


def model_flops(size: Size, length: int, mode: str) -> float:
    """Floating-point operations of our model per token, counting only what the attention pattern requires.

    A multiplication and an addition are two operations. A backward pass is twice the forward pass. Norms, activations,
    softmax and the selection are not counted.
    """
    keys = min(LSGPattern(1, size.block, "norm", size.block, 2).num_keys, 1 + length)
    products = 4 * size.hidden**2 + 2 * size.hidden * size.feed_forward
    forward = 2 * size.embedding * size.hidden + size.layers * (2 * products + 4 * size.hidden * keys)
    if mode == "forward":
        return forward
    return 3 * (forward + 2 * size.embedding * (size.hidden + size.vocabulary))


def matrix_rate(device: str, width: int, rounds: int = 20) -> float:
    """Floating-point operations per second in the product of two square random matrices, as a measure of the card."""
    left, right = torch.randn(2, width, width, device=device).to(getattr(torch, DTYPE))
    times = []
    for _ in range(rounds + 3):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * width**3 / statistics.median(times[3:])


def utilisation(result: Result, size: Size, rate: float) -> float:
    """The rate of our model's own arithmetic, as a share of the card's measured matrix rate."""
    return model_flops(size, max(result.case.lengths), result.case.mode) * result.tokens_per_second / rate


def find(store: Store, name: str, mode: str, length: int) -> Result | None:
    """The result of the filled batch; None if there is none or it failed."""
    group = store.groups.get(group_name(name, mode, length), [])
    return group[-1] if group and group[-1].error is None else None


def fastest(store: Store, names: Sequence[str], mode: str, length: int) -> Result | None:
    results = [find(store, name, mode, length) for name in names]
    return max((result for result in results if result is not None), key=lambda r: r.tokens_per_second, default=None)


def memory_at_batch_one(store: Store, name: str, mode: str) -> dict[int, int]:
    """Peak bytes beyond the weights for each length, of a batch of one."""
    results = [result for result in store.results if (result.case.contestant, result.case.mode) == (name, mode)]
    return {max(r.case.lengths): r.peak_bytes for r in results if len(r.case.lengths) == 1 and r.peak_bytes}


def target_rows(store: Store, size: Size, rate: float, lengths: Sequence[int]) -> list[list[str]]:
    """The measured targets: our fastest contestant against ALBERT's flash attention, in training."""
    rows = []

    def add(text: str, value: float | None, target: str, met: bool) -> None:
        shown = "not measured" if value is None else f"{value:.2f}"
        rows.append([text, shown, target, "" if value is None else "met" if met else "**not met**"])

    short, long = min(lengths), min(lengths) * 4
    for length, limit in ((short, 1.0), (long, 0.5)):
        best, albert = fastest(store, OURS, "training", length), find(store, "albert-flash", "training", length)
        value = None if best is None or albert is None else albert.tokens_per_second / best.tokens_per_second
        name = "ours" if best is None else best.case.contestant
        text = f"training, {length}: time per token of {name} / albert-flash"
        add(text, value, f"<= {limit}", value is not None and value <= limit)
    best = fastest(store, OURS, "training", short)
    value = None if best is None else utilisation(best, size, rate)
    text = f"training, {short}: our arithmetic / the card's matrix rate ({rate / 1e12:.0f} TFLOP/s measured)"
    add(text, value, ">= 0.40", value is not None and value >= 0.40)
    memory = memory_at_batch_one(store, "ours", "training")
    value = None
    if len(memory) > 1:
        least, most = min(memory), max(memory)
        value = memory[most] / memory[least] / (most / least)
    text = "training, batch 1: peak memory of the longest / that of the shortest, over the ratio of lengths"
    add(text, value, "<= 1.05 (linear)", value is not None and value <= 1.05)
    return rows


def result_row(result: Result, albert: Result | None, size: Size, rate: float) -> list[str]:
    batch, length = result.case.shape
    start = [f"{length:,}", result.case.contestant]
    if result.error is not None:
        return [*start, "-", "**failed**", result.error.replace("|", "/"), "", "", "", ""]
    ratio = None if albert is None else albert.tokens_per_second / result.tokens_per_second
    share = f"{utilisation(result, size, rate):.0%}" if result.case.contestant in OURS else "-"
    return [
        *start,
        str(batch),
        format_seconds(result.median),
        count_calls(result),
        f"{result.tokens_per_second:,.0f}",
        format_ratio(ratio),
        share,
        format_bytes(result.peak_bytes),
    ]


def report(store: Store, size: Size, rate: float, lengths: Sequence[int], machine: dict, settings: dict) -> str:
    names = list(dict.fromkeys(result.case.contestant for result in store.results))
    parts = ["# Speed and memory on a GPU\n", describe(machine, settings)]
    parts += ["\n".join(f"- `{name}`: {find_contestant(name).label}" for name in names) + "\n"]
    parts += [table(["target", "measured", "limit", ""], target_rows(store, size, rate, lengths))]
    parts += [
        "Each batch is the largest power of two that fits. Times are medians of n calls after a warm-up call. The "
        "share of the matrix rate is that of our model's own arithmetic. Peak memory does not include the weights.\n"
    ]
    for mode in dict.fromkeys(result.case.mode for result in store.results):
        results = [group[-1] for group in store.groups.values() if group[-1].case.mode == mode]
        results.sort(key=lambda result: (max(result.case.lengths), names.index(result.case.contestant)))
        head = ["length", "contestant", "batch", "median", "n", "tokens/s", "time per token / albert-flash"]
        rows = [
            result_row(result, find(store, "albert-flash", mode, max(result.case.lengths)), size, rate)
            for result in results
        ]
        head += ["of the matrix rate", "peak GiB"]
        parts += [f"## {mode}, {DTYPE}\n", TIMED[mode] + "\n", table(head, rows, text_columns=2)]
        seen = sorted({max(result.case.lengths) for result in results})
        memory = {name: memory_at_batch_one(store, name, mode) for name in names}
        rows = [
            [name, *(format_bytes(by_length.get(n)) for n in seen)] for name, by_length in memory.items() if by_length
        ]
        parts += [table(["peak GiB, batch 1", *(f"{n:,}" for n in seen)], rows)]
    return "\n".join(parts)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the reports")
    parser.add_argument(
        "--contestants", type=contestant_names, default=CONTESTANTS, help=f"comma-separated (default: {CONTESTANTS})"
    )
    parser.add_argument(
        "--modes", type=lambda text: text.split(","), default="training,forward",
        help="comma-separated (default: training,forward)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=lambda text: [int(n) for n in text.split(",")], default=",".join(map(str, LENGTHS)),
        help=f"tokens, comma-separated (default: {','.join(map(str, LENGTHS))})",
    )  # fmt: skip
    parser.add_argument(
        "--most-tokens", type=int, default=2**19,
        help="most tokens of a batch; more would not make the card busier (default: 524288)",
    )  # fmt: skip
    parser.add_argument("--matrix", type=int, default=MATRIX, help=argparse.SUPPRESS)
    # To try the script without a card; the numbers mean nothing.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    add_size_argument(parser)
    add_plan_arguments(parser, rounds=5, budget=30)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here: this benchmark is for GPUs. See `python -m benchmarks.speed`.")
    plan = make_plan(args, positions=max(args.lengths))
    machine = describe_machine(args.device, args.threads)
    settings = describe_plan(args, plan)
    print(describe(machine, settings))
    store = Store(args.results / f"{args.name}.json", machine, settings)
    for name in args.contestants:
        with Workers(plan) as workers:  # one contestant at a time has the whole card
            for mode, length in product(args.modes, args.lengths):
                if group_name(name, mode, length) not in store.groups:
                    print(group_name(name, mode, length))
                    measure_filled(workers, store, name, mode, length, args)
    rate = matrix_rate(args.device, args.matrix)
    settings["measured matrix rate"] = f"{rate / 1e12:.3g} TFLOP/s, {DTYPE}, {args.matrix} x {args.matrix}"
    text = report(store, plan.size, rate, args.lengths, machine, settings)
    write_atomically(args.results / f"{args.name}.md", text)
    print("\n" + text)
    return text


if __name__ == "__main__":
    main()
