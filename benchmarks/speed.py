"""Measure time and memory of LSG-ALBERT, its peers and the floor, interleaved in one run, each in its own process.

    python -m benchmarks.speed --name cpu
    python -m benchmarks.speed --name quick --lengths 4096 --modes forward --dtypes float32 --contestants ours,floor

Run this from the repository's root. It writes `benchmarks/results/NAME.json` after every group of cases, and `NAME.md`
and `NAME.png` at the end. With the same name, it continues where it stopped.
"""

import argparse
import importlib.util
import os
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks.cases import DTYPES, MODES, SIZES, Case, Result, time_ratio
from benchmarks.contestants import contestant_names, find_contestant
from benchmarks.runner import RESULTS, Plan, Store, Workers, describe_machine, run_groups, write_atomically

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
REFERENCE = "ours"  # the ratios divide its time by the others'
TIMED = {
    "forward": "Forward pass of the base model: `eval()`, `torch.no_grad()`, from input ids to the last hidden states.",
    "training": (
        "Training step of the masked language model: `train()` without dropout; forward pass, loss on 15 % of the "
        "tokens, backward pass, gradients cleared. No optimizer."
    ),
    "checkpointed": "The same training step with gradient checkpointing.",
    "backward": (
        "The base model forward and backward: `train()` without dropout; backward from the states of all real tokens, "
        "gradients cleared."
    ),
}


def add_size_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="base", help="size of the models (default: base)")


def add_plan_arguments(parser: argparse.ArgumentParser, rounds: int, budget: float) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed calls per case (default: {rounds})")
    parser.add_argument(
        "--budget", type=float, default=budget, metavar="SECONDS",
        help=f"computing time per case, after which it gets no further round (default: {budget:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=1800, metavar="SECONDS",
        help="time after which a single call is stopped and its case fails (default: 1800)",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the reports (default: benchmarks/results)"
    )


def numbers(text: str) -> list[int]:
    """The whole numbers in a comma-separated list."""
    return [int(number) for number in text.split(",")]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the reports")
    parser.add_argument(
        "--contestants", type=contestant_names, default="ours,peers,floor",
        help="names and groups (peers, selections, flex), comma-separated (default: ours,peers,floor)",
    )  # fmt: skip
    parser.add_argument(
        "--modes", type=lambda text: text.split(","), default="forward,training",
        help="comma-separated (default: forward,training)",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", type=lambda text: text.split(","), default="float32,bfloat16",
        help="comma-separated (default: float32,bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=numbers, default=",".join(map(str, LENGTHS)),
        help=f"tokens, comma-separated (default: {','.join(map(str, LENGTHS))})",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="documents per batch (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device (default: cuda if available)")
    add_size_argument(parser)
    add_plan_arguments(parser, rounds=5, budget=60)
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for given, known, option in ((args.modes, MODES, "--modes"), (args.dtypes, DTYPES, "--dtypes")):
        if not set(given) <= set(known):
            parser.error(f"{option} takes {', '.join(known)}, got {','.join(given)}")
    return args


def make_plan(args: argparse.Namespace, positions: int) -> Plan:
    return Plan(SIZES[args.size], positions, args.threads, args.rounds, args.budget, args.limit)


def describe_plan(args: argparse.Namespace, plan: Plan) -> dict[str, object]:
    """The settings that all results of a report must share."""
    budget = f"{plan.budget:.0f} s per case"
    return {"size": args.size, "longest input": plan.positions, "timed calls": plan.rounds, "budget": budget}


def make_groups(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The groups of cases that are compared with each other, by name. Short ones come first, to give early results."""
    return {
        f"{mode} {dtype} {args.batch} x {length}": [
            Case(name, mode, (length,) * args.batch, dtype, args.device) for name in args.contestants
        ]
        for mode, dtype, length in product(args.modes, args.dtypes, sorted(args.lengths))
    }


def table(head: Iterable[str], rows: Iterable[Iterable[object]], text_columns: int = 1) -> str:
    """A Markdown table; the first columns are text, the others are numbers."""
    head = list(head)
    lines = [head, ["---"] * text_columns + ["---:"] * (len(head) - text_columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def format_seconds(seconds: float) -> str:
    """Seconds with three digits, in s or ms."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def format_bytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}" if size >= 2**24 else f"{size / 2**30:.4f}"


def count_calls(result: Result) -> str:
    """The number of calls that a result is computed from."""
    return "1, cold" if set(result.seconds) == {0} else str(len(result.seconds))


def result_row(result: Result, reference: Result | None) -> list[str]:
    batch, length = result.case.shape
    start = [f"{batch} x {length:,}", result.case.contestant]
    if result.error is not None:
        return [*start, "**failed**", f"{result.error.replace('|', '/')}", "", "", "", "", ""]
    fastest, slowest = result.spread
    ratio = None if reference is None else time_ratio([reference], [result])
    return [
        *start,
        format_seconds(result.median),
        f"{format_seconds(fastest)} - {format_seconds(slowest)}",
        count_calls(result),
        f"{result.tokens_per_second:,.0f}",
        format_bytes(result.peak_bytes),
        format_bytes(result.weights_bytes),
        format_ratio(ratio),
    ]


def describe(machine: dict, settings: dict) -> str:
    """The machine and the settings, as a Markdown list."""
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in {**machine, **settings}.items()]
    return "\n".join(lines) + "\n"


