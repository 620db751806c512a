"""From a short ALBERT to the root's model: what must not change in the two steps does not."""

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM, AutoTokenizer

from conftest import ROOT
from lsg_albert import LSGAlbertForMaskedLM
from pretraining import long_checkpoint

SHORT = torch.cat([torch.tensor([[2]]), torch.arange(5, 60)[None], torch.tensor([[3]])], dim=1)


@pytest.fixture
def short_albert(tmp_path):
    config = AlbertConfig(
        vocab_size=16000, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16,
        num_hidden_layers=2, max_position_embeddings=512, hidden_act="gelu_pytorch_tanh", initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path / "short"
    AlbertForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT).save_pretrained(folder)
    for name in long_checkpoint.TOKENIZER_FILES:
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@torch.no_grad()
def logits(model, ids=SHORT):
    return model.eval()(ids).logits


def test_extended_model_reads_more_and_short_texts_as_before(short_albert, tmp_path):
    target = tmp_path / "extended"
    assert long_checkpoint.main(["extend", str(short_albert), str(target), "--max-length", "1024"]) == 0
    model = LSGAlbertForMaskedLM.from_pretrained(target)
    torch.testing.assert_close(logits(model), logits(AlbertForMaskedLM.from_pretrained(short_albert)))
    assert logits(model, torch.randint(5, 100, (1, 1024))).shape == (1, 1024, 16000)
    assert AutoTokenizer.from_pretrained(target).mask_token_id == 4


def test_finished_model_is_the_trained_one_and_plain_alberts_equal(short_albert, tmp_path):
    extended, root = tmp_path / "extended", tmp_path / "root"
    root.mkdir()
    (root / "config.json").write_text("old")
    long_checkpoint.extend(short_albert, extended, 1024)
    trained = LSGAlbertForMaskedLM.from_pretrained(extended)
    with torch.no_grad():
        trained.albert.embeddings.global_embeddings.weight.normal_()  # as training would
    trained.save_pretrained(extended)
    assert long_checkpoint.main(["finish", str(extended), str(root)]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["config.json", "model.safetensors"]
    finished = LSGAlbertForMaskedLM.from_pretrained(root)
    assert finished.config.hidden_act == "gelu_new"
    others = [token for token in range(100) if token != 2]  # the score of [CLS] itself is another
    for ids in (SHORT, torch.cat([SHORT[:, :1], torch.randint(5, 100, (1, 800))], dim=1)):
        torch.testing.assert_close(logits(finished, ids)[..., others], logits(trained, ids)[..., others])
    albert = AlbertForMaskedLM.from_pretrained(root)
    torch.testing.assert_close(logits(albert), logits(finished), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    assert long_checkpoint.main(["finish", str(tmp_path / "none"), str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("long_checkpoint: ")
