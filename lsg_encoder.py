"""The encoder: embeddings, attention, layers, and the stack of their groups.

Short texts go through the layers as rows, long texts as a list of blocks: see `LSGAlbertEncoder.layout`.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_lsg_albert import MAX_GLOBAL_TOKENS, LSGAlbertConfig, check_attn_implementation
from .lsg_compat import GradientCheckpointingLayer
from .lsg_flex import check_no_dropout
from .lsg_functional import block_attention, lsg_attention_map, row_attention
from .lsg_padding import BlockList, list_blocks
from .lsg_pattern import LSGPattern
from .lsg_sparsity import hash_projections
from .lsg_tracing import is_exported, is_traced

CPU_CHUNK_TOKENS = 512  # the intermediate states of this many tokens stay in the cache of a core

# The GELUs that one kernel computes, by the name that torch has for the way to compute them.
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def get_activation(name: str) -> nn.Module:
    """The activation of transformers with that name. The configuration has checked the name.

    transformers computes "gelu_new" with a chain of eight kernels, and the same function under its other name with one.
    """
    return ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]


def can_fuse_gelu(linear: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN can compute the GELU of `linear(x)` together with the product.

    That takes a third of the GELU's own time. It works for a plain linear layer without hooks, in inference on the
    CPU. torch.compile fuses the two itself.
    """
    is_plain = (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter  # no quantized or sharded tensor
        and type(x) is Tensor
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
    )
    is_busy = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    return (
        is_plain
        and not (is_busy or is_traced())
        and x.device.type == "cpu"
        and x.dtype == linear.weight.dtype
        and x.dtype in fused_gelu_dtypes()
    )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """The GELU of a linear layer by oneDNN's fused kernel, an operator of torch that is not public.

    `approximate` is as in `torch.nn.functional.gelu`.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)


@cache
def fused_gelu_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes for which `linear_gelu` works in this build of torch and is fast on this processor; tried once."""
    usable = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = (torch.linspace(-2, 2, n, dtype=dtype) for n in (32, 128, 8))
        x, weight = x.view(4, 8, 1).expand(4, 8, 16).contiguous(), weight.view(8, 16)
        try:
            if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                continue
            fused = torch.stack([linear_gelu(x, weight, bias, kind) for kind in ("none", "tanh")])
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # this build has no such operator
            continue
        plain = torch.stack([F.gelu(F.linear(x, weight, bias), approximate=kind) for kind in ("none", "tanh")])
        tolerance = 100 * torch.finfo(dtype).eps
        if fused.dtype == dtype and torch.allclose(fused, plain, rtol=tolerance, atol=tolerance):
            usable.append(dtype)
    return tuple(usable)


