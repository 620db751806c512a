"""The sequence-to-sequence model against search written from its definition, and whether it learns what it is made for.

The reference searches score every prefix anew: one whole forward for each step, without a cache, and each text alone
and unpadded. The searches of `generate` run on a padded batch, with a cache.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoTokenizer

from conftest import ROOT
from lsg_albert import LSGAlbertConfig, LSGAlbertForConditionalGeneration

PAD, UNK, CLS, SEP = 0, 1, 2, 3
SPECIAL = 5  # ids of special tokens come first
IGNORED = -100

# --- search

WORDS = 9  # few, and a bias for [SEP], so that some sequences end early and others do not
Scorer = Callable[[list[list[int]]], Tensor]

# Older releases compare the finished sequences with the best continuation even if that has just ended itself.
COUNTS_ENDED_BEAMS = Version(transformers.__version__) < Version("4.50")


@pytest.fixture
def make_model(tiny_config) -> Callable[..., LSGAlbertForConditionalGeneration]:
    def make(seed: int, **fields) -> LSGAlbertForConditionalGeneration:
        torch.manual_seed(seed)
        config = tiny_config(vocab_size=SPECIAL + WORDS, initializer_range=0.3, **fields)
        model = LSGAlbertForConditionalGeneration(config).eval()
        model.get_output_embeddings().bias.data[SEP] += 2
        return model

    return make


def make_texts(seed: int) -> list[list[int]]:
    """Three texts: within a block, and over several."""
    draw = random.Random(seed)
    return [[CLS, *draw.choices(range(SPECIAL, SPECIAL + WORDS), k=length), SEP] for length in (4, 21, 39)]


def pad(rows: list[list[int]], value: int = PAD) -> Tensor:
    """(rows, longest row), padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def unpad(row: list[int]) -> list[int]:
    """A generated row up to its first [SEP]: what follows is padding, for which some releases take [SEP] itself."""
    return row[: row.index(SEP) + 1] if SEP in row else row


def scorer(model: LSGAlbertForConditionalGeneration, text: list[int]) -> Scorer:
    """A function of prefixes of one length -> log-probabilities of the next token, (prefixes, vocabulary)."""

    @torch.no_grad()
    def next_log_probabilities(prefixes: list[list[int]]) -> Tensor:
        decoder_input_ids = torch.tensor(prefixes)
        input_ids = torch.tensor([text] * len(prefixes))
        logits = model(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False).logits
        return logits[:, -1].double().log_softmax(-1)

    return next_log_probabilities


def greedy_search(score: Scorer, max_length: int) -> list[int]:
    tokens = [CLS]
    while len(tokens) < max_length and tokens[-1] != SEP:
        tokens.append(int(score([tokens])[0].argmax()))
    return tokens


