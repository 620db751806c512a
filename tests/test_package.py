"""The installed package: what it exports, and what importing it does."""

import ast
import re
from pathlib import Path

import pytest

import lsg_albert
from conftest import ROOT
from helpers import run_in_new_process
from lsg_albert import conversion
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


@pytest.mark.parametrize("package", [lsg_albert, conversion])
def test_what_is_imported_late_is_known_early(package):
    """To `dir`, to `import *`, and to type checkers, which read the imports under `TYPE_CHECKING`."""
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'LSGAlbert'"):
        _ = package.LSGAlbert
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert imported == {name: package._MODULES[name] for name in package.__all__}


def test_importing_the_package_imports_nothing_slow(tmp_path):
    code = """
import importlib.util
spec = importlib.util.spec_from_file_location("lsg_albert", sys.argv[1], submodule_search_locations=[sys.argv[2]])
package = sys.modules["lsg_albert"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
assert not {"torch", "transformers"} & sys.modules.keys()
assert package.modeling_lsg_albert.LSGAlbertModel is package.LSGAlbertModel
"""
    done = run_in_new_process(code, ROOT / "__init__.py", ROOT, cwd=tmp_path, modules_cache=tmp_path / "modules")
    assert done.returncode == 0, done.stderr


def test_exported_names_are_no_modules_whatever_has_been_imported(tmp_path):
    """A module of the same name would take a function's place as soon as anything imports it."""
    code = """
import importlib, importlib.util, types
spec = importlib.util.spec_from_file_location("lsg_albert", sys.argv[1], submodule_search_locations=[sys.argv[2]])
package = sys.modules["lsg_albert"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
before = {name: getattr(package, name) for name in package.__all__}
assert isinstance(before["lsg_attention"], types.FunctionType)
for module in sys.argv[3:]:
    importlib.import_module(f"lsg_albert.{module}")
assert all(getattr(package, name) is value for name, value in before.items())
from lsg_albert import LSGPattern, lsg_attention
assert lsg_attention is before["lsg_attention"] and LSGPattern is before["LSGPattern"]
"""
    modules = sorted({path.stem for path in ROOT.glob("*.py")} - {"__init__", "noxfile"})
    places = (ROOT / "__init__.py", ROOT, *modules)
    done = run_in_new_process(code, *places, cwd=tmp_path, modules_cache=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    assert not set(lsg_albert.__all__) & set(modules)


def test_names_that_stand_in_two_places_agree():
    assert set(ATTN_IMPLEMENTATIONS) == set(ATTENTION_FUNCTIONS)
    assert PYPROJECT["project"]["version"] == lsg_albert.__version__


def test_every_module_of_the_root_is_packaged():
    packaged = {name.removeprefix("lsg_albert.") for name in PYPROJECT["tool"]["setuptools"]["py-modules"]}
    assert packaged == {path.stem for path in ROOT.glob("*.py")} - {"__init__", "noxfile"}
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert setuptools["packages"] == ["lsg_albert.conversion"] and (ROOT / "conversion" / "__init__.py").is_file()
    others = {path.name for path in (ROOT / "conversion").iterdir() if path.suffix not in (".py", "")} - {"README.md"}
    assert set(setuptools["package-data"]["lsg_albert.conversion"]) == others


def test_modeling_imports_every_module_of_the_remote_code_itself():
    """Older transformers (5.0.0 and before) copy only what the file itself imports, not what those modules import."""

    def imported_by(name):
        found = re.findall(r"^from \.(\w+) import", (ROOT / f"{name}.py").read_text(encoding="utf-8"), re.MULTILINE)
        return {*found}

    needed = imported_by("modeling_lsg_albert")
    assert set().union(*(imported_by(name) for name in needed)) <= needed
