"""Search long documents by vectors: one for the whole document, one for each chunk, or late chunking.

    python -m experiments.retrieval DATA --source FOLDER --collections covid_qa --lengths 1024 2048 4096

The source is a sentence-transformers model that pools by the mean. Its conversion and all vectors are kept in --folder.
OUTPUT.json holds the rank of the right document for every query. It is written after every system, and a new run keeps
what it holds. OUTPUT.md is made from it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gzip
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.worker import Memory
from lsg_albert.conversion import convert_checkpoint
from lsg_albert.lsg_pattern import SPARSITY_TYPES
from pretraining.training_support import describe_machine, write_atomically

LATE = 8000  # characters; a query is late if at least so many precede its answer
PASSAGES = (128, 256, 512)  # tokens of a chunk, or of a passage in late chunking
WHOLE = 16384  # tokens; few documents have more
AT_ONCE = 8192  # tokens in a batch of chunks


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
    documents, queries = [], []
    for split in ("train", "test"):
        for row in read_lines(data / f"qa/covid_qa/{split}.jsonl.gz"):
            for asked in row["qas"]:
                position = asked["answers"][0]["answer_start"]
                queries.append(Query(asked["question"], len(documents), position, split == "test"))
            documents.append(row["context"])
    return Collection(documents, queries)


def qmsum(data: Path) -> Collection:
    """The specific questions of the test split against whole meetings. Turns are lines, and answers are spans of turns."""
    folder = data / "summarization"
    meetings = {row["id"]: row["document"] for row in read_lines(folder / "qmsum_general/test.jsonl.gz")}
    numbers, queries = {name: number for number, name in enumerate(meetings)}, []
    for row in read_lines(folder / "qmsum_spans/test.jsonl.gz"):
        before = meetings[row["id"]].split("\n")[: int(row["span"][0][0])]
        queries.append(Query(row["query"], numbers[row["id"]], len("\n".join(before))))
    return Collection([*meetings.values()], queries)


def take_paragraph(text: str, generator: random.Random) -> tuple[str, str, int] | None:
    """Take a paragraph of 200 to 800 characters from the last third of a text. Return the rest of the text, the
    paragraph and the position where it stood; None if there is no such paragraph."""
    paragraphs = text.split("\n\n")
    starts = np.cumsum([0] + [len(each) + 2 for each in paragraphs])
    found = [i for i, each in enumerate(paragraphs) if 200 <= len(each) <= 800 and starts[i] >= len(text) * 2 / 3]
    if not found:
        return None
    taken = generator.choice(found)
    return "\n\n".join(paragraphs[:taken] + paragraphs[taken + 1 :]), paragraphs[taken], int(starts[taken])


def encyclopedia(data: Path) -> Collection:
    """Find the article of a paragraph. The paragraphs are taken out of the last thirds of 100 articles of 16,000
    characters or more. The articles are among those that are kept out of training."""
    names = {*(data / "corpus/HELDOUT_wikispeedia_ids.txt").read_text(encoding="utf-8").split()}
    rows = [row for row in read_lines(data / "corpus/wikispeedia.jsonl.gz") if row["id"] in names]
    generator, documents, queries = random.Random(0), [], []
    for row in generator.sample([row for row in rows if len(row["text"]) >= 16000], 100):
        taken = take_paragraph(row["text"], generator)
        if taken is not None:
            queries.append(Query(taken[1], len(documents), taken[2]))
            documents.append(taken[0])
    return Collection(documents, queries)


COLLECTIONS = {"covid_qa": covid_qa, "qmsum": qmsum, "encyclopedia": encyclopedia}


@dataclass(frozen=True)
class System:
    """A way to turn documents into vectors. The model reads the first `length` tokens of a document in one pass or, if
    `chunked`, the whole document in chunks of `length` tokens. `fields` replace fields of the model's config."""

    name: str
    model: Path
    length: int
    chunked: bool = False
    fields: dict = field(default_factory=dict)


