"""Start a small ALBERT from a trained encoder of another family and another vocabulary.

    python -m pretraining.transplant SENTENCE_ENCODER runs/start --tokenizer .

A BERT is an ALBERT with as many groups as layers, so its layers are copied. The word embeddings are transferred to the
new vocabulary as in Gee et al., "Fast Vocabulary Transfer for Language Model Compression" (EMNLP 2022 Industry Track).
A piece that the source knows gets the source's vector. Any other piece is split by the source's tokenizer, and gets
the mean of the vectors of its parts. The head for masked words starts as the identity, so that the first predictions
are the words whose vectors are near the encoder's outputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lsg_albert.conversion.families import CONVERTIBLE, FAMILIES, IDENTITY, added_tensors
from pretraining.training_support import copy_tokenizer

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
WORD_START, CONTINUED = "▁", "##"  # prefixes of sentencepiece and WordPiece pieces
SPECIAL = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


def source_ids(pieces: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """For each sentencepiece piece, the ids of the source's pieces that stand for it. A lone word start has none.

    Inside a word, WordPiece marks pieces of letters with a prefix, but never punctuation.
    """
    vocabulary = tokenizer.get_vocab()
    inside = [vocabulary.get(CONTINUED + piece) if piece.isalnum() else None for piece in pieces]
    texts = [piece.replace(WORD_START, " ") for piece in pieces]
    split = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids if known is None else [known] for ids, known in zip(split, inside, strict=True)]


def transplant_vectors(vectors: Tensor, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> Tensor:
    """Word vectors for the target's vocabulary, made from those of the source's vocabulary.

    Args:
        vectors: shape (source vocabulary, size).
        source, target: the tokenizers of both vocabularies; the target's is a sentencepiece vocabulary.

    Returns:
        Shape (target vocabulary, size). Special tokens are matched by their role. A piece without a counterpart in
        the source gets the mean of all vectors.
    """
    pieces = target.convert_ids_to_tokens(list(range(len(target))))
    found = vectors.mean(0).repeat(len(pieces), 1)
    for index, ids in enumerate(source_ids(pieces, source)):
        if ids:
            found[index] = vectors[ids].mean(0)
    for role in SPECIAL:
        found[getattr(target, role)] = vectors[getattr(source, role)]
    return found


def albert_config(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> AlbertConfig:
    """The configuration of an ALBERT with the encoder's sizes and the tokenizer's vocabulary.

    Raises:
        ValueError: the encoder does not belong to a family that can be converted.
    """
    family = FAMILIES.get(encoder.config.model_type)
    if family is None:
        raise ValueError(f"the source is a {encoder.config.model_type!r} model; it must be one of {CONVERTIBLE}.")
    fields = family.albert_fields(encoder.config.to_dict())
    known = AlbertConfig().to_dict().keys() - {"architectures", "model_type", "transformers_version", "dtype"}
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    sizes = {name: value for name, value in fields.items() if name in known}
    return AlbertConfig(**{**sizes, **special, "vocab_size": len(tokenizer)})


@torch.no_grad()
def transplant(
    encoder: PreTrainedModel, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> AlbertForMaskedLM:
    """An ALBERT with the encoder's layers, the target's vocabulary and a head for masked words.

    Raises:
        ValueError: the encoder does not belong to a family that can be converted, or lacks a tensor.
    """
    model = AlbertForMaskedLM(albert_config(encoder, target))
    family = FAMILIES[encoder.config.model_type]
    state = {family.tensor_name(name): tensor for name, tensor in encoder.state_dict().items()}
    state[POSITIONS] = state[POSITIONS][family.unused_positions(encoder.config.to_dict()) :]
    state[WORDS] = transplant_vectors(state[WORDS], source, target)
    filled = added_tensors(family, model.config.embedding_size, model.config.hidden_size)
    for name, parameter in model.albert.named_parameters():
        if name in filled:
            (torch.nn.init.eye_ if filled[name] == IDENTITY else torch.nn.init.zeros_)(parameter)
        elif name in state:
            parameter.copy_(state[name])
        else:
            raise ValueError(f"the source has no tensor for {name}.")
    head = model.predictions
    torch.nn.init.eye_(head.dense.weight)
    head.dense.bias.zero_()
    return model


def load_encoder(source: str) -> PreTrainedModel:
    """The encoder in a directory. Every layer must be there; a head is left out.

    Raises:
        ValueError: a tensor of the encoder is missing. transformers would initialize it at random.
    """
    encoder, loading = AutoModel.from_pretrained(source, output_loading_info=True)
    missing = sorted(name for name in loading["missing_keys"] if ".pooler." not in f".{name}")
    if missing:
        raise ValueError(f"{source} lacks {missing[0]}.")
    return encoder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="directory of an encoder of the BERT family, with its tokenizer")
    parser.add_argument("output", type=Path, help="directory to write the ALBERT into")
    parser.add_argument("--tokenizer", required=True, help="directory with the tokenizer of the new vocabulary")
    args = parser.parse_args(argv)
    try:
        source, target = AutoTokenizer.from_pretrained(args.source), AutoTokenizer.from_pretrained(args.tokenizer)
        model = transplant(load_encoder(args.source), source, target)
        model.save_pretrained(args.output)
        copy_tokenizer(Path(args.tokenizer), args.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
