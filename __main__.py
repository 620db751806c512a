"""The command line: `lsg-albert convert SOURCE TARGET` and `lsg-albert export-onnx MODEL FILE`.

`python -m lsg_albert` does the same. Each command imports only what it needs, so help and errors appear at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .conversion.options import PLACES, add_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    options = vars(make_parser().parse_args(arguments))
    del options["command"]
    run = options.pop("run")
    try:
        run(**options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def convert(report: Path | None, push_to_hub: str | None, private: bool, **options: Any) -> None:
    """Convert a checkpoint and print the report."""
    from huggingface_hub.utils import disable_progress_bars

    from .conversion.convert import convert_checkpoint, push

    if not sys.stderr.isatty():
        disable_progress_bars()  # for downloads and uploads; our own bars detect a terminal themselves
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


def check_writable(report_file: Path, target: Path) -> None:
    """Raise `OSError` before the work begins if the report cannot be written."""
    if report_file.resolve().parent != target.resolve():  # the target is created later
        with report_file.open("a"):
            pass


def export_onnx(model: str, file: Path, architecture: str | None) -> None:
    """Write an ONNX file and print how much its outputs differ from the model's."""
    from . import onnx_export

    for length, difference in onnx_export.export_onnx(model, file, architecture).items():
        print(f"{length:,} tokens: outputs within {difference:.1e} of the model's")
    print(f"wrote {file}")


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser("lsg-albert", description="LSG-ALBERT: ALBERT for long documents.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    conversion = commands.add_parser(
        "convert",
        help="make an LSG-ALBERT from an ALBERT, BERT, RoBERTa, ...",
        description="Make an LSG-ALBERT from a checkpoint of ALBERT, BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT "
        "or ELECTRA.",
    )
    conversion.add_argument("source", metavar="SOURCE", help="a directory, or the name of a repository on the Hub")
    conversion.add_argument("target", metavar="TARGET", help="the directory to create")
    groups = add_options(conversion)
    groups[PLACES].add_argument(
        "--report", type=Path, metavar="FILE", help="also write the report to this file, as JSON"
    )
    conversion.set_defaults(run=convert)
    onnx = commands.add_parser(
        "export-onnx",
        help="write the ONNX file of an LSG-ALBERT",
        description="Write the ONNX file of an LSG-ALBERT, for texts of any length, and compare it with the model.",
    )
    onnx.add_argument("model", metavar="MODEL", help="a directory, or the name of a repository on the Hub")
    onnx.add_argument("file", metavar="FILE", type=Path, help="the file to write; an existing file is replaced")
    onnx.add_argument("--architecture", metavar="CLASS", help="LSGAlbertForX or LSGAlbertModel (default: MODEL's)")
    onnx.set_defaults(run=export_onnx)
    return parser


if __name__ == "__main__":
    sys.exit(main())
