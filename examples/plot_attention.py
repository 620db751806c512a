"""Draw what the tokens of a text attend to: the pattern, and one layer's effective attention map.

    python examples/plot_attention.py examples/long_document.txt

The map has a weight for every pair of tokens. Where the model attended to the mean of several tokens, the weight is
spread over these tokens. Needs matplotlib (`pip install ".[plot]"`).
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

matplotlib.use("Agg")  # draw into a file, not into a window
from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import ListedColormap, LogNorm  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"not attended to": "#f4f4f4", "local": "#3b75af", "sparse": "#ef8636", "global": "#519d3e"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("document", type=Path, help="a text file in UTF-8")
    parser.add_argument("--model", default=str(ROOT), help="directory or Hub id; its code is run")
    parser.add_argument("--output", type=Path, default=Path("attention.png"), help="picture to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    parser.add_argument("--tokens", type=int, default=160, help="tokens of the text to read")
    parser.add_argument("--layer", type=int, default=-1, help="layer, counted from 0, or from -1 at the end")
    parser.add_argument("--head", type=int, default=0, help="attention head, counted from 0, or from -1 at the end")
    # Small blocks by default: the pattern of 128-token blocks would need a larger picture.
    parser.add_argument("--block-size", type=int, default=16, help="tokens per block")
    parser.add_argument("--sparse-block-size", type=int, default=16, help="sparse tokens per side")
    parser.add_argument("--sparsity-factor", type=int, default=4, help="tokens per sparse token")
    parser.add_argument("--sparsity-type", default="norm", help="how to select the sparse tokens")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {args.tokens}")
    if args.output.exists() and not args.overwrite:
        parser.error(f"{args.output} exists; choose another --output, or use --overwrite to replace it")
    return args


def describe(kind: str, index: int, count: int) -> str:
    """Describe one of `count` layers or heads in words.

    Raises:
        ValueError: no layer or head has this index.
    """
    if not -count <= index < count:
        raise ValueError(f"--{kind} {index}: the model has {count} {kind}s, 0 to {count - 1}")
    return {0: f"first {kind}", count - 1: f"last {kind}"}.get(index % count, f"{kind} {index % count} (from 0)")


@torch.no_grad()
def attention_map(args: argparse.Namespace, text: str) -> tuple[Tensor, int, str]:
    """One head's effective map (globals + tokens, globals + tokens), the number of globals, and which head it is."""
    pattern = {name: getattr(args, name) for name in ("block_size", "sparse_block_size", "sparsity_factor")}
    model = AutoModelForMaskedLM.from_pretrained(
        args.model, trust_remote_code=True, sparsity_type=args.sparsity_type, **pattern
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.tokens)
    maps = model(**inputs, output_attentions=True).attentions
    which = f"{describe('layer', args.layer, len(maps))}, {describe('head', args.head, maps[0].shape[1])}"
    return maps[args.layer][0, args.head], model.config.num_global_tokens, which


def kinds_of_keys(weights: Tensor, num_globals: int, block_size: int) -> Tensor:
    """Index into `KINDS` for every pair (query, key) of a map: how the query attended to the key."""
    token = torch.arange(len(weights)) - num_globals  # below 0: a global token
    block = token.div(block_size, rounding_mode="floor")
    is_local = (block[:, None] - block[None]).abs() <= 1
    is_global = (token[:, None] < 0) | (token[None] < 0)
    names = list(KINDS)
    kinds = torch.where(is_local, names.index("local"), names.index("sparse"))
    kinds = torch.where(is_global, names.index("global"), kinds)
    return torch.where(weights > 0, kinds, names.index("not attended to"))


def draw(weights: Tensor, kinds: Tensor, title: str, output: Path) -> None:
    """Write the two pictures, side by side, into one file."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12.5, 5.8), layout="constrained")
    left.imshow(
        kinds.numpy(), cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=len(KINDS) - 1, interpolation="nearest"
    )
    left.set_title("Which keys a query attends to")
    left.legend(handles=[Patch(color=color, label=name) for name, color in KINDS.items()], loc="upper right")
    image = right.imshow(weights.clamp(min=1e-6).numpy(), cmap="magma", norm=LogNorm(1e-6, 1), interpolation="nearest")
    right.set_title(title)
    figure.colorbar(image, ax=right, label="effective attention weight")
    for axes in (left, right):
        axes.set_xlabel("key token")
        axes.set_ylabel("query token")
    figure.savefig(output, dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        text = args.document.read_text(encoding="utf-8")
        weights, num_globals, which = attention_map(args, text)
        kinds = kinds_of_keys(weights, num_globals, args.block_size)
        draw(weights, kinds, f'Effective attention map, {which}, "{args.sparsity_type}"', args.output)
    except (OSError, ValueError) as error:
        print(f"plot_attention: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {which}; {len(weights) - num_globals} tokens, {num_globals} global")
    return 0


if __name__ == "__main__":
    sys.exit(main())
