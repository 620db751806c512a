"""Search by vectors, with a small random BERT and documents written here."""

import argparse
import gzip
import json
import math
import random

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the intervals come from it")

import torch
import transformers
from packaging.version import Version
from transformers import AutoModel, AutoTokenizer

from experiments import retrieval
from family_sources import WORDS, make_model, save, save_words

PLAIN = [word for word in WORDS if word.isalpha()]

needs_trainer = pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.46"),
    reason="the trainers of sentence-transformers pass `processing_class`, an argument that is new in transformers 4.46",
)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def some_text(seed, words):
    return " ".join(random.Random(seed).choices(PLAIN, k=words))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three papers, the last of them for testing; two meetings; 102 articles, the last of them to train on."""
    folder = tmp_path_factory.mktemp("data")
    papers = [some_text(seed, 150 + 60 * seed) for seed in range(3)]
    rows = [
        {"context": text, "qas": [{"question": text[-60:], "answers": [{"answer_start": at}]} for at in (5, 9000)]}
        for text in papers
    ]
    write(folder / "qa/covid_qa/train.jsonl.gz", rows[:2])
    write(folder / "qa/covid_qa/test.jsonl.gz", rows[2:])
    write(
        folder / "summarization/qmsum_general/test.jsonl.gz",
        [{"id": name, "document": f"A: {name}\nB: yes\nA: on it"} for name in ("one", "two")],
    )
    spans = [
        {"id": "two", "query": "what?", "span": [["2", "2"]]},
        {"id": "one", "query": "who?", "span": [["0", "1"]]},
    ]
    write(folder / "summarization/qmsum_spans/test.jsonl.gz", spans)
    article = "\n\n".join(f"{i} {some_text(i, 60)}" for i in range(60))
    ids = [f"w{i}" for i in range(102)]
    write(folder / "corpus/wikispeedia.jsonl.gz", [{"id": name, "text": f"{name}\n\n{article}"} for name in ids])
    (folder / "corpus/HELDOUT_wikispeedia_ids.txt").write_text("\n".join(ids[:-1]))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An embedder in the layout of sentence-transformers."""
    folder = save(make_model("bert", "Model"), tmp_path_factory.mktemp("sources") / "source")
    save_words(folder, tokenizer_class="BertTokenizer", model_max_length=512)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate({"": "Transformer", "1_Pooling": "Pooling"}.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256, "do_lower_case": false}')
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="module")
def loaded(source):
    return AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)


def embed_alone(loaded, ids):
    """The source's embedding of one text, by the definition."""
    model, tokenizer = loaded
    with torch.no_grad():
        row = torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]])
        mean = model(row).last_hidden_state[0].double().mean(0)
    return mean / mean.norm()


def test_ranks_and_scores_of_a_case_by_hand():
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    documents = [np.array([[1.0, 0.0]]), np.array([[0.0, -1.0], [0.0, 1.0]]), np.array([[0.0, 1.0]])]
    # cosines: 1, 0, 0 | 0, 1 (its second vector), 1 | 0.6, 0.8, 0.8
    ranks = retrieval.rank_documents(queries, documents, [0, 1, 0])
    assert ranks.tolist() == [1, 2, 3]
    gains = retrieval.ndcg_at_10(np.array([1, 2, 3, 10, 11]))
    assert gains == pytest.approx([1, 1 / math.log2(3), 0.5, 1 / math.log2(11), 0])
    assert retrieval.recall_at_1(ranks).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="not finite"):
        retrieval.rank_documents(queries * np.nan, documents, [0, 1, 0])


def test_intervals_resample_documents_not_their_queries():
    documents = np.repeat(np.arange(20), 2)
    within = np.tile([0.0, 1.0], 20)
    assert retrieval.interval(within, documents) == pytest.approx((0.5, 0.5))
    low, high = retrieval.interval(np.repeat([0.0, 1.0], 20), documents)  # as 20 tosses of a coin: 2 x 0.112 each way
    assert low == pytest.approx(0.28, abs=0.05) and high == pytest.approx(0.72, abs=0.05)


@pytest.mark.parametrize(("count", "length"), [(0, 3), (2, 3), (3, 3), (7, 3)])
def test_pieces_cover_a_document(count, length):
    pieces = retrieval.split(range(count), length)
    assert [i for piece in pieces for i in piece] == [*range(count)]
    assert len(pieces) == max(1, math.ceil(count / length)) and all(len(piece) == length for piece in pieces[:-1])


