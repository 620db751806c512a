"""The command line: `lsg-albert convert SOURCE TARGET` and `lsg-albert export-onnx MODEL FILE`, also as `python -m
lsg_albert ...`."""

import argparse
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from inspect import Parameter
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from . import __version__
from .checkpoint_conversion import DTYPES, convert_checkpoint, lsg_parameters, push
from .checkpoint_files import one_line
from .configuration_lsg_albert import LSGAlbertConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = vars(make_parser().parse_args(arguments))
    if options.pop("command") == "export-onnx":
        return write_onnx(**options)
    report_file: Path | None = options.pop("report")
    repository, private = options.pop("push_to_hub"), options.pop("private")
    if not sys.stderr.isatty():
        disable_progress_bars()  # those of downloads and uploads; ours see by themselves that there is no terminal
    try:
        if report_file is not None:
            check_writable(report_file, Path(options["target"]))
        report = convert_checkpoint(**options)
        if report_file is not None:
            report.save(report_file)  # before a push, which may fail
        if repository is not None:
            report.pushed_to = push(Path(report.target), repository, options["token"], private)
            if report_file is not None:
                report.save(report_file)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing is written", file=sys.stderr)
        return 130
    print(report.text())
    return 0


def write_onnx(model: str, file: Path, architecture: str | None) -> int:
    """Write an ONNX file; returns the exit code."""
    from .onnx_export import export_onnx

    try:
        differences = export_onnx(model, file, architecture)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    for length, difference in differences.items():
        print(f"{length:,} tokens: within {difference:.1e} of the model")
    print(f"written: {file}")
    return 0


def check_writable(report_file: Path, target: Path) -> None:
    """Refuse a place for the report before the work begins, not after.

    Raises:
        OSError: it cannot be written.
    """
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
        help="make an LSG-ALBERT from an ALBERT",
        description="Make an LSG-ALBERT from an ALBERT checkpoint.",
    )
    convert.add_argument("source", metavar="SOURCE", help="a directory, or the name of a repository on the Hub")
    convert.add_argument("target", metavar="TARGET", help="the directory to make")
    add_conversion_options(convert.add_argument_group("conversion"))
    add_lsg_parameters(
        convert.add_argument_group("attention pattern, by default that of an LSG source, else as given")
    )
    add_place_options(convert.add_argument_group("reading and writing"))
    onnx = commands.add_parser(
        "export-onnx",
        help="write the ONNX file of an LSG-ALBERT",
        description="Write the ONNX file of an LSG-ALBERT, for texts of any length, and compare it with the model.",
    )
    onnx.add_argument("model", metavar="MODEL", help="a directory, or the name of a repository on the Hub")
    onnx.add_argument("file", metavar="FILE", type=Path, help="to write or to replace")
    onnx.add_argument(
        "--architecture", metavar="CLASS", help="LSGAlbertForX or LSGAlbertModel; by default the model's"
    )
    return parser


def add_conversion_options(group: argparse._ArgumentGroup) -> None:
    """What `convert_checkpoint` has of its own."""
    group.add_argument(
        "--max-length", type=int, default=4096, metavar="N", help="longest text, in tokens (%(default)s)"
    )
    group.add_argument("--architecture", metavar="CLASS", help="AlbertForX or LSGAlbertForX; by default the source's")
    group.add_argument("--random-global-init", action="store_true", help="global tokens from random words, not [MASK]")
    group.add_argument(
        "--global-positional-stride", type=int, default=64, metavar="N",
        help="positions between one global token and the next (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--keep-first-global-token",
        action="store_true",
        help="keep an LSG source's first global token, remake the others",
    )
    group.add_argument(
        "--resize-lsg", action="store_true", help="keep an LSG source's global tokens, change its positions"
    )
    group.add_argument(
        "--no-token-type", dest="use_token_type", action="store_false", help="leave token type 0 out of global tokens"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (%(default)s)")
    group.add_argument("--dtype", choices=DTYPES, help="of the result's weights; by default the source's")
    group.add_argument("--bos-token-id", type=int, metavar="ID", help="token of the first global token")
    group.add_argument("--mask-token-id", type=int, metavar="ID", help="token of the other global tokens")


def add_lsg_parameters(group: argparse._ArgumentGroup) -> None:
    """One option for each parameter that `LSGAlbertConfig` has and ALBERT has not. The class checks the values."""
    for name, parameter in lsg_parameters().items():
        flag, text = "--" + name.replace("_", "-"), describe(name)
        if parameter.annotation is bool:
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{text} ({parameter.default})",
            )
        else:
            group.add_argument(
                flag,
                type=reader(parameter),
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{text} ({parameter.default})",
            )


def reader(parameter: Parameter) -> Callable[[str], int | str | None]:
    """Reads a value of the parameter's type; where that allows `None`, the word "none" stands for it."""
    is_union = typing.get_origin(parameter.annotation) in (types.UnionType, typing.Union)
    allowed = typing.get_args(parameter.annotation) if is_union else (parameter.annotation,)
    (kind,) = set(allowed) - {types.NoneType}

    def read(text: str) -> int | str | None:
        return None if types.NoneType in allowed and text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return read


def describe(name: str) -> str:
    """What the configuration's docstring says about a parameter, in a form for argparse."""
    found = re.search(rf"^ *{name} \(.*?\):\n((?: {{12,}}.*\n)+)", LSGAlbertConfig.__doc__ or "", re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".").replace("`", "").replace("%", "%%") if found else ""


def add_place_options(group: argparse._ArgumentGroup) -> None:
    """Where things come from and go."""
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a source on the Hub")
    group.add_argument("--token", help="for the Hub; by default the one that you are logged in with")
    group.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    group.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights (%(default)s)")
    group.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare TARGET with SOURCE")
    group.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON too")
    group.add_argument("--push-to-hub", metavar="REPOSITORY", help="upload TARGET to the Hub")
    group.add_argument("--private", action="store_true", help="make the repository on the Hub a private one")


if __name__ == "__main__":
    sys.exit(main())
