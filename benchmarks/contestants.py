"""The models that are compared. They have random weights and the configurations below; nothing is downloaded.

transformers' models are imported when they are built, because not every release has each of them.
"""

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Size
from lsg_albert import LSGAlbertConfig, LSGAlbertForConditionalGeneration, LSGAlbertForMaskedLM, LSGAlbertModel
from lsg_albert.lsg_pattern import SPARSITY_TYPES

TOLERANCE = 1e-4  # between ours and ALBERT in float32; outputs have a size of about 1 after the layer norm
PACKING_FIELD = "pack_padding"  # the field of our configuration that says whether padded batches are packed

OTHER_SELECTIONS = tuple(name for name in SPARSITY_TYPES if name != "norm")


class WrongOutput(ValueError):
    """A contestant computes something wrong, so its time would mean nothing."""


@dataclass(frozen=True)
class Contestant:
    """One of the models.

    Args:
        label: the description for the reports.
        make: (size, longest input in tokens, mode) -> the model, in float32 on the CPU; for the mode "training" with
            the masked-LM head, for "generate" a sequence-to-sequence model.
        check: (size, device); raises `WrongOutput` if the model computes something wrong.
        before_case: called with the model before each case.
        context: wraps every call.
        takes: "input_ids", "embeddings" for a matrix (tokens, embedding) instead, or "texts" for a list of strings.
        compiled: whether `torch.compile` is applied.
        compiles: whether the first call of a shape compiles something, so that only the second call counts.
    """

    label: str
    make: Callable[[Size, int, str], nn.Module]
    check: Callable[[Size, str], None] | None = None
    before_case: Callable[[nn.Module], None] | None = None
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    takes: str = "input_ids"
    compiled: bool = False
    compiles: bool = False


def common_fields(size: Size) -> dict:
    """The fields that the configurations of all the models share."""
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.feed_forward,
    }


def without_dropout() -> dict:
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def ours_config(size: Size, positions: int, **fields: object) -> LSGAlbertConfig:
    sizes = {**common_fields(size), **without_dropout(), "embedding_size": size.embedding}
    blocks = {"block_size": size.block, "sparse_block_size": size.block}
    return LSGAlbertConfig(**{**sizes, **blocks, "max_position_embeddings": positions, **fields})


def ours(label: str, compiled: bool = False, **fields: object) -> Contestant:
    """Our model; `fields` replace fields of the default configuration."""

    def make(size: Size, positions: int, mode: str) -> nn.Module:
        classes = {"training": LSGAlbertForMaskedLM, "generate": LSGAlbertForConditionalGeneration}
        return classes.get(mode, LSGAlbertModel)(ours_config(size, positions, **fields))

    def check(size: Size, device: str) -> None:
        check_against_albert(size, device, **fields)

    compiles = compiled or fields.get("attn_implementation") == "flex_attention"
    return Contestant(f"LSG-ALBERT, {label}", make, check, compiled=compiled, compiles=compiles)


def unpacked() -> Contestant:
    """Our model, which here computes the padding of a batch too."""

    def make(size: Size, positions: int, mode: str) -> nn.Module:
        if not hasattr(LSGAlbertConfig(), PACKING_FIELD):
            raise NotImplementedError(f"the configuration has no `{PACKING_FIELD}`: padded batches cannot be packed")
        return ours("", **{PACKING_FIELD: False}).make(size, positions, mode)

    return Contestant("LSG-ALBERT, norm, sdpa, padded batches not packed", make)