class LSGAlbertEmbeddings(nn.Module):
    """The global tokens' embeddings, then the text's, which are sums of word, position and token-type embeddings."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        width = config.embedding_size
        self.add_positions = config.position_embedding_type == "absolute"
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, width)
        self.num_global_tokens = config.num_global_tokens
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids (batch, length), or embeddings (batch, length, embedding_size) -> (batch, globals + length, ...)."""
        text = self.embed_text(input_ids, token_type_ids, position_ids, inputs_embeds)
        global_tokens = self.global_embeddings(torch.arange(self.num_global_tokens, device=text.device))
        global_tokens = global_tokens.to(text.dtype).expand(text.shape[0], -1, -1)
        return self.normalize(torch.cat([global_tokens, text], dim=1))

    def embed_text(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """The text alone, before `normalize`: (batch, length, embedding_size)."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length = words.shape[1]
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, length, dtype=torch.long, device=words.device)
        text = words + self.token_type_embeddings(token_type_ids)
        if self.add_positions:
            if position_ids is None:
                position_ids = torch.arange(length, device=words.device)[None]
            text = text + self.position_embeddings(position_ids)
        return text

    def normalize(self, embeddings: Tensor) -> Tensor:
        """Normalization and dropout."""
        return self.dropout(self.LayerNorm(embeddings))


class LSGAlbertAttention(nn.Module):
    """Multi-head LSG attention with its output projection, residual connection and normalization."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        visible: Tensor | BlockList,
        pattern: LSGPattern,
        projections: tuple[Tensor, ...] = (),
        map_size: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Attend, without the output projection (`add_context`).

        Args:
            hidden_states: (batch, globals + length, hidden), or (tokens, hidden) listed by blocks.
            visible: (batch, length) bool, which text tokens may be attended to; for listed tokens, their `BlockList`.
            pattern: which keys a query sees.
            projections: for "lsh" only.
            map_size: the number of tokens of the effective attention map, globals included; None for no map.

        Returns:
            The context, in the shape of `hidden_states`, and the map (batch, heads, map_size, map_size) if `map_size`
            is given. The context is then computed from the map, so that gradients reach the map. Dropout applies to
            the weights of the map.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(-3, -2)
            for projection in (self.query, self.key, self.value)
        )  # ([batch,] heads, tokens, head_size)
        implementation = self.config._attn_implementation
        check_attn_implementation(implementation)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        if implementation == "flex_attention":
            check_no_dropout(dropout)
        maps = []
        if map_size is None:
            attention = block_attention if isinstance(visible, BlockList) else row_attention
            context = attention(query, key, value, visible, pattern, projections, implementation, dropout)
        else:
            maps.append(lsg_attention_map(query, key, visible, pattern, projections)[..., :map_size, :map_size])
            context = F.dropout(maps[0], dropout) @ value[:, :, :map_size]
            context = F.pad(context, (0, 0, 0, query.shape[2] - map_size))  # nothing reads the padding's context
        return context.transpose(-3, -2).flatten(-2), *maps

    def add_context(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        """Project the context, add it to the states that it comes from, and normalize; all (..., hidden)."""
        return self.LayerNorm(hidden_states + self.output_dropout(self.dense(context)))


class LSGAlbertLayer(GradientCheckpointingLayer):
    """Attention and feed-forward part."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.full_layer_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = LSGAlbertAttention(config)
        self.ffn = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = get_activation(config.hidden_act)
        self.gelu = GELUS.get(config.hidden_act)  # None: another activation

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The new states, and the map if `map_size` is given; arguments as in `LSGAlbertAttention.forward`.

        The result holds nothing but tensors, because tools that hook layers rely on that.
        """
        context, *maps = self.attention(hidden_states, *args, **kwargs)
        size = self.chunk_size(hidden_states)
        if size is None:
            return self.feed_forward(self.attention.add_context(hidden_states, context)), *maps
        chunks = zip(hidden_states.split(size, dim=-2), context.split(size, dim=-2), strict=True)
        states = [self.feed_forward(self.attention.add_context(*chunk)) for chunk in chunks]
        return torch.cat(states, dim=-2), *maps

    def chunk_size(self, hidden_states: Tensor) -> int | None:
        """How many tokens to process at a time after the attention; None for all at once.

        After the attention no token depends on another. `chunk_size_feed_forward` sets the number. If it is not set,
        inference on the CPU takes as many tokens as fit into the processor's cache. Training does not: gradient
        checkpointing must repeat its results to the last bit. An exported graph is for any number of tokens, so it has
        no fixed number of chunks.
        """
        if is_exported():
            return None
        if self.chunk_size_feed_forward:
            return self.chunk_size_feed_forward
        if self.training or torch.is_grad_enabled() or is_traced() or not hidden_states.is_cpu:
            return None
        num_tokens = hidden_states.shape[-2]
        # Chunks of about equal size: a last chunk of one token would read all weights for that token.
        return math.ceil(num_tokens / max(1, round(num_tokens / CPU_CHUNK_TOKENS)))

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """The feed-forward part with its residual connection and normalization; (..., hidden) in and out."""
        if self.gelu and not self.training and can_fuse_gelu(self.ffn, hidden_states):
            activated = linear_gelu(hidden_states, self.ffn.weight, self.ffn.bias, self.gelu)
        else:
            activated = self.activation(self.ffn(hidden_states))
        output = self.ffn_output(activated)
        return self.full_layer_layer_norm(output + hidden_states)


class LSGAlbertLayerGroup(nn.Module):
    """The layers of one group: only a container, which keeps ALBERT's parameter names."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.albert_layers = nn.ModuleList([LSGAlbertLayer(config) for _ in range(config.inner_group_num)])


class LSGAlbertEncoder(nn.Module):
    """The stack of shared layer groups.

    Args:
        config: sizes and pattern.
        reads_padding: whether a head uses the outputs of padding. If so, blocks of padding are not left out.
    """

    def __init__(self, config: LSGAlbertConfig, reads_padding: bool = False):
        super().__init__()
        self.config = config
        self.pattern = LSGPattern.from_config(config)
        self.reads_padding = reads_padding
        self.is_seeded = config.lsh_seed is not None
        if self.is_seeded:
            # Stored as integers with the same bits, because `model.half()` would round floats.
            for i, projection in enumerate(self.draw_projections()):
                self.register_buffer(f"projections_{i}", projection.view(torch.int32), persistent=False)
        self.embedding_hidden_mapping_in = nn.Linear(config.embedding_size, config.hidden_size)
        self.albert_layer_groups = nn.ModuleList(
            [LSGAlbertLayerGroup(config) for _ in range(config.num_hidden_groups)]
        )

    def forward(
        self, embeddings: Tensor, visible: Tensor, output_attentions: bool = False, output_hidden_states: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Apply all layers.

        Args:
            embeddings: (batch, globals + length, embedding_size).
            visible: (batch, length) bool, which text tokens may be attended to.
            output_attentions: whether to return maps.
            output_hidden_states: whether to return the states that go into each layer.

        Returns:
            The last states (batch, globals + length, hidden); the text's states (batch, length, hidden) that went into
            each layer; and the layers' effective attention maps (batch, heads, globals + length, globals + length).
        """
        num_tokens, length = embeddings.shape[1], visible.shape[1]
        alignment = self.alignment(length)
        embeddings, visible = F.pad(embeddings, (0, 0, 0, alignment)), F.pad(visible, (0, alignment), value=False)
        pack, unpack, seen = self.layout(visible, with_maps=output_attentions)
        states = self.embedding_hidden_mapping_in(pack(embeddings))
        text_states, attention_maps = [], []
        projections = iter(self.projections_of_calls())
        for group_index in self.group_of_layer():
            if output_hidden_states:
                text, rows = expose_text(unpack(states), num_tokens - length, num_tokens)
                text_states.append(text)
                states = states if is_exported() else pack(rows)  # exported graphs have no gradients
            elif output_attentions:
                states = unpack(states)  # blanks padding, as the branch above does, so that maps are the same
            for layer in self.albert_layer_groups[group_index].albert_layers:
                map_size = num_tokens if output_attentions else None
                states, *attention_map = layer(states, seen, self.pattern, next(projections), map_size)
                attention_maps += attention_map
        return first_tokens(unpack(states), num_tokens), text_states, attention_maps

    def layout(
        self, visible: Tensor, with_maps: bool
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor | BlockList]:
        """How the layers get the tokens of a batch: short texts as rows, long texts as a list of blocks.

        Args:
            visible: (batch, length) bool, of aligned texts.
            with_maps: whether attention maps are returned. They are maps of rows, so all texts then stay rows.

        Returns:
            A function that packs rows (batch, globals + length, ...) for the layers; a function that unpacks them
            again, with zeros for blocks of padding; and the layers' `visible`, the tokens that may be attended to.
        """
        if not is_exported() and visible.shape[1] <= self.pattern.full_length:
            return unchanged, unchanged, visible
        blocks = list_blocks(visible, self.pattern.block_size, self.padding_mode(visible))
        if with_maps:
            return unchanged, lambda rows: blocks.unpack(blocks.pack(rows)), visible
        return blocks.pack, blocks.unpack, blocks

    def padding_mode(self, visible: Tensor) -> str:
        """The `padding` argument of `list_blocks`. A compiler cannot drop blocks: their number depends on the data."""
        if self.reads_padding or not self.config.pack_padding:
            return "keep"
        is_compiled = is_traced() or self.config._attn_implementation == "flex_attention"
        return "blank" if is_compiled or visible.is_meta else "drop"

    def alignment(self, length: int) -> int:
        """How many tokens are appended to a text of `length` tokens so that its blocks are whole.

        Raises:
            ValueError: tokens must be appended, but `adaptive` is False.
        """
        block_size = self.pattern.block_size
        missing = (length + block_size - 1) // block_size * block_size - length
        if is_exported():  # one graph serves all lengths, so short texts go through blocks too
            return missing
        full_length = self.pattern.full_length
        missing = missing if length > full_length else 0
        if missing and not self.config.adaptive:
            raise ValueError(
                f"The length {length} is above {full_length} and is not a multiple of `block_size` ({block_size}): "
                "pad the inputs (`pad_to_multiple_of=block_size` in the tokenizer), or set `adaptive=True` in the "
                "config."
            )
        return missing

    def group_of_layer(self) -> list[int]:
        """The index of the group that each of the `num_hidden_layers` layers applies."""
        num_layers, num_groups = self.config.num_hidden_layers, self.config.num_hidden_groups
        return [layer * num_groups // num_layers for layer in range(num_layers)]

    def draw_projections(self) -> list[Tensor]:
        """The random projections of "lsh" for every call of an attention layer, see `hash_projections`."""
        config = self.config
        num_calls = config.num_hidden_layers * config.inner_group_num
        head_size = config.hidden_size // config.num_attention_heads
        return hash_projections(
            num_calls, self.pattern.hash_rounds, config.num_attention_heads, head_size, config.lsh_seed
        )

    @torch.no_grad()
    def reset_projections(self) -> None:
        """Write the seeded projections into their buffers: a model built on the meta device loses their values."""
        if self.is_seeded:
            for i, projection in enumerate(self.draw_projections()):
                self.get_buffer(f"projections_{i}").copy_(projection.view(torch.int32))

    def projections_of_calls(self) -> list[tuple[Tensor, ...]]:
        """The projections for each call of an attention layer.

        Without a seed, they are drawn here, before the layers run. So gradient checkpointing computes a layer again
        with the same projections.
        """
        if self.is_seeded:
            rounds = [self.get_buffer(f"projections_{i}") for i in range(len(self.pattern.hash_rounds))]
            rounds = [floats_of_bits(bits) if is_exported() else bits.view(torch.float32) for bits in rounds]
        else:
            rounds = self.draw_projections()
        num_calls = self.config.num_hidden_layers * self.config.inner_group_num
        return [tuple(projections[call] for projections in rounds) for call in range(num_calls)]


def floats_of_bits(bits: Tensor) -> Tensor:
    """The same as `bits.view(torch.float32)` for int32, in exact arithmetic, because ONNX has no such view.

    It is right only for numbers that are not subnormal. The random projections hold only such numbers.
    """
    magnitude = bits.long() + torch.where(bits < 0, 2**31, 0)
    exponent = magnitude // 2**23
    significand = (magnitude - exponent * 2**23 + 2**23) * torch.where(bits < 0, -1, 1)
    powers = torch.tensor([2.0 ** (i - 150) for i in range(255)], dtype=torch.float32, device=bits.device)
    return significand.to(torch.float32) * powers[exponent]


def unchanged(x: Tensor) -> Tensor:
    return x


def expose_text(rows: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """The text (tokens `first` to `end - 1`) of rows (batch, tokens, hidden), and the rows rebuilt from it.

    The text is returned to the user. The next layer reads the rebuilt rows, so that the returned text gets a gradient.
    """
    text = first_tokens(rows, end)[:, first:]
    return text, torch.cat([rows[:, :first], text, rows[:, end:]], dim=1)


def first_tokens(x: Tensor, length: int) -> Tensor:
    """The first `length` tokens of each row: (batch, tokens, ...) -> (batch, length, ...)."""
    if is_exported():  # a slice needs `length` to be at most the padded length, which torch.export does not see
        return x[:, torch.arange(length, device=x.device)]
    return x[:, :length]
