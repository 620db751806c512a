"""What models return: output classes, selected states, losses."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_lsg_albert import check_problem_type


@dataclass
class LSGAlbertModelOutput(BaseModelOutputWithPooling):
    """
    Output of [`LSGAlbertModel`]: ALBERT's output, and the states of the global tokens.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The text tokens' last states. With `pool_with_global`, the first is that of the first global token.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, *optional*):
            The first state of `last_hidden_state` after the pooler.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            `num_hidden_layers + 1` states of the shape of `last_hidden_state`, from the embeddings on.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            The effective attention maps of the `num_hidden_layers * inner_group_num` layers, `(batch_size,
            num_attention_heads, num_global_tokens + sequence_length, num_global_tokens + sequence_length)`, global
            tokens first. Every row sums to 1.
        global_hidden_states (`torch.FloatTensor` of shape `(batch_size, num_global_tokens, hidden_size)`):
            The global tokens' last states.
    """

    global_hidden_states: torch.FloatTensor | None = None


@dataclass
class LSGAlbertForPreTrainingOutput(ModelOutput):
    """
    Output of [`LSGAlbertForPreTraining`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Sum of the masked-language-model and the sentence-order loss, when both labels are given.
        prediction_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the vocabulary before softmax.
        sop_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Scores of the sentence order before softmax.
        hidden_states, attentions (*optional*):
            As in [`LSGAlbertModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    prediction_logits: torch.FloatTensor | None = None
    sop_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def wants_states(selection: bool | int | list[int] | None) -> bool:
    """Whether `output_hidden_states` asks for any states. Index 0 means the first states, not False."""
    return selection is not None and selection is not False


def select_states(
    hidden_states: list[Tensor], selection: bool | int | list[int] | None
) -> tuple[Tensor | None, ...] | None:
    """All states for True, None for False or None; for indices (negative ones too), None in place of the others."""
    if selection is None or isinstance(selection, bool):
        return tuple(hidden_states) if selection else None
    indices = [selection] if isinstance(selection, int) else selection
    chosen = {index % len(hidden_states) for index in indices if -len(hidden_states) <= index < len(hidden_states)}
    return tuple(states if i in chosen else None for i, states in enumerate(hidden_states))


def token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | float | None = None) -> Tensor:
    """Cross entropy of scores (..., classes) for labels (...), without labels of -100.

    It is the mean, or the sum divided by `num_items`: the number of labels in all batches of a training step.
    """
    logits, labels = logits.flatten(0, -2), labels.to(logits.device).flatten()
    if num_items is None:
        return F.cross_entropy(logits, labels)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(logits.device).flatten()[0]  # `DataParallel` hands a matrix to each device
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)) / num_items  # float16 would overflow


def span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross entropy of scores (batch, length) for positions (batch,) or (batch, 1).

    Positions past the end are left out. Negative positions count as 0.
    """
    length = logits.shape[1]
    return F.cross_entropy(logits, positions.to(logits.device).flatten().clamp(0, length), ignore_index=length)


def order_loss(logits: Tensor, order: Tensor, labels: Tensor, num_items: Tensor | float | None = None) -> Tensor:
    """Cross entropy of the sentence order: the mean over texts, or a sum as in `token_loss` if `num_items` is given.

    `Trainer` does not count texts. In the sum, a text therefore has the weight of its masked tokens, so that the loss
    does not depend on how a step is cut into batches.

    Args:
        logits: (batch, classes).
        order: (batch,) or (batch, 1), the class of each text.
        labels: (batch, length), the ids of the masked tokens, -100 elsewhere.
        num_items: the number of masked tokens in all batches of a training step.
    """
    if num_items is not None:
        logits = logits[:, None].expand(*labels.shape, -1)
        order = order.view(-1, 1).to(labels.device).where(labels != -100, -100)
    return token_loss(logits, order, num_items)


def text_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of a classifier of texts, or of a regression.

    Args:
        logits: (batch, labels).
        labels: (batch,) class indices; (batch, labels) of 0 and 1; or numbers.
        problem_type: "regression", "single_label_classification" or "multi_label_classification". With None, a single
            label means the first of these; otherwise, integers mean the second and floats the third.

    Raises:
        ValueError: `problem_type` is unknown.
    """
    check_problem_type(problem_type)  # it may have been set since the model was made
    labels = labels.to(logits.device)
    if problem_type is None and logits.shape[-1] == 1:
        problem_type = "regression"
    elif problem_type is None:
        problem_type = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
