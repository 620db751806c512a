"""Helpers of the sequence-to-sequence model: a step of `generate`, the encoder's outputs, checks of the inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EncoderDecoderCache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from .configuration_lsg_albert import LSGAlbertConfig
from .lsg_compat import as_encoder_decoder_cache, find_cache, is_checkpointing
from .lsg_inputs import check_mask, check_tokens
from .lsg_outputs import LSGAlbertModelOutput

logger = logging.get_logger(__name__)

# `generate` passes arguments from step to step; `forward` gets these. It refuses the last one.
DECODING_ARGUMENTS = (
    "attention_mask", "encoder_outputs", "decoder_attention_mask", "use_cache", "output_attentions",
    "output_hidden_states", "decoder_inputs_embeds",
)  # fmt: skip


def decoding_step(input_ids: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model's `forward` for one step of `generate`.

    Args:
        input_ids: (batch, length), the decoder's tokens: all so far, or the new ones alone.
        arguments: all that `generate` passes from step to step. The cache is found by its type, because its name
            differs between releases. Arguments outside `DECODING_ARGUMENTS` are for the encoder or for `generate`.

    Returns:
        These arguments, the cache, and as `decoder_input_ids` the tokens that are not in the cache yet.
    """
    cache = find_cache(arguments.values())
    if cache is not None:
        cache = as_encoder_decoder_cache(cache)
        num_new = input_ids.shape[1] - cache.self_attention_cache.get_seq_length()
        input_ids = input_ids[:, -max(1, num_new) :].contiguous()
    needed = {name: arguments[name] for name in DECODING_ARGUMENTS if name in arguments}
    return {**needed, "decoder_input_ids": input_ids, "cache": cache}


def returns_cache(model: PreTrainedModel, use_cache: bool | None, labels: Tensor | None) -> bool:
    """Whether a forward pass returns the cache: `use_cache`, or with None the value in the model's config.

    It does not return the cache with labels, or in training with gradient checkpointing.
    """
    use_cache = (model.config.use_cache if use_cache is None else use_cache) and labels is None
    if use_cache and model.training and is_checkpointing(model):
        logger.warning_once("`use_cache=True` does not work with gradient checkpointing. It is set to `False`.")
        return False
    return use_cache


def chosen_cache(cache: Any, past_key_values: Any, use_cache: bool) -> EncoderDecoderCache | None:
    """The cache under either of its names, a new one if there is none but `use_cache` asks for it, or None.

    Raises:
        ValueError: it is given under both names, or is of a type that is not supported.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give only one of them.")
    cache = past_key_values if cache is None else cache
    return as_encoder_decoder_cache(cache) if use_cache or cache is not None else None


def fill_in_token_ids(generation_config: GenerationConfig, config: LSGAlbertConfig) -> None:
    """Give a generation config, in place, the ids that it lacks and the model's config has."""
    for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation_config, name) is None:
            setattr(generation_config, name, getattr(config, name))


def as_model_output(encoder_outputs: ModelOutput | tuple) -> ModelOutput:
    """The encoder's outputs by name, even if they come as the tuple that `return_dict=False` gives."""
    if isinstance(encoder_outputs, ModelOutput):
        return encoder_outputs
    last_hidden_state, *others = encoder_outputs
    named = {name_of_output(part): part for part in others if part is not None and len(part)}
    return LSGAlbertModelOutput(last_hidden_state, **named)


def name_of_output(part: Tensor | tuple) -> str:
    """The name of the encoder's output that a part of a tuple holds.

    A tuple leaves out outputs that are None, so the place of a part does not tell its name; its dimensions do.
    In a tuple of states, those that were not selected are None.
    """
    if isinstance(part, Tensor):
        return "global_hidden_states" if part.ndim == 3 else "pooler_output"
    are_maps = any(x is not None and x.ndim == 4 for x in part)
    return "attentions" if are_maps else "hidden_states"


def states_for_decoder(encoder_outputs: ModelOutput, passes_globals: bool) -> Tensor:
    """The states that the decoder attends to, (batch, keys, hidden).

    The global tokens' states come first if `passes_globals`; the text's states follow.

    Raises:
        ValueError: the global tokens' states are missing, or have another batch size.
    """
    text_states = encoder_outputs.last_hidden_state
    if not passes_globals:
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


def encoder_keys(
    config: LSGAlbertConfig,
    encoder_outputs: ModelOutput | None,
    cached_states: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """What the decoder attends to in the encoder.

    Args:
        config: of the model.
        encoder_outputs: not None if nothing is cached.
        cached_states: the cross-attention's keys and values of a layer (batch, heads, keys, head_size), or None.
        attention_mask: of the encoder's text, (batch, length), or None.

    Returns:
        The encoder's states (batch, keys, hidden), None if their keys are cached; and which of the keys may be
        attended to, (batch, keys) bool.

    Raises:
        ValueError: an output of the encoder is missing, or the mask is wrong.
    """
    passes_globals = config.pass_global_tokens_to_decoder
    num_globals = config.num_global_tokens if passes_globals else 0
    if cached_states is not None:
        return None, encoder_visibility(attention_mask, cached_states[0][:, 0], num_globals)
    states = states_for_decoder(encoder_outputs, passes_globals)
    return states, encoder_visibility(attention_mask, states, num_globals)


def encoder_visibility(attention_mask: Tensor | None, keys: Tensor, num_globals: int) -> Tensor:
    """Which of the encoder's states may be attended to, (batch, keys) bool.

    `keys` is (batch, keys, ...); the first `num_globals` keys are those of global tokens. In a row without any real or
    global token, all keys may be attended to.
    """
    if attention_mask is None:
        return torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
    check_mask("attention_mask", attention_mask, (len(keys), keys.shape[1] - num_globals))
    visible = F.pad(attention_mask.to(keys.device, torch.bool), (num_globals, 0), value=True)
    return visible | ~visible.any(1, keepdim=True)


def default_decoder_text(input_ids: Tensor | None, labels: Tensor | None, past_length: int) -> Tensor:
    """The ids that the decoder's default inputs are made from: the labels, or else the encoder's ids.

    Raises:
        ValueError: both are None, or the cache holds tokens already.
    """
    text = input_ids if labels is None else labels
    if text is None or past_length > 0:
        raise ValueError(
            "The decoder has no inputs: give `decoder_input_ids` or `decoder_inputs_embeds`, or, at the start of a "
            "text, `labels` or `input_ids` that they can be made from."
        )
    return text


def check_decoder_inputs(
    config: LSGAlbertConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    batch_size: int,
    past_length: int,
) -> None:
    """Raise `ValueError` for decoder inputs that are wrong, given twice, or not of the encoder's batch size."""
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("Give `decoder_input_ids` or `decoder_inputs_embeds`, not both.")
    shape = check_tokens(config, input_ids, inputs_embeds, "decoder_", past_length)
    name = "decoder_input_ids" if inputs_embeds is None else "decoder_inputs_embeds"
    if shape[0] != batch_size:
        raise ValueError(
            f"`{name}` has a batch of {shape[0]}, but the encoder has a batch of {batch_size}: they must be the same."
        )
    if labels is not None and tuple(labels.shape) != shape:
        raise ValueError(
            f"`labels` must have the shape of `{name}`, (batch, length) = {shape}, got {tuple(labels.shape)}."
        )
    if attention_mask is not None:
        check_mask("decoder_attention_mask", attention_mask, (batch_size, past_length + shape[1]))
