"""ALBERT checkpoints with random weights, saved by transformers itself, to convert."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AlbertConfig, PreTrainedModel

from conftest import ROOT, SHARED

HEADS = (
    "AlbertModel",
    "AlbertForPreTraining",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertForQuestionAnswering",
    "AlbertForMultipleChoice",
)
SMALL = {
    "embedding_size": 16,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
# The vocabulary that ALBERT was published with where it is at hand, else this repository's.
PUBLISHED = SHARED / "data" / "albert-tokenizer" / "spiece.model"
VOCABULARY = PUBLISHED if PUBLISHED.is_file() else ROOT / "spiece.model"
VOCAB_SIZE = 30_000 if PUBLISHED.is_file() else 16_000


def make_albert(head: str = "AlbertForMaskedLM", **fields) -> PreTrainedModel:
    """A random model; its biases and normalizations are random too, so that none can get lost unseen."""
    torch.manual_seed(0)
    model = getattr(transformers, head)(AlbertConfig(**{"vocab_size": VOCAB_SIZE, **SMALL, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name or "layer_norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: PreTrainedModel, folder: Path, tokenizer: bool = True, **options) -> Path:
    """Save it with transformers, and the vocabulary beside it."""
    model.save_pretrained(folder, **options)
    if tokenizer:
        shutil.copyfile(VOCABULARY, folder / "spiece.model")
    return folder


def pickle_weights(folder: Path, num_shards: int = 1, old_format: bool = False) -> Path:
    """Put the weights into `.bin` files, which transformers 5 does not write any more."""
    state_dict = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(state_dict)
    parts = [names[i::num_shards] for i in range(num_shards)]
    weight_map = {}
    for i, part in enumerate(parts):
        file_name = f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin" if num_shards > 1 else "pytorch_model.bin"
        tensors = {name: state_dict[name] for name in part}
        torch.save(tensors, folder / file_name, _use_new_zipfile_serialization=not old_format)
        weight_map |= dict.fromkeys(part, file_name)
    if num_shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """A hash of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edit_json(path: Path, **fields) -> None:
    """Replace fields of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether tensors of the same names are equal bit for bit."""
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
