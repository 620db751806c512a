"""The table of how far models read, with a tiny ALBERT and the vocabulary at the root."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer, whose script this shares, needs it")

import torch
from transformers import AlbertConfig, AlbertForMaskedLM, AutoTokenizer

from conftest import ROOT
from helpers import TOKENIZER
from lsg_albert.conversion import convert_checkpoint
from pretraining import extrapolation
from pretraining.masking import IGNORED, Masker
from pretraining.token_cache import TokenizedDocuments, load_tokens

SHORT = 18  # so that a piece holds 16 tokens, and a segment 128
ARGUMENTS = ["--short", str(SHORT), "--segments", "3"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three documents of several segments, two of them held out, and one that is held out but too short."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "king queen river mountain science music letter garden winter summer house window".split()
    texts = {name: " ".join(np.random.default_rng(i).choice(words, 400)) for i, name in enumerate("abc")}
    rows = [{"id": name, "text": text} for name, text in (texts | {"short": "king queen"}).items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.txt").write_text("b\nc\nshort\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny random ALBERT of 32 positions, and what conversion makes of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = AlbertConfig(
        vocab_size=16000, num_hidden_layers=2, max_position_embeddings=32, initializer_range=0.3, bos_token_id=2,
        eos_token_id=3, pad_token_id=0, **sizes,
    )  # fmt: skip
    AlbertForMaskedLM(config).save_pretrained(folder / "albert")
    for name in TOKENIZER:
        shutil.copyfile(ROOT / name, folder / "albert" / name)
    pattern = {"block_size": 8, "sparse_block_size": 8, "mask_first_token": True}
    convert_checkpoint(folder / "albert", folder / "converted", max_length=256, verify=False, **pattern)
    return folder


def command(corpus, models, output, *options):
    held_out = ["--exclude-ids", str(corpus / "held_out.txt")]
    paths = ["--albert", str(models / "albert"), "--converted", str(models / "converted"), "--output", str(output)]
    return [str(corpus / "corpus.jsonl"), *held_out, *paths, *ARGUMENTS, *options]


@pytest.fixture(scope="module")
def report(corpus, models, tmp_path_factory):
    output = tmp_path_factory.mktemp("reports") / "table"
    assert extrapolation.main(command(corpus, models, output, "--trained", str(models / "converted"))) == 0
    assert "| a: ALBERT, as trained | - | 18 |" in output.with_suffix(".md").read_text()
    return json.loads(output.with_suffix(".json").read_text())


def test_every_model_selection_and_length_is_a_row(report):
    rows = {(row["name"][0], row["selection"], row["tokens"]) for row in report["rows"]}
    kinds = {"norm", "pooling", "bos_pooling", "lsh", "stride", "block_stride", "none"}
    expected = {("a", None, 18), ("b", None, 130)} | {("c", kind, n) for kind in kinds for n in (34, 66, 130)}
    assert rows == expected | {("d", "norm", n) for n in (18, 34, 66, 130)}
    assert len({row["masked_tokens"] for row in report["rows"]}) == 1
    same = {
        row["name"][0]: row["loss"] for row in report["rows"] if (row["selection"], row["tokens"]) == ("norm", 130)
    }
    assert same["c"] == same["d"]  # the same model given twice


def test_first_rows_are_what_transformers_computes(report, corpus, models, tokenizer, tmp_path):
    """Loss by the model's own forward pass: every piece by itself, and the segment at once with stretched positions."""
    documents = load_tokens(corpus / "corpus.jsonl", tokenizer, tmp_path)
    tokens = extrapolation.choose_segments([documents], {"b", "c"}, 128, 3, 12_345)
    segments = extrapolation.hide(tokens, Masker.for_tokenizer(tokenizer), 12_345)
    albert = AlbertForMaskedLM.from_pretrained(models / "albert").eval()
    stretched = AlbertForMaskedLM.from_pretrained(models / "albert").eval()
    positions = stretched.albert.embeddings.position_embeddings.weight
    stretched.albert.embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(positions.repeat(8, 1))
    stretched.albert.embeddings.position_ids = torch.arange(256)[None]
    stretched.albert.embeddings.register_buffer("token_type_ids", torch.zeros(1, 256, dtype=torch.long), False)
    for row, model, size in zip(report["rows"], (albert, stretched), (16, 128), strict=False):
        total = count = 0
        for hidden, labels in zip(segments.hidden, segments.labels, strict=True):
            for start in range(0, 128, size):
                ids = [tokenizer.cls_token_id, *hidden[start : start + size], tokenizer.sep_token_id]
                logits = model(input_ids=torch.tensor([ids])).logits[0, 1:-1].log_softmax(-1)
                targets = torch.tensor(labels[start : start + size])
                places = (targets != IGNORED).nonzero()[:, 0]
                total -= logits[places, targets[places]].sum().item()
                count += len(places)
        assert row["masked_tokens"] == count and row["loss"] == pytest.approx(total / count, rel=1e-5)
        assert row["tokens"] == size + 2


def test_segments_are_held_out_text_without_overlap(tokenizer):
    offsets = np.array([0, 100, 205, 300])
    documents = TokenizedDocuments(np.arange(300), offsets, ["seen", "held", "also"])
    segments = extrapolation.choose_segments([documents], {"held", "also"}, 20, 9, 0)
    assert segments.shape == (9, 20) and len(np.unique(segments)) == 180
    for segment in segments:
        assert (np.diff(segment) == 1).all()
        assert (100 <= segment[0] and segment[-1] < 205) or (205 <= segment[0] and segment[-1] < 300)
    assert (segments == extrapolation.choose_segments([documents], {"held", "also"}, 20, 9, 0)).all()


def test_difference_of_paired_segments():
    """Equal numbers of targets: the standard error is that of the mean of the segments' differences."""
    rng = np.random.default_rng(0)
    reference = np.stack([rng.normal(50, 9, 40), np.zeros(40), np.zeros(40), np.full(40, 10)], axis=1)
    sums = reference.copy()
    sums[:, 0] += rng.normal(-3, 1, 40)
    found = extrapolation.difference(sums, reference)
    gaps = (sums[:, 0] - reference[:, 0]) / 10
    assert found["difference"] == pytest.approx(gaps.mean())
    assert found["standard_error"] == pytest.approx(gaps.std(ddof=1) / np.sqrt(40))


def test_too_little_text_is_reported_in_one_line(corpus, models, tmp_path, capsys):
    assert extrapolation.main(command(corpus, models, tmp_path / "table", "--segments", "500")) == 1
    assert "segments of 128 tokens, not 500" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "table.json").exists()
