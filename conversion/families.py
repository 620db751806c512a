"""The families of encoders that can be converted. A family is data: how its checkpoints differ from ALBERT's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """The checkpoints of one `model_type`.

    Args:
        model_type: as in config.json.
        class_name: what the names of its classes begin with, such as "Albert" in `AlbertForMaskedLM`.
        prefix: what stands before the tensors of the base model in a model with a head.
        cls_id, mask_id: ids of these tokens in its vocabularies, for sources without a tokenizer.
        vocabularies: files that hold a vocabulary, and the class that reads each if no other file names one.
        tensors: regular expressions with their replacements, applied in order, that turn a tensor's name (without
            `prefix`) into ALBERT's.
        fields: names of fields in its config.json that ALBERT has under another name, which is the value.
    """

    model_type: str
    class_name: str
    prefix: str
    cls_id: int
    mask_id: int
    vocabularies: Mapping[str, str]
    tensors: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)

    def tensor_name(self, name: str) -> str:
        """ALBERT's name, without prefix, of a tensor of this family, without prefix."""
        for pattern, replacement in self.tensors.items():
            name = re.sub(pattern, replacement, name)
        return name


ALBERT = Family(
    model_type="albert",
    class_name="Albert",
    prefix="albert.",
    cls_id=2,
    mask_id=4,
    vocabularies={
        "spiece.model": "AlbertTokenizer",
        "tokenizer.json": "AlbertTokenizer",
        "vocab.txt": "BertTokenizer",
    },
)
FAMILIES = {family.model_type: family for family in (ALBERT,)}
