"""LSG-ALBERT: the ALBERT encoder and its heads with local + sparse + global attention, on transformers' public API."""

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput, logging

from .configuration_lsg_albert import MAX_GLOBAL_TOKENS, LSGAlbertConfig, check_attn_implementation
from .lsg_attention import block_attention, is_exported, is_traced, lsg_attention, lsg_attention_map
from .lsg_blocks import BlockList, list_blocks
from .lsg_compat import GradientCheckpointingLayer, as_encoder_decoder_cache, cached
from .lsg_decoder import LSGAlbertDecoder, shift_right
from .lsg_flex import check_no_dropout
from .lsg_sparsity import LSGPattern, hash_projections

logger = logging.get_logger(__name__)

# What `generate` hands on from step to step for the encoder, or for itself, and not for the decoder.
_USED_BY_GENERATE = {
    "inputs_embeds", "token_type_ids", "position_ids", "labels",
    "cache_position", "next_sequence_length", "is_first_iteration",
}  # fmt: skip

CPU_CHUNK_TOKENS = 512  # their intermediate states stay in the cache of a core

# The same function; the second is one kernel, the first a chain of eight.
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")


@dataclass
class LSGAlbertModelOutput(BaseModelOutputWithPooling):
    """
    Output of [`LSGAlbertModel`]: that of ALBERT, and the global tokens.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The text tokens' last states; the first is that of the first global token with `pool_with_global`.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, *optional*):
            The first of them after the pooler.
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


def get_activation(name: str) -> nn.Module:
    """The activation of transformers with that name, which the configuration has checked."""
    return ACT2FN[TANH_GELUS[-1] if name in TANH_GELUS else name]


def can_fuse_gelu(linear: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN can compute the tanh-GELU of `linear(x)` together with the product, for a third of its time.

    It can for a plain linear layer that nobody listens to, in inference on the CPU. torch.compile fuses by itself.
    """
    is_plain = (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter  # no quantized or sharded tensor
        and type(x) is Tensor
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
    )
    is_busy = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    return (
        is_plain
        and not (is_busy or is_traced())
        and x.device.type == "cpu"
        and x.dtype == linear.weight.dtype
        and x.dtype in fused_gelu_dtypes()
    )


@cache
def fused_gelu_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that this build of torch and this processor have the fused kernel for."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


