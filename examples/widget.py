"""Print the model's first words for the model card's widget examples, as the Hub does, with and without remote code.

    python examples/widget.py

`trust_remote_code=True` loads the repository's own LSG-ALBERT. Otherwise, transformers' ALBERT reads the same files.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import pipeline

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"`trust_remote_code=True`": {"trust_remote_code": True}, "plain": {}}


def widget_texts(model: str) -> list[str]:
    """The widget examples in the metadata of a model's card. `model` is a directory or an id on the Hub.

    Raises:
        ValueError: the card has no such examples.
    """
    card = ModelCard.load(Path(model) / "README.md" if Path(model).is_dir() else model)
    texts = [example["text"] for example in card.data.get("widget") or [] if "text" in example]
    if not texts:
        raise ValueError(f"the card of {model} has no `widget:` examples with a text")
    return texts


def format_predictions(predictions: list[dict]) -> str:
    """`word 12.3%` for each prediction of the pipeline."""
    return ", ".join(f"{found['token_str'].strip()} {found['score']:.1%}" for found in predictions)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT), help="directory or Hub id; its code is run")
    model = parser.parse_args(argv).model
    try:
        texts = widget_texts(model)
        pipelines = {kind: pipeline("fill-mask", model=model, **options) for kind, options in KINDS.items()}
    except (OSError, ValueError) as error:
        print(f"widget: {error}", file=sys.stderr)
        return 1
    print("| text | loaded | first five |\n| --- | --- | --- |")
    for text in texts:
        for kind, fill_mask in pipelines.items():
            print(f"| {text} | {kind} | {format_predictions(fill_mask(text))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
