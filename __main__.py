"""The command line: `lsg-albert convert SOURCE TARGET`, also as `python -m lsg_albert convert SOURCE TARGET`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .conversion.options import PLACES, add_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = vars(make_parser().parse_args(arguments))
    del options["command"]
    try:
        return convert(**options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing is written", file=sys.stderr)
        return 130


def convert(report: Path | None, push_to_hub: str | None, private: bool, **options) -> int:
    """Convert a checkpoint and print the report."""
    # Only here, as it takes seconds: help and wrong arguments are answered before.
    from huggingface_hub.utils import disable_progress_bars

    from .conversion.convert import convert_checkpoint, push

    if not sys.stderr.isatty():
        disable_progress_bars()  # those of downloads and uploads; ours see by themselves that there is no terminal
    if report is not None:
        check_writable(report, Path(options["target"]))
    done = convert_checkpoint(**options)
    if report is not None:
        done.save(report)  # before a push, which may fail
    if push_to_hub is not None:
        done.pushed_to = push(Path(done.target), push_to_hub, options["token"], private)
        if report is not None:
            done.save(report)
    print(done.text())
    return 0


def check_writable(report_file: Path, target: Path) -> None:
    """Refuse a place for the report before the work begins, not after."""
    if report_file.resolve().parent != target.resolve():  # which is still to be made
        with report_file.open("a"):
            pass


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser("lsg-albert", description="LSG-ALBERT: ALBERT for long documents.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser(
        "convert",
        help="make an LSG-ALBERT from an ALBERT, BERT, RoBERTa, ...",
        description="Make an LSG-ALBERT from a checkpoint of ALBERT, BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT "
        "or ELECTRA.",
    )
    convert.add_argument("source", metavar="SOURCE", help="a directory, or the name of a repository on the Hub")
    convert.add_argument("target", metavar="TARGET", help="the directory to make")
    groups = add_options(convert)
    groups[PLACES].add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
