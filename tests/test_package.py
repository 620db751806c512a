"""The installed package: what it exports, and what importing it does."""

import re

import pytest

import lsg_albert
from conftest import ROOT
from helpers import run_in_new_process
from lsg_albert.configuration_lsg_albert import ATTN_IMPLEMENTATIONS, AUTO_MAP
from lsg_albert.lsg_softmax import ATTENTION_FUNCTIONS

tomllib = pytest.importorskip("tomllib", reason="it comes with Python 3.11")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

_IMPORT = """
import importlib.util, pathlib, torch, transformers
transformers.PreTrainedModel, transformers.PretrainedConfig  # what they import and read is theirs
root = pathlib.Path(sys.argv[1])
touched = []
def note(event, args):
    if event == "open" and (args[1] or "r").strip("bt") != "r":
        touched.append(str(args[0]))
sys.dont_write_bytecode = True
sys.addaudithook(note)
spec = importlib.util.spec_from_file_location("lsg_albert", root / "__init__.py", submodule_search_locations=[str(root)])
package = sys.modules["lsg_albert"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
assert package.LSGAlbertModel and not touched, touched
"""


def test_importing_reaches_for_no_network_and_writes_no_file(tmp_path):
    done = run_in_new_process(_IMPORT, ROOT, cwd=tmp_path, modules_cache=tmp_path / "modules")
    assert done.returncode == 0, done.stderr


def test_all_public_classes_are_exported():
    assert {target.split(".")[1] for target in AUTO_MAP.values()} <= set(lsg_albert.__all__)
    assert all(hasattr(lsg_albert, name) for name in lsg_albert.__all__)


def test_names_that_stand_in_two_places_agree():
    assert set(ATTN_IMPLEMENTATIONS) == set(ATTENTION_FUNCTIONS)
    assert PYPROJECT["project"]["version"] == lsg_albert.__version__


def test_every_module_of_the_root_is_packaged():
    packaged = {name.removeprefix("lsg_albert.") for name in PYPROJECT["tool"]["setuptools"]["py-modules"]}
    assert packaged == {path.stem for path in ROOT.glob("*.py")} - {"__init__", "noxfile"}


def test_modeling_imports_every_module_of_the_remote_code_itself():
    """Older transformers (5.0.0 and before) copy only what the file itself imports, not what those modules import."""

    def imported_by(name):
        found = re.findall(r"^from \.(\w+) import", (ROOT / f"{name}.py").read_text(encoding="utf-8"), re.MULTILINE)
        return {*found}

    needed = imported_by("modeling_lsg_albert")
    assert set().union(*(imported_by(name) for name in needed)) <= needed