@torch.no_grad()
def check_against_albert(size: Size, device: str, **fields: object) -> None:
    """Compare ours with transformers' ALBERT of the same weights, in float32.

    With the global token made from [CLS] and the first token hidden, two blocks of text are ALBERT's full attention.
    So are longer texts on the block-sparse path, if the sparse part holds every token outside the local window.

    Raises:
        WrongOutput: an output differs by more than `TOLERANCE`.
    """
    two_blocks, four_blocks = 2 * size.block, 4 * size.block
    lossless = {"mask_first_token": True, "num_global_tokens": 1}
    every_token = {**lossless, "sparsity_factor": 1, "sparse_block_size": four_blocks, "block_size": size.block}
    variants = [(two_blocks, lossless)]
    if fields.get("sparsity_type", "norm") != "none":
        variants.append((four_blocks, every_token))
    albert = make_albert(size, four_blocks, "forward", "eager").to(device).eval()
    input_ids = torch.randint(5, size.vocabulary, (2, four_blocks), generator=torch.Generator().manual_seed(1))
    input_ids = input_ids.to(device)
    for length, variant in variants:
        model = LSGAlbertModel(ours_config(size, four_blocks, **{**fields, **variant})).to(device).eval()
        # ALBERT lacks only the table of global tokens.
        missing = set(model.load_state_dict(albert.state_dict(), strict=False).missing_keys)
        if missing != {"embeddings.global_embeddings.weight"}:
            raise WrongOutput(f"the weights of ALBERT do not fit our model: {sorted(missing)} differ")
        for row, first in enumerate(input_ids[:, 0]):
            embeddings = model.embeddings
            embeddings.global_embeddings.weight[0] = (
                embeddings.word_embeddings.weight[first]
                + embeddings.position_embeddings.weight[0]
                + embeddings.token_type_embeddings.weight[0]
            )
            text = input_ids[row : row + 1, :length]
            check_equal(model(text).last_hidden_state, albert(text).last_hidden_state, f"{length} tokens")


def check_equal(actual: Tensor, expected: Tensor, what: str, other: str = "ALBERT's") -> None:
    """Raise `WrongOutput` unless both are equal up to `TOLERANCE`. The `other` output is the expected one."""
    if actual.shape != expected.shape:
        raise WrongOutput(f"{what}: the shape is {tuple(actual.shape)}, not {tuple(expected.shape)}")
    difference = (actual - expected).abs().max().item()
    if not difference <= TOLERANCE:  # this form also refuses NaN
        raise WrongOutput(f"{what}: the output differs from {other} by {difference:.1e}, more than {TOLERANCE:.0e}")


def make_albert(size: Size, positions: int, mode: str, attention: str) -> nn.Module:
    config = transformers.AlbertConfig(
        **common_fields(size), **without_dropout(), embedding_size=size.embedding, max_position_embeddings=positions,
        attn_implementation=attention,
    )  # fmt: skip
    return getattr(transformers, "AlbertModel" if mode != "training" else "AlbertForMaskedLM")(config)


def albert(label: str, attention: str, context: Callable = contextlib.nullcontext) -> Contestant:
    def make(size: Size, positions: int, mode: str) -> nn.Module:
        return make_albert(size, positions, mode, attention)

    return Contestant(f"transformers ALBERT, {label}", make, context=context)


def make_longformer(size: Size, positions: int, mode: str) -> nn.Module:
    window = size.longformer_window
    config = transformers.LongformerConfig(
        **common_fields(size), **without_dropout(), attention_window=window,
        # It pads to whole windows, and its positions begin after the padding token's position.
        max_position_embeddings=round_up(positions, window) + 2, pad_token_id=1,
    )  # fmt: skip
    return getattr(transformers, "LongformerModel" if mode != "training" else "LongformerForMaskedLM")(config)


def make_bigbird(size: Size, positions: int, mode: str) -> nn.Module:
    config = transformers.BigBirdConfig(
        **common_fields(size), **without_dropout(), attention_type="block_sparse", block_size=size.bigbird_block,
        max_position_embeddings=round_up(positions, size.bigbird_block), pad_token_id=0, bos_token_id=1,
        eos_token_id=2, sep_token_id=3,
    )  # fmt: skip
    return getattr(transformers, "BigBirdModel" if mode != "training" else "BigBirdForMaskedLM")(config)


def make_bigbird_sparse(model: nn.Module) -> None:
    """Switch BigBird back to sparse attention: a short input switches it to full attention permanently."""
    getattr(model, "bert", model).set_attention_type("block_sparse")


def make_modernbert(size: Size, positions: int, mode: str) -> nn.Module:
    config = transformers.ModernBertConfig(
        **{**common_fields(size), "intermediate_size": size.modernbert_feed_forward},
        local_attention=size.modernbert_window, max_position_embeddings=positions, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=3, sep_token_id=4, reference_compile=False, attn_implementation="sdpa",
    )  # fmt: skip
    return getattr(transformers, "ModernBertModel" if mode != "training" else "ModernBertForMaskedLM")(config)


def make_led(size: Size, positions: int, mode: str) -> nn.Module:
    """LED-base: half of the layers are the encoder's. Its window is twice Longformer's."""
    layers, heads, window = size.layers // 2, size.heads, 2 * size.longformer_window
    config = transformers.LEDConfig(
        vocab_size=size.vocabulary, d_model=size.hidden, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=size.feed_forward,
        decoder_ffn_dim=size.feed_forward, attention_window=window, dropout=0.0, attention_dropout=0.0,
        max_encoder_position_embeddings=round_up(positions, window), max_decoder_position_embeddings=positions,
    )  # fmt: skip
    return transformers.LEDForConditionalGeneration(config)


