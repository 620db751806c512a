"""The command `lsg-albert convert` in a clone, without installation: python convert_albert_to_lsg.py SOURCE TARGET"""

import importlib.util
import sys
from pathlib import Path


def import_clone() -> None:
    """Make the modules beside this file importable as `lsg_albert`, as if the package were installed."""
    root = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "lsg_albert", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    sys.modules["lsg_albert"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["lsg_albert"])


if __name__ == "__main__":
    import_clone()
    raise SystemExit(importlib.import_module("lsg_albert.__main__").main(["convert", *sys.argv[1:]]))
