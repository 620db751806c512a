"""Measure the project's targets on the CPU, and report which are met.

    python -m benchmarks.targets --name targets
    python -m benchmarks.targets --name trial --groups forward-float32,padding-forward
    python -m benchmarks.targets --name very-long --set very-long

Run this from the repository's root. The numbers are medians of ratios within interleaved rounds, as in
`benchmarks.speed`.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.cases import Case, Result, memory_ratio, time_ratio
from benchmarks.contestants import OTHER_SELECTIONS
from benchmarks.runner import Store, Workers, describe_machine, run_groups, write_atomically
from benchmarks.speed import (
    add_plan_arguments,
    add_size_argument,
    count_calls,
    describe,
    describe_plan,
    format_bytes,
    format_seconds,
    make_plan,
    table,
)

# Documents of one batch, in tokens. Models of the size "tiny" get a 32nd of them.
DOCUMENTS = (300, 500, 700, 900, 1300, 1900, 2800, 4096)
TINY_DIVISOR = 32
# The padded batch has 32,768 positions: the activations of all 12 layers do not fit into 24 GiB for a backward pass.
# All layers are the same, so the ratios are nearly those of the whole model.
BACKWARD_LAYERS = 4


@dataclass(frozen=True)
class Target:
    """A measured number and its upper limit.

    Args:
        group: targets of one group are measured together, interleaved.
        text: the description of the number.
        limit: the target.
        numerators, denominators: cases whose times are added up and divided.
        quantity: "time"; "memory" for the peak beyond the weights, with one case on each side; or "GiB" for the peak and
            the weights of one case.
    """

    group: str
    text: str
    limit: float
    numerators: tuple[Case, ...]
    denominators: tuple[Case, ...]
    quantity: str = "time"

    @property
    def cases(self) -> tuple[Case, ...]:
        return self.numerators + self.denominators


def make_targets(divisor: int = 1) -> list[Target]:
    """The targets of the project; all lengths are divided by `divisor`."""
    short, middle, long = (length // divisor for length in (512, 4096, 16384))

    def case(name: str, mode: str = "forward", dtype: str = "float32", length: int = middle) -> tuple[Case, ...]:
        return (Case(name, mode, (length,), dtype),)

    targets = []
    for dtype, limits in (("float32", (1.40, 0.62, 0.60)), ("bfloat16", (2.0, 0.35, 0.42))):
        for peer, limit in zip(("floor", "albert-sdpa", "longformer"), limits, strict=True):
            text = f"forward, {middle}, {dtype}: time / {peer}"
            pair = case("ours", dtype=dtype), case(peer, dtype=dtype)
            targets.append(Target(f"forward-{dtype}", text, limit, *pair))
    step = case("ours", "training"), case("albert-sdpa", "training")
    text = f"training step, {middle}, float32"
    targets += [
        Target("training", f"{text}: time / albert-sdpa", 0.62, *step),
        Target("training", f"{text}: peak memory / albert-sdpa", 1.0, *step, "memory"),
    ]
    growth = case("ours", length=long), case("ours")
    text = f"forward, float32, {long} against {middle}"
    targets += [
        Target("growth", f"{text}: time", 4.3, *growth),
        Target("growth", f"{text}: peak memory beyond the weights", 4.2, *growth, "memory"),
    ]
    pair = case("ours", length=short), case("albert-sdpa", length=short)
    targets.append(Target("short", f"forward, {short}, float32: time / albert-sdpa", 1.0, *pair))
    for kind in OTHER_SELECTIONS:
        pair = case(f"ours-{kind}"), case("ours")
        text = f"forward, {middle}, float32: time of {kind} / norm"
        targets.append(Target("selections", text, 1.15, *pair))
    for mode, layers in (("forward", None), ("backward", BACKWARD_LAYERS)):
        lengths = tuple(max(1, length // divisor) for length in DOCUMENTS)
        batch, padded = ((Case(name, mode, lengths, layers=layers),) for name in ("ours", "ours-unpacked"))
        single = tuple(Case("ours", mode, (length,), layers=layers) for length in lengths)
        text = f"{mode}, batch of {len(lengths)} documents of {lengths[0]} to {lengths[-1]}, float32"
        text += "" if layers is None else f", {layers} layers"
        targets += [
            Target(f"padding-{mode}", f"{text}: time / sum of the documents one by one", 1.15, batch, single),
            Target(f"padding-{mode}", f"{text}: time / batch that is not packed", 0.55, batch, padded),
        ]
    return targets


def very_long_targets(divisor: int = 1) -> list[Target]:
    """The targets for very long texts; all lengths are divided by `divisor`."""
    short, training, long, longest = (length // divisor for length in (16384, 32768, 65536, 131072))

    def case(length: int, mode: str = "forward") -> tuple[Case, ...]:
        return (Case("ours", mode, (length,)),)

    text = f"training step with gradient checkpointing, {training}, float32: GiB"
    return [
        Target("forward", f"forward, float32, {longest} against {short}: time", 8.4, case(longest), case(short)),
        Target("forward", f"forward, {long}, float32: GiB", 24, case(long), (), "GiB"),
        Target("forward", f"forward, {longest}, float32: GiB", 24, case(longest), (), "GiB"),
        Target("checkpointed", text, 24, case(training, "checkpointed"), (), "GiB"),
    ]


SETS = {"standard": make_targets, "very-long": very_long_targets}


def make_groups(targets: Iterable[Target]) -> dict[str, list[Case]]:
    """The cases of each group, each once, in the order of the targets."""
    groups: dict[str, dict[Case, None]] = {}
    for target in targets:
        groups.setdefault(target.group, {}).update(dict.fromkeys(target.cases))
    return {name: list(cases) for name, cases in groups.items()}


def measured_value(target: Target, results: dict[Case, Result]) -> float | None:
    """The target's measured number; None if one of its cases failed, or its memory is unknown."""
    numerators, denominators = (
        [results[case] for case in cases] for cases in (target.numerators, target.denominators)
    )
    if target.quantity == "GiB":
        (result,) = numerators
        return None if result.peak_bytes is None else (result.peak_bytes + result.weights_bytes) / 2**30
    if target.quantity == "memory":
        return memory_ratio(numerators[0], denominators[0])
    return time_ratio(numerators, denominators)