class LSGAlbertEmbeddings(nn.Module):
    """Word, position and token-type embeddings, with the global tokens' own before them."""

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
        return self.finish(torch.cat([global_tokens, text], dim=1))

    def embed_text(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """The text alone, as a sum that `finish` is still to be applied to: (batch, length, embedding_size)."""
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

    def finish(self, embeddings: Tensor) -> Tensor:
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
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (batch, globals + length, hidden), or (tokens, hidden) listed by blocks.
            visible: (batch, length) bool, which text tokens may be attended to; of listed tokens, their blocks.
            pattern: which keys a query sees.
            projections: of "lsh".
            map_size: how many tokens, globals included, the effective attention map is wanted of; None for no map.

        Returns:
            The context, of the shape of `hidden_states`, and the map (batch, heads, map_size, map_size) or None. The
            context is computed from the map where there is one, so that gradients reach it; dropout then falls on its
            weights.
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
        attention_map = None
        if map_size is None:
            attention = block_attention if isinstance(visible, BlockList) else lsg_attention
            context = attention(query, key, value, visible, pattern, projections, implementation, dropout)
        else:
            attention_map = lsg_attention_map(query, key, visible, pattern, projections)[..., :map_size, :map_size]
            context = F.dropout(attention_map, dropout) @ value[:, :, :map_size]
            context = F.pad(context, (0, 0, 0, query.shape[2] - map_size))  # nothing reads the padding's context
        return context.transpose(-3, -2).flatten(-2), attention_map

    def add_context(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        """Project the context, add it to the states that it was computed from, and normalize; all (..., hidden)."""
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
        self.is_tanh_gelu = config.hidden_act in TANH_GELUS

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The new states and the map; arguments as in `LSGAlbertAttention.forward`."""
        context, attention_map = self.attention(hidden_states, *args, **kwargs)
        size = self.chunk_size(hidden_states)
        if size is None:
            return self.feed_forward(self.attention.add_context(hidden_states, context)), attention_map
        chunks = zip(hidden_states.split(size, dim=-2), context.split(size, dim=-2), strict=True)
        states = [self.feed_forward(self.attention.add_context(*chunk)) for chunk in chunks]
        return torch.cat(states, dim=-2), attention_map

    def chunk_size(self, hidden_states: Tensor) -> int | None:
        """How many tokens to take at a time after the attention, where no token needs another; None for all at once.

        As many as `chunk_size_feed_forward` says; without it, in inference on the CPU, as many as fit its cache. Not in
        training: gradient checkpointing must compute what it did before, to the last bit. An exported graph is for any
        number of tokens, and so cannot say how many chunks there are.
        """
        if is_exported():
            return None
        if self.chunk_size_feed_forward:
            return self.chunk_size_feed_forward
        if self.training or torch.is_grad_enabled() or is_traced() or not hidden_states.is_cpu:
            return None
        num_tokens = hidden_states.shape[-2]
        # Chunks of one size, about: a last one of a single token would read all weights for it.
        return math.ceil(num_tokens / max(1, round(num_tokens / CPU_CHUNK_TOKENS)))

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """The feed-forward part with its residual connection and normalization; (..., hidden) in and out."""
        if self.is_tanh_gelu and not self.training and can_fuse_gelu(self.ffn, hidden_states):
            weights = self.ffn.weight, self.ffn.bias
            activated = torch.ops.mkldnn._linear_pointwise(hidden_states, *weights, "gelu", [], "tanh")
        else:
            activated = self.activation(self.ffn(hidden_states))
        output = self.ffn_output(activated)
        return self.full_layer_layer_norm(output + hidden_states)


class LSGAlbertLayerGroup(nn.Module):
    """The layers of one group; only a container, under ALBERT's parameter names."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.albert_layers = nn.ModuleList([LSGAlbertLayer(config) for _ in range(config.inner_group_num)])


class LSGAlbertEncoder(nn.Module):
    """The stack of shared layer groups."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.config = config
        self.pattern = LSGPattern(
            num_global_tokens=config.num_global_tokens,
            block_size=config.block_size,
            sparsity_type=config.sparsity_type if config.is_sparse else None,
            sparse_block_size=config.sparse_block_size or 0,
            sparsity_factor=config.sparsity_factor,
            lsh_num_pre_rounds=config.lsh_num_pre_rounds,
        )
        self.reads_padding = False  # whether something computes with the outputs of padding
        self.is_seeded = config.lsh_seed is not None
        if self.is_seeded:
            # As integers of the same bits, or `model.half()` would round them.
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
            output_hidden_states: whether to return states in between.

        Returns:
            The last states (batch, globals + length, hidden); the text's states (batch, length, hidden) that went into
            each layer; and the layers' effective attention maps (batch, heads, globals + length, globals + length).
        """
        num_tokens, length = embeddings.shape[1], visible.shape[1]
        padding = self.adaptive_padding(length)
        embeddings = F.pad(embeddings, (0, 0, 0, padding))
        visible = F.pad(visible, (0, padding), value=False)
        in_blocks = (is_exported() or visible.shape[1] > 2 * self.pattern.block_size) and not output_attentions
        if in_blocks:
            visible = list_blocks(visible, self.pattern.block_size, self.treatment_of_padding(visible))
            embeddings = visible.pack(embeddings)
        states = self.embedding_hidden_mapping_in(embeddings)
        text_states, attention_maps = [], []
        projections = iter(self.projections_of_calls())
        for group_index in self.group_of_layer():
            if output_hidden_states:
                rows = visible.unpack(states) if in_blocks else states
                text_states.append(first_tokens(rows, num_tokens)[:, num_tokens - length :])
                if not is_exported():
                    # Put together again, so that what is returned is what the next layer reads: it has a gradient.
                    parts = rows[:, : num_tokens - length], text_states[-1], rows[:, num_tokens:]
                    rows = torch.cat(parts, dim=1)
                    states = visible.pack(rows) if in_blocks else rows
            for layer in self.albert_layer_groups[group_index].albert_layers:
                map_size = num_tokens if output_attentions else None
                states, attention_map = layer(states, visible, self.pattern, next(projections), map_size)
                attention_maps.append(attention_map)
        rows = visible.unpack(states) if in_blocks else states
        return first_tokens(rows, num_tokens), text_states, attention_maps

    def treatment_of_padding(self, visible: Tensor) -> str:
        """What `list_blocks` does with blocks of padding. How many there are depends on the data, which a compiler
        does not know."""
        if self.reads_padding or not self.config.pack_padding:
            return "keep"
        is_compiled = is_traced() or self.config._attn_implementation == "flex_attention"
        return "blank" if is_compiled or visible.is_meta else "drop"

    def adaptive_padding(self, length: int) -> int:
        """How many tokens of padding the blocks need behind a text of `length` tokens.

        Raises:
            ValueError: some, but `adaptive` is False.
        """
        block_size = self.pattern.block_size
        padding = (length + block_size - 1) // block_size * block_size - length
        if is_exported():  # a graph is one for all lengths: texts of up to two blocks go through blocks too
            return padding
        padding = padding if length > 2 * block_size else 0
        if padding and not self.config.adaptive:
            raise ValueError(
                f"The length {length} is no multiple of `block_size` ({block_size}) and above two blocks: pad the "
                "inputs (`pad_to_multiple_of=block_size` in the tokenizer), or set `adaptive=True` in the config."
            )
        return padding

    def group_of_layer(self) -> list[int]:
        """The index of the group that each of the `num_hidden_layers` layers applies."""
        num_layers, num_groups = self.config.num_hidden_layers, self.config.num_hidden_groups
        return [layer * num_groups // num_layers for layer in range(num_layers)]

    def draw_projections(self) -> list[Tensor]:
        """The random projections of "lsh" for all calls of an attention layer, see `hash_projections`."""
        config = self.config
        num_calls = config.num_hidden_layers * config.inner_group_num
        head_size = config.hidden_size // config.num_attention_heads
        return hash_projections(
            num_calls, self.pattern.hash_rounds, config.num_attention_heads, head_size, config.lsh_seed
        )

    @torch.no_grad()
    def reset_projections(self) -> None:
        """Write the seeded projections into their buffers, which a model built on the meta device has lost."""
        if self.is_seeded:
            for i, projection in enumerate(self.draw_projections()):
                self.get_buffer(f"projections_{i}").copy_(projection.view(torch.int32))

    def projections_of_calls(self) -> list[tuple[Tensor, ...]]:
        """For each call of an attention layer, its projections. Those without a seed are drawn here, before the layers,
        so that gradient checkpointing computes a layer again with what it had."""
        if self.is_seeded:
            rounds = [self.get_buffer(f"projections_{i}") for i in range(len(self.pattern.hash_rounds))]
            rounds = [floats_of_bits(bits) if is_exported() else bits.view(torch.float32) for bits in rounds]
        else:
            rounds = self.draw_projections()
        num_calls = self.config.num_hidden_layers * self.config.inner_group_num
        return [tuple(projections[call] for projections in rounds) for call in range(num_calls)]


def floats_of_bits(bits: Tensor) -> Tensor:
    """What `bits.view(torch.float32)` gives for int32, by arithmetic, which is exact: ONNX has no such view. Only for
    normal numbers, to which a random number belongs."""
    magnitude = bits.long() + torch.where(bits < 0, 2**31, 0)
    exponent = magnitude // 2**23
    significand = (magnitude - exponent * 2**23 + 2**23) * torch.where(bits < 0, -1, 1)
    powers = torch.tensor([2.0 ** (i - 150) for i in range(255)], dtype=torch.float32, device=bits.device)
    return significand.to(torch.float32) * powers[exponent]


def first_tokens(x: Tensor, length: int) -> Tensor:
    """The first of a row's tokens: (batch, tokens, ...) -> (batch, length, ...)."""
    if is_exported():  # torch.export does not see that a length is at most what it is padded to, as a slice must know
        return x[:, torch.arange(length, device=x.device)]
    return x[:, :length]


class LSGAlbertPreTrainedModel(PreTrainedModel):
    """What all LSG-ALBERT models share: the configuration, loading and saving, initialization."""

    config_class = LSGAlbertConfig
    base_model_prefix = "albert"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["LSGAlbertLayer"]  # for `device_map="auto"`
    _supports_param_buffer_assignment = False  # transformers 4.4x would part the two names of the decoder's bias
    # A file may hold a pooler or a decoder that a model does not have, and, if it is old, the positions' buffer.
    _keys_to_ignore_on_load_unexpected = [r"pooler\.", r"embeddings\.position_ids", r"decoder\.cross_attentions\."]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch.distributed."):
            # FSDP's `fully_shard` gives a model a class of its own below the model's. `save_pretrained` would write down
            # that name, and copy PyTorch's files for its code.
            model_class = cls.__bases__[-1]
            cls.__module__, cls.__name__ = model_class.__module__, model_class.__name__

    def __init__(self, config: LSGAlbertConfig, is_encoder_decoder: bool = False):
        config.check_fields()  # fields may have been set since the configuration was made
        check_attn_implementation(config._attn_implementation)
        super().__init__(config_for(config, is_encoder_decoder))

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs: Any) -> None:
        """Switch between "sdpa", "eager" and "flex_attention" at run time.

        Raises:
            ValueError: LSG attention has no such implementation.
        """
        if isinstance(attn_implementation, dict):
            attn_implementation = attn_implementation.get("", self.config._attn_implementation)
        check_attn_implementation(attn_implementation)
        self.config._attn_implementation = attn_implementation

    @classmethod
    def _autoset_attn_implementation(
        cls, config: LSGAlbertConfig, use_flash_attention_2: bool = False, **kwargs: Any
    ) -> LSGAlbertConfig:
        # Of the releases we try only 4.44 and 4.48 call this. For flash attention they send the user to the authors.
        check_attn_implementation("flash_attention_2" if use_flash_attention_2 else config._attn_implementation)
        if config._attn_implementation == "flex_attention":  # the older does not know it
            return config
        return super()._autoset_attn_implementation(config, **kwargs)

    def _check_given(
        self, prefix: str, input_ids: Tensor | None, inputs_embeds: Tensor | None, past_length: int = 0
    ) -> tuple[int, int]:
        """The batch size and length of ids or embeddings that are in order; `ValueError` for others.

        `prefix` is put before their names; `past_length` tokens came before them.
        """
        name, given, num_dims = (
            (f"{prefix}input_ids", input_ids, 2)
            if inputs_embeds is None
            else (f"{prefix}inputs_embeds", inputs_embeds, 3)
        )
        if given.ndim != num_dims:
            shape = "(batch, length)" if num_dims == 2 else "(batch, length, embedding_size)"
            raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(given.shape)}.")
        if inputs_embeds is not None and inputs_embeds.shape[2] != self.config.embedding_size:
            raise ValueError(
                f"`{name}` must have `embedding_size` ({self.config.embedding_size}) as its last dimension, got the "
                f"shape {tuple(inputs_embeds.shape)}."
            )
        batch_size, length = given.shape[:2]
        if length == 0:
            raise ValueError(f"`{name}` has the length 0: give at least one token.")
        limit = self.config.max_position_embeddings
        if past_length + length > limit:
            before = f" behind the {past_length} in `past_key_values`" if past_length else ""
            raise ValueError(
                f"`{name}` has {length} tokens{before}, but `max_position_embeddings` is {limit}. Truncate the text "
                "(`truncation=True, max_length=...` in the tokenizer; a smaller `max_length` in `generate`), or convert "
                "the checkpoint for more positions with `convert_albert_to_lsg.py` and a max length of at least "
                f"{past_length + length}."
            )
        return batch_size, length

    def _init_weights(self, module: nn.Module) -> None:
        # Only torch.nn.init: transformers 5 replaces its functions by ones that leave loaded parameters alone.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, LSGAlbertMLMHead):
            nn.init.zeros_(module.bias)
        if isinstance(module, LSGAlbertEncoder):
            module.reset_projections()


def config_for(config: LSGAlbertConfig, is_encoder_decoder: bool) -> LSGAlbertConfig:
    """The configuration itself where it is right for an encoder-decoder model, or for an encoder, and else a copy that
    is: whatever a checkpoint was saved from, each class can be loaded from it."""
    start_token_id = config.decoder_start_token_id
    if is_encoder_decoder and start_token_id is None:
        start_token_id = config.bos_token_id
    if (config.is_encoder_decoder, config.decoder_start_token_id) == (is_encoder_decoder, start_token_id):
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder, config.decoder_start_token_id = is_encoder_decoder, start_token_id
    return config


class LSGAlbertModel(LSGAlbertPreTrainedModel):
    """
    The bare encoder.

    Args:
        config ([`LSGAlbertConfig`]):
            Sizes and attention pattern.
        add_pooling_layer (`bool`, *optional*, defaults to `True`):
            Whether `pooler_output` is computed.
        is_encoder_decoder (`bool`, *optional*, defaults to `False`):
            Whether it is part of an encoder-decoder model, whose configuration it then shares.
    """

    def __init__(self, config: LSGAlbertConfig, add_pooling_layer: bool = True, is_encoder_decoder: bool = False):
        super().__init__(config, is_encoder_decoder)
        self.embeddings = LSGAlbertEmbeddings(self.config)
        self.encoder = LSGAlbertEncoder(self.config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | LSGAlbertModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids; exactly one of `input_ids` and `inputs_embeds` is given.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 or `True` for real tokens, 0 or `False` for padding, which may stand anywhere.
            token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token types, 0 by default.
            position_ids (`torch.LongTensor` of shape `(batch_size or 1, sequence_length)`, *optional*):
                Positions below `max_position_embeddings`, 0 to `sequence_length - 1` by default.
            head_mask:
                Not supported; there for callers that pass `None` by position.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, embedding_size)`, *optional*):
                Embeddings in place of `input_ids`.
            output_attentions (`bool`, *optional*):
                Whether to return the effective attention maps. They are quadratic in the length.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return the states before and after each layer; with indices, only those, and `None` for the
                others.
            return_dict (`bool`, *optional*):
                Whether to return a [`LSGAlbertModelOutput`] or a plain tuple.

        Raises:
            ValueError: an input is missing, given twice, too long, of a wrong shape, or not supported.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if head_mask is not None:
            raise ValueError("`head_mask` is not supported by LSG attention: leave it out.")
        batch_size, length = self._check_inputs(input_ids, inputs_embeds, attention_mask)
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)

        embeddings = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, length, dtype=torch.bool, device=embeddings.device)
        visible = attention_mask.to(embeddings.device, torch.bool)
        if self.config.mask_first_token:
            visible = visible & (torch.arange(length, device=visible.device) > 0)
        wants_states = output_hidden_states is not None and output_hidden_states is not False
        states, text_states, attention_maps = self.encoder(embeddings, visible, output_attentions, wants_states)
        global_states, last_state = states.tensor_split([self.encoder.pattern.num_global_tokens], dim=1)
        if self.config.pool_with_global:
            is_first = torch.arange(length, device=last_state.device)[:, None] == 0
            last_state = torch.where(is_first, global_states[:, :1], last_state)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(last_state[:, 0]))
        output = LSGAlbertModelOutput(
            last_hidden_state=last_state,
            pooler_output=pooled,
            hidden_states=select_states([*text_states, last_state], output_hidden_states),
            attentions=tuple(attention_maps) if output_attentions else None,
            global_hidden_states=global_states,
        )
        return output if return_dict else output.to_tuple()

    def _check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[int, int]:
        """The batch size and length of inputs that are in order; `ValueError` for others."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        shape = self._check_given("", input_ids, inputs_embeds)
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, shape)
        return shape


def check_mask(name: str, mask: Tensor, shape: tuple[int, int]) -> None:
    """`ValueError` for an attention mask of another shape than (batch, length), or of another kind than 0 and 1."""
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"`{name}` must have the shape (batch, length) = {shape}, with 1 for real tokens and 0 for masked ones, "
            f"got the shape {tuple(mask.shape)}."
        )
    if has_other_than_0_and_1(mask):
        raise ValueError(f"`{name}` must hold 1 for real tokens and 0 for masked ones, got other values.")


def has_other_than_0_and_1(mask: Tensor) -> bool:
    """Whether a float mask is of another kind, such as one to be added to scores. Integers are taken at their word: to
    look would make the processor wait for the device."""
    if not mask.is_floating_point() or mask.device.type == "meta" or is_traced():
        return False
    return bool(((mask != 0) & (mask != 1)).any())


def select_states(
    hidden_states: list[Tensor], selection: bool | int | list[int] | None
) -> tuple[Tensor | None, ...] | None:
    """All states for True, none for False or None; for indices, which may be negative, None in place of the others."""
    if selection is None or isinstance(selection, bool):
        return tuple(hidden_states) if selection else None
    indices = [selection] if isinstance(selection, int) else selection
    chosen = {index % len(hidden_states) for index in indices if -len(hidden_states) <= index < len(hidden_states)}
    return tuple(states if i in chosen else None for i, states in enumerate(hidden_states))


class LSGAlbertMLMHead(nn.Module):
    """Scores of the vocabulary for every token."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.activation = get_activation(config.hidden_act)
        self._tie_weights()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)."""
        return self.decoder(self.LayerNorm(self.activation(self.dense(hidden_states))))

    def _tie_weights(self) -> None:
        # transformers 4 calls this after loading, which may have put a parameter in the place of either name of the
        # bias; a file has one of them, and the other one may still be without values.
        if self.bias.is_meta:
            self.bias = self.decoder.bias
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


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of scores (..., classes) for labels (...); -100 is left out."""
    return F.cross_entropy(logits.flatten(0, -2), labels.to(logits.device).flatten())


class _WithMLMHead(LSGAlbertPreTrainedModel):
    """A model whose `predictions` share the word embeddings."""

    # transformers 5 wants {target: source}; transformers 4 reads the keys.
    _tied_weights_keys = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # Only transformers 5 calls this. The bias has two names also where `tie_word_embeddings` is False.
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        return {**tied, "predictions.decoder.bias": "predictions.bias"}

    def get_output_embeddings(self) -> nn.Linear:
        return self.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.predictions.decoder = new_embeddings
        self.predictions.bias = new_embeddings.bias


class LSGAlbertForPreTraining(_WithMLMHead):
    """Masked-language-model and sentence-order heads, as in ALBERT's pre-training."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.albert = LSGAlbertModel(self.config)
        self.predictions = LSGAlbertMLMHead(config)
        self.sop_classifier = LSGAlbertSOPHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        sentence_order_label: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | LSGAlbertForPreTrainingOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids of the masked tokens, -100 elsewhere.
            sentence_order_label (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                0 for the original order, 1 for the switched one. The loss needs both labels.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        prediction_logits = self.predictions(outputs.last_hidden_state)
        sop_logits = self.sop_classifier(outputs.pooler_output)
        loss = None
        if labels is not None and sentence_order_label is not None:
            loss = token_loss(prediction_logits, labels) + token_loss(sop_logits, sentence_order_label)
        output = LSGAlbertForPreTrainingOutput(
            loss, prediction_logits, sop_logits, outputs.hidden_states, outputs.attentions
        )
        return output if return_dict else output.to_tuple()


class LSGAlbertForMaskedLM(_WithMLMHead):
    """Masked-language-model head."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.albert = LSGAlbertModel(self.config, add_pooling_layer=False)
        self.predictions = LSGAlbertMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | MaskedLMOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids of the masked tokens, -100 elsewhere.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.predictions(outputs.last_hidden_state)
        loss = None if labels is None else token_loss(logits, labels)
        output = MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict else output.to_tuple()


class LSGAlbertForConditionalGeneration(_WithMLMHead, GenerationMixin):
    """
    A sequence-to-sequence model. Its decoder is the encoder's embeddings and layers once more, with causal
    self-attention and a cross-attention put into each layer, see [`LSGAlbertDecoder`]; its head is that of the masked
    language model. Any checkpoint of an ALBERT or LSG-ALBERT holds all of it but the cross-attention, which starts as
    a copy of the self-attention.
    """

    _supports_cache_class = True  # of transformers 4.4x

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config, is_encoder_decoder=True)
        # First, or `device_map="auto"` takes it for `predictions.decoder` and looks for what that is tied to in vain.
        self.decoder = LSGAlbertDecoder(self.config)
        self.albert = LSGAlbertModel(self.config, add_pooling_layer=False, is_encoder_decoder=True)
        self.predictions = LSGAlbertMLMHead(self.config)
        self.post_init()
        self.decoder.copy_self_attentions(self.albert.encoder.albert_layer_groups)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`, and what an encoder's checkpoint lacks is filled in: cross-attentions that the
        checkpoint has not get the weights of the self-attentions, and `generation_config` the ids of the config."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = {name.removeprefix("decoder.") for name in info["missing_keys"]}
        model.decoder.copy_self_attentions(model.albert.encoder.albert_layer_groups, missing)
        for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(model.generation_config, name) is None:
                setattr(model.generation_config, name, getattr(model.config, name))
        return (model, info) if output_loading_info else model

    def get_encoder(self, *args: Any, **kwargs: Any) -> LSGAlbertModel:
        return self.albert

    def get_decoder(self) -> LSGAlbertDecoder:
        return self.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels (batch, length), -100 where there is none -> the decoder's inputs (batch, length)."""
        return shift_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of `forward` for one step of `generate`: the decoder's tokens `input_ids` (batch, length) that
        are not in the cache yet, or the last where only new ones are given, and the encoder's outputs in place of its
        inputs."""
        if past_key_values is not None:
            past_key_values = as_encoder_decoder_cache(past_key_values)
            num_new = input_ids.shape[1] - past_key_values.self_attention_cache.get_seq_length()
            input_ids = input_ids[:, -max(1, num_new) :].contiguous()
        forwarded = {name: value for name, value in kwargs.items() if name not in _USED_BY_GENERATE}
        return {**forwarded, "decoder_input_ids": input_ids, "past_key_values": past_key_values}

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> tuple | Seq2SeqLMOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds, token_type_ids, position_ids (*optional*):
                The encoder's inputs, as in [`LSGAlbertModel`].
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                The decoder's tokens, behind those in `past_key_values`. By default `labels`, or else `input_ids`, one
                place to the right behind `decoder_start_token_id`.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, past_length + target_length)`, *optional*):
                1 for real tokens of the decoder, 0 for padding, which may stand on either side.
            encoder_outputs (`LSGAlbertModelOutput` or `tuple`, *optional*):
                What the encoder returned, in place of its inputs. `attention_mask` still says what is padding.
            past_key_values (`EncoderDecoderCache`, *optional*):
                Keys and values of the tokens before, as returned. Where it holds those of the encoder's states,
                neither the encoder's inputs nor its outputs are needed.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, embedding_size)`, *optional*):
                Embeddings in place of `decoder_input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Ids that the decoder is to predict, -100 where there is none.
            use_cache (`bool`, *optional*):
                Whether to return `past_key_values`; never with labels or in training with gradient checkpointing.
            output_attentions, output_hidden_states, return_dict (*optional*):
                As in [`LSGAlbertModel`], for both encoder and decoder. The maps of cross-attention have a column for
                each global token first, with `pass_global_tokens_to_decoder`.

        Raises:
            ValueError: an input is missing, given twice, too long, of a wrong shape, or not supported.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and labels is None
        if use_cache and self.training and self.decoder.layer.gradient_checkpointing:
            logger.warning_once("`use_cache=True` does not go with gradient checkpointing. It is set to `False`.")
            use_cache = False
        cache = as_encoder_decoder_cache(past_key_values) if use_cache or past_key_values is not None else None
        cached_states = None if cache is None else cached(cache.cross_attention_cache, 0)

        if encoder_outputs is not None:
            encoder_outputs = as_model_output(encoder_outputs)
        elif cached_states is None:
            encoder_outputs = self.albert(
                input_ids, attention_mask, token_type_ids, position_ids, None, inputs_embeds,
                output_attentions, output_hidden_states, return_dict=True,
            )  # fmt: skip
        encoder_states = self._states_for_decoder(encoder_outputs) if cached_states is None else None
        keys = encoder_states if cached_states is None else cached_states[0][:, 0]  # (batch, keys, ...)
        encoder_visible = self._encoder_visibility(attention_mask, keys)

        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._default_decoder_input_ids(input_ids, labels, cache)
        past_length = 0 if cache is None else cache.self_attention_cache.get_seq_length()
        self._check_decoder_inputs(
            decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, labels, len(keys), past_length
        )
        visible = None if decoder_attention_mask is None else decoder_attention_mask.to(keys.device, torch.bool)
        wants_states = output_hidden_states is not None and output_hidden_states is not False
        states, all_states, self_maps, cross_maps = self.decoder(
            self.albert, decoder_input_ids, decoder_inputs_embeds, visible, encoder_states, encoder_visible,
            cache, output_attentions, wants_states,
        )  # fmt: skip
        logits = self.predictions(states)
        encoder_outputs = encoder_outputs or LSGAlbertModelOutput()
        output = Seq2SeqLMOutput(
            loss=None if labels is None else token_loss(logits, labels),
            logits=logits,
            past_key_values=cache if use_cache else None,
            decoder_hidden_states=select_states([*all_states, states], output_hidden_states),
            decoder_attentions=tuple(self_maps) if output_attentions else None,
            cross_attentions=tuple(cross_maps) if output_attentions else None,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
        )
        return output if return_dict else output.to_tuple()

    def _states_for_decoder(self, encoder_outputs: ModelOutput) -> Tensor:
        """The states that the decoder attends to, (batch, keys, hidden): with `pass_global_tokens_to_decoder` those of
        the global tokens, then the text's."""
        text_states = encoder_outputs.last_hidden_state
        if not self.config.pass_global_tokens_to_decoder:
            return text_states
        global_states = encoder_outputs.get("global_hidden_states")
        if global_states is None:
            raise ValueError(
                "`encoder_outputs` has no `global_hidden_states`, which the decoder attends to: give all that "
                "`get_encoder()` returns, or set `pass_global_tokens_to_decoder=False` in the config."
            )
        if len(global_states) != len(text_states):
            raise ValueError(
                f"`encoder_outputs` has `global_hidden_states` of {len(global_states)} rows and a `last_hidden_state` "
                f"of {len(text_states)}: give the same batch for both."
            )
        return torch.cat([global_states, text_states], dim=1)

    def _encoder_visibility(self, attention_mask: Tensor | None, keys: Tensor) -> Tensor:
        """Which of the encoder's states (batch, keys, ...) may be attended to, (batch, keys) bool; all of them in a
        row without any real token or global token."""
        if attention_mask is None:
            return torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        num_globals = self.albert.embeddings.num_global_tokens if self.config.pass_global_tokens_to_decoder else 0
        check_mask("attention_mask", attention_mask, (len(keys), keys.shape[1] - num_globals))
        visible = F.pad(attention_mask.to(keys.device, torch.bool), (num_globals, 0), value=True)
        return visible | ~visible.any(1, keepdim=True)

    def _default_decoder_input_ids(self, input_ids: Tensor | None, labels: Tensor | None, cache: Any) -> Tensor:
        """What the decoder reads where nothing is given to it."""
        given = input_ids if labels is None else labels
        if given is None or (cache is not None and cache.self_attention_cache.get_seq_length() > 0):
            raise ValueError(
                "The decoder has no inputs: give `decoder_input_ids` or `decoder_inputs_embeds`, or, at the start of a "
                "text, `labels` or `input_ids` that they can be made from."
            )
        return self.prepare_decoder_input_ids_from_labels(given)

    def _check_decoder_inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        batch_size: int,
        past_length: int,
    ) -> None:
        """`ValueError` for inputs of the decoder that are not in order, or not of the encoder's batch."""
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Give `decoder_input_ids` or `decoder_inputs_embeds`, not both.")
        shape = self._check_given("decoder_", input_ids, inputs_embeds, past_length)
        name = "decoder_input_ids" if inputs_embeds is None else "decoder_inputs_embeds"
        if shape[0] != batch_size:
            raise ValueError(
                f"`{name}` has a batch of {shape[0]}, but that of the encoder is {batch_size}: they must be the same."
            )
        if labels is not None and tuple(labels.shape) != shape:
            raise ValueError(
                f"`labels` must have the shape of `{name}`, (batch, length) = {shape}, got {tuple(labels.shape)}."
            )
        if attention_mask is not None:
            check_mask("decoder_attention_mask", attention_mask, (batch_size, past_length + shape[1]))


