"""Search long documents by their vectors: one for the whole, one for each chunk, or late chunking, without training.

    python -m experiments.retrieval DATA --source all-MiniLM-L6-v2 --collections covid_qa --lengths 1024 2048 4096

SOURCE is a model of sentence-transformers of the BERT family that pools by the mean. Its conversion to LSG is made in FOLDER,
where the vectors are kept too. OUTPUT.json holds the rank of the right document for every query, and is written after every
system; started again, what is there is kept. OUTPUT.md is made from it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.worker import Memory
from lsg_albert.configuration_lsg_albert import SPARSITY_TYPES
from lsg_albert.conversion import convert_checkpoint
from pretraining.training_support import describe_machine, write_atomically

LATE = 8000  # characters before the answer, from which a query is about the later part
PASSAGES = (128, 256, 512)  # tokens of a chunk, or of a passage in late chunking
WHOLE = 16384  # tokens, more than any of these documents has but two
CHUNKS_AT_ONCE = 8192  # tokens


@dataclass(frozen=True)
class Query:
    text: str
    document: int
    position: int  # characters of the document before the answer
    is_test: bool = True  # whether the document is kept out of fine-tuning


@dataclass(frozen=True)
class Collection:
    documents: list[str]
    queries: list[Query]


def read_lines(path: Path) -> list[dict]:
    """The objects of a gzipped JSON lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def covid_qa(data: Path) -> Collection:
    """Questions against the whole papers that answer them."""
    rows = [
        (row, split == "test")
        for split in ("train", "test")
        for row in read_lines(data / f"qa/covid_qa/{split}.jsonl.gz")
    ]
    queries = [
        Query(question["question"], number, question["answers"][0]["answer_start"], is_test)
        for number, (row, is_test) in enumerate(rows)
        for question in row["qas"]
    ]
    return Collection([row["context"] for row, _ in rows], queries)


def qmsum(data: Path) -> Collection:
    """The specific questions of the test split against whole meetings; turns are lines, and answers are spans of turns."""
    folder = data / "summarization"
    meetings = {row["id"]: row["document"] for row in read_lines(folder / "qmsum_general/test.jsonl.gz")}
    numbers = {name: number for number, name in enumerate(meetings)}
    queries = [
        Query(
            row["query"], numbers[row["id"]], len("\n".join(meetings[row["id"]].split("\n")[: int(row["span"][0][0])]))
        )
        for row in read_lines(folder / "qmsum_spans/test.jsonl.gz")
    ]
    return Collection([*meetings.values()], queries)


def take_paragraph(text: str, generator: random.Random) -> tuple[str, str, int] | None:
    """A text without a paragraph of its last third, that paragraph, and where it stood; None if there is none of 200 to 800
    characters."""
    paragraphs = text.split("\n\n")
    starts = np.cumsum([0] + [len(each) + 2 for each in paragraphs])
    found = [i for i, each in enumerate(paragraphs) if 200 <= len(each) <= 800 and starts[i] >= len(text) * 2 / 3]
    if not found:
        return None
    taken = generator.choice(found)
    return "\n\n".join(paragraphs[:taken] + paragraphs[taken + 1 :]), paragraphs[taken], int(starts[taken])


def without_paragraphs(texts: Iterable[str]) -> Collection:
    """Paragraphs from the last third of texts against the texts without them."""
    generator = random.Random(0)
    found = [taken for text in texts if (taken := take_paragraph(text, generator)) is not None]
    return Collection([rest for rest, _, _ in found], [Query(each, i, at) for i, (_, each, at) in enumerate(found)])


def kept_out(data: Path, name: str) -> list[str]:
    """The texts of a corpus that are kept out of training."""
    names = set((data / f"corpus/HELDOUT_{name}_ids.txt").read_text(encoding="utf-8").split())
    return [row["text"] for row in read_lines(data / f"corpus/{name}.jsonl.gz") if row["id"] in names]


def encyclopedia(data: Path) -> Collection:
    """A paragraph from the last third of each of 100 articles of 16,000 characters and more."""
    texts = [text for text in kept_out(data, "wikispeedia") if len(text) >= 16000]
    return without_paragraphs(random.Random(0).sample(texts, 100))


