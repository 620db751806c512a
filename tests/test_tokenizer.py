"""The tokenizer files at the root, against sentencepiece itself, under whichever transformers is installed."""

import importlib
import json
import logging
import random
import re
import unicodedata
import warnings
from pathlib import Path

import pytest
import sentencepiece
import transformers
from transformers import AutoTokenizer

from pretraining import train_tokenizer

ROOT = Path(__file__).parents[1]
SPECIAL = {"pad": "<pad>", "unk": "<unk>", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CLASSES = ("AutoTokenizer", "AlbertTokenizer", "AlbertTokenizerFast")  # slow and fast are one class in 5.x
TEXTS = (
    "Hello, world!",
    "Édouard Manet's 1,234.50 café — naïve ŒUVRE, Straße, İstanbul",
    "in 1996, 12,345 men; 9,9 and 3/4, ½ and x², 10,000,000,",
    "  lots   of\n\n space\tand a\u00a0no-break one\u3000",
    "``quoted'' text, “curly” ‘ones’ don’t \"matter\" 'here'",
    "日本語 text ⚡ 🙂 Москва ελλάδα हिन्दी עברית",
    "a\u200bzero-width and a\x00nul",
    "\u00b4a\u00b4 ¨b … ﬁne ＦＵＬＬ",
    "antidisestablishmentarianism honorificabilitudinitatibus",
    "",
    "   ",
)


def load(name: str, folder: Path = ROOT):
    return getattr(transformers, name).from_pretrained(folder)


@pytest.fixture(scope="module", params=CLASSES)
def tokenizer(request):
    return load(request.param)


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "spiece.model"))


def expected_ids(text: str, pieces: sentencepiece.SentencePieceProcessor) -> list[int]:
    """ALBERT's tokenization by its definition: tidy each stretch between special tokens, then sentencepiece."""
    ids = []
    for part in re.split(r"(<pad>|<unk>|\[CLS\]|\[SEP\]|\[MASK\])", text):
        if part in SPECIAL.values():
            ids.append(pieces.piece_to_id(part))
        else:
            tidy = " ".join(part.split()).replace("``", '"').replace("''", '"')
            tidy = "".join(char for char in unicodedata.normalize("NFKD", tidy) if not unicodedata.combining(char))
            ids += pieces.encode(tidy.lower())
    return [2, *ids, 3]


def random_text(seed: int) -> str:
    """Words of the vocabulary, digits, punctuation, accents and special tokens in a random order."""
    rng = random.Random(seed)
    words = [
        "The",
        "ünïque",
        "novel",
        "12",
        ",",
        "3,4",
        ".",
        "'s",
        "[MASK]",
        "<unk>",
        "(",
        "Wikipedia",
        "\n",
        "x",
        "語",
    ]
    return "".join(rng.choice(words) + rng.choice(["", " ", "  "]) for _ in range(60))


def test_special_tokens_have_alberts_ids(tokenizer):
    assert [getattr(tokenizer, f"{name}_token") for name in SPECIAL] == list(SPECIAL.values())
    assert [getattr(tokenizer, f"{name}_token_id") for name in SPECIAL] == [0, 1, 2, 3, 4]
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == list(SPECIAL.values())
    assert len(tokenizer) == 16_000
    assert tokenizer.model_max_length == 4096


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_sentencepiece(tokenizer, pieces, text):
    assert tokenizer(text)["input_ids"] == expected_ids(text, pieces)


@pytest.mark.parametrize("seed", range(20))
def test_random_ids_equal_sentencepiece(tokenizer, pieces, seed):
    text = random_text(seed)
    assert tokenizer(text)["input_ids"] == expected_ids(text, pieces)


@pytest.mark.parametrize("text", ["a [MASK] here", "a[MASK] here", "a [MASK]here", "a  [MASK]   here"])
def test_mask_takes_the_space_before_it(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "[MASK]", "▁here"]


