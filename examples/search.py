"""Search the documents that examples/embed.py has embedded. Each query is compared with every document.

    python examples/search.py --embeddings runs/articles --query "Which river runs through Rome?" --query "trade in salt"
    python examples/search.py --embeddings runs/articles --top 10

Without --query, each line of the standard input is a query. Documents with higher scores are nearer. The score is the
cosine, unless the model defines another. Needs `pip install ".[embeddings]"`.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--embeddings", required=True, type=Path, help="the --output of examples/embed.py")
    option("--query", action="append", help="what to look for; can be given several times (default: standard input)")
    option("--top", type=int, default=5, help="documents to show for each query (default: %(default)s)")
    option("--model", help="directory or Hub id; its code is run (default: the one that embed.py used)")
    option("--prompt", help="text to put before each query (default: the model's own prompt for queries)")
    args = parser.parse_args(argv)
    return args if args.top >= 1 else parser.error(f"--top must be at least 1, got {args.top}")


def load(folder: Path) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """The ids, the embeddings (documents, dimensions), and what embed.py noted about the model."""
    try:
        tables = [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
        notes = [{key.decode(): value.decode() for key, value in table.schema.metadata.items()} for table in tables]
        ids = [name for table in tables for name in table["id"].to_pylist()]
        matrix = np.concatenate([table["embedding"].combine_chunks().flatten() for table in tables])
        models, (parts,) = {note["fingerprint"] for note in notes}, {int(note["parts"]) for note in notes}
    except (OSError, pa.ArrowException, LookupError, AttributeError, ValueError) as error:
        sys.exit(f"{folder} has no embeddings from embed.py ({' '.join(repr(error).split())})")
    if len(models) > 1 or len(tables) < parts:
        reason = "from several models" if len(models) > 1 else f"{len(tables)} of {parts} parts: embed.py is not done"
        sys.exit(f"the embeddings in {folder} are {reason}")
    return ids, matrix.reshape(len(ids), -1), notes[0]


def fingerprint(model: str) -> str:
    """A hash of a directory's files, or the commit of a model on the Hub."""
    if not Path(model).is_dir():
        return Path(snapshot_download(model, allow_patterns=["modules.json"])).name
    files = [path for path in sorted(Path(model).rglob("*")) if path.suffix in (".json", ".safetensors", ".bin")]
    hashes = [(path.relative_to(model).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    ids, matrix, notes = load(args.embeddings)
    name = args.model or notes["model"]
    try:
        if fingerprint(name) != notes["fingerprint"]:
            sys.exit(f"{args.embeddings} was made by {notes['model']}, and {name} is another model or has changed")
        model = SentenceTransformer(name, trust_remote_code=True)
    except (OSError, ValueError) as error:
        sys.exit(f"--model {name} cannot be loaded: {' '.join(str(error).split())}")
    print(f"{len(ids):,} documents" + ("" if args.query else "; type one query per line, Ctrl-D ends"), flush=True)
    for query in (line.strip() for line in args.query or sys.stdin):
        if query:
            vector = model.encode_query(query, prompt=args.prompt, show_progress_bar=False)
            scores = model.similarity(vector, matrix)[0]
            print(f"\n{query}")
            for index in scores.argsort(descending=True, stable=True)[: args.top].tolist():
                print(f"{scores[index]:8.4f}  {ids[index]}", flush=True)


if __name__ == "__main__":
    main()