def novels(data: Path) -> Collection:
    """A paragraph from the last third of each of 3 excerpts, of 20,000 characters, of each of 30 novels."""
    excerpts = []
    for text in kept_out(data, "novels100"):
        paragraphs = text.split("\n\n")
        for part in range(3):
            rest = "\n\n".join(paragraphs[len(paragraphs) * (2 * part + 1) // 7 :])
            excerpts.append(rest[:20000].rsplit("\n\n", 1)[0])
    return without_paragraphs(excerpts)


COLLECTIONS = {"covid_qa": covid_qa, "qmsum": qmsum, "encyclopedia": encyclopedia, "novels": novels}


@dataclass(frozen=True)
class System:
    """A way to vectors of documents. `model` is a folder; `length` tokens are read in one pass or, where `chunked`, in each
    chunk of the whole document; `fields` replace those of the model's config."""

    name: str
    model: Path
    length: int
    chunked: bool = False
    fields: dict = field(default_factory=dict)


def load(system: System, dtype: str) -> PreTrainedModel:
    options = {"trust_remote_code": True} if system.fields else {}
    model = AutoModel.from_pretrained(system.model, **options, **system.fields, torch_dtype=getattr(torch, dtype))
    return model.eval()


def split(ids: Sequence[int], length: int) -> list[list[int]]:
    """Consecutive pieces of that many ids, the last one shorter; of no ids one empty piece."""
    return [list(ids[i : i + length]) for i in range(0, max(len(ids), 1), length)]


def states_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The last states (tokens, hidden) of each piece of ids, in float32, [CLS] and [SEP] around it."""
    rows = [[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id] for piece in pieces]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    states = model(**batch).last_hidden_state.float()
    return [each[: len(row)] for each, row in zip(states, rows, strict=True)]


def passage_vectors(states: Tensor, size: int) -> Tensor:
    """Late chunking (Günther et al., 2024, arXiv 2409.04701): the mean of each run of `size` states, at length 1.

    Args:
        states: (tokens, hidden), of a whole document in one pass.

    Returns:
        (passages, hidden); the last passage may have fewer tokens.
    """
    return torch.stack([normalize(run.mean(0), dim=-1) for run in states.split(size)])


def encode_pass(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], length: int
) -> dict[str, Tensor]:
    """The vectors (vectors, hidden) of a document's first `length` tokens, one for all and, of long ones, of passages."""
    (states,) = states_of(model, tokenizer, [ids[: length - 2]])
    sizes = PASSAGES if length > max(PASSAGES) else ()
    late = {f"late chunking, {size}": passage_vectors(states, size) for size in sizes}
    return {"one vector": passage_vectors(states, len(states)), **late}


def encode_chunks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], length: int
) -> dict[str, Tensor]:
    """The vectors of a document's chunks, each embedded alone, and the mean of them."""
    pieces = split(ids, length - 2)
    at_once = max(1, CHUNKS_AT_ONCE // length)
    states = [
        each for i in range(0, len(pieces), at_once) for each in states_of(model, tokenizer, pieces[i : i + at_once])
    ]
    vectors = torch.cat([passage_vectors(each, len(each)) for each in states])
    return {"mean of chunks": normalize(vectors.mean(0, keepdim=True), dim=-1), "best chunk": vectors}


@torch.no_grad()
def encode_queries(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """The vectors (queries, hidden) of texts, of which 256 tokens are read."""
    ids = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=254)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    vectors = {}
    for batch in split(order, 32):
        states = states_of(model, tokenizer, [ids[i] for i in batch])
        vectors |= {i: passage_vectors(each, len(each)) for i, each in zip(batch, states, strict=True)}
    return torch.cat([vectors[i] for i in range(len(ids))]).numpy()


def rank_documents(queries: np.ndarray, documents: Sequence[np.ndarray], relevant: Sequence[int]) -> np.ndarray:
    """The rank of each query's document, by the cosine of its nearest vector; of equal ones the worst.

    Args:
        queries: (queries, hidden), of length 1, as all vectors.
        documents: (vectors, hidden) of each document.
        relevant: the index of each query's document.

    Raises:
        ValueError: a vector has a value that is no number.
    """
    scores = np.stack([(queries @ each.T).max(1) for each in documents], axis=1)
    if not np.isfinite(scores).all():
        raise ValueError("A vector has a value that is not finite: no ranks can be told.")
    return (scores >= scores[np.arange(len(queries)), relevant][:, None]).sum(1)


def ndcg_at_10(ranks: np.ndarray) -> np.ndarray:
    """Of queries with one right document each, the discounted cumulative gain among the first 10 (Järvelin and Kekäläinen,
    2002), of which the best is 1."""
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)


