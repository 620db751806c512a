"""The converter makes an LSG-ALBERT from an ALBERT, BERT or related model: a function, and `lsg-albert convert`.

As in the package itself, a module is imported only when a name is used, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert_checkpoint
    from .files import ConversionError
    from .options import ConversionOptions
    from .tensors import convert_state_dict

__all__ = ["ConversionError", "ConversionOptions", "convert_checkpoint", "convert_state_dict"]
_MODULES = dict(zip(__all__, ["files", "options", "convert", "tensors"], strict=True))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
