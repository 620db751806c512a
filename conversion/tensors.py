"""The tensors of a conversion: making the table of global tokens, and extending the table of positions.

Source: Condevaux and Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long sequences",
arXiv 2210.15497, section 4, and the conversion script published with it.
"""

import torch
from torch import Tensor

from ..configuration_lsg_albert import MAX_GLOBAL_TOKENS as NUM_GLOBALS

GLOBAL_TABLE = "embeddings.global_embeddings.weight"
POSITION_TABLE = "embeddings.position_embeddings.weight"
TOKEN_TYPE_TABLE = "embeddings.token_type_embeddings.weight"
WORD_TABLE = "embeddings.word_embeddings.weight"


def convert_state_dict(
    state_dict: dict[str, Tensor],
    *,
    max_length: int,
    bos_token_id: int,
    mask_token_id: int | None,
    stride: int = 64,
    use_token_type: bool = True,
    random_globals: bool = False,
    keep_globals: bool = False,
    keep_first_global: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Make the weights of an LSG-ALBERT from those of an ALBERT or LSG-ALBERT, with any head or none.

    Args:
        state_dict: ALBERT's weights. Neither the dictionary nor a tensor in it is changed.
        max_length: positions of the result; the source's positions are repeated in order, or cut off.
        bos_token_id: id of the token that begins a text. Global token 0 is made from its embedding.
        mask_token_id: id of the mask token. The other global tokens are made from its embedding, except with
            `random_globals`.
        stride, use_token_type, random_globals, seed: see `make_global_table`.
        keep_globals: leave an LSG-ALBERT's table of global tokens unchanged.
        keep_first_global: leave only the first row of that table unchanged.

    Returns:
        The source's tensors with a new position table and a table of global tokens.

    Raises:
        ValueError: an embedding table is missing, an id lies outside the vocabulary, or the stride does not work.
    """
    prefix = embeddings_prefix(state_dict)
    words, positions = state_dict[prefix + WORD_TABLE], state_dict[prefix + POSITION_TABLE]
    old_table = state_dict.get(prefix + GLOBAL_TABLE)
    if old_table is None and (keep_globals or keep_first_global):
        raise ValueError(f"There are no global tokens to keep: `state_dict` has no {prefix + GLOBAL_TABLE!r}.")
    if keep_globals:
        global_table = old_table
    else:
        used_ids = {"bos_token_id": bos_token_id} | ({} if random_globals else {"mask_token_id": mask_token_id})
        for name, token_id in used_ids.items():
            if token_id is None or not 0 <= token_id < len(words):
                raise ValueError(
                    f"`{name}` must be an id of the vocabulary, from 0 to {len(words) - 1}, got {token_id}."
                )
        token_type = state_dict[prefix + TOKEN_TYPE_TABLE][0] if use_token_type else None
        global_table = make_global_table(
            words, positions, token_type, bos_token_id, mask_token_id, stride, random_globals, seed
        )
        if keep_first_global:
            global_table[0] = old_table[0]
    return {
        **state_dict,
        prefix + GLOBAL_TABLE: global_table,
        prefix + POSITION_TABLE: repeat_positions(positions, max_length),
    }


def embeddings_prefix(state_dict: dict[str, Tensor]) -> str:
    """The prefix of the base model's tensor names: "albert." in a model with a head, "" in the bare model.

    Raises:
        ValueError: an embedding table is missing.
    """
    prefix = "albert." if "albert." + WORD_TABLE in state_dict else ""
    for table in (WORD_TABLE, POSITION_TABLE, TOKEN_TYPE_TABLE):
        if prefix + table not in state_dict:
            raise ValueError(f"`state_dict` is not that of an ALBERT model: it has no {prefix + table!r}.")
    return prefix


def repeat_positions(positions: Tensor, max_length: int) -> Tensor:
    """The position table (N, E) repeated in order, or cut off, to (max_length, E)."""
    return positions[torch.arange(max_length) % len(positions)]


def make_global_table(
    words: Tensor,
    positions: Tensor,
    token_type: Tensor | None,
    bos_token_id: int,
    mask_token_id: int | None,
    stride: int = 64,
    random_globals: bool = False,
    seed: int = 0,
) -> Tensor:
    """Embeddings of the global tokens.

    Args:
        words, positions: tables (V, E) and (N, E) of the source.
        token_type: embedding (E,) of the token type that is added; None to add none.
        bos_token_id, mask_token_id: rows of `words` for global token 0 and for the others.
        stride: distance in positions between one global token and the next.
        random_globals: draw words for all but token 0 from the normal distribution with the mean and covariance of
            `words`, instead of taking the mask token.
        seed: of the random words, and of the positions that are missing in a source with fewer than 512.

    Returns:
        (512, E) in the dtype of `words`.

    Raises:
        ValueError: the stride does not work with that number of positions.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(words.dtype, torch.float32)
    ordered_positions = order_positions(extend_to_globals(positions.to(dtype), generator), stride)
    if random_globals:
        chosen_words = draw_words(words.to(dtype), generator)
    else:
        chosen_words = words[mask_token_id].to(dtype).repeat(NUM_GLOBALS, 1)
    chosen_words[0] = words[bos_token_id]
    table = ordered_positions + chosen_words
    if token_type is not None:
        table = table + token_type.to(dtype)
    return table.to(words.dtype)


def extend_to_globals(positions: Tensor, generator: torch.Generator) -> Tensor:
    """Positions (N, E). If N is below 512, random normal rows with each column's mean and deviation are appended."""
    missing = max(0, NUM_GLOBALS - len(positions))
    noise = torch.randn(missing, positions.shape[1], generator=generator, dtype=positions.dtype)
    return torch.cat([positions, positions.mean(0) + noise * positions.std(0)])


def order_positions(positions: Tensor, stride: int) -> Tensor:
    """512 of the positions (N, E), N >= 512, `stride` apart, starting again one position later after each round.

    Raises:
        ValueError: 512 positions cannot be visited with this stride.
    """
    spacing = len(positions) // NUM_GLOBALS  # only every `spacing`-th position is used
    step = stride // spacing
    if step < 1 or NUM_GLOBALS % step != 0:
        working = ", ".join(str(spacing * 2**power) for power in range(10))
        raise ValueError(f"`stride` {stride} does not work with {len(positions)} positions. These do: {working}.")
    row = torch.arange(NUM_GLOBALS)
    rounds = NUM_GLOBALS // step
    return positions[spacing * (step * (row % rounds) + row // rounds)]


def draw_words(words: Tensor, generator: torch.Generator) -> Tensor:
    """512 rows from the normal distribution with the mean and covariance of the rows of `words` (V, E)."""
    # Eigenvectors are used and not Cholesky's factor, because the covariance may be singular.
    variances, axes = torch.linalg.eigh(words.T.cov())
    noise = torch.randn(NUM_GLOBALS, words.shape[1], generator=generator, dtype=words.dtype)
    return words.mean(0) + (noise * variances.clamp(min=0).sqrt()) @ axes.T
