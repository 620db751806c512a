"""From a trained LSG-ALBERT to the root's model: what must not change in that step does not."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AlbertForMaskedLM

from conftest import TINY
from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM
from pretraining import finish

SHORT = torch.cat([torch.tensor([[2]]), torch.arange(5, 19)[None], torch.tensor([[3]])], dim=1)  # two blocks


@pytest.fixture
def trained(tmp_path):
    """A directory with a model whose global token is not [CLS], as after training."""
    config = LSGAlbertConfig(**TINY, mask_first_token=True, hidden_act="gelu_pytorch_tanh")
    config.use_cache = False  # as the Trainer leaves it
    LSGAlbertForMaskedLM(config).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@torch.no_grad()
def logits(folder, ids, model_class=LSGAlbertForMaskedLM):
    return model_class.from_pretrained(folder).eval()(ids).logits


def test_finished_model_is_the_trained_one_and_plain_alberts_equal(trained, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "config.json").write_text("old")
    assert finish.main([str(trained), str(root)]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["config.json", "model.safetensors"]
    assert LSGAlbertConfig.from_pretrained(root).hidden_act == "gelu_new"
    assert json.loads((root / "config.json").read_text())["use_cache"] is True
    others = [token for token in range(120) if token != 2]  # the score of [CLS] itself is another
    for ids in (SHORT, torch.cat([SHORT[:, :1], torch.randint(5, 120, (1, 100))], dim=1)):
        torch.testing.assert_close(logits(root, ids)[..., others], logits(trained, ids)[..., others])
    torch.testing.assert_close(logits(root, SHORT, AlbertForMaskedLM), logits(root, SHORT), rtol=1e-5, atol=1e-5)


def test_a_smaller_file_loads_as_float32(trained, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    assert finish.main([str(trained), str(root), "--dtype", "float16"]) == 0
    assert {weight.dtype for weight in load_file(root / "model.safetensors").values()} == {torch.float16}
    for model_class in (LSGAlbertForMaskedLM, AlbertForMaskedLM):
        assert model_class.from_pretrained(root).dtype == torch.float32
    others = [token for token in range(120) if token != 2]
    torch.testing.assert_close(
        logits(root, SHORT)[..., others], logits(trained, SHORT)[..., others], rtol=0, atol=5e-3
    )


def test_a_model_that_reads_cls_is_refused(tmp_path, capsys):
    LSGAlbertForMaskedLM(LSGAlbertConfig(**TINY)).save_pretrained(tmp_path)
    assert finish.main([str(tmp_path), str(tmp_path)]) == 1
    assert "`mask_first_token` is False" in capsys.readouterr().err


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    assert finish.main([str(tmp_path / "none"), str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