def recall_at_1(ranks: np.ndarray) -> np.ndarray:
    return (ranks == 1).astype(float)


def interval(values: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of the queries' values. Documents are resampled, with all their queries."""
    groups = np.unique(documents, return_inverse=True)[1]
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    if len(sums) < 2:
        return float("nan"), float("nan")
    found = bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=2000,
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)


@torch.no_grad()
def measure(
    encode: Callable[[Sequence[int]], dict[str, Tensor]], documents: Sequence[Sequence[int]]
) -> tuple[dict, dict]:
    """The vectors of each document by the way they are read out, and what a document costs: CPU seconds (wall-clock time
    would count other programs) and the peak of memory beyond the weights, in MiB (None where it is not known)."""
    memory, made = Memory("cpu"), {}
    memory.reset_peak()
    started = time.process_time()
    for ids in tqdm(documents, unit="document", disable=None):
        for name, vectors in encode(ids).items():
            made.setdefault(name, []).append(vectors.numpy())
    seconds, peak = (time.process_time() - started) / len(documents), memory.peak_beyond_base()
    return made, {"seconds": round(seconds, 3), "mebibytes": peak and round(peak / 2**20)}


def kept(path: Path, make: Callable[[], tuple[dict, dict]]) -> tuple[dict, dict]:
    """What `measure` makes, from a file if it was made before."""
    if not path.exists():
        made, cost = make()
        arrays = {f"{name}/{i}": array for name, arrays in made.items() for i, array in enumerate(arrays)}
        content = BytesIO()
        np.savez(content, cost=json.dumps(cost), **arrays)
        write_atomically(path, content.getvalue())
    with np.load(path) as file:
        made = {}
        for name in file.files:
            if name != "cost":
                made.setdefault(name.rsplit("/", 1)[0], []).append(file[name])
        return made, json.loads(str(file["cost"]))


