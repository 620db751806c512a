"""Tokenizers of every family: the target has the source's files, class and ids, without trusting code."""

import shutil

import pytest
import transformers
from transformers import AutoTokenizer

import lsg_albert
from albert_sources import edit_json
from family_sources import BYTES, PIECES, STARTS, WORDS, make_model, save, save_bytes, save_pieces, save_words
from lsg_albert.conversion import convert_checkpoint

SHORT = {"max_length": 64, "block_size": 16}
TEXT = "the river flows from the mountains into the sea"
CLASSES = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
}
FILES = {"roberta": save_bytes, "xlm-roberta": save_pieces, "camembert": save_pieces}


RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))


def own_class(family, use_fast=True):
    """The class of a family's tokenizer; there is only one from release 5 on."""
    return getattr(transformers, CLASSES[family] + "Fast" * (use_fast and RELEASE < (5, 0)))


def make_source(folder, family, **settings):
    """A model with the vocabulary that its family has."""
    vocab_size = {save_bytes: BYTES, save_pieces: PIECES}.get(FILES.get(family), len(WORDS))
    source = save(make_model(family, vocab_size=vocab_size), folder)
    FILES.get(family, save_words)(source, **settings)
    if family == "camembert" and RELEASE == (5, 0):
        with pytest.raises(TypeError):
            own_class(family).from_pretrained(source)
        pytest.skip("release 5.0 cannot read CamemBERT's file itself")
    return source


def check(first, target, use_fast=True):
    """Compare a tokenizer with that of a directory, which is returned."""
    second = AutoTokenizer.from_pretrained(target, use_fast=use_fast)
    assert type(first) is type(second)
    assert first(TEXT)["input_ids"] == second(TEXT)["input_ids"]
    assert first.mask_token_id == second.mask_token_id and second.model_max_length == 64
    return second


@pytest.mark.parametrize("family", STARTS)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("use_fast", [True, False])
def test_the_vocabulary_alone(tmp_path, target, family, named, use_fast):
    """The files of old repositories, with the class's name beside them and without."""
    settings = {"tokenizer_class": CLASSES[family]} if named else {}
    source = make_source(tmp_path / "source", family, **settings)
    report = convert_checkpoint(source, target, **SHORT)
    assert report.comparison.lossless_difference < 1e-4 and report.comparison.text is not None
    tokenizer = check(own_class(family, use_fast).from_pretrained(source), target, use_fast)
    assert tokenizer.mask_token_id == report.mask_token_id and tokenizer.cls_token_id == report.bos_token_id
    config = lsg_albert.LSGAlbertConfig.from_pretrained(target)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id,
    )  # fmt: skip


@pytest.mark.parametrize("family", STARTS)
def test_tokenizer_json_alone(tmp_path, target, family):
    source = make_source(tmp_path / "source", family)
    saved = own_class(family).from_pretrained(source)
    saved.save_pretrained(tmp_path / "saved")
    for name in ("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model"):
        (source / name).unlink(missing_ok=True)
    shutil.copyfile(tmp_path / "saved" / "tokenizer.json", source / "tokenizer.json")
    report = convert_checkpoint(source, target, **SHORT)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert type(tokenizer) is type(saved) and tokenizer(TEXT)["input_ids"] == saved(TEXT)["input_ids"]
    assert report.comparison.lossless_difference < 1e-4


@pytest.mark.parametrize("family", STARTS)
def test_what_this_release_saves(tmp_path, target, family):
    source = make_source(tmp_path / "source", family)
    own_class(family).from_pretrained(source).save_pretrained(source)
    convert_checkpoint(source, target, **SHORT)
    check(own_class(family).from_pretrained(source), target)


def test_a_model_with_another_familys_tokenizer(tmp_path, target):
    """Multilingual E5 and MiniLM are BERTs that read XLM-RoBERTa's pieces."""
    source = save(make_model("bert", vocab_size=PIECES), tmp_path / "source")
    save_pieces(source)
    edit_json(source / "config.json", tokenizer_class="XLMRobertaTokenizer")
    convert_checkpoint(source, target, **SHORT)
    assert type(AutoTokenizer.from_pretrained(target)).__name__.startswith("XLMRobertaTokenizer")
