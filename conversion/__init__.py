"""The converter: an LSG-ALBERT from an ALBERT, as a function and as the command `lsg-albert convert`.

Nothing is imported before it is asked for, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert_checkpoint
    from .files import ConversionError
    from .options import ConversionOptions
    from .report import Report
    from .tensors import convert_state_dict

__all__ = ["ConversionError", "ConversionOptions", "Report", "convert_checkpoint", "convert_state_dict"]
_MODULES = {
    "ConversionError": "files",
    "ConversionOptions": "options",
    "Report": "report",
    "convert_checkpoint": "convert",
    "convert_state_dict": "tensors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
