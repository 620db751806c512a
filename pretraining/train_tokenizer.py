"""Train the vocabulary: a sentencepiece unigram model with ALBERT's special ids, and the tokenizer files around it.

    python -m pretraining.train_tokenizer corpus.jsonl.gz --exclude-ids heldout.txt --output .

Three files are written: ``spiece.model`` for the slow tokenizer, ``tokenizer.json`` for the fast tokenizer, and
``tokenizer_config.json``. Without ``tokenizer.json``, transformers converts ``spiece.model``, which needs protobuf.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pretraining.corpus import CorpusError, read_documents, read_ids
from pretraining.training_support import write_atomically

SPECIAL_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")  # the position is the id, as in ALBERT
BOUNDARY = "\t"  # no piece may contain it in training; it never occurs in normalized text
SHORT_NAMES = {"pad": "<pad>", "unk": "<unk>", "cls": "[CLS]", "sep": "[SEP]", "bos": "[CLS]", "eos": "[SEP]"}


def normalize(text: str) -> str:
    """Normalize a text as AlbertTokenizer does before sentencepiece (lower case, no accents, single spaces).

    The sentencepiece model itself normalizes nothing. transformers 5.0 ignores a model's own rules, but other versions
    apply them, so only a model without rules gives the same ids everywhere.
    """
    text = " ".join(text.split()).replace("``", '"').replace("''", '"')
    text = unicodedata.normalize("NFKD", text)
    return "".join(char for char in text if not unicodedata.combining(char)).lower()


def mark_boundaries(text: str) -> str:
    """Keep digits and commas in separate pieces: AlbertTokenizer cuts "9," in two, but the fast tokenizer does not."""
    return re.sub(r"(?<=\d)(?=,)", BOUNDARY, text)


def paragraphs(sources: Iterable[str], held_out: set[str]) -> Iterator[str]:
    """The normalized, non-empty paragraphs of all documents that are not held out."""
    for doc_id, text in read_documents(sources):
        if doc_id not in held_out:
            yield from filter(None, map(normalize, text.split("\n")))


def sample(items: Iterable[str], size: int, seed: int) -> list[str]:
    """A uniform sample of at most ``size`` items (reservoir sampling), the same for the same seed and items."""
    rng = random.Random(seed)
    kept: list[str] = []
    for seen, item in enumerate(items):
        if seen < size:
            kept.append(item)
        elif (slot := rng.randrange(seen + 1)) < size:
            kept[slot] = item
    return kept


def train_unigram(texts: list[str], vocab_size: int, threads: int) -> bytes:
    """Train on normalized texts. Returns the serialized sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(mark_boundaries, texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        character_coverage=0.9998,
        normalization_rule_name="identity",
        pretokenization_delimiter=BOUNDARY,
        max_sentence_length=1_000_000,
        num_threads=threads,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece=SPECIAL_TOKENS[0],
        unk_piece=SPECIAL_TOKENS[1],
        control_symbols=list(SPECIAL_TOKENS[2:]),
        minloglevel=1,
    )
    return model.getvalue()


def fast_tokenizer(model: bytes) -> Tokenizer:
    """The same tokenizer for the `tokenizers` library, built as transformers 5 builds its AlbertTokenizer."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=1, byte_fallback=False))
    quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    letters = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(quotes + letters)
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens([AddedToken(**_added_token(token)) for token in SPECIAL_TOKENS])
    return tokenizer


def _added_token(token: str) -> dict[str, str | bool]:
    """A special token's settings. `[MASK]` stands for a word, so it includes the space before it."""
    settings = {"single_word": False, "lstrip": token == "[MASK]", "rstrip": False, "normalized": False}
    return {"content": token, **settings, "special": True}


def tokenizer_config(max_length: int) -> dict[str, object]:
    """The content of ``tokenizer_config.json``."""
    mask = {"__type": "AddedToken", **_added_token("[MASK]")}
    return {
        "tokenizer_class": "AlbertTokenizer",
        "do_lower_case": True,
        "keep_accents": False,
        "remove_space": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],  # otherwise, 5.x drops the token types
        "model_max_length": max_length,
        **{f"{name}_token": token for name, token in SHORT_NAMES.items()},
        "mask_token": mask,
        "added_tokens_decoder": {str(i): _added_token(token) for i, token in enumerate(SPECIAL_TOKENS)},
    }


def write_tokenizer(folder: Path, model: bytes, max_length: int) -> None:
    """Write the three tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(tokenizer_config(max_length), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "spiece.model", model)
    write_atomically(folder / "tokenizer.json", fast_tokenizer(model).to_str().encode() + b"\n")
    write_atomically(folder / "tokenizer_config.json", config.encode())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the sentencepiece vocabulary.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("corpus", nargs="+", help="JSON lines (also .gz), text files or folders, or data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer files")
    parser.add_argument("--exclude-ids", nargs="*", default=[], help="files with one held-out document id per line")
    parser.add_argument("--vocab-size", type=int, default=16_000, help="number of pieces, special ones included")
    parser.add_argument("--sample", type=int, default=400_000, help="largest number of paragraphs to train on")
    parser.add_argument("--max-length", type=int, default=4096, help="model_max_length of the tokenizer, in tokens")
    parser.add_argument("--seed", type=int, default=1, help="random seed of the sample")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="number of threads; it changes the result slightly, as sums depend on their order",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        held_out = read_ids(args.exclude_ids)
        texts = sample(paragraphs(args.corpus, held_out), args.sample, args.seed)
        if not texts:
            raise CorpusError("nothing to train on: every document is empty or held out")
        model = train_unigram(texts, args.vocab_size, args.threads)
        write_tokenizer(args.output, model, args.max_length)
    except (CorpusError, OSError, RuntimeError) as error:  # RuntimeError: sentencepiece, e.g. too little text
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"trained {args.vocab_size} pieces on {len(texts)} paragraphs; wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