def as_model_output(encoder_outputs: ModelOutput | tuple) -> ModelOutput:
    """The encoder's outputs by name, also where they come as the tuple that `return_dict=False` gives."""
    if isinstance(encoder_outputs, ModelOutput):
        return encoder_outputs
    last_hidden_state, *others = encoder_outputs
    global_states = others[-1] if others and isinstance(others[-1], Tensor) and others[-1].ndim == 3 else None
    # Of states and maps either may be missing; states have three dimensions, and unselected ones are None.
    layers = {
        "attentions" if x[-1] is not None and x[-1].ndim == 4 else "hidden_states": x
        for x in others
        if isinstance(x, (tuple, list)) and x
    }
    return LSGAlbertModelOutput(last_hidden_state, global_hidden_states=global_states, **layers)


class LSGAlbertForSequenceClassification(LSGAlbertPreTrainedModel):
    """A classifier, or a regression, of whole documents."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = LSGAlbertModel(self.config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | SequenceClassifierOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
                Class indices, or a float matrix of 0 and 1 for several classes at once, or with one label the values
                of a regression. `config.problem_type` decides where the labels do not.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else self._loss(logits, labels.to(logits.device))
        output = SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem_type = self.config.problem_type
        if problem_type is None and self.num_labels == 1:
            problem_type = "regression"
        elif problem_type is None:
            problem_type = (
                "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            )
        if problem_type == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        if problem_type == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class LSGAlbertForTokenClassification(LSGAlbertPreTrainedModel):
    """A classifier of every token."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = LSGAlbertModel(self.config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | TokenClassifierOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The tokens' classes, -100 where there is none.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else token_loss(logits, labels)
        output = TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict else output.to_tuple()


