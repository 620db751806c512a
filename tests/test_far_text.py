"""Whether distant text is used: what is scored, what is hidden, and that a model which copies the name is seen to do so."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer, whose script this shares, needs it")

import torch
from transformers import AutoTokenizer

from conftest import ROOT
from helpers import TOKENIZER
from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM
from lsg_albert.lsg_pattern import SPARSITY_TYPES
from pretraining import far_text
from pretraining.extrapolation import Segments, evaluate
from pretraining.masking import IGNORED


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


def make_model(**pattern) -> LSGAlbertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    pattern = {"block_size": 8, "sparse_block_size": 8, "mask_first_token": True, **pattern}
    return LSGAlbertForMaskedLM(
        LSGAlbertConfig(
            vocab_size=16000, num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=2,
            eos_token_id=3, pad_token_id=0, **sizes, **pattern,
        )
    ).eval()  # fmt: skip


def test_only_the_second_half_beyond_the_window_is_scored():
    segments = Segments(np.zeros((2, 100), dtype=int), np.ones((2, 100), dtype=int))
    labels = far_text.second_half(segments, 16).labels
    assert (labels[:, :66] == IGNORED).all() and (labels[:, 66:] == 1).all() and (segments.labels == 1).all()


def test_hidden_text_changes_nothing_and_visible_text_does():
    rng = np.random.default_rng(0)
    model, tokens = make_model(), rng.integers(5, 16000, (2, 126))
    labels = np.where(np.arange(126) > 100, tokens, IGNORED)
    other = tokens.copy()
    other[:, :40] = rng.integers(5, 16000, (2, 40))
    sums = [evaluate(model, Segments(text, labels), 1, 2, 3, n) for n in (63, 0) for text in (tokens, other)]
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)
    assert abs(sums[2] - sums[3]).max() > 1e-3


def test_a_name_is_stated_at_the_top_and_masked_at_the_end(tokenizer):
    fillers = np.full((20, 90), 10)
    stated, alone = (far_text.needle_segments(fillers, tokenizer, flag) for flag in (True, False))
    assert stated.hidden.shape == alone.hidden.shape == fillers.shape
    for index in range(20):
        name = far_text.NAMES[index % len(far_text.NAMES)]
        text = tokenizer.decode(stated.hidden[index])
        assert text.startswith(f"the name of the old captain was {name}") and "[MASK]" in text[-20:]
        assert name not in tokenizer.decode(alone.hidden[index])
        answer = stated.labels[index][stated.labels[index] != IGNORED]
        assert tokenizer.decode(answer) == name and (alone.labels[index] == stated.labels[index]).all()


def test_the_command_compares_every_selection(tmp_path, tokenizer, capsys):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    for name in TOKENIZER:
        shutil.copyfile(ROOT / name, tmp_path / "model" / name)
    words = np.random.default_rng(0).choice("king queen river mountain science music".split(), 400)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "a", "text": " ".join(words)}) + "\n")
    (tmp_path / "held_out.txt").write_text("a\n")
    options = [
        "--model",
        str(tmp_path / "model"),
        "--length",
        "128",
        "--segments",
        "2",
        "--output",
        str(tmp_path / "far"),
    ]
    options += ["--exclude-ids", str(tmp_path / "held_out.txt")]
    assert far_text.main([str(tmp_path / "corpus.jsonl"), *options]) == 0
    report = json.loads((tmp_path / "far.json").read_text())
    assert (
        [row["selection"] for row in report["half"]]
        == [row["selection"] for row in report["needle"]]
        == [*SPARSITY_TYPES]
    )
    for row in report["half"] + report["needle"]:
        assert row["masked_tokens_with"] == row["masked_tokens_without"] > 0
        assert row["difference"] == pytest.approx(row["loss_with"] - row["loss_without"])
    assert (tmp_path / "far.md").read_text() in capsys.readouterr().out
    assert far_text.main([str(tmp_path / "corpus.jsonl"), *options, "--segments", "9"]) == 1
    assert "error: the held-out documents hold" in capsys.readouterr().err