def target_row(target: Target, results: dict[Case, Result]) -> list[str]:
    value = measured_value(target, results)
    if value is None:
        errors = [results[case].error for case in target.cases if results[case].error is not None]
        reason = errors[0].replace("|", "/") if errors else "peak memory is unknown here"
        return [target.text, "failed", f"<= {target.limit:.2f}", f"not met ({reason})"]
    verdict = "met" if value <= target.limit else "**not met**"
    return [target.text, f"{value:.3f}", f"<= {target.limit:.2f}", verdict]


def report(targets: list[Target], results: dict[str, list[Result]], machine: dict, settings: dict) -> str:
    """The measured targets and their times, in Markdown. `results` has the results of each group."""
    measured = [target for target in targets if target.group in results]
    by_group = {name: {result.case: result for result in group} for name, group in results.items()}
    rows = [target_row(target, by_group[target.group]) for target in measured]
    parts = ["# Targets on the CPU\n", describe(machine, settings)]
    parts += [table(["case", "measured", "target", ""], rows)]
    parts += [
        "Times are medians; ratios are medians of the ratios within the n interleaved rounds. Peak memory is that of "
        "a call, beyond the weights and all other memory in use before it.\n"
    ]
    for name, group in results.items():
        rows = [result_cells(result) for result in group]
        parts += [f"## {name}\n", table(["case", "median", "fastest - slowest", "n", "peak GiB"], rows)]
    return "\n".join(parts)


def result_cells(result: Result) -> list[str]:
    name = str(result.case)
    if len(set(result.case.lengths)) > 1:
        name += f", documents of {', '.join(map(str, result.case.lengths))}"
    if result.error is not None:
        return [name, "**failed**", result.error.replace("|", "/"), "", ""]
    fastest, slowest = map(format_seconds, result.spread)
    cells = [format_seconds(result.median), f"{fastest} - {slowest}", count_calls(result)]
    return [name, *cells, format_bytes(result.peak_bytes)]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="targets", help="name of the reports (default: targets)")
    known = {name: list(make_groups(targets())) for name, targets in SETS.items()}
    parser.add_argument("--set", choices=SETS, default="standard", help="set of targets (default: standard)")
    parser.add_argument(
        "--groups", type=lambda text: text.split(","),
        help=f"groups of the set, comma-separated (default: all; standard has {','.join(known['standard'])})",
    )  # fmt: skip
    add_size_argument(parser)
    add_plan_arguments(parser, rounds=5, budget=300)
    args = parser.parse_args(argv)
    args.groups = args.groups or known[args.set]
    unknown = set(args.groups) - set(known[args.set])
    if unknown:
        parser.error(f"there is no group {', '.join(unknown)}: choose from {', '.join(known[args.set])}")
    return args


def main(argv: Sequence[str] | None = None) -> str:
    args = parse_args(argv)
    targets = SETS[args.set](TINY_DIVISOR if args.size == "tiny" else 1)
    groups = {name: cases for name, cases in make_groups(targets).items() if name in args.groups}
    # The model is the same for all groups, no matter which of them are measured.
    plan = make_plan(args, positions=max(max(case.lengths) for target in targets for case in target.cases))
    machine = describe_machine("cpu", args.threads)
    settings = describe_plan(args, plan)
    print(describe(machine, settings))
    store = Store(args.results / f"{args.name}.json", machine, settings)
    with Workers(plan) as workers:
        run_groups(workers, store, groups)
    text = report(targets, store.groups, machine, settings)
    write_atomically(args.results / f"{args.name}.md", text)
    print("\n" + text)
    return text


if __name__ == "__main__":
    main()