def systems(args: argparse.Namespace) -> list[System]:
    """The systems to compare, the most informative first."""
    source, lsg, long = Path(args.source), args.folder / "lsg", max(args.lengths)

    def converted(length: int, kind: str, block_size: int = 128, model: Path = lsg, name: str = "LSG") -> System:
        name = f"{name} {length:,}, {kind}" + (f", blocks of {block_size}" if block_size != 128 else "")
        return System(name, model, length, fields={"block_size": block_size, "sparsity_type": kind})

    # A text of up to two blocks gets full attention. That makes the model the source with repeated positions.
    full = {"block_size": long // 2, "sparsity_type": "none"}
    found = [System(f"source, cut at {length}", source, length) for length in (256, 512)]
    found += [converted(long, kind) for kind in ("none", "norm")]
    found += [System(f"source, chunks of {size}", source, size, chunked=True) for size in PASSAGES]
    found += [converted(WHOLE, "none"), System(f"full attention {long:,}", lsg, long, fields=full)]
    if args.all:
        found += [converted(long, kind) for kind in SPARSITY_TYPES] + [converted(WHOLE, "norm")]
        found += [converted(n, kind, size) for n in args.lengths for size in (128, 256) for kind in ("none", "norm")]
    if args.trained_lsg:
        found.append(converted(WHOLE, "none", model=args.trained_lsg, name=args.trained_lsg.name))
    if args.trained_source:
        found.append(System(f"{args.trained_source.name}, chunks of 128", args.trained_source, 128, chunked=True))
    unique = {system.name: system for system in found}.values()
    return [system for system in unique if any(part in system.name for part in args.systems)]


def load(system: System, dtype: str) -> PreTrainedModel:
    options = {"trust_remote_code": True, **system.fields} if system.fields else {}
    return AutoModel.from_pretrained(system.model, **options).to(getattr(torch, dtype)).eval()


def split(ids: Sequence[int], length: int) -> list[list[int]]:
    """Consecutive pieces of `length` ids; the last may be shorter. Without ids, there is one empty piece."""
    return [list(ids[i : i + length]) for i in range(0, max(len(ids), 1), length)]


def states_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The last states (tokens, hidden) of each piece of ids, in float32. [CLS] and [SEP] enclose each piece."""
    rows = [torch.tensor([tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]) for piece in pieces]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    states = model(ids, attention_mask=mask).last_hidden_state.float()
    return [each[: len(row)] for each, row in zip(states, rows, strict=True)]


def passage_vectors(states: Tensor, size: int) -> Tensor:
    """Late chunking (Günther et al., 2024, arXiv 2409.04701): the mean of each run of `size` states, scaled to length 1.

    Args:
        states: (tokens, hidden), of a whole document in one pass.

    Returns:
        (passages, hidden); the last passage may have fewer tokens.
    """
    return torch.stack([normalize(run.mean(0), dim=-1) for run in states.split(size)])


def encode_pass(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], length: int) -> dict:
    """The vectors (vectors, hidden) of a document's first `length` tokens, and of its passages if `length` is large."""
    (states,) = states_of(model, tokenizer, [ids[: length - 2]])
    sizes = PASSAGES if length > max(PASSAGES) else ()
    late = {f"late chunking, {size}": passage_vectors(states, size) for size in sizes}
    return {"one vector": passage_vectors(states, len(states)), **late}


def encode_chunks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], length: int) -> dict:
    """The vectors (vectors, hidden) of a document's chunks, each embedded alone, and their mean."""
    batches = split(split(ids, length - 2), AT_ONCE // length)
    states = [each for batch in batches for each in states_of(model, tokenizer, batch)]
    vectors = torch.cat([passage_vectors(each, len(each)) for each in states])
    return {"mean of chunks": normalize(vectors.mean(0, keepdim=True), dim=-1), "best chunk": vectors}


@torch.no_grad()
def encode_queries(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """The vectors (queries, hidden) of texts. The model reads up to 256 tokens of each."""
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=254)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    states = [each for batch in split(order, 32) for each in states_of(model, tokenizer, [ids[i] for i in batch])]
    vectors = torch.cat([passage_vectors(each, len(each)) for each in states])
    return vectors[np.argsort(order)].numpy()


def rank_documents(queries: np.ndarray, documents: Sequence[np.ndarray], relevant: Sequence[int]) -> np.ndarray:
    """The rank of each query's document, by the cosine of its nearest vector. Ties get the worst rank.

    Args:
        queries: (queries, hidden), of length 1 like all vectors.
        documents: (vectors, hidden) of each document.
        relevant: the index of each query's document.

    Raises:
        ValueError: a vector has a value that is not finite.
    """
    scores = np.stack([(queries @ each.T).max(1) for each in documents], axis=1)
    if not np.isfinite(scores).all():
        raise ValueError("A vector has a value that is not finite, so the documents cannot be ranked.")
    return (scores >= scores[np.arange(len(queries)), relevant][:, None]).sum(1)


def ndcg_at_10(ranks: np.ndarray) -> np.ndarray:
    """The discounted cumulative gain of the first 10 documents (Järvelin and Kekäläinen, 2002), for queries with one
    right document each. The best value is 1."""
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)


def recall_at_1(ranks: np.ndarray) -> np.ndarray:
    return (ranks == 1).astype(float)


