"""Our classes in transformers' common tests of models; test_common_models.py runs this file in a process of its own.

`tests` is the package of that name in transformers' source distribution.
"""

import contextlib
import functools
import sys
import unittest
from types import ModuleType
from unittest import mock

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

import lsg_albert
from lsg_albert import (
    LSGAlbertConfig,
    LSGAlbertForConditionalGeneration,
    LSGAlbertForPreTraining,
    LSGAlbertPreTrainedModel,
)

CLASSES = {
    "": "LSGAlbertModel",
    "FOR_PRETRAINING_": "LSGAlbertForPreTraining",
    "FOR_MASKED_LM_": "LSGAlbertForMaskedLM",
    "FOR_SEQUENCE_CLASSIFICATION_": "LSGAlbertForSequenceClassification",
    "FOR_TOKEN_CLASSIFICATION_": "LSGAlbertForTokenClassification",
    "FOR_QUESTION_ANSWERING_": "LSGAlbertForQuestionAnswering",
    "FOR_MULTIPLE_CHOICE_": "LSGAlbertForMultipleChoice",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM_": "LSGAlbertForConditionalGeneration",
}
for kind, name in CLASSES.items():  # from which the tests conclude what labels a class takes
    getattr(modeling_auto, f"MODEL_{kind}MAPPING_NAMES")["lsg_albert"] = name
AutoModel.register(LSGAlbertConfig, lsg_albert.LSGAlbertModel)

# The source distribution has the files `tests/test_*.py` alone, without the folders from which these two come.
for module, mixin in {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}.items():
    package = f"tests.{module.partition('.')[0]}"
    sys.modules[package] = ModuleType(package)
    sys.modules[f"tests.{module}"] = ModuleType(f"tests.{module}")
    setattr(sys.modules[f"tests.{module}"], mixin, type(mixin, (), {}))

from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402


class Inputs:
    """What the tests ask of a "model tester": five blocks of text, with holes in the mask."""

    batch_size, seq_length, num_choices, num_labels = 3, 40, 4, 3
    is_training = True
    sizes = {
        "vocab_size": 120,
        "embedding_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "block_size": 8,
        "sparse_block_size": 8,
    }

    def __init__(self, is_encoder_decoder: bool):
        self.is_encoder_decoder = is_encoder_decoder
        vars(self).update(self.sizes)

    def get_config(self) -> LSGAlbertConfig:
        return LSGAlbertConfig(**self.sizes, is_encoder_decoder=self.is_encoder_decoder)

    def prepare_config_and_inputs_for_common(self) -> tuple[LSGAlbertConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "attention_mask": random_attention_mask(shape),
            "token_type_ids": ids_tensor(shape, 2),
        }
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids_tensor(shape, self.vocab_size)
            inputs["decoder_attention_mask"] = random_attention_mask(shape)
        return self.get_config(), inputs


class _Common(ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True  # which skips files without the year of a copyright

    def setUp(self) -> None:
        self.model_tester = Inputs(self.is_encoder_decoder)

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is LSGAlbertForPreTraining:  # ALBERT's own tests add these likewise
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs["sentence_order_label"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs

    def test_attention_outputs(self) -> None:
        """The maps have a row and a column for each global token, before those of the text."""
        tester = self.model_tester
        tester.encoder_seq_length = tester.key_length = tester.get_config().num_global_tokens + tester.seq_length
        super().test_attention_outputs()

    def test_can_set_attention_dynamically(self) -> None:
        """transformers looks for its own way to call attention in the source; our method needs no such thing."""
        with mock.patch.object(LSGAlbertPreTrainedModel, "_can_set_attn_implementation", return_value=True):
            super().test_can_set_attention_dynamically()

    def test_load_with_mismatched_shapes(self) -> None:
        """Saved with its code, a model is found by the Auto classes with `trust_remote_code=True` alone."""
        with contextlib.ExitStack() as stack:
            for auto_class in (AutoModel, AutoModelForSequenceClassification):
                load = functools.partial(auto_class.from_pretrained, trust_remote_code=True)
                stack.enter_context(mock.patch.object(auto_class, "from_pretrained", load))
            super().test_load_with_mismatched_shapes()


class EncoderTest(_Common, unittest.TestCase):
    all_model_classes = tuple(
        getattr(lsg_albert, name) for name in CLASSES.values() if name != "LSGAlbertForConditionalGeneration"
    )


class Seq2SeqTest(_Common, unittest.TestCase):
    all_model_classes = (LSGAlbertForConditionalGeneration,)
    is_encoder_decoder = True

    @pytest.mark.skip(reason="`GenerationTesterMixin` is not in the source distribution")
    def test_generation_tester_mixin_inheritance(self) -> None: ...

    @pytest.mark.skip(reason="it wants a warning for `past_key_values`, which is one of our two names of the cache")
    def test_bc_cache_name_forward(self) -> None: ...
