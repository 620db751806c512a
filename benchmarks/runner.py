"""The runner controls the workers, one process per contestant. It calls them in rounds and keeps results in a file."""

import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import ROOT
from benchmarks.cases import Case, Result, Size, result_from_json, result_to_json
from benchmarks.worker import Call, Failure, Setup, available_memory, serve

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Plan:
    """How a run measures.

    Args:
        size: the sizes of the models.
        positions: the longest input in tokens.
        threads: of every worker.
        rounds: timed calls per case, in addition to the first one.
        budget: seconds of computing after which a case gets no further round.
        limit: seconds after which a single call is stopped and its case fails.
    """

    size: Size
    positions: int
    threads: int
    rounds: int
    budget: float
    limit: float


class Workers:
    """The contestants' processes. A process is started when it is first needed, and again after it has died."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.running: dict[str, tuple[Any, Any]] = {}
        # Workers are forked from a process that has imported everything. They start at once and share its memory.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(["benchmarks.worker"])

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self.running):
            self.stop(name)

    def start(self, name: str) -> tuple[Any, Any]:
        ours, theirs = self.context.Pipe()
        setup = Setup(name, self.plan.size, self.plan.positions, self.plan.threads)
        process = self.context.Process(target=serve, args=(theirs, setup), daemon=False, name=f"benchmark {name}")
        process.start()
        theirs.close()
        return process, ours

    def stop(self, name: str) -> None:
        process, connection = self.running.pop(name)
        connection.close()
        process.join(1)
        if process.is_alive():
            process.kill()
            process.join()

    def ask(self, request: str, case: Case) -> Call | Failure | None:
        """Send a request to a contestant's worker. If it dies or does not answer, this is a `Failure` too."""
        name = case.contestant
        if name not in self.running:
            self.running[name] = self.start(name)
        process, connection = self.running[name]
        try:
            connection.send((request, case))
            if connection.poll(self.plan.limit):
                return connection.recv()
            failure = Failure(f"stopped after {self.plan.limit:.0f} s")
        except (EOFError, OSError):
            process.join()
            failure = Failure(death_of(process.exitcode))
        self.stop(name)
        return failure


def death_of(exitcode: int | None) -> str:
    if exitcode == -9:
        return "the process was killed (signal 9), as the kernel does when memory runs out"
    return f"the process died with exit code {exitcode}"


@dataclass
class _Progress:
    """The results of a case so far."""

    first: Call | None = None
    calls: dict[int, Call] = field(default_factory=dict)
    spent: float = 0.0
    error: str | None = None

    def add(self, round_number: int, answer: Call | Failure) -> None:
        if isinstance(answer, Failure):
            self.error = answer.error
            return
        self.spent += answer.seconds
        if round_number == 0:
            self.first = answer
        else:
            self.calls[round_number] = answer

    def goes_on(self, budget: float) -> bool:
        """Whether another call fits into the budget. It takes at most as long as the first one."""
        return self.error is None and self.spent + self.first.seconds <= budget

    def result(self, case: Case, code: str) -> Result:
        if self.error is not None:
            return Result(case, {}, error=self.error, code=code)
        calls = self.calls or {0: self.first}
        peaks = [call.peak_bytes for call in calls.values() if call.peak_bytes is not None]
        seconds = {number: call.seconds for number, call in calls.items()}
        peak_bytes, first = max(peaks, default=None), self.first
        return Result(case, seconds, peak_bytes, first.weights_bytes, code=code, cache_bytes=first.cache_bytes)


def measure_group(workers: Workers, cases: list[Case], code: str, say: Callable[[str], None] = print) -> list[Result]:
    """Measure cases in turn: every round calls each case once, and each round begins with another case.

    Only one worker computes at a time. A case stops early once its budget is used up, and at its first failure.
    """
    plan = workers.plan
    progress = {case: _Progress() for case in cases}
    for case in cases:
        progress[case].add(0, workers.ask("prepare", case))
        first = progress[case].first
        say(f"  {case}: " + (f"{first.seconds:.2f} s" if first else f"FAILED: {progress[case].error}"))
    for round_number in range(1, plan.rounds + 1):
        turn = round_number % len(cases)
        for case in cases[turn:] + cases[:turn]:
            if progress[case].goes_on(plan.budget):
                progress[case].add(round_number, workers.ask("measure", case))
                if progress[case].error is not None:
                    say(f"  {case}: FAILED in round {round_number}: {progress[case].error}")
    for case in cases:
        if case.contestant in workers.running:
            workers.ask("finish", case)
    return [progress[case].result(case, code) for case in cases]


