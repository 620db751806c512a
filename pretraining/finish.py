"""Put a trained LSG-ALBERT into the repository's root, in a form that plain ALBERT can also load.

    python -m pretraining.finish runs/long/final . --dtype float16

This is the last step of the training: `pretrain_mlm` trains a short ALBERT, `lsg-albert convert --mask-first-token`
converts it, and `pretrain_mlm` trains the result at full length. It needs the package (`pip install .`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from lsg_albert import LSGAlbertForMaskedLM
from pretraining.training_support import write_atomically

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = ("float32", "float16", "bfloat16")


@torch.no_grad()
def fold_global_into_cls(model: LSGAlbertForMaskedLM, cls_token_id: int) -> None:
    """Give [CLS] at position 0 the trained embedding of global token 0.

    With `mask_first_token`, no token attends to [CLS], so the model's outputs do not change, except the score of [CLS]
    itself. Plain ALBERT has no global tokens; there, [CLS] then has the same role.

    Raises:
        ValueError: tokens of the model attend to [CLS].
    """
    if not model.config.mask_first_token:
        raise ValueError(
            "`mask_first_token` is False in this model: a new embedding of [CLS] would change its outputs."
        )
    embeddings = model.albert.embeddings
    first = embeddings.position_embeddings.weight[0] + embeddings.token_type_embeddings.weight[0]
    embeddings.word_embeddings.weight[cls_token_id] = embeddings.global_embeddings.weight[0] - first


def finish(source: Path, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights and the configuration of the model in `source` into `target`.

    The weights may be rounded to a smaller type in the file. They load as float32, as the configuration says.
    """
    model = LSGAlbertForMaskedLM.from_pretrained(source)
    fold_global_into_cls(model, model.config.bos_token_id)
    if model.config.hidden_act == "gelu_pytorch_tanh":
        model.config.hidden_act = "gelu_new"  # the same function, under the name that every ALBERT code knows
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / WEIGHTS)
        # The same parameter under its other name: in 4.44 and 4.48, transformers' own ALBERT reads only this name.
        weights["predictions.decoder.bias"] = weights.pop("predictions.bias")
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        write_atomically(target / WEIGHTS, serialize(weights, metadata={"format": "pt"}))
        write_atomically(target / CONFIG, (Path(folder) / CONFIG).read_bytes())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="directory of the trained model")
    parser.add_argument("target", type=Path, help="directory to write config.json and model.safetensors into")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the weights in the file (default: float32)"
    )
    args = parser.parse_args(argv)
    try:
        finish(args.source, args.target, getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