def ratio_table(results: list[Result]) -> str:
    """The reference's time divided by each contestant's, with one column for each length."""
    by_case = {(result.case.contestant, result.case.lengths): result for result in results}
    names = list(dict.fromkeys(result.case.contestant for result in results))
    shapes = sorted({result.case.lengths for result in results}, key=sum)

    def cell(name: str, lengths: tuple[int, ...]) -> str:
        reference, other = by_case.get((REFERENCE, lengths)), by_case.get((name, lengths))
        if reference is None or other is None:
            return "-"
        return "failed" if other.error is not None else format_ratio(time_ratio([reference], [other]))

    rows = [[name, *(cell(name, lengths) for lengths in shapes)] for name in names if name != REFERENCE]
    return table([f"time of {REFERENCE} / time of", *(f"{max(lengths):,}" for lengths in shapes)], rows)


def group_results(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """The results by mode and dtype, in their order."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case.mode, result.case.dtype), []).append(result)
    return groups


def report(results: list[Result], machine: dict, settings: dict, picture: str | None = None) -> str:
    """All results in Markdown.

    Args:
        results: in the order of the tables.
        machine, settings: facts to list at the top.
        picture: the file name of the picture.
    """
    names = list(dict.fromkeys(result.case.contestant for result in results))
    parts = ["# Speed and memory\n", describe(machine, settings)]
    parts += ["\n".join(f"- `{name}`: {find_contestant(name).label}" for name in names) + "\n"]
    parts += [
        "The contestants take turns: one computes at a time, and each has its own process. Times are medians, with "
        "the fastest and the slowest of n calls after a warm-up call (\"1, cold\": this call alone, because it used "
        "up the budget). Ratios are medians of the ratios within a round. Peak memory is that of a call, beyond the "
        "weights and all other memory in use before it. The input is random ids without padding; weights are random.\n"
    ]  # fmt: skip
    if picture is not None:
        parts += [f"![Time and memory against length]({picture})\n"]
    for (mode, dtype), group in group_results(results).items():
        references = {result.case.lengths: result for result in group if result.case.contestant == REFERENCE}
        head = ["batch x length", "contestant", "median", "fastest - slowest", "n"]
        head += ["tokens/s", "peak GiB", "weights GiB", f"{REFERENCE} / it"]
        rows = [result_row(result, references.get(result.case.lengths)) for result in group]
        parts += [f"## {mode}, {dtype}\n", TIMED[mode] + "\n", ratio_table(group)]
        parts += [table(head, rows, text_columns=2)]
    return "\n".join(parts)


def draw(results: list[Result], path: Path) -> None:
    """Plot time and memory against length: a line per contestant, a column per mode and dtype, logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, without a window
    from matplotlib import pyplot

    groups = group_results(results)
    names = list(dict.fromkeys(result.case.contestant for result in results))
    figure, axes = pyplot.subplots(2, len(groups), figsize=(4.2 * len(groups), 7.5), squeeze=False, sharex=True)
    for column, ((mode, dtype), group) in enumerate(groups.items()):
        axes[0, column].set_title(f"{mode}, {dtype}")
        axes[1, column].set_xlabel("tokens per document")
        for i, name in enumerate(names):
            good = [r for r in group if r.case.contestant == name and r.error is None]
            style = {"color": f"C{i}", "marker": "o", "markersize": 3, "label": name}
            style |= {"linewidth": 2.5} if name == REFERENCE else {"linewidth": 1}
            style |= {"linestyle": "--"} if name == "floor" else {}
            axes[0, column].plot([max(r.case.lengths) for r in good], [r.median for r in good], **style)
            known = [r for r in good if r.peak_bytes]
            memory = [r.peak_bytes / 2**30 for r in known]
            axes[1, column].plot([max(r.case.lengths) for r in known], memory, **style)
        lengths = sorted({max(r.case.lengths) for r in group})
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds (median)")
    axes[1, 0].set_ylabel("peak memory beyond the weights, GiB")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    # The legend is below the panels, in as many lines as it needs.
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2 * len(groups), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> str:
    args = parse_args(argv)
    plan = make_plan(args, positions=max(args.lengths))
    machine = describe_machine(args.device, args.threads)
    settings = describe_plan(args, plan)
    print(describe(machine, settings))
    store = Store(args.results / f"{args.name}.json", machine, settings)
    with Workers(plan) as workers:
        run_groups(workers, store, make_groups(args))
    picture = args.results / f"{args.name}.png" if importlib.util.find_spec("matplotlib") else None
    text = report(store.results, machine, settings, picture and picture.name)
    write_atomically(args.results / f"{args.name}.md", text)
    print("\n" + text)
    if picture is None:
        print("No picture was drawn, because matplotlib is not installed.")
    else:
        draw(store.results, picture)
    return text


if __name__ == "__main__":
    main()
