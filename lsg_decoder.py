"""The decoder of LSG-ALBERT: it uses the encoder's embeddings and layers, and adds a cross-attention to each layer.

ALBERT's layers share their weights, and the decoder shares them too. So an encoder's checkpoint holds all weights of
the decoder except the cross-attention. The idea is from Rothe, Narayan and Severyn, "Leveraging Pre-trained
Checkpoints for Sequence Generation Tasks", TACL 8, 2020. There it worked best for summarization.

Masks are boolean, True = may be attended to. Every query has at least one key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from .configuration_lsg_albert import LSGAlbertConfig, check_attn_implementation
from .lsg_compat import GradientCheckpointingLayer, cached, extend_cache
from .lsg_softmax import ATTENTION_FUNCTIONS, eager_attention, visibility_bias


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(batch, length, hidden) -> (batch, heads, length, head_size)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, implementation: str, dropout: float, with_map: bool
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of every query to the keys that it sees.

    Args:
        query: (batch, heads, queries, head_size).
        key, value: (batch, heads, keys, head_size).
        seen: (batch or 1, 1, queries or 1, keys) bool.
        implementation: a name in `ATTENTION_FUNCTIONS`.
        dropout: the share of attention weights dropped.
        with_map: whether to return the weights. The context is then computed from them, so that gradients reach them.

    Returns:
        The context (batch, queries, hidden), and the weights (batch, heads, queries, keys) without dropout, or None.
    """
    weights, bias = None, visibility_bias(seen, query.dtype)
    if with_map:
        identity = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
        weights = eager_attention(query, key, identity.expand(*key.shape[:2], -1, -1), bias)
        context = F.dropout(weights, dropout) @ value
    else:
        context = ATTENTION_FUNCTIONS[implementation](query, key, value, bias, dropout)
    return context.transpose(1, 2).flatten(2), weights


def causal_visibility(visible: Tensor | None, past_length: int, length: int, device: torch.device) -> Tensor:
    """Which tokens each of the newest `length` tokens sees: itself, and the visible tokens before it.

    A masked token sees itself too, so that every query has a key.

    Args:
        visible: (batch, past_length + length) bool, which tokens may be attended to; None for all.
        past_length: the number of earlier tokens.
        length: the number of new tokens.
        device: of the result.

    Returns:
        (batch or 1, 1, length, past_length + length) bool.
    """
    keys = torch.arange(past_length + length, device=device)
    queries = keys[past_length:, None]
    if visible is None:
        return (keys <= queries)[None, None]
    return ((keys < queries) & visible[:, None, None]) | (keys == queries)


def token_positions(visible: Tensor | None, past_length: int, length: int, device: torch.device) -> Tensor:
    """Positions (batch or 1, length) of the newest `length` tokens; arguments as in `causal_visibility`.

    Masked tokens do not count, so padding on the left does not change the positions of the text.
    """
    if visible is None:
        return torch.arange(past_length, past_length + length, device=device)[None]
    return (visible.long().cumsum(1) - 1).clamp(min=0)[:, past_length:]


def shift_right(ids: Tensor, start_token_id: int | None, pad_token_id: int | None) -> Tensor:
    """The decoder's inputs (batch, length) for ids or labels (batch, length).

    The ids move one place to the right, after the start token. Padding replaces -100.

    Raises:
        ValueError: `start_token_id` or `pad_token_id` is None.
    """
    for name, token_id in (("decoder_start_token_id", start_token_id), ("pad_token_id", pad_token_id)):
        if token_id is None:
            raise ValueError(
                f"The decoder's inputs cannot be made: the config has no `{name}`. Set `model.config.{name}` "
                "(for the start token, `bos_token_id` also works), or give `decoder_input_ids`."
            )
    shifted = F.pad(ids[:, :-1], (1, 0), value=start_token_id)
    return shifted.masked_fill(shifted == -100, pad_token_id)


