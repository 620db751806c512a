"""A pytest plugin that takes out of transformers what it has announced to remove, as far as this release has it.

`pytest -p release_to_come` then shows what would break: 5.24 announces these removals for 5.40 and 6.0.
"""

import warnings
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import ModelOutput, generic

OUTPUT_FIELDS = [
    name for name in ("past_key_values", "cache_params") if isinstance(vars(ModelOutput).get(name), property)
]
METHODS = [
    f"gradient_checkpointing_{verb}"
    for verb in ("enable", "disable")
    if hasattr(PreTrainedModel, f"activation_checkpointing_{verb}")
]


def gone(*args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"called what the next release will not have: {args[1:]} {kwargs}")


def refuse_old_names(kwargs: dict[str, Any]) -> None:
    if old := kwargs.keys() & {"past_key_values", "cache_params"}:
        raise TypeError(f"unexpected keyword arguments {sorted(old)}")


def pytest_configure() -> None:
    for name in OUTPUT_FIELDS:
        delattr(ModelOutput, name)
        ModelOutput._replace_old_cache_name = lambda self, key: key
        generic._rename_kwargs_for_bc = refuse_old_names
    for name in METHODS:
        setattr(PreTrainedModel, name, gone)
    # What renames an argument on the way only warns.
    warnings.filterwarnings(
        "error", message=".*(past_key_values|gradient_checkpointing).* deprecated", category=FutureWarning
    )


def pytest_report_header() -> str:
    return f"without {', '.join(OUTPUT_FIELDS + METHODS) or 'anything: nothing is announced'}"
