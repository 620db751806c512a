"""LSG attention and the LSG-ALBERT encoder by their definition, in float64: slow and obvious on purpose.

Written from the mathematics alone, without the package's code, so that the two can be compared. Every query gets an
explicit list of *entries*. An entry is a weight vector over the G + T tokens of `[globals, text]`; its key and value are
the so weighted sums of the tokens' keys and values. A plain token is a one-hot entry, a pooled or hashed key an average.
Nothing is batched, no mask is ever added to a score: what a query may not see is simply not in its list. All is plain
autograd, so gradients come with it.

Letters follow the specification: G globals, T text tokens, B block size, S sparse block size, f sparsity factor,
p = B / f sparse tokens per block, c = min(B, S) chunk size of the types `norm` and `lsh`.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor


def chunks(num_tokens: int, size: int) -> list[range]:
    """Consecutive runs of `size` token indices; an error when they do not cover all tokens exactly."""
    if num_tokens % size:
        raise ValueError(f"{num_tokens} tokens cannot be cut into chunks of {size}.")
    return [range(start, start + size) for start in range(0, num_tokens, size)]


def lsh_buckets(
    chunk: range, key: Tensor, visible: Tensor, num_buckets: int, projections: list[Tensor] | None
) -> list[list[int]]:
    """The visible tokens of one chunk, by the bucket of the last round.

    Args:
        key: (T, head_dim). visible: bool (T).
        num_buckets: of the last round; the rounds before it have as many as the chunk has tokens.
        projections: one (head_dim, R // 2) per round of R buckets, in order; not looked at when `num_buckets` is 1.
    """
    if num_buckets == 1:  # the rounds before cannot matter
        return [[j for j in chunk if visible[j]]]
    if not projections:
        raise ValueError("lsh needs `projections`.")
    elements = [[j] if visible[j] else [] for j in chunk]  # the tokens that each element is the sum of
    for number, projection in enumerate(projections, start=1):
        size = num_buckets if number == len(projections) else len(chunk)
        if projection.shape != (key.shape[-1], size // 2):
            raise ValueError(f"a round of {size} buckets cannot use a projection of shape {tuple(projection.shape)}.")
        buckets: list[list[int]] = [[] for _ in range(size)]
        for members in elements:
            if members:  # an empty element would go to bucket 0 and add nothing there
                z = F.normalize(key[members].sum(0), dim=0, eps=1e-12) @ projection.double()
                scores = [*z.tolist(), *(-z).tolist()]
                buckets[scores.index(max(scores))] += members  # the first maximum
        elements = buckets
    return elements


def sparse_list(
    query_0: Tensor,
    key: Tensor,
    visible: Tensor,
    head: int,
    size: int,
    window: int | None,
    f: int,
    kind: str | None,
    projections: list[Tensor] | None,
) -> list[Tensor | None]:
    """The ordered sparse list of one row and head: weights over the T text tokens, None for an invisible entry.

    Args:
        query_0: (head_dim), the query of text token 0.
        key: (T, head_dim), text tokens only.
        visible: bool (T), True = may be attended to.
        head: its index, which sets the offset of the strides.
        size: B, in tokens. window: S, the sparse tokens on one side. f: the sparsity factor. kind: the sparsity type.
        projections: this head's lsh draws, each (head_dim, R // 2).
    """
    num_tokens = len(visible)
    if not window or f <= 0 or kind in (None, "none"):
        return []
    if size % f:
        raise ValueError(f"`block_size` ({size}) must be divisible by `sparsity_factor` ({f}).")
    one_hot = torch.eye(num_tokens, dtype=torch.float64)
    c = min(size, window)
    if kind == "lsh" and f == window:
        kind = "bos_pooling"

    def select(tokens: list[int] | range) -> list[Tensor | None]:
        return [one_hot[j] if visible[j] else None for j in tokens]

    def mean(members: list[int]) -> Tensor | None:
        return one_hot[members].mean(0) if members else None

    if f == 1:
        return select(range(num_tokens))
    if kind in ("norm", "lsh") and c % f:
        raise ValueError(f"`sparsity_factor` ({f}) must divide the chunk size ({c}).")
    if kind == "norm":
        score = (key.norm(dim=-1) * visible).tolist()
        ascending = [sorted(chunk, key=lambda j: score[j]) for chunk in chunks(num_tokens, c)]
        return select([j for chunk in ascending for j in chunk[-(c // f) :]])
    if kind == "stride":
        return select([a * f + head % f for a in range(num_tokens // f)])
    if kind == "block_stride":
        first = head % f * (size // f)
        return select([j for block in chunks(num_tokens, size) for j in block[first : first + size // f]])
    if kind == "lsh":
        hashed = [lsh_buckets(chunk, key, visible, c // f, projections) for chunk in chunks(num_tokens, c)]
        return [mean(members) for buckets in hashed for members in buckets]
    members_of = [[j for j in chunk if visible[j]] for chunk in chunks(num_tokens, f)]
    if kind == "pooling":
        return [mean(members) for members in members_of]
    if kind == "bos_pooling":
        scores = key @ query_0 / math.sqrt(key.shape[-1])
        return [scores[members].softmax(0) @ one_hot[members] if members else None for members in members_of]
    raise ValueError(f"unknown sparsity_type {kind!r}")


def entries_of_query(
    index: int,
    visible: Tensor,
    sparse: list[Tensor | None],
    num_globals: int,
    size: int,
    window: int | None,
    f: int,
    neighbours: int = 1,
) -> Tensor:
    """All that query `index` of `[globals, text]` attends to: one weight vector over the tokens per entry, (N, G + T).

    Args:
        visible: bool (T), text tokens only.
        sparse: weights over the T text tokens, None where invisible.
        size: B, in tokens. window: S, the sparse tokens on one side. f: the sparsity factor.
        neighbours: the blocks on one side of a query's own in its local window; 1 in the paper.
    """
    num_tokens = len(visible)
    one_hot = torch.eye(num_globals + num_tokens, dtype=torch.float64)
    entries = [one_hot[g] for g in range(num_globals)]
    if index < num_globals or num_tokens <= (neighbours + 1) * size:
        return torch.stack(entries + [one_hot[num_globals + j] for j in range(num_tokens) if visible[j]])
    block = (index - num_globals) // size
    first, last = block - neighbours, block + neighbours
    local = range(max(first * size, 0), min((last + 1) * size, num_tokens))
    entries += [one_hot[num_globals + j] for j in local if visible[j]]
    if sparse:
        p = size // f
        left, right = first * p, (last + 1) * p  # the sparse image of the local window is [left, right)
        for a in [*range(left - window, left), *range(right, right + window)]:
            if 0 <= a < len(sparse) and sparse[a] is not None:
                entries.append(F.pad(sparse[a], (num_globals, 0)))
    return torch.stack(entries)


def oracle_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    num_global_tokens: int,
    block_size: int,
    sparse_block_size: int | None,
    sparsity_factor: int,
    sparsity_type: str | None,
    projections: list[Tensor] | None = None,
    neighbours: int = 1,
) -> tuple[Tensor, Tensor]:
    """LSG attention by the definition, in float64.

    Args:
        query, key, value: (batch, heads, G + T, head_dim), the globals first; T is a multiple of B when T > 2B (with
            more `neighbours`, when T > (neighbours + 1) B).
        visible: bool (batch, T), True = this text token may be attended to.
        projections: for `lsh` only, the draws in order (pre-rounds first), each (heads, head_dim, R // 2).

    Returns:
        The context (batch, heads, G + T, head_dim) and the effective attention map (batch, heads, G + T, G + T): the
        weight of a pooled key is spread over its tokens, and a token that is seen twice has both weights added. So
        each row sums to 1 and map @ value is the context.
    """
    query, key, value, visible = query.double(), key.double(), value.double(), visible.bool()
    batch, heads, length, head_dim = query.shape
    num_globals, num_tokens = num_global_tokens, length - num_global_tokens
    pattern = block_size, sparse_block_size, sparsity_factor
    if visible.shape != (batch, num_tokens):
        raise ValueError(f"`visible` is {tuple(visible.shape)}, not {(batch, num_tokens)}.")
    is_long = num_tokens > (neighbours + 1) * block_size
    if is_long and num_tokens % block_size:
        raise ValueError(f"{num_tokens} text tokens are no multiple of `block_size` ({block_size}).")
    contexts, maps = [], []
    for n in range(batch):
        for h in range(heads):
            sparse: list[Tensor | None] = []
            if is_long:
                draws = [draw[h] for draw in projections] if projections else None
                q_0, text_key = query[n, h, num_globals], key[n, h, num_globals:]
                sparse = sparse_list(q_0, text_key, visible[n], h, *pattern, sparsity_type, draws)
            for i in range(length):
                entries = entries_of_query(i, visible[n], sparse, num_globals, *pattern, neighbours)  # (N, G + T)
                scores = (entries @ key[n, h]) @ query[n, h, i] / math.sqrt(head_dim)  # (N)
                contexts.append(scores.softmax(0) @ (entries @ value[n, h]))  # (head_dim)
                maps.append(scores.softmax(0) @ entries)  # (G + T)
    return torch.stack(contexts).view(query.shape), torch.stack(maps).view(batch, heads, length, length)


def oracle_encoder(
    state_dict: dict[str, Tensor],
    config: dict | SimpleNamespace,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    projections_per_layer: list[list[Tensor]] | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    """LSGAlbertModel in evaluation mode by the definition, in float64.

    Args:
        state_dict: the bare model's names ("embeddings.word_embeddings.weight", ...).
        config: a dict, or anything with the fields as attributes.
        input_ids, attention_mask, token_type_ids: (batch, t). inputs_embeds: (batch, t, embedding_size).
        position_ids: (batch, t) or (1, t).
        projections_per_layer: for `lsh`, the draws of each attention call, in the order of execution.

    Returns:
        last_hidden_state (batch, t, D); pooler_output (batch, D) where the state dict has a pooler; hidden_states, the
        mapped embeddings and then each of the num_hidden_layers steps, (batch, t, D); attentions, one effective map per
        attention call, (batch, heads, G + T, G + T) with the adaptive padding kept; global_hidden_states (batch, G, D).
    """
    config = SimpleNamespace(**config) if isinstance(config, dict) else config
    weights = {name: tensor.double() for name, tensor in state_dict.items()}
    sparse_fields = "sparse_block_size", "sparsity_factor", "sparsity_type"
    pattern = {name: getattr(config, name) for name in ("num_global_tokens", "block_size", *sparse_fields)}
    num_globals, size, heads = config.num_global_tokens, config.block_size, config.num_attention_heads
    act = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}[config.hidden_act]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], config.layer_norm_eps)

    def table(name: str) -> Tensor:
        return weights[f"embeddings.{name}_embeddings.weight"]

    # Embeddings: globals first, without token type and position
    text = table("word")[input_ids] if inputs_embeds is None else inputs_embeds.double()  # (n, t, E)
    batch, t, _ = text.shape
    text = text + table("token_type")[0 if token_type_ids is None else token_type_ids]
    if getattr(config, "position_embedding_type", "absolute") == "absolute":
        text = text + table("position")[torch.arange(t)[None] if position_ids is None else position_ids]
    x = torch.cat([table("global")[:num_globals].expand(batch, -1, -1), text], dim=1)
    x = layer_norm(x, "embeddings.LayerNorm")  # (n, G + t, E)

    # Adaptive padding (zeros after the LayerNorm, masked), then the first token's mask
    padding = -t % size if t > 2 * size else 0
    if padding and not config.adaptive:
        raise ValueError(f"{t} tokens are not a multiple of `block_size` ({size}) and `adaptive` is off.")
    visible = torch.ones(batch, t, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    x, visible = F.pad(x, (0, 0, 0, padding)), F.pad(visible, (0, padding))  # (n, G + T, E), (n, T)
    if config.mask_first_token:
        visible = visible & (torch.arange(t + padding) > 0)

    x = linear(x, "encoder.embedding_hidden_mapping_in")  # (n, G + T, D)
    states, attentions = [x], []
    for step in range(config.num_hidden_layers):
        group = step * config.num_hidden_groups // config.num_hidden_layers
        for inner in range(config.inner_group_num):
            name = f"encoder.albert_layer_groups.{group}.albert_layers.{inner}."
            query, key, value = (
                linear(x, f"{name}attention.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)  # (n, H, G + T, d)
                for part in ("query", "key", "value")
            )
            draws = projections_per_layer[len(attentions)] if projections_per_layer else None
            context, attention = oracle_attention(query, key, value, visible, **pattern, projections=draws)
            attentions.append(attention)
            context = linear(context.transpose(1, 2).flatten(2), name + "attention.dense")  # (n, G + T, D)
            a = layer_norm(x + context, name + "attention.LayerNorm")
            feed_forward = linear(act(linear(a, name + "ffn")), name + "ffn_output")
            x = layer_norm(a + feed_forward, name + "full_layer_layer_norm")
        states.append(x)

    hidden_states = [state[:, num_globals : num_globals + t] for state in states]
    if config.pool_with_global or config.mask_first_token:  # mask_first_token forces pool_with_global
        hidden_states[-1] = torch.cat([x[:, :1], hidden_states[-1][:, 1:]], dim=1)
    output = {
        "last_hidden_state": hidden_states[-1],
        "hidden_states": hidden_states,
        "attentions": attentions,
        "global_hidden_states": x[:, :num_globals],
    }
    if "pooler.weight" in weights:
        output["pooler_output"] = torch.tanh(linear(hidden_states[-1][:, 0], "pooler"))
    return output


def oracle_decoder(
    state_dict: dict[str, Tensor],
    config: dict | SimpleNamespace,
    encoder: dict[str, Tensor | list[Tensor]],
    *,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor,
    decoder_attention_mask: Tensor | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    """The decoder of LSGAlbertForConditionalGeneration and its head by the definition, in float64.

    One query at a time, over an explicit list of what it sees: of the decoder's tokens itself and the real ones before
    it, of the encoder's the global tokens (if they are passed on) and the real ones. A token's position is the number
    of real tokens before it.

    Args:
        state_dict: the model's names ("albert.embeddings.word_embeddings.weight", "decoder.cross_attentions...", ...).
        config: a dict, or anything with the fields as attributes.
        encoder: what `oracle_encoder` returned. attention_mask: (batch, T) of its inputs.
        decoder_input_ids, decoder_attention_mask: (batch, t).

    Returns:
        logits (batch, t, V); hidden_states, the mapped embeddings and then each of the num_hidden_layers steps, (batch,
        t, D); attentions and cross_attentions, one map per layer, (batch, heads, t, t) and (batch, heads, t, keys).
    """
    config = SimpleNamespace(**config) if isinstance(config, dict) else config
    weights = {name: tensor.double() for name, tensor in state_dict.items()}
    heads, (batch, t) = config.num_attention_heads, decoder_input_ids.shape
    act = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}[config.hidden_act]
    real = torch.ones(batch, t, dtype=torch.bool) if decoder_attention_mask is None else decoder_attention_mask.bool()
    text = encoder["last_hidden_state"]
    keys_real = torch.ones(text.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if config.pass_global_tokens_to_decoder:
        text = torch.cat([encoder["global_hidden_states"], text], dim=1)
        keys_real = F.pad(keys_real, (config.num_global_tokens, 0), value=True)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], config.layer_norm_eps)

    def attention(x: Tensor, states: Tensor, name: str, sees: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
        query, key, value = (
            linear(y, f"{name}.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)  # (n, H, length, d)
            for y, part in ((x, "query"), (states, "key"), (states, "value"))
        )
        weights_of = torch.zeros(batch, heads, t, states.shape[1], dtype=torch.float64)
        context = torch.zeros_like(query)
        for n in range(batch):
            for h in range(heads):
                for i in range(t):
                    seen = sees[n][i]
                    scores = key[n, h, seen] @ query[n, h, i] / math.sqrt(query.shape[-1])
                    weights_of[n, h, i, seen] = scores.softmax(0)
                    context[n, h, i] = scores.softmax(0) @ value[n, h, seen]
        return layer_norm(
            x + linear(context.transpose(1, 2).flatten(2), name + ".dense"), name + ".LayerNorm"
        ), weights_of

    sees_self = [[[*[j for j in range(i) if real[n, j]], i] for i in range(t)] for n in range(batch)]
    sees_text = [[keys_real[n].nonzero().flatten().tolist()] * t for n in range(batch)]
    positions = torch.tensor([[max(0, int(real[n, : i + 1].sum()) - 1) for i in range(t)] for n in range(batch)])

    table = "albert.embeddings.{}_embeddings.weight".format
    x = weights[table("word")][decoder_input_ids] + weights[table("token_type")][0]
    if getattr(config, "position_embedding_type", "absolute") == "absolute":
        x = x + weights[table("position")][positions]
    x = linear(layer_norm(x, "albert.embeddings.LayerNorm"), "albert.encoder.embedding_hidden_mapping_in")
    states, attentions, cross_attentions = [x], [], []
    for step in range(config.num_hidden_layers):
        group = step * config.num_hidden_groups // config.num_hidden_layers
        for inner in range(config.inner_group_num):
            name = f"albert.encoder.albert_layer_groups.{group}.albert_layers.{inner}."
            x, weights_of = attention(x, x, name + "attention", sees_self)
            attentions.append(weights_of)
            x, weights_of = attention(x, text, f"decoder.cross_attentions.{group}.{inner}", sees_text)
            cross_attentions.append(weights_of)
            x = layer_norm(
                x + linear(act(linear(x, name + "ffn")), name + "ffn_output"), name + "full_layer_layer_norm"
            )
        states.append(x)
    logits = layer_norm(act(linear(x, "predictions.dense")), "predictions.LayerNorm")
    logits = F.linear(logits, weights[table("word")], weights["predictions.bias"])
    return {
        "logits": logits, "hidden_states": states, "attentions": attentions, "cross_attentions": cross_attentions,
    }  # fmt: skip
