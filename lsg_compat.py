"""What differs between the releases of transformers, in one place: gradient checkpointing and caches."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput

# The cache has the same position in the outputs of all releases. Its name changed from `past_key_values` in 5.24.
CACHE_FIELD = fields(Seq2SeqLMOutput)[2].name
CACHE_NAMES = tuple(dict.fromkeys((CACHE_FIELD, "cache", "past_key_values")))

# Before 4.53, transformers has no such class: its models call the checkpointing function themselves.
try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:

    class GradientCheckpointingLayer(nn.Module):
        """A layer that forgets its activations in training and computes them again for the backward pass."""

        gradient_checkpointing = False

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)
            return super().__call__(*args, **kwargs)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether the layers of a model forget their activations in training and compute them again."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second until 5.23
    return getattr(model, next(name for name in names if hasattr(type(model), name)))


def find_cache(arguments: Iterable[Any]) -> Cache | None:
    """The cache among the arguments of a step of `generate`, under any name; None if there is none.

    `generate` may pass an empty cache of its own beside the caller's, so the longest cache is returned.
    """
    caches = [argument for argument in arguments if isinstance(argument, Cache)]
    return max(caches, key=lambda cache: cache.get_seq_length(), default=None)


def as_encoder_decoder_cache(cache: Any) -> EncoderDecoderCache:
    """A cache with a part for self-attention and one for cross-attention, made from any cache that a caller may pass.

    Args:
        cache: None for an empty cache; an `EncoderDecoderCache`, which is returned as it is; a `DynamicCache` for the
            self-attention alone; or, on transformers 4, the tuples that its `to_legacy_cache` makes.

    Raises:
        ValueError: `cache` is of another type. Caches of a fixed size are not supported.
    """
    if cache is None:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    if isinstance(cache, (tuple, list)) and hasattr(EncoderDecoderCache, "from_legacy_cache"):
        return EncoderDecoderCache.from_legacy_cache(cache)
    if isinstance(cache, DynamicCache):
        return EncoderDecoderCache(cache, DynamicCache())
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        if all(isinstance(part, DynamicCache) for part in parts):
            return cache
    raise ValueError(
        "`cache` (or `past_key_values`) must be an `EncoderDecoderCache` of two `DynamicCache`, as this model returns "
        f"it, got {type(cache).__name__}. In `generate`, leave `cache_implementation` out."
    )


def extend_cache(cache: DynamicCache, num_entries: int) -> None:
    """Make room for `num_entries` entries in an empty cache.

    `generate` of transformers 5 makes `num_hidden_layers` entries, but each inner layer of a layer needs its own.
    """
    entries = getattr(cache, "layers", None)  # a cache without such a list, or with an empty one, grows by itself
    if entries and cache.get_seq_length() == 0:
        entries.extend(deepcopy(entries[-1]) for _ in range(num_entries - len(entries)))


def cached(cache: DynamicCache, index: int) -> tuple[Tensor, Tensor] | None:
    """The keys and values (batch, heads, length, head_size) of an entry, or None while it is empty."""
    if cache.get_seq_length(index) == 0:
        return None
    return (cache.layers[index].keys, cache.layers[index].values) if hasattr(cache, "layers") else cache[index]
