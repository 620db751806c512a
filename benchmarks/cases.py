"""What is measured (`Size`, `Case`), the results (`Result`), and their statistics. This module does not need torch."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

MODES = ("forward", "training", "checkpointed", "backward")  # of benchmarks.speed; others have their own scripts
INFERENCE = ("forward", "generate", "embed")  # the modes without gradients
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Size:
    """The sizes of the models. They are the same for all contestants that have such a size.

    Args:
        hidden, layers, heads, feed_forward, vocabulary: of every model.
        embedding: width of the ALBERTs' embeddings.
        block: tokens per block, and sparse tokens per side, of our model.
        longformer_window: tokens that a Longformer token sees, both sides together.
        bigbird_block: tokens per block of BigBird.
        modernbert_feed_forward: width of each of the two halves of ModernBERT's gated feed-forward part.
        modernbert_window: tokens that a token sees in ModernBERT's local layers, both sides together.
    """

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    vocabulary: int = 30_000
    embedding: int = 128
    block: int = 128
    longformer_window: int = 512
    bigbird_block: int = 64
    modernbert_feed_forward: int = 1152
    modernbert_window: int = 128


SIZES = {
    "base": Size(),
    # For tests: everything runs, but the numbers mean nothing.
    "tiny": Size(32, 2, 4, 48, 120, 16, 8, longformer_window=16, bigbird_block=4, modernbert_window=16),
}


@dataclass(frozen=True)
class Embedders(Size):
    """The directories of two models of sentence-transformers. Their sizes are in their own files."""

    source: str = ""
    converted: str = ""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        contestant: a name of `contestants.find_contestant`.
        mode: "forward" is the base model in `eval()` under `no_grad`; "training" is the masked-LM class in `train()`
            without dropout: forward, loss on 15 % of the tokens, backward, gradients cleared; "backward" is the base
            model in `train()`: forward, backward from all real tokens' states, gradients cleared; "checkpointed" is
            "training" with gradient checkpointing; "generate" is a sequence-to-sequence model that reads a text and
            writes another; "embed" is a model of sentence-transformers that reads texts.
        lengths: tokens of each document of the batch; shorter ones are padded on the right, with an attention mask.
        dtype: of weights and activations; the weights are cast.
        device: "cpu" or "cuda".
        layers: the number of layers, if it differs from the size's.
        new_tokens, beams: of "generate".
    """

    contestant: str
    mode: str
    lengths: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    layers: int | None = None
    new_tokens: int = 0
    beams: int = 1

    @property
    def tokens(self) -> int:
        """The number of real tokens in the batch."""
        return sum(self.lengths)

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, length) of the input ids, padding included."""
        return len(self.lengths), max(self.lengths)

    def __str__(self) -> str:
        batch, length = self.shape
        layers = "" if self.layers is None else f", {self.layers} layers"
        new = f", {self.new_tokens} new tokens, {self.beams} beams" if self.new_tokens else ""
        return f"{self.mode} {self.dtype} {batch} x {length} {self.contestant} ({self.device}{layers}{new})"


@dataclass(frozen=True)
class Result:
    """The result of a case.

    Args:
        case: what was timed.
        seconds: of every timed call, by round. Round 0 is the first call, without a warm-up. It counts only if it has
            used up the case's budget; then there are no other rounds.
        peak_bytes: peak memory of a call, beyond the memory that the process or device held before it.
        weights_bytes: parameters and buffers.
        error: why the case failed; None if it succeeded.
        code: digest of the measured modules of ours, see `runner.code_digest`.
        cache_bytes: keys and values that the model holds at the end of "generate"; None if unknown.
    """

    case: Case
    seconds: dict[int, float]
    peak_bytes: int | None = None
    weights_bytes: int | None = None
    error: str | None = None
    code: str = ""
    cache_bytes: int | None = None

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds.values())

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds of the fastest and the slowest call."""
        return min(self.seconds.values()), max(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.case.tokens / self.median


def time_ratio(numerators: Sequence[Result], denominators: Sequence[Result]) -> float | None:
    """The sum of the numerators' times, divided by the sum of the denominators' times.

    The ratio is taken within each round that all results have, so that a slow minute of the machine affects both
    sides. The median of these ratios is returned. If there is no common round (one case was too slow for more than its
    first call), it is the ratio of the sums of medians. None if one of the cases failed.
    """
    results = [*numerators, *denominators]
    if not results or any(result.error is not None for result in results):
        return None
    rounds = set.intersection(*(set(result.seconds) for result in results))
    if not rounds:
        return sum(result.median for result in numerators) / sum(result.median for result in denominators)
    return statistics.median(
        sum(result.seconds[r] for result in numerators) / sum(result.seconds[r] for result in denominators)
        for r in rounds
    )


def memory_ratio(numerator: Result, denominator: Result) -> float | None:
    """The ratio of peak memory beyond the weights; None if a case failed or its memory is unknown."""
    if not numerator.peak_bytes or not denominator.peak_bytes:
        return None
    return numerator.peak_bytes / denominator.peak_bytes


def result_to_json(result: Result) -> dict:
    """A result in the form of JSON: keys are strings, and tuples are lists."""
    return {**asdict(result), "seconds": {str(r): seconds for r, seconds in result.seconds.items()}}


def result_from_json(data: dict) -> Result:
    case = Case(**{**data["case"], "lengths": tuple(data["case"]["lengths"])})
    return Result(**{**data, "case": case, "seconds": {int(r): s for r, s in data["seconds"].items()}})