def make_two_berts(size: Size, positions: int, mode: str) -> nn.Module:
    fields = {**common_fields(size), **without_dropout(), "max_position_embeddings": positions}
    encoder = transformers.BertModel(transformers.BertConfig(**fields), add_pooling_layer=False)
    decoder = transformers.BertLMHeadModel(
        transformers.BertConfig(**fields, is_decoder=True, add_cross_attention=True)
    )
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 2, 3, 0
    return model


class Floor(nn.Module):
    """The matrix products of our projections and feed-forward parts, with their biases, and nothing else.

    They are chained: the result of each product is the input of the next, with nothing between them.
    """

    def __init__(self, size: Size):
        super().__init__()
        hidden = size.hidden
        self.embedding_hidden_mapping_in = nn.Linear(size.embedding, hidden)
        names = ("query", "key", "value", "dense")
        self.layer = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in names})
        self.layer["ffn"] = nn.Linear(hidden, size.feed_forward)
        self.layer["ffn_output"] = nn.Linear(size.feed_forward, hidden)
        self.num_layers = size.layers
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                # The states keep their size through all layers. Subnormal numbers would be slow.
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, embeddings: Tensor) -> SimpleNamespace:
        """(tokens, embedding) -> (tokens, hidden); the loss is there for the backward pass."""
        states = self.embedding_hidden_mapping_in(embeddings)
        for _ in range(self.num_layers):
            for linear in self.layer.values():
                states = linear(states)
        loss = states.square().mean() if self.training else None
        return SimpleNamespace(last_hidden_state=states, loss=loss)


def make_floor(size: Size, positions: int, mode: str) -> nn.Module:
    return Floor(size)


def flash_only() -> AbstractContextManager:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


OURS = {"ours": ours("norm, sdpa")}
SELECTIONS = {f"ours-{kind}": ours(f"{kind}, sdpa", sparsity_type=kind) for kind in OTHER_SELECTIONS}
FLEX = {"ours-flex": ours("norm, flex_attention", attn_implementation="flex_attention")}
PEERS = {
    "albert-sdpa": albert("sdpa", "sdpa"),
    "albert-eager": albert("eager", "eager"),
    "longformer": Contestant("transformers Longformer, window 512, no global token", make_longformer),
    "bigbird": Contestant("transformers BigBird, block_sparse", make_bigbird, before_case=make_bigbird_sparse),
    "modernbert": Contestant("transformers ModernBERT, sdpa, 12 layers", make_modernbert),
}
WRITERS = {  # for the mode "generate" alone
    "led": Contestant("transformers LED-base, half of the layers decode, no global token", make_led),
    "two-berts": Contestant(
        "transformers EncoderDecoderModel of two BERTs, sdpa, positions stretched", make_two_berts
    ),
}
FLOOR = {"floor": Contestant("only the matrix products of ours", make_floor, takes="embeddings")}
OTHERS = {
    "ours-unpacked": unpacked(),
    "ours-compiled": ours("norm, sdpa, torch.compile", compiled=True),
    "ours-flex-compiled": ours(
        "norm, flex_attention, torch.compile", compiled=True, attn_implementation="flex_attention"
    ),
    "albert-flash": albert("sdpa, flash kernel forced", "sdpa", flash_only),
}
GROUPS = {"selections": SELECTIONS, "flex": FLEX, "peers": PEERS, "writers": WRITERS}
CONTESTANTS = {**OURS, **SELECTIONS, **FLEX, **PEERS, **WRITERS, **FLOOR, **OTHERS}


def find_contestant(name: str) -> Contestant:
    """The contestant with a name in `CONTESTANTS`, or your own: "module:attribute"."""
    if name in CONTESTANTS:
        return CONTESTANTS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(
            f"there is no contestant {name!r}: choose from {', '.join([*CONTESTANTS, *GROUPS])} and module:attribute"
        )
    return getattr(importlib.import_module(module), attribute)


def contestant_names(text: str) -> list[str]:
    """The names in a comma-separated list, with groups in place of their members' names."""
    names = [member for name in text.split(",") for member in GROUPS.get(name, [name])]
    for name in names:
        find_contestant(name)
    return list(dict.fromkeys(names))
