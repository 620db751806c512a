"""Draw the training losses of one or more runs that followed each other, over the tokens read.

    python -m pretraining.curves runs/a/checkpoint-2000=8192 runs/b=8192 --output pretraining/results/training

A run is the output directory of a finished run, or a checkpoint, then the number of tokens in a step. The script writes
``OUTPUT.json`` (the points of the curves) and ``OUTPUT.png``. The picture needs ``pip install ".[plot]"``.
"""

from __future__ import annotations

import argparse
import json
import sys
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot  # noqa: E402

from pretraining.training_support import write_atomically  # noqa: E402

HISTORIES = {"history.json": "history", "trainer_state.json": "log_history"}  # file: field with the log


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and training losses from the log of a run or a checkpoint.

    Raises:
        ValueError: the folder holds no log, or the log no loss.
    """
    for name, field in HISTORIES.items():
        if (folder / name).is_file():
            lines = json.loads((folder / name).read_text())[field]
            losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
            if not losses:
                raise ValueError(f"{folder / name} holds no training loss: it needs at least one logged step")
            return losses
    raise ValueError(f"{folder} has neither {' nor '.join(HISTORIES)}: give a finished run or a checkpoint")


def join_curves(runs: list[tuple[str, int]]) -> list[dict]:
    """One curve for each (folder, tokens per step). A run begins after the tokens that the runs before it have read."""
    curves, before = [], 0
    for folder, tokens_per_step in runs:
        losses = read_losses(Path(folder))
        points = [[before + step * tokens_per_step, loss] for step, loss in losses]
        curves.append({"run": Path(folder).as_posix(), "tokens_per_step": tokens_per_step, "points": points})
        before = points[-1][0]
    return curves


def draw(curves: list[dict]) -> bytes:
    """The curves as a PNG picture."""
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for curve in curves:
        tokens, losses = zip(*curve["points"], strict=True)
        axes.plot([number / 1e6 for number in tokens], losses, label=curve["run"])
    axes.set(xlabel="million tokens read", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    return picture.getvalue()


def parse_run(text: str) -> tuple[str, int]:
    folder, _, tokens = text.rpartition("=")
    if not folder or not tokens.isdigit() or int(tokens) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not RUN=TOKENS_PER_STEP, such as runs/a=8192")
    return folder, int(tokens)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=parse_run, help="RUN=TOKENS_PER_STEP, in the order of training")
    parser.add_argument("--output", type=Path, required=True, help="path of the files, without .json and .png")
    args = parser.parse_args(argv)
    try:
        curves = join_curves(args.runs)
        write_atomically(args.output.with_suffix(".json"), (json.dumps(curves) + "\n").encode())
        write_atomically(args.output.with_suffix(".png"), draw(curves))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
