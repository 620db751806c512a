"""The texts that the page starts with, and those that a user uploads."""

from pathlib import Path

LONG_EXAMPLE = (Path(__file__).resolve().parent.parent / "long_document.txt").read_text(encoding="utf-8")
EXAMPLE = "\n\n".join(LONG_EXAMPLE.split("\n\n")[2:6])  # paragraphs without a [MASK]
EXAMPLE_WORD = "century"
EXAMPLE_QUESTION = "How did the monks become rich?"
NAME_LENGTH = 40  # characters


def name_of(text: str) -> str:
    """A name for a pasted text: the start of its first line."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= NAME_LENGTH else line[: NAME_LENGTH - 1].rstrip() + "…"


def read_uploads(paths: list[str]) -> list[tuple[str, str]]:
    """Read the names and texts of uploaded files, and remove the files.

    Raises:
        ValueError: a file is not text in UTF-8.
    """
    files = [Path(path) for path in paths]
    try:
        return [(file.name, read_text(file)) for file in files]
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"“{file.name}” cannot be read: give a plain text file in UTF-8.") from error
