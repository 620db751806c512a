"""What CONTRIBUTING.md says about the files is true of them."""

import re

import pytest

from helpers import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[`(\w+)`\]\(([\w/.]+)#L(\d+)\)", TEXT)


def test_there_are_links():
    assert len(LINKS) >= 8


@pytest.mark.parametrize(("name", "file", "line"), LINKS, ids=lambda part: part)
def test_every_link_leads_to_the_line_that_defines_the_name(name, file, line):
    text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert re.match(rf"\s*(def |class )?{name}\b", text), f"{file}:{line} is: {text}"


def test_every_file_of_the_model_is_named():
    files = {path.name for pattern in ("lsg_*.py", "*_lsg_albert.py") for path in ROOT.glob(pattern)}
    assert files <= set(re.findall(r"`([\w.]+\.py)`", TEXT))
