"""Export a model to an ONNX file for any batch size and length, and compare the file with the model before keeping it.

This needs `pip install "lsg-albert[onnx]"`.
"""

import math
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import modeling_lsg_albert as models
from .configuration_lsg_albert import LSGAlbertConfig

# The classes that can be exported, with the outputs of their files.
OUTPUTS = {
    "LSGAlbertModel": ("last_hidden_state",),
    "LSGAlbertForMaskedLM": ("logits",),
    "LSGAlbertForPreTraining": ("prediction_logits", "sop_logits"),
    "LSGAlbertForSequenceClassification": ("logits",),
    "LSGAlbertForTokenClassification": ("logits",),
    "LSGAlbertForQuestionAnswering": ("start_logits", "end_logits"),
}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TOLERANCE = 1e-4  # relative to the largest value of an output, or to 1 if that is larger
TEXTS = 3  # batches of texts tried for each length, until one agrees


class NamedOutputs(nn.Module):
    """A model as a function of `INPUTS` that returns the named outputs as a tuple."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids, attention_mask, token_type_ids, return_dict=True)
        return tuple(output[name] for name in self.names)


def export_onnx(source: str, file: str | Path, architecture: str | None = None) -> dict[int, float]:
    """Write the ONNX file of a checkpoint, and compare it with the model at three lengths.

    Args:
        source: a directory, or the name of a repository on the Hub.
        file: the file to write; an existing one is replaced.
        architecture: a class in `OUTPUTS`; None for the class that the checkpoint names.

    Returns:
        For each length in tokens, the largest difference of an output at a real token.

    Raises:
        ValueError: the checkpoint is not an LSG-ALBERT of a class in `OUTPUTS`, a package is missing, or the file's
            outputs differ from the model's. In these cases, nothing is written.
    """
    check_packages()
    model = load_model(source, architecture)
    target = Path(file).resolve()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / target.name
        write_graph(model, written)
        differences = compare(model, written)
        for part in Path(folder).iterdir():  # weights of more than 2 GB are in a separate file
            os.replace(part, target.parent / part.name)
    return differences


def check_packages() -> None:
    """Raise `ValueError` if a package that the export needs cannot be imported."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'`{error.name}` is not installed. The ONNX export needs it: `pip install "lsg-albert[onnx]"`.'
        ) from error


def load_model(source: str, architecture: str | None) -> PreTrainedModel:
    """The model of a checkpoint, in float32 on the CPU; `ValueError` if its class is not in `OUTPUTS`."""
    config = LSGAlbertConfig.from_pretrained(source)
    name = architecture or (config.architectures or ["LSGAlbertModel"])[0]
    if name not in OUTPUTS:
        raise ValueError(
            f"`architecture` {name!r} cannot be exported to ONNX. Choose from {', '.join(OUTPUTS)}. To make an "
            "LSG-ALBERT from an ALBERT, use `lsg-albert convert`."
        )
    return getattr(models, name).from_pretrained(source).float().eval()


def write_graph(model: PreTrainedModel, file: Path) -> None:
    """Export the model with a dynamic batch and length."""
    names = OUTPUTS[type(model).__name__]
    length = min(model.config.block_size + 1, model.config.max_position_embeddings)
    inputs = random_text(model.config, 2, length, seed=0)
    axes = {0: "batch", 1: "length"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about itself
        program = torch.onnx.export(
            NamedOutputs(model, names).eval(), (), kwargs=inputs, dynamo=True, verbose=False,
            input_names=list(INPUTS), output_names=list(names), dynamic_shapes=dict.fromkeys(INPUTS, axes),
        )  # fmt: skip
    program.save(str(file))


def random_text(config: LSGAlbertConfig, batch_size: int, length: int, seed: int) -> dict[str, Tensor]:
    """Random tokens, (batch, length); the last row's second half is padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(config.vocab_size, (batch_size, length), generator=generator)
    types = torch.randint(config.type_vocab_size, (batch_size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, (length + 1) // 2 :] = 0
    return dict(zip(INPUTS, (input_ids, attention_mask, types), strict=True))


def compare(model: PreTrainedModel, file: Path) -> dict[int, float]:
    """The largest difference between a file and its model, for each of three lengths.

    The lengths are one token, the shortest text that is read block by block, and many blocks.

    Raises:
        ValueError: file and model differ for all batches of a length. If the norms of two keys differ only in the last
            bits, rounding may select the other key in one batch; a wrong file differs for all batches.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    longest, full_length = model.config.max_position_embeddings, model.base_model.encoder.pattern.full_length
    differences = {}
    for batch_size, wanted in ((1, 1), (2, full_length + 1), (3, 3 * full_length + 1)):
        length = min(wanted, longest)
        for seed in range(1, 1 + TEXTS):
            inputs = random_text(model.config, batch_size, length, seed)
            outputs = session.run(None, {name: inputs[name].numpy() for name in INPUTS})
            relative, found = difference(model, inputs, outputs)
            if relative <= TOLERANCE:
                break
        else:
            raise ValueError(
                f"The ONNX file differs from the model by {found:.1e} for {batch_size} texts of {length} tokens. It "
                "was not written. Please report this with the versions of torch, onnxscript and onnxruntime."
            )
        differences[length] = found
    return differences


@torch.no_grad()
def difference(model: PreTrainedModel, inputs: dict[str, Tensor], outputs: list[np.ndarray]) -> tuple[float, float]:
    """The largest difference of an output at a real token: relative to the largest value (or to 1), and absolute."""
    expected = NamedOutputs(model, OUTPUTS[type(model).__name__])(**inputs)
    real = inputs["attention_mask"].bool()
    largest = (0.0, 0.0)
    for actual, value in zip(outputs, expected, strict=True):
        actual = torch.from_numpy(actual)
        if actual.shape != value.shape:
            return math.inf, math.inf
        if value.shape[:2] == real.shape:
            actual, value = actual[real], value[real]
        found = (actual - value).abs().max().item()
        largest = max(largest, (found / max(1.0, value.abs().max().item()), found))
    return largest
