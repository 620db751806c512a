"""Benchmarks of LSG-ALBERT and its peers; see README.md in this folder.

Importing this package makes `lsg_albert` the checkout that contains this folder, even if another copy is installed.
So the benchmarks measure the code beside the scripts.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before transformers is imported anywhere: all weights are random, and nothing may wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _import_checkout() -> None:
    spec = importlib.util.spec_from_file_location(
        "lsg_albert", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["lsg_albert"] = package
    spec.loader.exec_module(package)


if "lsg_albert" not in sys.modules:  # the tests' conftest may have imported it already
    _import_checkout()