def test_pair_has_token_types(tokenizer, pieces):
    first, second = "who was he?", "a painter, born in 1832"
    encoded = tokenizer(first, second)
    head, tail = expected_ids(first, pieces), expected_ids(second, pieces)[1:]
    assert encoded["input_ids"] == head + tail
    assert encoded["token_type_ids"] == [0] * len(head) + [1] * len(tail)
    assert encoded["attention_mask"] == [1] * len(head + tail)


def test_batch_is_padded_on_the_right_with_id_0(tokenizer):
    batch = tokenizer(["one two three", "one"], padding=True)
    assert batch["input_ids"][1][3:] == [0] * (len(batch["input_ids"][0]) - 3)
    assert batch["attention_mask"][1] == [1] * 3 + [0] * (len(batch["input_ids"][0]) - 3)


def test_truncation_stops_at_4096_tokens(tokenizer):
    ids = tokenizer("word " * 5000, truncation=True)["input_ids"]
    assert len(ids) == 4096 and ids[-1] == 3


def test_decoding_gives_the_lower_cased_text(tokenizer):
    ids = tokenizer("The Café, in 1996.")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cafe, in 1996."


def test_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for text in (*TEXTS, random_text(0)):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_loading_is_silent():
    """No prompt for remote code, no Python warning, nothing in transformers' log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            AutoTokenizer.from_pretrained(ROOT)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def test_loading_needs_no_protobuf(monkeypatch):
    """protobuf, which a conversion of spiece.model takes, is no dependency of this project."""

    def fail(*args, **kwargs):
        raise ImportError("no protobuf")

    conversion = importlib.import_module("transformers.convert_slow_tokenizer")
    monkeypatch.setattr(conversion, "import_protobuf", fail)
    monkeypatch.setattr(conversion, "requires_backends", fail)
    assert AutoTokenizer.from_pretrained(ROOT)("a [MASK]")["input_ids"][2:] == [4, 3]


def test_fast_file_holds_the_vocabulary_of_the_slow_one(pieces):
    """`tokenizer.json` and `spiece.model` were written by the same training."""
    vocab = json.loads((ROOT / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert [piece for piece, _ in vocab] == [pieces.id_to_piece(i) for i in range(len(pieces))]
    assert [score for _, score in vocab] == pytest.approx([pieces.get_score(i) for i in range(len(pieces))])


def test_no_piece_joins_a_digit_and_a_comma(pieces):
    """AlbertTokenizer cuts such pieces in two, the fast one does not."""
    assert not [i for i in range(len(pieces)) if re.search(r"\d,", pieces.id_to_piece(i))]


def write_corpus(path: Path, documents: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in documents.items()))
    return path


def test_training_leaves_held_out_documents_out(tmp_path):
    shown = " ".join(f"the {a}{b} sees" for a in "abcdefgh" for b in ("ark", "oat", "ill", "end"))
    corpus = write_corpus(tmp_path / "corpus.jsonl", {"shown": f"{shown}\n" * 5, "hidden": "qzqz " * 500})
    (tmp_path / "ids.txt").write_text("hidden\n")
    outputs = [tmp_path / "a", tmp_path / "b"]
    for output in outputs:
        options = ["--exclude-ids", str(tmp_path / "ids.txt"), "--vocab-size", "30", "--output", str(output)]
        assert train_tokenizer.main([str(corpus), *options]) == 0
    vocab = load("AutoTokenizer", outputs[0]).get_vocab()
    assert len(vocab) == 30
    assert not [piece for piece in vocab if "q" in piece or "z" in piece]
    assert (outputs[0] / "spiece.model").read_bytes() == (outputs[1] / "spiece.model").read_bytes()


@pytest.mark.parametrize("content", [None, "", '{"id": "a"}\n', "no json\n", '{"id": "a", "text": " "}\n'])
def test_training_reports_bad_corpora_in_one_line(tmp_path, capsys, content):
    corpus = tmp_path / "corpus.jsonl"
    if content is not None:
        corpus.write_text(content)
    assert train_tokenizer.main([str(corpus), "--output", str(tmp_path)]) == 1
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
    assert not (tmp_path / "spiece.model").exists()
