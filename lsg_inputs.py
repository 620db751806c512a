"""Preparation of a model's inputs: checks, rows that hold several texts, batches without rows, several choices.

`DataCollatorWithFlattening` of transformers makes rows with several texts. `PackedTexts` gives each text its own row.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from .configuration_lsg_albert import LSGAlbertConfig
from .lsg_tracing import is_traced

Inputs = dict[str, Tensor | None]  # of an encoder, by the names of its arguments

# Arguments with which other libraries mark where the texts of a row begin.
MARKS_OF_TEXTS = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def refuse_marks_of_texts(arguments: Collection[str]) -> None:
    """Raise `ValueError` if an argument marks texts in a way that this model does not support."""
    given = MARKS_OF_TEXTS & set(arguments)
    if given:
        raise ValueError(
            f"`{min(given)}` is not supported. To mark the texts of a row, give only `position_ids` that begin again "
            "at 0 with each text, as `DataCollatorWithFlattening()` makes them by default."
        )


def check_encoder_inputs(config: LSGAlbertConfig, inputs: Inputs) -> tuple[int, int]:
    """Check the inputs of an encoder; return their batch size and length.

    Raises:
        ValueError: an input is missing, given twice or too long, or has a wrong shape.
    """
    input_ids, inputs_embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    shape = check_tokens(config, input_ids, inputs_embeds)
    if inputs["attention_mask"] is not None:
        check_mask("attention_mask", inputs["attention_mask"], shape)
    return shape


def check_tokens(
    config: LSGAlbertConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    prefix: str = "",
    past_length: int = 0,
) -> tuple[int, int]:
    """Check ids (batch, length) or embeddings (batch, length, embedding_size); return their batch size and length.

    Args:
        config: of the model.
        input_ids, inputs_embeds: at least one is not None; ids are ignored if there are embeddings.
        prefix: put before the arguments' names in messages.
        past_length: the number of tokens before them.

    Raises:
        ValueError: the input has a wrong shape, no tokens, or more tokens than there are positions.
    """
    name, given, num_dims = (
        (f"{prefix}input_ids", input_ids, 2) if inputs_embeds is None else (f"{prefix}inputs_embeds", inputs_embeds, 3)
    )
    if given.ndim != num_dims:
        shape = "(batch, length)" if num_dims == 2 else "(batch, length, embedding_size)"
        raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(given.shape)}.")
    if inputs_embeds is not None and inputs_embeds.shape[2] != config.embedding_size:
        raise ValueError(
            f"`{name}` must have `embedding_size` ({config.embedding_size}) as its last dimension, got the shape "
            f"{tuple(inputs_embeds.shape)}."
        )
    batch_size, length = given.shape[:2]
    if length == 0:
        raise ValueError(f"`{name}` has the length 0: give at least one token.")
    limit = config.max_position_embeddings
    if past_length + length > limit:
        before = f" after the {past_length} in the cache" if past_length else ""
        raise ValueError(
            f"`{name}` has {length} tokens{before}, but `max_position_embeddings` is {limit}. Truncate the text "
            "(`truncation=True, max_length=...` in the tokenizer; a smaller `max_length` in `generate`), or convert "
            "the checkpoint for more positions with `convert_albert_to_lsg.py` and a max length of at least "
            f"{past_length + length}."
        )
    return batch_size, length


def check_mask(name: str, mask: Tensor, shape: tuple[int, int]) -> None:
    """Raise `ValueError` if a mask does not have `shape`, (batch, length), or holds other values than 0 and 1."""
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"`{name}` must have the shape (batch, length) = {shape}, with 1 for real tokens and 0 for masked ones, "
            f"got the shape {tuple(mask.shape)}."
        )
    if has_other_than_0_and_1(mask):
        raise ValueError(f"`{name}` must hold 1 for real tokens and 0 for masked ones, got other values.")


def has_other_than_0_and_1(mask: Tensor) -> bool:
    """Whether a float mask holds other values than 0 and 1, for instance because it is meant to be added to scores.

    Integer masks are not checked, because the processor would have to wait for the device.
    """
    if not mask.is_floating_point() or mask.device.type == "meta" or is_traced():
        return False
    return bool(((mask != 0) & (mask != 1)).any())


@dataclass(frozen=True)
class PackedTexts:
    """The places of texts in rows that hold several texts.

    Args:
        shape: (batch, length) of the rows.
        token: (texts, longest) long, the index of each text's tokens among the tokens of all rows.
        is_token: (texts, longest) bool, False for the padding after a text.
        attention_mask: (texts, longest) bool, which tokens may be attended to.
    """

    shape: tuple[int, int]
    token: Tensor
    is_token: Tensor
    attention_mask: Tensor

    def unpack(self, x: Tensor | None) -> Tensor | None:
        """Rows (batch or 1, length, ...) -> texts (texts, longest, ...); the padding after a text holds any values."""
        return None if x is None else x.expand(*self.shape, *x.shape[2:]).flatten(0, 1)[self.token]

    def pack(self, x: Tensor | None) -> Tensor | None:
        """The reverse: texts (texts, longest, ...) -> rows (batch, length, ...)."""
        return None if x is None else x[self.is_token].unflatten(0, self.shape)

    def unpack_inputs(self, inputs: Inputs) -> Inputs:
        """The inputs of an encoder with a row for each text."""
        return {name: self.unpack(x) for name, x in inputs.items()} | {"attention_mask": self.attention_mask}

    def pack_output(self, output: ModelOutput) -> ModelOutput:
        """The encoder's output for `unpack_inputs`, with the states in rows again. Changes `output` itself."""
        output.last_hidden_state = self.pack(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(map(self.pack, output.hidden_states))
        return output


def find_texts(position_ids: Tensor | None, given: Tensor | None, attention_mask: Tensor | None) -> PackedTexts | None:
    """The texts of rows that hold several texts, or None if each row holds one text.

    Args:
        position_ids: (batch or 1, length). A row holds several texts if all positions count up by one, but begin again
            within the row, at 0 or at the first position of the row.
        given: the ids or embeddings (batch, length, ...).
        attention_mask: (batch, length), 0 for padding. Padding belongs to the text before it, with any positions.

    Reading the positions means waiting for their device. `torch.compile` breaks its graph here if it may.
    `torch.export` raises its own error.

    Raises:
        ValueError: positions are given to a trace, which cannot read them, or a shape or the mask is wrong.
    """
    if position_ids is None or position_ids.is_meta or given is None or given.ndim < 2:
        return None
    if torch.jit.is_tracing():
        raise ValueError(
            "`position_ids` tell whether a row holds one text or several, but a trace cannot read them. Leave them "
            "out; each row is then one text."
        )
    shape = tuple(given.shape[:2])
    if attention_mask is not None:
        check_mask("attention_mask", attention_mask, shape)
    if tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(f"`position_ids` must have the shape (batch or 1, length), got {tuple(position_ids.shape)}.")
    position_ids = position_ids.expand(shape)
    visible = torch.ones_like(position_ids) if attention_mask is None else attention_mask.to(position_ids.device)
    visible = visible.bool()
    counts_up = F.pad(position_ids.diff() == 1, (1, 0))
    begins = ((position_ids == 0) | (position_ids == position_ids[:, :1])) & ~counts_up & visible
    is_packed = (begins | counts_up | ~visible).all() & (begins.sum(1) > 1).any() & counts_up.any()
    if not is_packed:
        return None
    begins[:, 0] = True
    first = begins.flatten().nonzero()
    length = F.pad(first, (0, 0, 0, 1), value=begins.numel()).diff(dim=0)
    place = torch.arange(int(length.max()), device=first.device)
    token, is_token = (first + place).clamp(max=begins.numel() - 1), place < length
    return PackedTexts(shape, token, is_token, visible.flatten()[token] & is_token)


def one_row(inputs: Inputs) -> Inputs:
    """One row of zeros in place of a batch without rows, which has no blocks to compute."""
    return {name: None if x is None else x.new_zeros(1, *x.shape[1:]) for name, x in inputs.items()}


def without_rows(output: ModelOutput) -> ModelOutput:
    """The encoder's output for `one_row`, without that row. Changes `output` itself."""
    for name, x in output.items():
        output[name] = tuple(y if y is None else y[:0] for y in x) if isinstance(x, tuple) else x[:0]
    return output


def flatten_choices(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The number of choices, and the inputs (batch, choices, length, ...) as rows (batch * choices, length, ...).

    Raises:
        ValueError: ids and embeddings are missing, or an input has a wrong shape.
    """
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
    inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
    return given.shape[1], *(None if x is None else x.flatten(0, 1) for x in inputs)