def beam_search(
    score: Scorer, num_beams: int, max_length: int, length_penalty: float, early_stopping: bool | str
) -> list[tuple[float, list[int]]]:
    """Beam search as transformers documents it.

    A finished sequence counts by its log-probability over its length (without the first token) to the power of
    `length_penalty`. Of the `2 * num_beams` best continuations, those of the better half that end in [SEP] are
    finished, and the best others go on. With `num_beams` finished, the search ends at once (`early_stopping=True`),
    when the best one that goes on would count less than the worst finished if it ended now (`False`), or however it
    went on (`"never"`).

    Returns:
        The `num_beams` best finished sequences and their scores, the best first.
    """

    def counted(log_probability: float, length: int) -> float:
        return log_probability / length**length_penalty

    beams, finished = [(0.0, [CLS])], []
    for length in range(1, max_length):
        next_scores = score([tokens for _, tokens in beams]).tolist()
        continuations = [
            (total + value, [*tokens, token])
            for (total, tokens), values in zip(beams, next_scores, strict=True)
            for token, value in enumerate(values)
        ]
        continuations = sorted(continuations, reverse=True)[: 2 * num_beams]
        ended = [pair for pair in continuations[:num_beams] if pair[1][-1] == SEP]
        beams = [pair for pair in continuations if pair[1][-1] != SEP][:num_beams]
        if length == max_length - 1:
            ended += beams  # cut off
        finished += [(counted(total, length), tokens) for total, tokens in ended]
        finished = sorted(finished, reverse=True)[:num_beams]
        if len(finished) == num_beams:
            longest = max_length - 1 if early_stopping == "never" and length_penalty > 0 else length
            going_on = continuations[0] if COUNTS_ENDED_BEAMS else beams[0]
            if early_stopping is True or counted(going_on[0], longest) <= finished[-1][0]:
                break
    return finished


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("to_decoder", [True, False])
def test_greedy_search_equals_the_plain_one(make_model, seed, to_decoder):
    model, texts = make_model(seed, pass_global_tokens_to_decoder=to_decoder), make_texts(seed)
    batch = pad(texts)
    made = model.generate(
        input_ids=batch, attention_mask=(batch != PAD).long(), max_length=12, do_sample=False, num_beams=1
    )
    expected = [greedy_search(scorer(model, text), max_length=12) for text in texts]
    assert [unpad(row) for row in made.tolist()] == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize(
    ("length_penalty", "early_stopping"),
    [(1.0, True), (1.0, False), (2.0, True), (2.0, False), (2.0, "never"), (0.0, "never"), (-0.5, False)],
)
def test_beam_search_equals_the_plain_one(make_model, seed, num_beams, length_penalty, early_stopping):
    model, texts = make_model(seed), make_texts(seed)
    batch = pad(texts)
    options = {"max_length": 10, "length_penalty": length_penalty, "early_stopping": early_stopping}
    made = model.generate(
        input_ids=batch, attention_mask=(batch != PAD).long(), num_beams=num_beams, num_return_sequences=num_beams,
        do_sample=False, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    expected = [pair for text in texts for pair in beam_search(scorer(model, text), num_beams, **options)]
    assert [unpad(row) for row in made.sequences.tolist()] == [tokens for _, tokens in expected]
    scores = torch.tensor([score for score, _ in expected])
    torch.testing.assert_close(made.sequences_scores, scores, rtol=1e-5, atol=1e-5)


def test_the_searches_differ_and_end_in_different_ways(make_model):
    """What the tests above compare is not all the same: some sequences end and some are cut, beam search finds others
    than greedy search, and stopping at once gives others than going on."""
    ended = cut = differ = 0
    stops = {False: 0, "never": 0}
    for seed in range(4):
        model = make_model(seed)
        for text in make_texts(seed):
            score = scorer(model, text)
            found = {early: beam_search(score, 4, 10, 2.0, early) for early in (True, False, "never")}
            ended += sum(tokens[-1] == SEP for _, tokens in found[True])
            cut += sum(tokens[-1] != SEP for _, tokens in found["never"])
            differ += found["never"][0][1] != greedy_search(score, 10)
            for early in stops:
                stops[early] += found[early] != found[True]
    assert min(ended, cut, differ, *stops.values()) > 0


# --- learning


Pair = tuple[list[int], list[int]]  # a text without [CLS] and [SEP], and what is to be written of it


def frequent_tokens(texts: list[list[int]], number: int) -> dict[int, int]:
    """The most frequent tokens of real texts -> ids that are dense, behind those of the special tokens.

    A small vocabulary is what lets a small model learn within seconds.
    """
    counts = Counter(token for text in texts for token in text)
    return {token: SPECIAL + index for index, (token, _) in enumerate(counts.most_common(number))}


def small_model(num_words: int, seed: int) -> LSGAlbertForConditionalGeneration:
    """From scratch. Weights drawn with 0.1 learn to copy in 150 steps; with ALBERT's 0.02 not in 400."""
    torch.manual_seed(seed)
    sizes = {"embedding_size": 64, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    pattern = {"block_size": 16, "sparse_block_size": 16, "initializer_range": 0.1}
    config = LSGAlbertConfig(
        vocab_size=SPECIAL + num_words, num_hidden_layers=2, num_attention_heads=4, **sizes, **pattern
    )
    return LSGAlbertForConditionalGeneration(config)


def collate(pairs: list[Pair]) -> dict[str, Tensor]:
    input_ids = pad([[CLS, *text, SEP] for text, _ in pairs])
    labels = pad([[*target, SEP] for _, target in pairs], IGNORED)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": labels}


def train(model: LSGAlbertForConditionalGeneration, draw: Callable[[], list[Pair]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        model(**collate(draw())).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def exact_matches(model: LSGAlbertForConditionalGeneration, pairs: list[Pair]) -> tuple[float, float]:
    """How often greedy search writes the target, and how often, as a measure of chance, that of another text."""
    batch = collate(pairs)
    del batch["labels"]
    longest = 2 + max(len(target) for _, target in pairs)
    made = model.generate(**batch, max_length=longest, do_sample=False, num_beams=1)
    made = [unpad(row[1:]) for row in made.tolist()]
    targets = [[*target, SEP] for _, target in pairs]
    return tuple(
        sum(a == b for a, b in zip(made, expected, strict=True)) / len(pairs)
        for expected in (targets, targets[1:] + targets[:1])
    )


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.mark.parametrize("seed", range(2))
def test_learns_to_copy(tokenizer, seed):
    """Tokens of a real text in random order, which no language model could guess: at most 1 in 60 ** 4 by chance."""
    text = (ROOT / "examples" / "long_document.txt").read_text(encoding="utf-8")
    words = list(frequent_tokens([tokenizer(text, add_special_tokens=False)["input_ids"]], 60).values())
    rng = random.Random(seed)

    def draw(number: int) -> list[Pair]:
        texts = [rng.choices(words, k=rng.randint(4, 8)) for _ in range(number)]
        return [(text, text) for text in texts]

    model, held_out = small_model(len(words), seed), draw(100)
    assert exact_matches(model, held_out)[0] == 0
    train(model, lambda: draw(32), steps=250)
    matches, chance = exact_matches(model, held_out)
    assert matches > 0.9 and chance == 0


def runs_of_sentences(file: Path, articles: int, tokenizer) -> list[list[list[int]]]:
    """All runs of three sentences of the paragraphs of the first articles, as token ids."""
    runs = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line, _ in zip(lines, range(articles), strict=False):
            for paragraph in json.loads(line)["document"].split("\n\n"):
                found = [part for part in re.split(r"(?<=[.])\s+", paragraph) if part.endswith(".")]
                ids = tokenizer(found, add_special_tokens=False)["input_ids"] if found else []
                runs += [ids[start : start + 3] for start in range(len(ids) - 2)]
    return runs


@pytest.mark.slow
def test_learns_to_pick_the_first_sentence(tokenizer, shared):
    """Of three real sentences, the first of up to 12 tokens; rare tokens are all [UNK]. The held-out ones are of other
    articles. A model that copied one of the sentences without knowing which would be right in a third."""
    folder = shared / "data" / "summarization" / "wikispeedia_lead"
    articles = {"train": 600, "test": 200}
    runs = {name: runs_of_sentences(folder / f"{name}.jsonl.gz", articles[name], tokenizer) for name in articles}
    ids = frequent_tokens([run[0] for run in runs["train"]], 1000)
    pairs = {
        name: [
            ([ids.get(token, UNK) for sentence in run for token in sentence][:46], [ids.get(t, UNK) for t in run[0]])
            for run in found
            if 4 <= len(run[0]) <= 12
        ]
        for name, found in runs.items()
    }
    rng, held_out = random.Random(0), random.Random(0).sample(pairs["test"], 100)
    model = small_model(len(ids), seed=0)
    train(model, lambda: rng.sample(pairs["train"], 32), steps=500)
    matches, chance = exact_matches(model, held_out)
    assert matches > 0.6 and chance < 0.05