def interval(values: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of queries' values. Documents are resampled with all their queries. With
    a single document, both ends are NaN."""
    groups = np.unique(documents, return_inverse=True)[1]
    data = np.bincount(groups, values), np.bincount(groups)
    if len(data[0]) < 2:
        return float("nan"), float("nan")
    options = {"paired": True, "method": "percentile", "n_resamples": 2000, "rng": 0}
    found = bootstrap(data, lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis), **options)
    return found.confidence_interval.low, found.confidence_interval.high


@torch.no_grad()
def measure(
    system: System, dtype: str, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Sequence[int]]
) -> dict:
    """The vectors of each document for each readout, and the cost of a document: CPU seconds (wall-clock time would
    count other programs) and the peak of memory beyond the weights, in MiB (None if it is unknown)."""
    model, encode, vectors = load(system, dtype), encode_chunks if system.chunked else encode_pass, {}
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # frees what the last system took
    memory = Memory("cpu")
    memory.reset_peak()
    started = time.process_time()
    for ids in tqdm(documents, unit="document", disable=None):
        for name, found in encode(model, tokenizer, ids, system.length).items():
            vectors.setdefault(name, []).append(found)
    seconds, peak = (time.process_time() - started) / len(documents), memory.peak_beyond_base()
    return {"vectors": vectors, "cost": {"seconds": round(seconds, 3), "mebibytes": peak and round(peak / 2**20)}}


def check_pooling(folder: Path) -> None:
    """Refuse a sentence-transformers model that does not pool by the mean, since this script does.

    Raises:
        ValueError: the model pools in another way.
    """
    path = folder / "1_Pooling" / "config.json"
    if path.is_file() and not json.loads(path.read_text()).get("pooling_mode_mean_tokens", True):
        raise ValueError(f"--source {folder} does not pool by the mean of all tokens: choose a model that does.")


LONG, WHOLLY, CHUNKS = "LSG 4,096, none: ", "LSG 16,384, none: ", "source, chunks of "
COMPARED = [  # pairs of systems, to be compared by their difference over the same queries
    (LONG + "one vector", "source, cut at 512: one vector"),
    (LONG + "one vector", CHUNKS + "512: mean of chunks"),
    (LONG + "one vector", "LSG 4,096, norm: one vector"),
    (LONG + "one vector", "full attention 4,096: one vector"),
    (WHOLLY + "one vector", CHUNKS + "128: mean of chunks"),
    (WHOLLY + "one vector", CHUNKS + "512: mean of chunks"),
    (WHOLLY + "late chunking, 128", CHUNKS + "128: best chunk"),
    (WHOLLY + "late chunking, 512", CHUNKS + "512: best chunk"),
    *[
        pair
        for lsg, source in [("trained-lsg", "trained-source"), ("trained-lsg-half", "trained-source-half")]
        for pair in [
            (lsg + " 16,384, none: one vector", WHOLLY + "one vector"),
            (lsg + " 16,384, none: one vector", source + ", chunks of 128: mean of chunks"),
            (lsg + " 16,384, none: late chunking, 128", WHOLLY + "late chunking, 128"),
            (lsg + " 16,384, none: late chunking, 128", source + ", chunks of 128: best chunk"),
        ]
    ],
]


def mean_and_interval(values: np.ndarray, documents: np.ndarray, sign: str = "") -> str:
    low, high = interval(values, documents)
    return f"{100 * values.mean():{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def tables(rows: Sequence[dict], documents: np.ndarray, subsets: dict[str, np.ndarray]) -> list[str]:
    """Markdown tables of nDCG@10 and recall@1 over subsets of queries, in percent, and of differences in nDCG@10."""
    heads = [
        "system",
        *(f"{metric}, {name}" for metric in ("nDCG@10", "recall@1") for name in subsets),
        "CPU seconds",
        "MiB",
    ]
    found, gains = [heads, ["---"] * len(heads)], {}
    for row in rows:
        ranks, name = np.array(row["ranks"]), f"{row['system']}: {row['readout']}"
        name += f" ({row['dtype']})" * (row["dtype"] != rows[0]["dtype"])
        gains[name] = ndcg_at_10(ranks)
        cells = [mean_and_interval(gains[name][chosen], documents[chosen]) for chosen in subsets.values()]
        cells += [f"{100 * recall_at_1(ranks[chosen]).mean():.1f}" for chosen in subsets.values()]
        found.append([name, *cells, f"{row['seconds']:.2f}", str(row["mebibytes"] or "")])
    pairs = [pair for pair in COMPARED if gains.keys() >= {*pair}]
    if pairs:
        found += [[], ["nDCG@10 of", "minus that of", *subsets], ["---"] * (2 + len(subsets))]
    for first, second in pairs:
        values = gains[first] - gains[second]
        cells = [mean_and_interval(values[chosen], documents[chosen], "+") for chosen in subsets.values()]
        found.append([first, second, *cells])
    return ["| " + " | ".join(cells) + " |" if cells else "" for cells in found] + [""]


def report(results: dict) -> str:
    """The results as Markdown."""
    lines = [f"All on {results['machine']['on']}, transformers {results['machine']['transformers']}.", ""]
    for name, collection in results["collections"].items():
        documents, late, test = (np.array(collection[key]) for key in ("document", "late", "test"))
        rows = [row for row in results["rows"] if row["collection"] == name]
        trained = any(row["system"].startswith("trained") for row in rows) and not test.all()
        untrained = [row for row in rows if not (trained and row["system"].startswith("trained"))]
        lines += [f"## {name}", "", collection["described"], ""]
        subsets = {"all": late | True, "late": late}
        lines += tables(
            untrained, documents, {key: chosen for key, chosen in subsets.items() if key == "all" or not late.all()}
        )
        if trained:
            lines += [f"### {name}, the {test.sum():,} queries of documents that were not trained on", ""]
            lines += tables(rows, documents, {"all": test, "late": test & late})
    return "\n".join(lines)


def write_results(output: Path, results: dict) -> None:
    """Write the rows as JSON, one per line, and the tables as Markdown."""
    head = json.dumps({name: value for name, value in results.items() if name != "rows"})
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    write_atomically(output.with_suffix(".json"), f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'.encode())
    write_atomically(output.with_suffix(".md"), report(results).encode())


def describe(collection: Collection, lengths: Sequence[int]) -> dict:
    """The description of a collection in the results. Lists have an entry for each query."""
    queries = collection.queries
    late = [query.position >= LATE for query in queries]
    described = (
        f"{len(lengths)} documents of {int(np.median(lengths)):,} tokens (median; {max(lengths):,} the longest), "
        f"{len(queries):,} queries; late: the {sum(late):,} whose answer stands {LATE:,} characters and more from the start."
    )
    numbers, is_test = [query.document for query in queries], [query.is_test for query in queries]
    return {"described": described, "document": numbers, "late": late, "test": is_test}


def run(args: argparse.Namespace) -> dict:
    """Measure the systems that are not in the results yet."""
    source, lsg, path = Path(args.source), args.folder / "lsg", args.output.with_suffix(".json")
    check_pooling(source)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"collections": {}, "rows": []}
    results["machine"] = describe_machine()
    if not lsg.exists():
        convert_checkpoint(source, lsg, max_length=WHOLE)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name in args.collections:
        collection, queries = COLLECTIONS[name](args.data), {}  # the queries' vectors by model
        ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in collection.documents]
        results["collections"][name] = describe(collection, [len(each) for each in ids])
        for system in systems(args):
            case = {"collection": name, "system": system.name, "dtype": args.dtype}
            if any(case.items() <= row.items() for row in results["rows"]):
                continue
            print(*case.values(), file=sys.stderr)
            # The conversion checked that short texts get the source's vectors.
            asked = System("", source, 256) if system.model == lsg else system
            if asked.model not in queries:
                texts = [query.text for query in collection.queries]
                queries[asked.model] = encode_queries(load(asked, args.dtype), tokenizer, texts)
            kept = args.folder / "vectors" / f"{name} {system.name} {args.dtype}.pt"
            if not kept.exists():
                content = BytesIO()
                torch.save(measure(system, args.dtype, tokenizer, ids), content)
                write_atomically(kept, content.getvalue())
            made = torch.load(kept)
            for readout, vectors in made["vectors"].items():
                documents, relevant = (
                    [each.numpy() for each in vectors],
                    [query.document for query in collection.queries],
                )
                ranks = rank_documents(queries[asked.model], documents, relevant).tolist()
                results["rows"].append({**case, "readout": readout, **made["cost"], "ranks": ranks})
            write_results(args.output, results)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    folder = Path("runs/retrieval")
    parser.add_argument("data", type=Path, help="folder with qa/, summarization/ and corpus/")
    parser.add_argument(
        "--source", required=True, default=argparse.SUPPRESS, help="folder of a sentence-transformers model"
    )
    parser.add_argument("--output", type=Path, default=folder / "results", help="path without .json and .md")
    parser.add_argument("--folder", type=Path, default=folder, help="folder for the conversion and the vectors")
    parser.add_argument(
        "--collections", nargs="+", choices=list(COLLECTIONS), default=list(COLLECTIONS), help="collections to search"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens that the conversion reads")
    parser.add_argument("--systems", nargs="+", default=[""], help="only systems with one of these in their names")
    parser.add_argument("--all", action="store_true", help="add every selection, blocks of 256 and every length")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="data type of the models")
    parser.set_defaults(trained_lsg=None, trained_source=None)  # SUPPRESS below leaves them out of the help
    for option, model in (("--trained-lsg", "the conversion"), ("--trained-source", "the source")):
        text = f"folder trained-... that experiments.retrieval_training made from {model} (default: none)"
        parser.add_argument(option, type=Path, default=argparse.SUPPRESS, help=text)
    args = parser.parse_args(argv)
    try:
        print(report(run(args)))
    except (OSError, ValueError) as error:
        print(f"retrieval: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
