"""What pytest finds here, wherever and whenever it looks: the workers of `pytest -n` must all find the same tests."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT


def test_the_root_is_no_package_of_tests(request):
    """Its `__init__.py` would be imported as a module of the folder's name, and a clone may have any name."""
    assert not any(isinstance(collector, pytest.Package) for collector in request.node.listchain())


def collected(folder, hash_seed: int) -> list[str]:
    """The ids of all tests, found from a folder with a seed of the hashes of strings."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", ROOT / "tests"],
        cwd=folder, env={**os.environ, "PYTHONHASHSEED": str(hash_seed)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition("tests/")[2] for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_collection_depends_on_neither_clock_nor_hashes_nor_folder(tmp_path):
    found = collected(ROOT, hash_seed=1)
    assert len(found) > 1000 and len(set(found)) == len(found)
    assert collected(tmp_path, hash_seed=2) == found
