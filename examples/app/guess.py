"""Let the model guess a masked word, and collect the weights with which the word attended to each token.

These are the model's own weights, from the pass that made the guesses.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

KINDS = ("local", "sparse", "global")  # of attention to a token; also the classes in style.css
NOT_SEEN = "not seen"
MEAN = "mean"
TOP_K = 10


class Reading(NamedTuple):
    """The result of reading a text in which one masked token was chosen.

    Args:
        text: the text as it was read, with the chosen word masked.
        spans: for each token that was read, its first character and one past its last; empty for [CLS], [SEP].
        length: tokens of the whole text; more than the number of spans if the text was cut.
        chosen: index of the chosen token.
        predictions: guesses for the chosen token with their probabilities, best first.
        answer: the word that was masked, its probability, and its rank from 1; None if the text had [MASK] there, or
            if the word has several tokens.
        rows: (layers, heads, globals + tokens), the weights with which the chosen token attended to each.
        num_globals: how many global tokens come first in `rows`.
        block_size: tokens per block of the pattern.
        seconds: the time that it took to read the text.
    """

    text: str
    spans: list[tuple[int, int]]
    length: int
    chosen: int
    predictions: list[tuple[str, float]]
    answer: tuple[str, float, int] | None
    rows: Tensor
    num_globals: int
    block_size: int
    seconds: float


# The word


def places_of_word(text: str, word: str, mask_token: str) -> list[tuple[int, int]]:
    """The spans of a whole word, in any case, or of [MASK] in the text."""
    before, after = ("", "") if word == mask_token else (r"(?<!\w)", r"(?!\w)")
    return [match.span() for match in re.finditer(before + re.escape(word) + after, text, re.IGNORECASE)]


def find_word(text: str, word: str, occurrence: int, mask_token: str) -> tuple[int, int]:
    """The span of the n-th occurrence of a word in the text; an empty word means [MASK].

    Raises:
        ValueError: the text does not have it.
    """
    if not text.strip():
        raise ValueError("There is no text yet: paste one, or upload a file.")
    word = word.strip() or mask_token
    places = places_of_word(text, word, mask_token)
    if not places:
        raise ValueError(f"The text does not contain “{word}”: choose a word from the text.")
    if not 1 <= occurrence <= len(places):
        times = "once" if len(places) == 1 else f"{len(places):,} times"
        raise ValueError(f"The text has “{word}” only {times}: there is no occurrence {occurrence:,}.")
    return places[occurrence - 1]


def selected_word(text: str, selection: tuple[int, int], mask_token: str) -> tuple[str, int] | None:
    """The selected word and the number of its occurrence; None if the selection is not exactly one word.

    Browsers count in UTF-16, where a character beyond the first 65,536 counts twice. Some systems also select the
    space after a word, and a double click on [MASK] leaves out its brackets.
    """
    encoded = text.encode("utf-16-le", "surrogatepass")
    start, end = (len(encoded[: 2 * i].decode("utf-16-le", "ignore")) for i in selection)
    word = text[start:end].strip()
    start += len(text[start:end]) - len(text[start:end].lstrip())
    before, core = re.fullmatch(r"(\W*)(\w+)\W*", mask_token).groups()
    if word == core and text[:start].endswith(before) and text[start - len(before) :].startswith(mask_token):
        word, start = mask_token, start - len(before)
    if word != mask_token and not re.fullmatch(r"\w(\S*\w)?", word):
        return None
    places = places_of_word(text, word, mask_token)
    span = start, start + len(word)
    return (word, places.index(span) + 1) if span in places else None


# The model


def load(name: str) -> tuple[Any, Any]:
    """Load the model and its tokenizer.

    Raises:
        OSError, ValueError: the model does not exist, or is of another kind.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)
    if type(model).__name__ != "LSGAlbertForMaskedLM":
        raise ValueError(f"it holds a {type(model).__name__}, not an LSGAlbertForMaskedLM")
    if not tokenizer.is_fast:
        raise ValueError("its tokenizer cannot tell which characters a token covers: add a tokenizer.json")
    return model.float().eval().requires_grad_(False), tokenizer