def systems(args: argparse.Namespace) -> list[System]:
    """What is compared, the most telling first."""
    source, lsg = Path(args.source), args.folder / "lsg"
    long = max(args.lengths)

    def converted(length: int, block_size: int, sparsity_type: str, model: Path = lsg, name: str = "LSG") -> System:
        fields = {"block_size": block_size, "sparsity_type": sparsity_type}
        return System(
            f"{name}, {length:,} tokens, blocks of {block_size}, {sparsity_type}", model, length, fields=fields
        )

    found = [System(f"source, cut at {length}", source, length) for length in (256, 512)]
    found += [converted(long, 128, kind) for kind in ("none", "norm")]
    found += [System(f"source, chunks of {size}", source, size, chunked=True) for size in PASSAGES]
    found += [converted(WHOLE, 128, kind) for kind in ("none", "norm")]
    # Texts of up to two blocks get full attention, which makes this the source with its positions repeated.
    fields = {"block_size": long // 2, "sparsity_type": "none"}
    found.append(System(f"full attention, {long:,} tokens", lsg, long, fields=fields))
    if args.all:
        found += [converted(long, 128, kind) for kind in SPARSITY_TYPES]
        found += [converted(n, size, kind) for size in (128, 256) for n in args.lengths for kind in ("none", "norm")]
    if args.trained_lsg:
        found.append(converted(long, 128, "none", args.trained_lsg, "trained LSG"))
    if args.trained_source:
        found.append(System("trained source, chunks of 128", args.trained_source, 128, chunked=True))
    return [*{system.name: system for system in found}.values()]


def check_pooling(folder: Path) -> None:
    """Refuse a model of sentence-transformers that does not pool by the mean, which is what is computed here.

    Raises:
        ValueError: the model pools in another way.
    """
    path = folder / "1_Pooling" / "config.json"
    if path.is_file() and not json.loads(path.read_text()).get("pooling_mode_mean_tokens", True):
        raise ValueError(f"--source {folder} does not pool by the mean of all tokens: take a model that does.")


def describe(collection: Collection, lengths: Sequence[int]) -> dict:
    """What the results say of a collection; lists have an entry for each query."""
    queries = collection.queries
    return {
        "documents": len(collection.documents),
        "tokens": {"median": int(np.median(lengths)), "largest": max(lengths), "all": sum(lengths)},
        "document": [query.document for query in queries],
        "late": [query.position >= LATE for query in queries],
        "test": [query.is_test for query in queries],
    }


COMPARED = [  # which of two is better, by a difference over the same queries
    (("LSG, 4,096 tokens, blocks of 128, none", "one vector"), ("source, cut at 512", "one vector")),
    (("LSG, 4,096 tokens, blocks of 128, none", "one vector"), ("source, chunks of 512", "mean of chunks")),
    (
        ("LSG, 4,096 tokens, blocks of 128, none", "one vector"),
        ("LSG, 4,096 tokens, blocks of 128, norm", "one vector"),
    ),
    (("LSG, 4,096 tokens, blocks of 128, none", "one vector"), ("full attention, 4,096 tokens", "one vector")),
    (("LSG, 16,384 tokens, blocks of 128, none", "one vector"), ("source, chunks of 128", "mean of chunks")),
    (("LSG, 16,384 tokens, blocks of 128, none", "late chunking, 128"), ("source, chunks of 128", "best chunk")),
    (("LSG, 16,384 tokens, blocks of 128, none", "late chunking, 512"), ("source, chunks of 512", "best chunk")),
]
TRAINED = [
    (
        ("trained LSG, 4,096 tokens, blocks of 128, none", "one vector"),
        ("LSG, 4,096 tokens, blocks of 128, none", "one vector"),
    ),
    (
        ("trained LSG, 4,096 tokens, blocks of 128, none", "one vector"),
        ("trained source, chunks of 128", "mean of chunks"),
    ),
    (
        ("trained LSG, 4,096 tokens, blocks of 128, none", "late chunking, 128"),
        ("source, chunks of 128", "best chunk"),
    ),
    (
        ("trained LSG, 4,096 tokens, blocks of 128, none", "late chunking, 128"),
        ("trained source, chunks of 128", "best chunk"),
    ),
]


def table(rows: Sequence[dict], documents: np.ndarray, subsets: dict[str, np.ndarray]) -> list[str]:
    """Markdown of nDCG@10, with its interval, and recall@1, in percent, over subsets of the queries."""
    heads = [f"{metric}, {name}" for metric in ("nDCG@10", "recall@1") for name in subsets]
    heads = ["system", "vectors", *heads, "CPU seconds", "MiB"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        ranks, cells = np.array(row["ranks"]), []
        for chosen in subsets.values():
            gains = ndcg_at_10(ranks[chosen])
            low, high = interval(gains, documents[chosen])
            cells.append(f"{100 * gains.mean():.1f} ({100 * low:.1f}-{100 * high:.1f})")
        cells += [f"{100 * recall_at_1(ranks[chosen]).mean():.1f}" for chosen in subsets.values()]
        name = row["system"] + (f" ({row['dtype']})" if row["dtype"] != "float32" else "")
        lines.append(
            "| " + " | ".join([name, row["readout"], *cells, f"{row['seconds']:.2f}", str(row["mebibytes"])]) + " |"
        )
    return lines


def differences(
    rows: Sequence[dict], documents: np.ndarray, subsets: dict[str, np.ndarray], pairs: Sequence
) -> list[str]:
    """Markdown of the differences in nDCG@10 between pairs of systems, in points, with their intervals."""
    gains = {(row["system"], row["readout"]): ndcg_at_10(np.array(row["ranks"])) for row in rows}
    lines = ["| nDCG@10 of | minus that of | " + " | ".join(subsets) + " |", "| --- " * (2 + len(subsets)) + "|"]
    for first, second in pairs:
        if first in gains and second in gains:
            cells, found = [], gains[first] - gains[second]
            for chosen in subsets.values():
                low, high = interval(found[chosen], documents[chosen])
                cells.append(f"{100 * found[chosen].mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
            lines.append("| " + " | ".join([": ".join(first), ": ".join(second), *cells]) + " |")
    return lines


def report(results: dict) -> str:
    """The results as Markdown."""
    lines = []
    for name, collection in results["collections"].items():
        rows = [row for row in results["rows"] if row["collection"] == name]
        documents, late, test = (np.array(collection[key]) for key in ("document", "late", "test"))
        tokens = collection["tokens"]
        lines += [
            f"## {name}",
            "",
            f"{collection['documents']} documents, {tokens['median']:,} tokens in the median, {tokens['largest']:,}"
            f" at most; {len(late):,} queries, the answers of {late.sum():,} stand {LATE:,} characters and more from the start.",
            "",
        ]
        subsets = {"all": np.full(len(late), True), "late": late}
        subsets = {key: chosen for key, chosen in subsets.items() if key == "all" or not chosen.all()}
        lines += [*table(rows, documents, subsets), "", *differences(rows, documents, subsets, COMPARED), ""]
        if any(row["system"].startswith("trained") for row in rows) and not test.all():
            subsets = {"test": test, "test and late": test & late}
            lines += [f"### {name}, the {test.sum():,} questions of documents that nothing was trained on", ""]
            lines += [*table(rows, documents, subsets), "", *differences(rows, documents, subsets, TRAINED), ""]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join([*lines, machine, ""])


def write_results(output: Path, results: dict) -> None:
    """The rows as JSON, one a line, and the tables."""
    head = json.dumps({name: value for name, value in results.items() if name != "rows"})
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    write_atomically(output.with_suffix(".json"), f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'.encode())
    write_atomically(output.with_suffix(".md"), report(results).encode())


def run(args: argparse.Namespace) -> dict:
    """Measure what is not in the results yet."""
    check_pooling(Path(args.source))
    path = args.output.with_suffix(".json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"collections": {}, "rows": []}
    results["machine"] = describe_machine()
    if not (args.folder / "lsg").exists():
        convert_checkpoint(args.source, args.folder / "lsg", max_length=WHOLE)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    for name in args.collections:
        collection = COLLECTIONS[name](args.data)
        ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in collection.documents]
        results["collections"][name] = describe(collection, [len(each) for each in ids])
        texts, relevant = (
            [query.text for query in collection.queries],
            [query.document for query in collection.queries],
        )
        queries = {}  # by model; the conversion gives short texts the source's vectors, which it checks
        for system in systems(args):
            case = {"collection": name, "system": system.name, "dtype": args.dtype}
            if any(case.items() <= row.items() for row in results["rows"]):
                continue
            print(*case.values(), file=sys.stderr)
            model = load(system, args.dtype)
            asker = System("source", Path(args.source), 256) if system.model == args.folder / "lsg" else system
            if asker.model not in queries:
                queries[asker.model] = encode_queries(load(asker, args.dtype), tokenizer, texts)
            encode = partial(encode_chunks if system.chunked else encode_pass, model, tokenizer, length=system.length)
            file = args.folder / "vectors" / f"{name} {system.name} {args.dtype}.npz"
            made, cost = kept(file, lambda encode=encode, ids=ids: measure(encode, ids))
            for readout, vectors in made.items():
                ranks = rank_documents(queries[asker.model], vectors, relevant).tolist()
                results["rows"].append({**case, "readout": readout, **cost, "ranks": ranks})
            write_results(args.output, results)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", type=Path, help="folder with qa/, summarization/ and corpus/")
    parser.add_argument("--source", required=True, help="folder with a model of sentence-transformers")
    parser.add_argument("--output", type=Path, default="runs/retrieval/results", help=".json and .md are appended")
    parser.add_argument("--folder", type=Path, default="runs/retrieval", help="for the conversion and the vectors")
    parser.add_argument(
        "--collections", nargs="+", choices=list(COLLECTIONS), default=list(COLLECTIONS), help="what to search"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens that the conversion reads")
    parser.add_argument("--all", action="store_true", help="blocks of 256, and every selection at the greatest length")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the models")
    parser.add_argument("--trained-lsg", type=Path, help="what experiments.retrieval_training made of the conversion")
    parser.add_argument("--trained-source", type=Path, help="and of the source")
    args = parser.parse_args(argv)
    try:
        results = run(args)
    except (OSError, ValueError) as error:
        print(f"retrieval: {error}", file=sys.stderr)
        return 1
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
