"""Softmax attention of queries that all see the same keys: the kernels to choose from, and their gradient."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention by torch's fused kernel: (..., Q, D), (..., K, D), (..., K, E) -> (..., Q, E).

    `bias` (..., 1, K) is added to the scores; `dropout` is the share of weights dropped.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """The same as `sdpa_attention`, with matrix products and an explicit softmax."""
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2) + bias  # division first: no float16 overflow
    return drop(scores.softmax(-1), dropout) @ value


def drop(weights: Tensor, dropout: float) -> Tensor:
    """Apply dropout unless it is 0: exporters do not see that a dropout of 0 changes nothing."""
    return F.dropout(weights, dropout) if dropout else weights


def attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grad_context: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value in `sdpa_attention` without dropout, from the gradient of its context.

    torch's fused kernel computes them. In half precision, plain products do it, because the kernel takes twice as
    long on the CPU.
    """
    if query.element_size() > 2:
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            context = sdpa_attention(*inputs, bias)
        return torch.autograd.grad(context, inputs, grad_context)
    query = query / math.sqrt(query.shape[-1])
    weights = (query @ key.mT).add_(bias).softmax(-1)
    grad_scores = (grad_context @ value.mT).mul_(weights)
    grad_scores.addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)  # the softmax's own gradient
    grad_query = grad_scores @ key / math.sqrt(query.shape[-1])
    return grad_query, grad_scores.mT @ query, weights.mT @ grad_context


# FlexAttention itself is for blocks (lsg_flex.py). If every token sees every other, it has no keys to skip. In a graph
# for any length it cannot be used either, because the tiles of its mask are laid out for a single length.
ATTENTION_FUNCTIONS = {"sdpa": sdpa_attention, "eager": eager_attention, "flex_attention": sdpa_attention}


def visibility_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias that is added to scores: 0 for visible keys, minus infinity for others."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -math.inf)
