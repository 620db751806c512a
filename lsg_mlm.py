"""The parts of heads: scores of the vocabulary, with weights that have two names, and scores of the sentence order.

The models with heads are in modeling_lsg_albert.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_lsg_albert import LSGAlbertConfig
from .lsg_encoder import get_activation


class LSGAlbertMLMHead(nn.Module):
    """Scores of the vocabulary for every token."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.activation = get_activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)."""
        return self.decoder(self.LayerNorm(self.activation(self.dense(hidden_states))))

    def _tie_weights(self) -> None:
        # Only transformers 4 calls this. `__init__` does not tie the two names: if they are one parameter on the meta
        # device already, transformers 5 counts the bias as loaded even if the file has neither name.
        self.decoder.bias = self.bias


class LSGAlbertSOPHead(nn.Module):
    """Scores of the sentence order."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """(batch, hidden_size) -> (batch, num_labels)."""
        return self.classifier(self.dropout(pooled))


def classifier_dropout(config: LSGAlbertConfig) -> nn.Dropout:
    """The dropout before a classifier."""
    own = config.classifier_dropout_prob
    return nn.Dropout(config.hidden_dropout_prob if own is None else own)


class WithMLMHead:
    """Methods for a model whose head `predictions` shares the word embeddings. They extend `PreTrainedModel`."""

    accepts_loss_kwargs = True  # `Trainer` passes `num_items_in_batch`
    # transformers 5 reads {target: source}; transformers 4 reads only the keys.
    _tied_weights_keys = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # Only transformers 5 calls this. The bias has two names even if `tie_word_embeddings` is False.
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        return {**tied, "predictions.decoder.bias": "predictions.bias"}

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        # A file holds the bias under one name, and loading may have set the parameter under that name alone.
        if self.predictions.bias.is_meta and not self.predictions.decoder.bias.is_meta:
            self.predictions.bias = self.predictions.decoder.bias
        super().tie_weights(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Linear:
        return self.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.predictions.decoder = new_embeddings
        self.predictions.bias = new_embeddings.bias