def seconds_of_case(seconds: float, plan: Plan) -> float:
    """The seconds of a whole case whose calls take `seconds` each."""
    calls = 1 + plan.rounds
    while calls > 1 and calls * seconds > plan.budget:
        calls -= 1
    return calls * seconds


def estimate_left(done: Iterable[Result], todo: Iterable[Case], plan: Plan) -> float | None:
    """A rough guess of the seconds that the cases in `todo` take, from the nearest results; None without results.

    Time is taken to be proportional to the tokens, and a training step to be three forward passes.
    """
    passes = {"training": 3, "backward": 3, "checkpointed": 4}
    good = [result for result in done if result.error is None]
    if not good:
        return None

    def distance(result: Result, case: Case) -> tuple:
        other = result.case
        unlike = [
            getattr(other, name) != getattr(case, name) for name in ("contestant", "mode", "dtype", "new_tokens")
        ]
        return *unlike, abs(other.tokens - case.tokens)

    total = 0.0
    for case in todo:
        nearest = min(good, key=lambda result, case=case: distance(result, case))
        scale = case.tokens / nearest.case.tokens * passes.get(case.mode, 1) / passes.get(nearest.case.mode, 1)
        total += seconds_of_case(nearest.median * scale, plan)
    return total


def processor_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def total_memory(device: str) -> int | None:
    """Bytes of the machine, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Facts about the machine that a reader of the numbers needs."""
    memory, free = total_memory(device), available_memory()
    return {
        "device": device,
        "processor": processor_name(device),
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability() if device == "cpu" else None,
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "free_memory_gib_at_start": None if free is None else round(free / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "commit": git_commit(),
    }


def git_commit() -> str:
    """The commit of the checkout, with "+changes" if its Python files differ from it; "unknown" without git."""
    try:
        kind = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **kind).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "-uno", "--", "*.py"], **kind).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def code_digest() -> str:
    """A digest of our model's modules, which tells results of different code apart."""
    digest = hashlib.sha256()
    for pattern in ("configuration_*.py", "lsg_*.py", "modeling_*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """A run's results in a JSON file, which is written after every group, so that a stopped run can continue.

    Results of other code are dropped and measured again.
    """

    def __init__(self, path: Path, machine: dict, settings: dict):
        self.path, self.machine, self.settings = path, machine, settings
        self.code = code_digest()
        self.groups: dict[str, list[Result]] = {}
        if path.exists():
            self._load()

    def _load(self) -> None:
        data = json.loads(self.path.read_text(encoding="utf-8"))
        kept = {"settings": self.settings, "threads": self.machine["threads"], "processor": self.machine["processor"]}
        found = {"settings": data["settings"]} | {name: data["machine"][name] for name in ("threads", "processor")}
        if found != kept:
            raise SystemExit(
                f"{self.path} was measured with other settings ({found}, now {kept}): choose another --name."
            )
        for name, group in data["groups"].items():
            results = [result_from_json(result) for result in group]
            if all(result.code == self.code for result in results):
                self.groups[name] = results

    def has(self, name: str, cases: Iterable[Case]) -> bool:
        """Whether all these cases of a group have been measured. Cases of a group are measured together."""
        return set(cases) <= {result.case for result in self.groups.get(name, [])}

    def add(self, name: str, results: list[Result]) -> None:
        """Add or replace a group, and write the file."""
        self.groups[name] = results
        groups = {name: [result_to_json(result) for result in group] for name, group in self.groups.items()}
        data = {"machine": self.machine, "settings": self.settings, "groups": groups}
        write_atomically(self.path, json.dumps(data, indent=1) + "\n")

    @property
    def results(self) -> list[Result]:
        """The results of all groups."""
        return [result for group in self.groups.values() for result in group]


def write_atomically(path: Path, text: str) -> None:
    """Write a file. If this is interrupted, the old file stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def run_groups(
    workers: Workers, store: Store, groups: dict[str, list[Case]], say: Callable[[str], None] = print
) -> None:
    """Measure the groups of cases that the store lacks.

    A group is always measured as a whole, because only interleaved cases can be compared.
    """
    todo = {name: cases for name, cases in groups.items() if not store.has(name, cases)}
    say(f"{len(todo)} of {len(groups)} groups of cases to measure; results are in {store.path}")
    started = time.monotonic()
    while todo:
        name, cases = next(iter(todo.items()))
        say(f"{name}: {len(cases)} cases, {(time.monotonic() - started) / 60:.1f} minutes so far")
        store.add(name, measure_group(workers, cases, store.code, say))
        del todo[name]
        left = estimate_left(store.results, [case for later in todo.values() for case in later], workers.plan)
        if left:
            say(f"  about {left / 60:.0f} minutes left")
