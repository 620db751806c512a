"""LSG-ALBERT: ALBERT with local + sparse + global attention, for documents of thousands of tokens."""

from .configuration_lsg_albert import LSGAlbertConfig
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

__version__ = "0.1.0"
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
]