class LSGAlbertCrossAttention(nn.Module):
    """Multi-head attention to the encoder's states with output projection, residual connection and normalization."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)

    def keys_and_values(self, encoder_states: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length, hidden) -> twice (batch, heads, length, head_size)."""
        num_heads = self.config.num_attention_heads
        return split_heads(self.key(encoder_states), num_heads), split_heads(self.value(encoder_states), num_heads)

    def forward(
        self, hidden_states: Tensor, key: Tensor, value: Tensor, seen: Tensor, with_map: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, and add the result to the decoder's states.

        Args:
            hidden_states: (batch, length, hidden), of the decoder.
            key, value: as `keys_and_values` returns them.
            seen: (batch, 1, 1, keys) bool.
            with_map: whether to return the attention map.

        Returns:
            The new states, and the map (batch, heads, length, keys) or None.
        """
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        query = split_heads(self.query(hidden_states), self.config.num_attention_heads)
        context, weights = attend(query, key, value, seen, self.config._attn_implementation, dropout, with_map)
        return self.LayerNorm(hidden_states + self.output_dropout(self.dense(context))), weights


class LSGAlbertDecoderLayer(GradientCheckpointingLayer):
    """An encoder layer with a cross-attention, applied as a decoder layer.

    This module has no parameters: `forward` is given the encoder layer and the cross-attention.
    """

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.config = config

    def forward(
        self,
        hidden_states: Tensor,
        cross_key: Tensor,
        cross_value: Tensor,
        seen: Tensor,
        encoder_seen: Tensor,
        layer: nn.Module,
        cross_attention: LSGAlbertCrossAttention,
        cache: EncoderDecoderCache | None = None,
        index: int = 0,
        with_maps: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Causal self-attention, cross-attention and feed-forward part.

        Args:
            hidden_states: (batch, length, hidden).
            cross_key, cross_value: (batch, heads, keys, head_size), of the encoder's states.
            seen: (batch or 1, 1, length, past + length) bool, which of the decoder's tokens each token sees.
            encoder_seen: (batch, 1, 1, keys) bool, which of the encoder's states the tokens see.
            layer: the `LSGAlbertLayer`.
            cross_attention: the cross-attention between that layer's attention and feed-forward part.
            cache: of the earlier tokens; the keys and values of the new tokens are added to it.
            index: the layer's entry in the cache.
            with_maps: whether to return the attention maps.

        Returns:
            The new states, and the maps of self-attention (batch, heads, length, past + length) and cross-attention
            (batch, heads, length, keys), or None.
        """
        attention, config = layer.attention, self.config
        query, key, value = (
            split_heads(projection(hidden_states), config.num_attention_heads)
            for projection in (attention.query, attention.key, attention.value)
        )
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, index)
        dropout = config.attention_probs_dropout_prob if self.training else 0.0
        context, self_map = attend(query, key, value, seen, config._attn_implementation, dropout, with_maps)
        hidden_states = attention.add_context(hidden_states, context)
        hidden_states, cross_map = cross_attention(hidden_states, cross_key, cross_value, encoder_seen, with_maps)
        return layer.feed_forward(hidden_states), self_map, cross_map


def initial_value(attention: nn.Module, name: str) -> Tensor:
    """The value with which a cross-attention's parameter starts, from the self-attention before it.

    It is the value there, except for the normalization, which comes right after that of the self-attention. A copy would
    scale and shift every feature a second time. Instead, all features get the deviation and the mean that the features
    of a state have after the first normalization, so the second one hardly changes a state.
    """
    module, _, kind = name.rpartition(".")
    value = attention.get_parameter(name)
    if module != "LayerNorm":
        return value
    weight, bias = attention.LayerNorm.weight.float(), attention.LayerNorm.bias.float()
    mean = bias.mean()
    deviation = (weight.square().mean() + (bias - mean).square().mean()).sqrt()
    return (deviation if kind == "weight" else mean).to(value.dtype).expand_as(value)


