"""Measure `generate`: tokens per second, the time of one more token, and the cache, beside other models that write.

    python -m benchmarks.decoding --name decoding
    python -m benchmarks.decoding --name quick --lengths 4096 --beams 1 --new-tokens 16 --rounds 1

Run this from the repository's root. It writes `benchmarks/results/NAME.json` after every group of cases, and `NAME.md`
at the end. With the same name, it continues where it stopped.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from benchmarks.cases import DTYPES, Case, Result, time_ratio
from benchmarks.contestants import contestant_names, find_contestant
from benchmarks.runner import Store, Workers, describe_machine, run_groups, write_atomically
from benchmarks.speed import (
    REFERENCE,
    add_plan_arguments,
    add_size_argument,
    count_calls,
    describe,
    describe_plan,
    format_bytes,
    format_ratio,
    format_seconds,
    make_plan,
    numbers,
    table,
)

HEAD = (
    "source",
    "contestant",
    "all tokens",
    "n",
    "tokens/s",
    "first token",
    "one more token",
    "cache GiB",
    "peak GiB",
)
HEAD += ("weights GiB", f"{REFERENCE} / it", f"{REFERENCE} / it, one more token")
TIMED = (
    "`generate` of exactly {} tokens from one source without padding, in `eval()`: the encoder, then the decoder with "
    'its cache. "First token" is a call for one token: nearly all of it is the encoder. "One more token" is the '
    "difference of the two calls within a round, divided by the other tokens. The cache holds the keys and values of "
    "self- and cross-attention at the end. Times are medians of n calls after a warm-up call; the contestants take "
    "turns, and ratios are medians of the ratios within a round. Peak memory is that of the call for all tokens.\n"
)


def one_more_token(whole: Result, first: Result) -> Result:
    """The seconds of one more token, by round, as a result of the same case.

    Args:
        whole: of a call for all tokens.
        first: of a call for the first token.
    """
    error = whole.error or first.error
    if error is not None:
        return replace(whole, error=error)
    others = whole.case.new_tokens - first.case.new_tokens
    rounds = whole.seconds.keys() & first.seconds.keys()
    seconds = {r: (whole.seconds[r] - first.seconds[r]) / others for r in rounds}
    return replace(whole, seconds=seconds or {0: (whole.median - first.median) / others})


def make_groups(args: argparse.Namespace) -> dict[str, list[Case]]:
    """By name, the cases that are compared: every contestant with one new token and with all."""
    return {
        f"{args.dtype} {length}, {beams} beams": [
            Case(name, "generate", (length,), args.dtype, new_tokens=new_tokens, beams=beams)
            for name, new_tokens in product(args.contestants, (1, args.new_tokens))
        ]
        for beams, length in product(args.beams, sorted(args.lengths))
    }


def rows_of_group(results: Sequence[Result]) -> list[list[str]]:
    """A row of the table for each contestant; `results` are those of a group."""
    new_tokens = max(result.case.new_tokens for result in results)
    first = {result.case.contestant: result for result in results if result.case.new_tokens == 1}
    whole = {result.case.contestant: result for result in results if result.case.new_tokens == new_tokens}
    token = {name: one_more_token(result, first[name]) for name, result in whole.items()}
    rows = []
    for name, result in whole.items():
        start = [f"{result.case.tokens:,}", name]
        if token[name].error is not None:
            rows.append([*start, "**failed**", token[name].error.replace("|", "/"), *[""] * (len(HEAD) - 4)])
            continue
        ratios = (time_ratio([by[REFERENCE]], [by[name]]) if REFERENCE in by else None for by in (whole, token))
        cells = [format_seconds(result.median), count_calls(result), f"{new_tokens / result.median:.1f}"]
        cells += [format_seconds(first[name].median), format_seconds(token[name].median)]
        cells += map(format_bytes, (result.cache_bytes, result.peak_bytes, result.weights_bytes))
        rows.append([*start, *cells, *map(format_ratio, ratios)])
    return rows


def report(groups: dict[str, list[Result]], machine: dict, settings: dict) -> str:
    """All results in Markdown, with a table for each number of beams."""
    results = [result for group in groups.values() for result in group]
    names = list(dict.fromkeys(result.case.contestant for result in results))
    parts = ["# Decoding\n", describe(machine, settings)]
    parts += ["\n".join(f"- `{name}`: {find_contestant(name).label}" for name in names) + "\n"]
    parts += [TIMED.format(max(result.case.new_tokens for result in results))]
    for dtype, beams in dict.fromkeys((result.case.dtype, result.case.beams) for result in results):
        title = "greedy" if beams == 1 else f"{beams} beams"
        same = [group for group in groups.values() if (group[0].case.dtype, group[0].case.beams) == (dtype, beams)]
        rows = [row for group in same for row in rows_of_group(group)]
        parts += [f"## {title}, {dtype}\n", table(HEAD, rows, text_columns=2)]
    return "\n".join(parts)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="decoding", help="name of the reports (default: decoding)")
    parser.add_argument(
        "--contestants", type=contestant_names, default="ours,writers",
        help="names and groups, comma-separated (default: ours,writers)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=numbers, default="1024,4096", help="tokens of the source (default: 1024,4096)"
    )
    parser.add_argument("--beams", type=numbers, default="1,4", help="1 for greedy (default: 1,4)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to write, at least 2 (default: 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add_size_argument(parser)
    add_plan_arguments(parser, rounds=3, budget=120)
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        parser.error(f"--new-tokens must be at least 2, got {args.new_tokens}: the time of one more token is measured")
    return args


def main(argv: Sequence[str] | None = None) -> str:
    args = parse_args(argv)
    plan = make_plan(args, positions=max(*args.lengths, args.new_tokens + 1))
    machine = describe_machine("cpu", args.threads)
    settings = {**describe_plan(args, plan), "new tokens": args.new_tokens}
    print(describe(machine, settings))
    store = Store(args.results / f"{args.name}.json", machine, settings)
    with Workers(plan) as workers:
        run_groups(workers, store, make_groups(args))
    text = report(store.groups, machine, settings)
    write_atomically(args.results / f"{args.name}.md", text)
    print("\n" + text)
    return text


if __name__ == "__main__":
    main()
