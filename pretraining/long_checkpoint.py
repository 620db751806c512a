"""The two steps around training at full length: a short ALBERT becomes an LSG-ALBERT, and that becomes the root's model.

python -m pretraining.long_checkpoint extend runs/short/final runs/extended
python -m pretraining.pretrain_mlm ... --model runs/extended --max-length 4096 --output runs/long
python -m pretraining.long_checkpoint finish runs/long/final .
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from transformers import AlbertForMaskedLM, AutoTokenizer

from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM
from lsg_albert.convert_albert_to_lsg import convert_state_dict
from pretraining.corpus import write_atomically

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json")


def extend(source: Path, target: Path, max_length: int) -> None:
    """Convert a plain ALBERT, without training. [CLS] is masked: on short texts the two give the same logits."""
    albert = AlbertForMaskedLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    known = inspect.signature(LSGAlbertConfig.__init__).parameters
    fields = {name: value for name, value in albert.config.to_dict().items() if name in known}
    fields.update(max_position_embeddings=max_length, mask_first_token=True)
    model = LSGAlbertForMaskedLM(LSGAlbertConfig(**fields))
    converted = convert_state_dict(
        albert.state_dict(),
        max_length=max_length,
        bos_token_id=tokenizer.cls_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    model.load_state_dict(converted)
    model.save_pretrained(target)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, target / name)


@torch.no_grad()
def fold_global_into_cls(model: LSGAlbertForMaskedLM, cls_token_id: int) -> None:
    """Give [CLS] at position 0 the trained embedding of global token 0.

    With `mask_first_token` nothing reads [CLS] in its place, so the model's outputs stay what they are, but for the
    score of [CLS] itself; and plain ALBERT, which has no global tokens, finds its equal in [CLS].
    """
    embeddings = model.albert.embeddings
    first = embeddings.position_embeddings.weight[0] + embeddings.token_type_embeddings.weight[0]
    embeddings.word_embeddings.weight[cls_token_id] = embeddings.global_embeddings.weight[0] - first


def finish(source: Path, target: Path) -> None:
    """Put a trained LSG-ALBERT's weights and configuration into the repository's root."""
    model = LSGAlbertForMaskedLM.from_pretrained(source)
    fold_global_into_cls(model, model.config.bos_token_id)
    model.config.hidden_act = "gelu_new"  # trained with its fused equal; this is the name every ALBERT reader knows
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / WEIGHTS)
        # The same parameter by its other name: transformers' own ALBERT before 4.50 takes it from there alone.
        weights["predictions.decoder.bias"] = weights.pop("predictions.bias")
        write_atomically(target / WEIGHTS, serialize(weights, metadata={"format": "pt"}))
        write_atomically(target / CONFIG, (Path(folder) / CONFIG).read_bytes())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for name, text in (("extend", "convert a plain ALBERT, without training"), ("finish", "make it the root's model")):
        step = steps.add_parser(name, help=text)
        step.add_argument("source", type=Path)
        step.add_argument("target", type=Path)
    steps.choices["extend"].add_argument("--max-length", type=int, default=4096, help="positions (default: 4096)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.step == "extend":
            extend(args.source, args.target, args.max_length)
        else:
            finish(args.source, args.target)
    except (OSError, ValueError) as error:
        print(f"long_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
