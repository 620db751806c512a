"""Initial weights with which a small ALBERT attends to neighbouring tokens from the start.

With ALBERT's own random weights, attention stayed flat for the 5 million tokens that were tried, and the loss stayed
near that of word frequencies (6.4). To attend to the word before, every position must find its own neighbour through
products of small random numbers. Here, some heads attend to a fixed distance from the start (compare Trockman and
Kolter, "Mimetic Initialization of Self-Attention Layers", 2023). All weights are ALBERT's own, and trained as usual.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor
from transformers import AlbertForMaskedLM, PreTrainedModel

POSITION_DIMS = 32  # dimensions of the embedding that words do not use at first
POSITION_STD = 0.06  # twice that of words, whose vectors grow in training
FASTEST, SLOWEST = 2.0, 0.0015  # radians per token
SHARPNESS = 2.0  # initially, about half of the attention weight is on the chosen token
WIDE = 0.3  # radians per token; without the faster features, a head cannot distinguish near neighbours
OFFSETS = (-1, 1)  # relative positions that the first heads attend to


def turning_rates() -> Tensor:
    """The angle by which each pair of position features turns per token, shape (POSITION_DIMS / 2,)."""
    pairs = POSITION_DIMS // 2
    return FASTEST * (SLOWEST / FASTEST) ** (torch.arange(pairs) / (pairs - 1))


def position_features(length: int) -> Tensor:
    """Sines and cosines of the positions, of standard deviation 1, shape (length, POSITION_DIMS)."""
    angles = torch.arange(length)[:, None] * turning_rates()
    return 2**0.5 * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def shift(offset: int) -> Tensor:
    """The rotation that takes the features of position i to those of i + offset, a square matrix."""
    sin, cos = (turning_rates() * offset).sin(), (turning_rates() * offset).cos()
    blocks = torch.stack([torch.stack([cos, sin], dim=-1), torch.stack([-sin, cos], dim=-1)], dim=-2)
    return torch.block_diag(*blocks)


@torch.no_grad()
def look_at_neighbours(model: AlbertForMaskedLM) -> None:
    """Set position embeddings, the map to the hidden size, and queries and keys of the first heads, in place.

    Head h attends to the token at distance OFFSETS[h]. The next head attends to the surroundings. Other heads stay
    random.
    """
    embeddings, encoder = model.albert.embeddings, model.albert.encoder
    embeddings.word_embeddings.weight[:, :POSITION_DIMS] = 0
    positions = embeddings.position_embeddings.weight
    positions.zero_()
    positions[:, :POSITION_DIMS] = POSITION_STD * position_features(len(positions))
    into_hidden = encoder.embedding_hidden_mapping_in.weight  # (hidden, embedding)
    torch.nn.init.orthogonal_(into_hidden, gain=2**0.5)
    read = into_hidden[:, :POSITION_DIMS].T / 2  # hidden -> position features; 2: the gain, squared
    slow = (turning_rates() < WIDE).float().repeat_interleave(2).diag()
    for group in encoder.albert_layer_groups:
        for layer in group.albert_layers:
            size = layer.attention.query.out_features // model.config.num_attention_heads
            for head, matrix in enumerate([*map(shift, OFFSETS), slow][: model.config.num_attention_heads]):
                rows = slice(head * size, head * size + POSITION_DIMS)
                layer.attention.query.weight[rows] = SHARPNESS * matrix @ read
                layer.attention.key.weight[rows] = SHARPNESS * read


@torch.no_grad()
def extend_positions(model: PreTrainedModel, trained: int) -> None:
    """Set the position embeddings after the `trained` ones so that they continue those, in place.

    Training moved the positions away from the features that `look_at_neighbours` gave them. This change is fitted as a
    linear function of the features (ridge regression), which is then used for all positions. So the map from each
    position to its neighbour continues. The first and the last trained position only saw [CLS] and [SEP], and are left
    out of the fit.

    Raises:
        ValueError: there are not enough positions to fit, or no positions after them.
    """
    positions = model.albert.embeddings.position_embeddings.weight
    if not POSITION_DIMS < trained - 2 < len(positions):
        raise ValueError(f"`trained` is {trained}, but must be above {POSITION_DIMS + 2} and below {len(positions)}.")
    features = torch.cat([position_features(len(positions)), torch.ones(len(positions), 1)], dim=1)
    start = torch.zeros_like(positions)
    start[:, :POSITION_DIMS] = POSITION_STD * features[:, :-1]
    seen, moved = features[1 : trained - 1], (positions - start)[1 : trained - 1]
    fitted = torch.linalg.solve(seen.T @ seen + torch.eye(seen.shape[1]), seen.T @ moved)
    positions[trained - 1 :] = (start + features @ fitted)[trained - 1 :]


def unshare_layers(model: PreTrainedModel, groups: int) -> PreTrainedModel:
    """A model with `groups` groups of layers, which all start as copies of the only group of `model`.

    At first, its outputs are the same. Its cost is the same too. But the layers can now learn different weights.

    Raises:
        ValueError: `model` has several groups, or fewer layers than `groups`.
    """
    config = copy.deepcopy(model.config)
    if config.num_hidden_groups != 1 or not 1 <= groups <= config.num_hidden_layers:
        raise ValueError(
            f"`groups` is {groups}, but must be from 1 to the number of layers ({config.num_hidden_layers}), and the "
            f"model must have one group (it has {config.num_hidden_groups})."
        )
    config.num_hidden_groups = groups
    parted = type(model)(config)
    weights = model.state_dict()
    source = {name: re.sub(r"(albert_layer_groups)\.\d+\.", r"\1.0.", name) for name in parted.state_dict()}
    parted.load_state_dict({name: weights[first] for name, first in source.items()})
    return parted
