"""The comparison of a target with its source: what it finds, and what it refuses."""

import pytest
import torch
import transformers
from transformers import AlbertForMaskedLM

from albert_sources import make_albert, save
from lsg_albert.conversion import ConversionError, convert_checkpoint
from lsg_albert.conversion import convert as convert_module
from lsg_albert.conversion.verify import mean_cosine

SHORT = {"max_length": 64, "block_size": 16}


def test_verification_holds_for_all_ways_to_make_globals(masked_lm, tmp_path):
    for i, options in enumerate(({"use_token_type": False}, {"random_global_init": True})):
        report = convert_checkpoint(masked_lm, tmp_path / str(i), **SHORT, **options)
        assert report.comparison.lossless_difference < 1e-4


def test_the_similarity_is_that_of_the_last_states_without_padding(masked_lm, target):
    equal = convert_checkpoint(masked_lm, target, **{**SHORT, "block_size": 32}, mask_first_token=True).comparison
    assert equal.chosen_cosine == pytest.approx(1, abs=1e-5)
    report = convert_checkpoint(masked_lm, target, **SHORT, overwrite=True)
    assert -1 <= report.comparison.chosen_cosine < 0.9999 and f"{report.comparison.chosen_cosine:.4f}" in report.text()

    mask = torch.tensor([[1, 1, 0]])
    states = {"last_hidden_state": torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])}
    others = {"last_hidden_state": torch.tensor([[[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])}
    assert mean_cosine(states, others, mask) == pytest.approx((0.5**0.5 + 1) / 2)


def test_a_foreign_tokenizer_is_named(tmp_path, target):
    source = save(make_albert(vocab_size=50), tmp_path / "source")
    with pytest.raises(ConversionError, match=r"The tokenizer is not the model's: .* `vocab_size` is 50"):
        convert_checkpoint(source, target, **SHORT)
    assert not target.exists()


def test_a_comparison_that_cannot_be_run_is_named(masked_lm, target, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AlbertForMaskedLM, "forward", fail)
    with pytest.raises(ConversionError, match="can't allocate memory.*--no-verify"):
        convert_checkpoint(masked_lm, target, **SHORT)


@pytest.mark.parametrize("place", ["ffn.bias", "global_embeddings.weight", "predictions.bias"])
def test_a_conversion_that_loses_something_fails_loudly(masked_lm, target, tmp_path, monkeypatch, place):
    def lossy(*args, **options):
        tensors = real(*args, **options)
        (name,) = (name for name in tensors if name.endswith(place) and "layer_norm" not in name)
        return {**tensors, name: tensors[name] + 0.01}

    real = convert_module.convert_state_dict
    monkeypatch.setattr(convert_module, "convert_state_dict", lossy)
    with pytest.raises(ConversionError, match="not lossless|not the embedding of"):
        convert_checkpoint(masked_lm, target, **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_the_report_names_the_five_likeliest_tokens(masked_lm, target, tmp_path):
    seen = convert_checkpoint(masked_lm, target, **SHORT).comparison
    assert "[MASK]" in seen.text and len(seen.source_top5) == len(seen.target_top5) == 5
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    ids = tokenizer(seen.text, return_tensors="pt")["input_ids"]
    logits = make_albert()(ids).logits[0, ids[0].tolist().index(4)]
    expected = tokenizer.convert_ids_to_tokens(logits.topk(5).indices.tolist())
    assert [token for token, _ in seen.source_top5] == expected