def test_late_chunking_is_the_mean_of_each_passages_states():
    states = torch.randn(11, 4)
    found = retrieval.passage_vectors(states, 4)
    for row, first in zip(found, (0, 4, 8), strict=True):
        passage = states[first : first + 4].double()
        mean = sum(passage) / len(passage)
        torch.testing.assert_close(row.double(), mean / mean.norm(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_chunks_are_embedded_as_if_alone(loaded, monkeypatch):
    monkeypatch.setattr(retrieval, "AT_ONCE", 24)  # two chunks at once, the last one with padding
    ids = torch.randint(5, len(WORDS), (45,)).tolist()
    made = retrieval.encode_chunks(*loaded, ids, 12)
    alone = torch.stack([embed_alone(loaded, ids[i : i + 10]) for i in range(0, 45, 10)])
    torch.testing.assert_close(made["best chunk"].double(), alone, rtol=1e-4, atol=1e-5)
    mean = alone.mean(0) / alone.mean(0).norm()
    torch.testing.assert_close(made["mean of chunks"][0].double(), mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_pass_reads_so_many_tokens_and_queries_keep_their_order(loaded):
    ids = torch.randint(5, len(WORDS), (45,)).tolist()
    made = retrieval.encode_pass(*loaded, ids, 22)
    assert [*made] == ["one vector"]
    torch.testing.assert_close(made["one vector"][0].double(), embed_alone(loaded, ids[:20]), rtol=1e-4, atol=1e-5)
    texts = [some_text(i, words) for i, words in enumerate((9, 2, 400, 5))]
    found = retrieval.encode_queries(*loaded, texts)
    for row, text in zip(found, texts, strict=True):
        expected = embed_alone(loaded, loaded[1](text, add_special_tokens=False)["input_ids"][:254])
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


def test_collections_name_each_querys_document_and_place(data):
    covid = retrieval.covid_qa(data)
    found = [(query.document, query.position, query.is_test) for query in covid.queries]
    assert found == [(i, at, i == 2) for i in range(3) for at in (5, 9000)] and len(covid.documents) == 3
    meetings = retrieval.qmsum(data)
    assert [(query.document, query.position) for query in meetings.queries] == [(1, len("A: two\nB: yes")), (0, 0)]
    articles = retrieval.encyclopedia(data)
    assert len(articles.documents) == len(articles.queries) == 100
    for number, (document, query) in enumerate(zip(articles.documents, articles.queries, strict=True)):
        whole = len(document) + len(query.text) + 2
        assert query.document == number and query.text not in document and query.position >= whole * 2 / 3
        assert not document.startswith("w101")  # which is to train on


@pytest.fixture(scope="module")
def command(data, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    places = ["--source", str(source), "--output", str(folder / "results"), "--folder", str(folder / "work")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "WHOLE", 1024)
        arguments = [str(data), *places, "--collections", "covid_qa", "--lengths", "512"]
        assert retrieval.main(arguments) == 0
        yield arguments, folder


def read(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {(row["system"], row["readout"]): row["ranks"] for row in rows}


def test_every_system_ranks_the_right_document_of_every_query(command):
    arguments, folder = command
    found = read(folder)
    assert {len(ranks) for ranks in found.values()} == {6} and len(found) == 2 + 2 + 6 + 4 + 1
    assert all(1 <= rank <= 3 for ranks in found.values() for rank in ranks)
    table = (folder / "results.md").read_text()
    assert "3 documents" in table and "the 3 whose answer" in table
    gains = retrieval.ndcg_at_10(np.array(found["source, chunks of 128", "best chunk"]))
    assert f"| source, chunks of 128: best chunk | {100 * gains.mean():.1f} (" in table


def test_full_attention_is_the_source(command):
    vectors = {
        name: torch.load(command[1] / "work/vectors" / f"covid_qa {name} float32.pt")["vectors"]["one vector"]
        for name in ("source, cut at 512", "full attention 512")
    }
    for expected, found in zip(*vectors.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_where_it_was_killed(command, monkeypatch):
    arguments, folder = command
    whole, measured = read(folder), []
    results = json.loads((folder / "results.json").read_text())
    results["rows"] = [row for row in results["rows"] if "full" not in row["system"]]
    (folder / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(retrieval, "measure", lambda system, *_: measured.append(system.name) or 1 / 0)
    assert retrieval.main(arguments) == 0 and read(folder) == whole  # from its vectors, which were kept
    with pytest.raises(ZeroDivisionError):
        retrieval.main([*arguments, "--all", "--systems", "cut", "bos_pooling"])
    assert measured == ["LSG 512, bos_pooling"]


def test_a_model_that_pools_otherwise_is_refused_in_a_line(command, source, tmp_path, capsys):
    other = tmp_path / "other"
    (other / "1_Pooling").mkdir(parents=True)
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    assert retrieval.main([command[0][0], "--source", str(other)]) == 1
    assert capsys.readouterr().err.startswith(f"retrieval: --source {other} does not pool by the mean")
    assert retrieval.main([str(tmp_path), *command[0][1:]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("retrieval: ") and "train.jsonl.gz" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def training():
    pytest.importorskip("sentence_transformers", reason="it trains")
    pytest.importorskip("datasets", reason="its Trainer reads them")
    pytest.importorskip("accelerate", reason="its Trainer needs it")
    from experiments import retrieval_training

    return retrieval_training


@pytest.mark.parametrize("chunked", [False, True])
def test_the_loss_is_that_of_the_definition(training, source, loaded, chunked):
    model = training.SentenceTransformer(str(source), device="cpu").eval()
    model.max_seq_length = 600
    loss = training.PassageLoss(model, chunked)
    texts = [some_text(seed, words) for seed, words in ((1, 180), (2, 130), (3, 150))]
    asked = [some_text(4, 6), some_text(5, 9)]

    def batch(chosen):
        return [model.tokenize(each) for each in (chosen, asked)]

    loss(batch(texts[1:]))  # whose documents are remembered
    found = loss(batch(texts[:2]))
    encode, length = (retrieval.encode_chunks, 128) if chunked else (retrieval.encode_pass, 600)
    expected = []
    for name in loss.names:
        rows = []
        for text in texts:
            ids = loaded[1](text, add_special_tokens=False)["input_ids"]
            made = encode(*loaded, ids, length)
            rows.append(made[name])
        for number, text in enumerate(asked):
            query = embed_alone(loaded, loaded[1](text, add_special_tokens=False)["input_ids"]).float()
            scores = torch.stack([(20 * row @ query).max() for row in rows])
            expected.append(-scores.log_softmax(0)[number])
    torch.testing.assert_close(found, sum(expected) / 4, rtol=1e-4, atol=1e-5)


@needs_trainer
def test_a_trained_model_is_ranked_beside_the_others(training, command, source, data, tmp_path):
    arguments, folder = command
    options = ["--length", "600", "--batch-size", "2", "--epochs", "1", "--questions", "2", "--learning-rate", "0.01"]
    made = {"lsg": [str(folder / "work/lsg")], "source": [str(source), "--chunked"]}
    for name, model in made.items():
        assert (
            training.main([str(data), "--model", *model, "--output", str(tmp_path / f"trained-{name}"), *options]) == 0
        )
        history = json.loads((tmp_path / f"trained-{name}" / "training.json").read_text())["history"]
        assert math.isfinite(history[0]["loss"])
    assert training.main([str(data), "--model", "-", "--output", str(tmp_path / "no"), "--length", "512"]) == 1
    rows = training.training_rows(data, epochs=2, questions=3)
    assert len(rows) == 4 and {row["document"] for row in rows} == set(retrieval.covid_qa(data).documents[:2])
    trained = ["--trained-lsg", str(tmp_path / "trained-lsg"), "--trained-source", str(tmp_path / "trained-source")]
    assert retrieval.main([*arguments, *trained]) == 0
    assert ("trained-source, chunks of 128", "best chunk") in read(folder)
    assert "the 2 queries of documents that were not trained on" in (folder / "results.md").read_text()


@needs_trainer
def test_weights_from_before_are_kept_as_told(training, source, loaded, data, tmp_path):
    options = [
        "--chunked",
        "--batch-size",
        "2",
        "--length",
        "600",
        "--learning-rate",
        "0.01",
        "--questions",
        "1",
        "--epochs",
        "2",
    ]
    for keep in ("0", "1"):
        folder = tmp_path / keep
        assert (
            training.main([str(data), "--model", str(source), "--output", str(folder), *options, "--keep", keep]) == 0
        )
        weights = AutoModel.from_pretrained(folder).state_dict()
        same = [torch.equal(value, weights[name]) for name, value in loaded[0].state_dict().items()]
        assert all(same) == (keep == "1")


def test_every_option_has_a_help_text(training, monkeypatch):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, _: parsers.append(parser) or 1 / 0)
    for command in (retrieval.main, training.main):
        with pytest.raises(ZeroDivisionError):
            command([])
    assert [action.dest for parser in parsers for action in parser._actions if not action.help] == []
    assert not any("None" in parser.format_help() for parser in parsers)
