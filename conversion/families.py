"""The families of encoders that can be converted. A family is data: how its checkpoints differ from ALBERT's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """The checkpoints of one `model_type`."""

    model_type: str
    class_name: str  # what the names of its classes begin with, such as "Albert" in `AlbertForMaskedLM`
    prefix: str  # what stands before the tensors of the base model in a model with a head
    cls_id: int  # in its vocabularies, for sources without a tokenizer
    mask_id: int
    vocabularies: Mapping[str, str]  # files that hold one: the class that reads it if no other file names a class
    # Regular expressions and replacements, applied in order, that make ALBERT's name of a tensor's (without prefix).
    tensors: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)  # of config.json: ALBERT's name, where that is another

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