@contextlib.contextmanager
def attention_rows(model: Any, token: int) -> Iterator[list[Tensor]]:
    """Collect the weights with which the text's token number `token` attends, for a batch of one text.

    A context is the sum of the values times these weights, so its derivative by the values gives the weights. This is
    exact for every selection of sparse tokens. It needs about the memory of a pass; whole maps need quadratic memory.

    Yields:
        A list that gets (heads, globals + length [+ padding]) from every layer in turn.
    """
    rows: list[Tensor] = []
    values: list[Tensor] = []
    num_heads, place = model.config.num_attention_heads, model.config.num_global_tokens + token

    def by_head(x: Tensor) -> Tensor:  # from a batch or a list of blocks to (tokens, heads, head size)
        return x.reshape(-1, num_heads, x.shape[-1] // num_heads)

    def before(module: Any, args: Any, value: Tensor) -> Tensor:
        values.append(value.detach().requires_grad_())
        return values[-1]

    def after(module: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        context, *maps = output
        (gradient,) = torch.autograd.grad(by_head(context)[place, :, 0].sum(), values.pop())
        rows.append(by_head(gradient)[:, :, 0].T.clone())
        return context.detach(), *maps

    attentions = [layer.attention for g in model.albert.encoder.albert_layer_groups for layer in g.albert_layers]
    hooks = [attention.value.register_forward_hook(before) for attention in attentions]
    hooks += [attention.register_forward_hook(after) for attention in attentions]
    try:
        with torch.enable_grad():
            yield rows
    finally:
        for hook in hooks:
            hook.remove()


def read(model: Any, tokenizer: Any, text: str, word: str = "", occurrence: int = 1, top_k: int = TOP_K) -> Reading:
    """Mask a word of the text, or choose a [MASK] in it. Let the model read the text, cut to the model's maximum.

    Raises:
        ValueError: the text does not have this word, or the word was cut off.
    """
    began = time.perf_counter()
    mask = tokenizer.mask_token
    start, end = find_word(text, word, occurrence, mask)
    masked = text[:start] + mask + text[end:]
    limit = model.config.max_position_embeddings
    inputs = tokenizer(masked, truncation=True, max_length=limit, return_offsets_mapping=True)
    ids, spans = inputs["input_ids"], inputs["offset_mapping"]
    length = len(tokenizer(masked, verbose=False)["input_ids"])
    masks = [i for i, token_id in enumerate(ids) if token_id == tokenizer.mask_token_id]
    number = masked[:start].count(mask)
    if number >= len(masks):
        raise ValueError(
            f"“{text[start:end]}” comes after the first {limit:,} tokens, and the model reads no more: "
            "choose an earlier word or a shorter text."
        )
    chosen = masks[number]
    with attention_rows(model, chosen) as rows:
        states = model.albert(torch.tensor([ids])).last_hidden_state
    scores = model.predictions(states[0, chosen]).detach().softmax(-1)
    top, top_ids = scores.topk(min(top_k, len(scores)))
    words = [tokenizer.decode([token_id]).strip() for token_id in top_ids.tolist()]
    answer = None
    answer_ids = ids_of_span(tokenizer, text, start, end)
    if len(answer_ids) == 1 and text[start:end] != mask:
        score = scores[answer_ids[0]]
        answer = text[start:end], score.item(), int((scores > score).sum()) + 1
    num_globals = model.config.num_global_tokens
    return Reading(
        text=masked, spans=[tuple(span) for span in spans], length=length, chosen=chosen,
        predictions=list(zip(words, top.tolist(), strict=True)), answer=answer,
        rows=torch.stack(rows)[..., : num_globals + len(ids)], num_globals=num_globals,
        block_size=model.config.block_size, seconds=time.perf_counter() - began,
    )  # fmt: skip


def ids_of_span(tokenizer: Any, text: str, start: int, end: int) -> list[int]:
    """The ids of the tokens that have a character between `start` and `end`."""
    inputs = tokenizer(text, verbose=False, return_offsets_mapping=True)
    pairs = zip(inputs["input_ids"], inputs["offset_mapping"], strict=True)
    return [token_id for token_id, (first, last) in pairs if first < end and last > start]


# What the word attended to


def chosen_row(reading: Reading, layer: int | str, head: int | str) -> Tensor:
    """The weights (globals + tokens) of a layer and a head. Both count from 0; `MEAN` takes the mean of all."""
    rows = reading.rows.mean(0) if layer == MEAN else reading.rows[layer]
    return rows.mean(0) if head == MEAN else rows[head]


def kinds_of_keys(weights: Tensor, chosen: int, num_globals: int, block_size: int) -> list[str]:
    """How the chosen token attended to each global and each token, by the pattern: all tokens of its own block and the
    two blocks beside it are local, and those further away are sparse. A token without weight was not seen."""
    blocks = [token // block_size for token in range(len(weights) - num_globals)]
    kinds = ["global"] * num_globals
    kinds += ["local" if abs(block - chosen // block_size) <= 1 else "sparse" for block in blocks]
    return [kind if weight > 0 else NOT_SEEN for kind, weight in zip(kinds, weights.tolist(), strict=True)]
