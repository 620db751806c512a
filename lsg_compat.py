"""What differs between the releases of transformers, in one place."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

# Before 4.53 transformers has no such class; its models call the checkpointing function themselves.
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


def as_encoder_decoder_cache(past_key_values: Any) -> EncoderDecoderCache:
    """A cache with a part for self-attention and one for cross-attention, from whatever a caller may pass.

    Args:
        past_key_values: None for an empty cache; an `EncoderDecoderCache`, which is returned itself; a `DynamicCache`
            for the self-attention alone; or, on transformers 4, the tuples that its `to_legacy_cache` makes.

    Raises:
        ValueError: it is none of these. Caches of a fixed size are not supported.
    """
    if past_key_values is None:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    if isinstance(past_key_values, (tuple, list)) and hasattr(EncoderDecoderCache, "from_legacy_cache"):
        return EncoderDecoderCache.from_legacy_cache(past_key_values)
    if isinstance(past_key_values, DynamicCache):
        return EncoderDecoderCache(past_key_values, DynamicCache())
    if isinstance(past_key_values, EncoderDecoderCache):
        parts = (past_key_values.self_attention_cache, past_key_values.cross_attention_cache)
        if all(isinstance(part, DynamicCache) for part in parts):
            return past_key_values
    raise ValueError(
        "`past_key_values` must be an `EncoderDecoderCache` of two `DynamicCache`, as this model returns it, got "
        f"{type(past_key_values).__name__}. In `generate`, leave `cache_implementation` out."
    )


def make_room(cache: DynamicCache, num_entries: int) -> None:
    """Let a cache take `num_entries` entries. `generate` of transformers 5 makes it with `num_hidden_layers`, but a
    layer of several inner ones needs more."""
    entries = getattr(cache, "layers", [])  # there is no such list before 4.54, where a cache grows by itself
    while 0 < len(entries) < num_entries:
        entries.append(type(entries[0])())


def cached(cache: DynamicCache, index: int) -> tuple[Tensor, Tensor] | None:
    """The keys and values (batch, heads, length, head_size) of an entry, None while it is empty."""
    if cache.get_seq_length(index) == 0:
        return None
    return (cache.layers[index].keys, cache.layers[index].values) if hasattr(cache, "layers") else cache[index]
