"""Embed long documents, one vector for each, into Parquet files with the columns `id` and `embedding`. A JSON line holds
{"id": "Rome", "text": "Rome is ..."}. The default id is the number of the row. The id of a text file is its name.

    python examples/embed.py --documents articles.jsonl.gz --model my-lsg-model --output runs/articles
    torchrun --nproc-per-node 2 examples/embed.py --documents notes/ --model my-lsg-model --bf16 --output runs/notes

Each Parquet file is written in one step. After a kill, the same command makes only the missing files. Several processes
(torchrun, accelerate launch) share the work. examples/search.py reads the files. Needs `pip install ".[embeddings]"`.
The model is one of sentence-transformers, or any encoder. For an encoder, a vector is the mean of its last states.
"""

import gzip
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser


@dataclass
class Options:
    documents: str = HfArg(
        help="file (.jsonl, also .gz; .txt), folder of .txt files, or split on the Hub (NAME:SPLIT)"
    )
    model: str = HfArg(help="directory or Hub id; its code is run")
    output: str = HfArg(help="directory for the Parquet files")
    id_field: str = HfArg(default="id", help="field that holds the id")
    text_field: str = HfArg(default="text", help="field that holds the text")
    prompt: str | None = HfArg(default=None, help="text before each document; None: the model's prompt for documents")
    max_length: int | None = HfArg(default=None, help="tokens to read from a text; None: the model's maximum")
    batch_tokens: int = HfArg(default=16384, help="tokens in a batch, padding included")
    part_size: int = HfArg(default=256, help="documents per file")
    bf16: bool = HfArg(default=False, help="compute in bfloat16 where autocast does so; embeddings are float32")


def load(source: str, options: Options) -> dict[str, str]:
    """Load the texts by their ids."""
    path, name, place, texts = Path(source), source.lower().removesuffix(".gz"), "all rows", {}
    try:
        if path.is_dir() or name.endswith(".txt"):
            files = {str(file.relative_to(path)): file for file in path.rglob("*.txt")} or {path.name: path}
            rows = [(file, {options.id_field: file, options.text_field: files[file]}) for file in sorted(files)]
        elif name.endswith((".jsonl", ".json")):
            with (open if name == source.lower() else gzip.open)(source, "rt", encoding="utf-8-sig") as file:
                rows = [(f"line {i}", line) for i, line in enumerate(file, start=1) if line.strip()]
        else:
            data = load_dataset(*source.split(":")[:-1], split=source.split(":")[-1])
            rows = [(f"row {i}", row) for i, row in enumerate(data)]
        for place, row in rows:
            row = json.loads(row) if isinstance(row, str) else row
            name, text = str(row.get(options.id_field, place.split()[-1])), row[options.text_field]
            text = text.read_text(encoding="utf-8-sig") if isinstance(text, Path) else text
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # replaces lone surrogates
            if name in texts or not text.strip():
                raise ValueError(f"{name!r} is the id of another row, too" if name in texts else "the text is empty")
            texts[name] = text
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{source}, {place}: cannot read a text and an id ({' '.join(repr(error).split())})")
    return texts or sys.exit(f"{source}: no documents")


def fingerprint(model: str) -> str:
    """A hash of a directory's files, or the commit of a model on the Hub."""
    if not Path(model).is_dir():
        return Path(snapshot_download(model, allow_patterns=["modules.json"])).name
    files = [path for path in sorted(Path(model).rglob("*")) if path.suffix in (".json", ".safetensors", ".bin")]
    hashes = [(path.relative_to(model).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def main(argv: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses(argv)
    if min(options.part_size, options.batch_tokens, options.max_length or 1) < 1:
        sys.exit("--part_size, --batch_tokens and --max_length must be at least 1")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    documents = list(load(options.documents, options).items())
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        made_by = fingerprint(options.model)
        model = SentenceTransformer(options.model, device=device, trust_remote_code=True)
    except (OSError, ValueError) as error:
        sys.exit(f"--model {options.model} cannot be loaded: {' '.join(str(error).split())}")
    limit = model.max_seq_length = min(options.max_length or model.max_seq_length, model.max_seq_length)

    output, size = Path(options.output), options.part_size
    output.mkdir(parents=True, exist_ok=True)
    parts = {output / f"part-{i // size:05}.parquet": documents[i : i + size] for i in range(0, len(documents), size)}
    settings = [made_by, options.prompt, limit, options.bf16]
    stamps = {path: hashlib.sha256(json.dumps([settings, part]).encode()).hexdigest() for path, part in parts.items()}
    for path in output.glob("part-*.parquet"):
        if pq.read_schema(path).metadata[b"stamp"].decode() != stamps.get(path):
            sys.exit(f"{path} is from other documents, another model or other options: choose another --output")
    done = sum(len(part) for path, part in parts.items() if path.exists())
    if done == len(documents):
        return print(f"already done: {output} (another run needs another --output)")
    if rank == 0:
        print(
            f"resuming: {done:,} of {len(documents):,} done" if done else f"{len(documents):,} documents", flush=True
        )

    mine = [path for path in list(parts)[rank::processes] if not path.exists()]
    progress = tqdm(total=sum(len(parts[path]) for path in mine), unit="document", disable=rank > 0)
    for path in mine:
        names, texts = zip(*parts[path], strict=True)
        lengths = np.array([len(ids) for ids in model.tokenizer(list(texts), verbose=False)["input_ids"]])
        order, vectors = np.argsort(-lengths, kind="stable"), {}
        while len(order):  # fill a batch with texts of about the same length
            chosen = order[: max(options.batch_tokens // min(lengths[order[0]], limit), 1)]
            batch, order = [texts[i] for i in chosen], order[len(chosen) :]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16):
                found = model.encode_document(batch, prompt=options.prompt, batch_size=len(batch))
            vectors.update(zip(chosen, found, strict=True))
            progress.update(len(batch))
        matrix = np.stack([vectors[i] for i in range(len(texts))]).astype(np.float32)
        columns = {"id": names, "embedding": pa.FixedSizeListArray.from_arrays(matrix.ravel(), matrix.shape[1])}
        notes = {"model": options.model, "fingerprint": made_by, "stamp": stamps[path], "parts": str(len(parts))}
        pq.write_table(pa.table(columns, metadata=notes), f"{path}.partial")
        os.replace(f"{path}.partial", path)
        tqdm.write(f"{path}: {len(texts)} documents, {(lengths > limit).sum()} of them cut at {limit:,} tokens")


if __name__ == "__main__":
    main()
