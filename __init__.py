"""LSG-ALBERT: ALBERT with local + sparse + global attention, for documents of thousands of tokens.

`lsg_attention` and `LSGPattern` are the attention alone, on plain tensors. `import lsg_albert` imports neither torch
nor transformers. They are imported when one of the names below is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_lsg_albert import LSGAlbertConfig
    from .lsg_functional import lsg_attention
    from .lsg_pattern import LSGPattern
    from .modeling_lsg_albert import (
        LSGAlbertForConditionalGeneration,
        LSGAlbertForMaskedLM,
        LSGAlbertForMultipleChoice,
        LSGAlbertForPreTraining,
        LSGAlbertForQuestionAnswering,
        LSGAlbertForSequenceClassification,
        LSGAlbertForTokenClassification,
        LSGAlbertModel,
        LSGAlbertPreTrainedModel,
    )

__version__ = "0.2.0"
__all__ = [
    "LSGAlbertConfig",
    "LSGAlbertForConditionalGeneration",
    "LSGAlbertForMaskedLM",
    "LSGAlbertForMultipleChoice",
    "LSGAlbertForPreTraining",
    "LSGAlbertForQuestionAnswering",
    "LSGAlbertForSequenceClassification",
    "LSGAlbertForTokenClassification",
    "LSGAlbertModel",
    "LSGAlbertPreTrainedModel",
    "LSGPattern",
    "lsg_attention",
]
_MODULES = {
    **dict.fromkeys(__all__, "modeling_lsg_albert"),
    "LSGAlbertConfig": "configuration_lsg_albert",
    "LSGPattern": "lsg_pattern",
    "lsg_attention": "lsg_functional",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES.values():
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