class LSGAlbertDecoder(nn.Module):
    """The cross-attentions, one for each layer of each group, and the loop that runs them in the encoder's layers."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.config = config
        self.layer = LSGAlbertDecoderLayer(config)
        self.cross_attentions = nn.ModuleList(
            nn.ModuleList(LSGAlbertCrossAttention(config) for _ in range(config.inner_group_num))
            for _ in range(config.num_hidden_groups)
        )

    def forward(
        self,
        albert: nn.Module,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        visible: Tensor | None,
        encoder_states: Tensor | None,
        encoder_visible: Tensor,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Apply all layers to the newest tokens.

        Args:
            albert: the `LSGAlbertModel` whose embeddings and layers are used. It is not a submodule of the decoder,
                because a state dict would then hold it twice.
            input_ids, inputs_embeds: (batch, length) or (batch, length, embedding_size); one of them is None.
            visible: (batch, past + length) bool, which of the decoder's tokens may be attended to; None for all.
            encoder_states: (batch, keys, hidden); None if their keys and values are in the cache.
            encoder_visible: (batch, keys) bool, which of the encoder's states may be attended to.
            cache: of the `past` earlier tokens; the newest tokens are added to it. None for no cache.
            output_attentions: whether to return maps.
            output_hidden_states: whether to return the states that go into each layer.

        Returns:
            The last states (batch, length, hidden); the states that went into each of the `num_hidden_layers` layers;
            and, for each of their inner layers, the map of self-attention and the map of cross-attention.
        """
        check_attn_implementation(self.config._attn_implementation)
        given = input_ids if inputs_embeds is None else inputs_embeds
        past_length = 0 if cache is None else cache.self_attention_cache.get_seq_length()
        places = (visible, past_length, given.shape[1], given.device)
        embeddings = albert.embeddings.embed_text(input_ids, None, token_positions(*places), inputs_embeds)
        states = albert.encoder.embedding_hidden_mapping_in(albert.embeddings.normalize(embeddings))
        seen, encoder_seen = causal_visibility(*places), encoder_visible[:, None, None]

        calls = [
            (group, inner) for group in albert.encoder.group_of_layer() for inner in range(self.config.inner_group_num)
        ]
        keys_and_values = self.keys_and_values(calls, encoder_states, cache)
        all_states, self_maps, cross_maps = [], [], []
        for index, (group, inner) in enumerate(calls):
            if output_hidden_states and inner == 0:
                all_states.append(states)
            states, self_map, cross_map = self.layer(
                states, *keys_and_values[group, inner], seen, encoder_seen,
                albert.encoder.albert_layer_groups[group].albert_layers[inner], self.cross_attentions[group][inner],
                cache, index, output_attentions,
            )  # fmt: skip
            self_maps.append(self_map)
            cross_maps.append(cross_map)
        return states, all_states, self_maps, cross_maps

    def keys_and_values(
        self, calls: list[tuple[int, int]], encoder_states: Tensor | None, cache: EncoderDecoderCache | None
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Keys and values of the encoder's states for every (group, inner layer).

        Calls of the same layer share keys and values. So they are computed once, and the cache holds them in the entry
        of the first call that needs them. The entries of the other calls hold one token, because transformers expects
        an entry for every layer.
        """
        if cache is not None:
            extend_cache(cache.self_attention_cache, len(calls))
            extend_cache(cache.cross_attention_cache, len(calls))
        known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for index, (group, inner) in enumerate(calls):
            is_first = (group, inner) not in known
            entry = None if cache is None else cached(cache.cross_attention_cache, index)
            if is_first:
                known[group, inner] = entry or self.cross_attentions[group][inner].keys_and_values(encoder_states)
            if cache is not None and entry is None:
                held = (x if is_first else x[:, :, :1] for x in known[group, inner])
                cache.cross_attention_cache.update(*held, index)
        return known

    @torch.no_grad()
    def copy_self_attentions(self, layer_groups: nn.ModuleList, names: set[str] | None = None) -> None:
        """Give cross-attentions their `initial_value`s: copies, except for the normalization.

        Args:
            layer_groups: of the encoder.
            names: the parameters to write, with their names in the state dict of this module; None for all.
        """
        for name, parameter in list(self.named_parameters()):
            _, group, inner, *rest = name.split(".")
            attention = layer_groups[int(group)].albert_layers[int(inner)].attention
            source = initial_value(attention, ".".join(rest))
            if parameter.is_meta and not source.is_meta:
                # With `low_cpu_mem_usage=True`, transformers 4.4x neither reports this parameter nor gives it values.
                self.get_submodule(name.rpartition(".")[0]).register_parameter(rest[-1], nn.Parameter(source.clone()))
            elif names is None or name in names:
                parameter.copy_(source)
