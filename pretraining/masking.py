"""Whole-word n-gram masking, as in ALBERT: 15 % of the tokens, in spans of up to three words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of positions that are not predicted


@dataclass(frozen=True)
class Masker:
    """Chooses and hides tokens.

    Args:
        starts_word: shape ``(vocabulary,)``, True for pieces that begin a word.
        mask_id: id of `[MASK]`.
        replacements: ids that may replace a token (all except the special ones).
        rate: share of tokens that are predicted.
        span_words: largest number of adjacent words that are chosen together; n words have a probability ~ 1/n.
    """

    starts_word: np.ndarray
    mask_id: int
    replacements: np.ndarray
    rate: float = 0.15
    span_words: int = 3

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, rate: float = 0.15, span_words: int = 3) -> Masker:
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        starts_word = np.array([piece.startswith("▁") for piece in pieces])
        replacements = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        return cls(starts_word, tokenizer.mask_token_id, replacements, rate, span_words)

    def choose(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The positions to predict, shape ``(length,)``, True = predict.

        Spans of whole words are chosen. A span that would exceed the rate is left out, so a short text may have a
        little less than the rate. At least one token is always chosen.
        """
        chosen = np.zeros(len(tokens), dtype=bool)
        words = np.flatnonzero(self.starts_word[tokens] | (np.arange(len(tokens)) == 0))
        bounds = np.append(words, len(tokens))
        budget = max(1, round(self.rate * len(tokens)))
        lengths = np.arange(1, self.span_words + 1)
        sizes = rng.choice(lengths, size=len(words), p=(1 / lengths) / (1 / lengths).sum())
        for first, size in zip(rng.permutation(len(words)), sizes, strict=True):
            begin, end = bounds[first], bounds[min(first + size, len(words))]
            if end - begin <= budget and not chosen[begin:end].any():
                chosen[begin:end] = True
                budget -= end - begin
                if budget == 0:
                    break
        if not chosen.any():
            chosen[rng.integers(len(tokens))] = True
        return chosen

    def hide(self, tokens: np.ndarray, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A copy of the tokens in which 80 % of the chosen ones are `[MASK]`, 10 % random pieces, 10 % themselves."""
        dice = rng.random(len(tokens))
        hidden = np.where(chosen & (dice < 0.8), self.mask_id, tokens)
        return np.where(chosen & (dice >= 0.9), rng.choice(self.replacements, size=len(tokens)), hidden)
