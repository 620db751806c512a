"""A trained encoder as the start of an ALBERT with another vocabulary."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AlbertForMaskedLM, AutoTokenizer, BertTokenizer, T5Config, T5EncoderModel

from conftest import ROOT
from family_sources import LOSSLESS, WORDS, make_model, save_bytes, save_words
from pretraining import transplant
from pretraining.transplant import source_ids, transplant_vectors


@pytest.fixture(scope="module")
def target():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture
def source(tmp_path) -> BertTokenizer:
    save_words(tmp_path, tokenizer_class="BertTokenizer", do_lower_case=True)
    return BertTokenizer.from_pretrained(tmp_path)


def test_pieces_get_the_vectors_of_what_they_spell(source, target):
    vectors = torch.randn(len(WORDS), 7)
    transplanted = transplant_vectors(vectors, source, target)
    found = {piece: transplanted[index] for piece, index in target.get_vocab().items()}
    assert found["▁river"].equal(vectors[WORDS.index("river")])
    assert found["s"].equal(vectors[WORDS.index("##s")]), "inside of a word"
    assert found["."].equal(vectors[WORDS.index(".")]), "punctuation"
    assert found["[MASK]"].equal(vectors[WORDS.index("[MASK]")])
    assert found["<pad>"].equal(vectors[WORDS.index("[PAD]")]), "by its role, under another name"
    assert found["▁"].allclose(vectors.mean(0))
    ids = source(" rivers", add_special_tokens=False)["input_ids"]
    assert ids == [WORDS.index("river"), WORDS.index("##s")]
    assert found["▁rivers"].allclose(vectors[ids].mean(0))


def test_a_vocabulary_of_bytes_knows_word_starts_from_its_spaces(tmp_path, target):
    save_bytes(tmp_path, tokenizer_class="RobertaTokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    first, inside = source_ids(["▁th", "th"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(first) == ["Ġth"]
    assert tokenizer.convert_ids_to_tokens(inside) == ["t", "h"]


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*LOSSLESS])
def test_the_layers_compute_what_the_encoder_does(model_type, source, target):
    encoder = make_model(model_type, "Model").double()
    model = transplant.transplant(encoder, source, target).double().eval()
    embeddings = torch.randn(2, 9, model.config.embedding_size, dtype=torch.double)
    actual, expected = model.albert(inputs_embeds=embeddings)[0], encoder(inputs_embeds=embeddings)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_head_starts_as_the_identity(source, target):
    model = transplant.transplant(make_model("bert", "Model"), source, target).eval()
    states = torch.randn(3, model.config.hidden_size)
    words = model.get_input_embeddings().weight
    expected = torch.nn.functional.layer_norm(torch.nn.functional.gelu(states), states.shape[-1:], eps=1e-12) @ words.T
    torch.testing.assert_close(model.predictions(states), expected)


def test_the_command_writes_what_pretraining_can_go_on_from(tmp_path, target):
    folder = tmp_path / "source"
    make_model("bert", "ForMaskedLM").save_pretrained(folder)
    save_words(folder, tokenizer_class="BertTokenizer")
    assert transplant.main([str(folder), str(tmp_path / "start"), "--tokenizer", str(ROOT)]) == 0
    model = AlbertForMaskedLM.from_pretrained(tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    assert tokenizer.get_vocab() == target.get_vocab() and model.config.vocab_size == len(target)
    assert model.config.num_hidden_groups == 3 and model.config.max_position_embeddings == 512


@pytest.mark.parametrize("lost", ["config.json", "bert.encoder.layer.1.output.dense.weight"])
def test_a_source_that_is_not_whole_is_one_line(lost, tmp_path, capsys):
    folder = tmp_path / "source"
    make_model("bert", "ForMaskedLM").save_pretrained(folder)
    save_words(folder, tokenizer_class="BertTokenizer")
    if lost == "config.json":
        (folder / lost).unlink()
    else:
        weights = load_file(folder / "model.safetensors")
        del weights[lost]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert transplant.main([str(folder), str(tmp_path / "start"), "--tokenizer", str(ROOT)]) == 1
    assert "\nerror: " in "\n" + capsys.readouterr().err and not (tmp_path / "start").exists()


def test_other_encoders_are_refused(source, target):
    config = T5Config(vocab_size=len(WORDS), d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1)
    with pytest.raises(ValueError, match="'t5' model; it must be one of ALBERT, BERT"):
        transplant.transplant(T5EncoderModel(config), source, target)