class LSGAlbertForQuestionAnswering(LSGAlbertPreTrainedModel):
    """Scores of every token as the start and as the end of an answer."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = LSGAlbertModel(self.config, add_pooling_layer=False)
        self.albert.encoder.reads_padding = True  # its loss is a softmax over all tokens, padding included
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | QuestionAnsweringModelOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            start_positions, end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The answer's first and last token; answers outside the input are left out of the loss.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start_logits, start_positions) + span_loss(end_logits, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss, start_logits.contiguous(), end_logits.contiguous(), outputs.hidden_states, outputs.attentions
        )
        return output if return_dict else output.to_tuple()


def span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross entropy of scores (batch, length) for positions (batch,) or (batch, 1); those past the end are left
    out, negative ones count as 0."""
    length = logits.shape[1]
    return F.cross_entropy(logits, positions.to(logits.device).flatten().clamp(0, length), ignore_index=length)


class LSGAlbertForMultipleChoice(LSGAlbertPreTrainedModel):
    """Scores of several texts, of which one is right."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.albert = LSGAlbertModel(self.config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | MultipleChoiceModelOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], but each of shape `(batch_size, num_choices, sequence_length)`, and
        `inputs_embeds` of shape `(batch_size, num_choices, sequence_length, embedding_size)`; and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The index of the right choice.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        given, num_dims = (input_ids, 3) if inputs_embeds is None else (inputs_embeds, 4)
        if given is None or given.ndim != num_dims:
            raise ValueError(
                "Give `input_ids` of the shape (batch, choices, length) or `inputs_embeds` of the shape (batch, "
                f"choices, length, embedding_size), got {None if given is None else tuple(given.shape)}."
            )
        for name, x in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if x is not None and x.shape != given.shape[:3]:
                raise ValueError(
                    f"`{name}` must have the shape (batch, choices, length) = {tuple(given.shape[:3])}, got "
                    f"{tuple(x.shape)}."
                )
        num_choices = given.shape[1]
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, num_choices)
        loss = None if labels is None else token_loss(logits, labels)
        output = MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict else output.to_tuple()


# A saved model carries its own code, and its config says where each Auto class finds its model.
LSGAlbertModel.register_for_auto_class("AutoModel")
LSGAlbertForPreTraining.register_for_auto_class("AutoModelForPreTraining")
LSGAlbertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
LSGAlbertForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
LSGAlbertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LSGAlbertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
LSGAlbertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
LSGAlbertForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")
