"""Checks of a conversion: each tensor of the source is accounted for, and the result computes what the source does."""

import copy
import difflib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AlbertConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import modeling_lsg_albert
from .checkpoint_files import ConversionError, SourceWeights, one_line
from .configuration_lsg_albert import AUTO_MAP, LSGAlbertConfig

# Not the sequence-to-sequence model, which transformers has nothing of to compare with; it loads from any of these.
ARCHITECTURES = tuple(
    path.split(".")[1] for auto, path in AUTO_MAP.items() if auto not in ("AutoConfig", "AutoModelForSeq2SeqLM")
)
BASE_PARTS = ("embeddings", "encoder", "pooler")
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # counted up by the model itself
# Second names of one parameter, which files may hold or not.
DECODER = "predictions.decoder.weight"
TWINS = {DECODER: "albert.embeddings.word_embeddings.weight", "predictions.decoder.bias": "predictions.bias"}
LOSSLESS = 1e-4  # largest difference of logits in the lossless setting, where only rounding may tell the models apart
SHORT_TEXT = (
    "The river flows from the mountains into the {mask}. Ships go up and down on it, and towns lie on both sides."
)


def lsg_architecture(name: str) -> str:
    """The LSG class for an architecture `AlbertForX` or `LSGAlbertForX`.

    Raises:
        ConversionError: there is none.
    """
    wanted = name if name.startswith("LSG") else "LSG" + name
    if wanted not in ARCHITECTURES:
        known = [known.removeprefix("LSG") for known in ARCHITECTURES]
        nearest = difflib.get_close_matches(name.removeprefix("LSG"), known, n=1, cutoff=0.0)[0]
        raise ConversionError(
            f"There is no LSG class for the architecture {name!r}: did you mean {nearest!r}? Known are "
            f"{', '.join(known)}."
        )
    return wanted


def model_class(architecture: str) -> type[PreTrainedModel]:
    """The class of that name, ours for names with LSG, else transformers' own."""
    return getattr(modeling_lsg_albert if architecture.startswith("LSG") else transformers, architecture)


def shapes_of(architecture: str, config: LSGAlbertConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of a class."""
    with torch.device("meta"):
        model = model_class(architecture)(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@dataclass
class Account:
    """What becomes of each tensor of the source, and where each of the target comes from."""

    copied: dict[str, str] = field(default_factory=dict)  # name in the target: name in the source
    dropped: dict[str, str] = field(default_factory=dict)  # name in the source: reason
    missing: list[str] = field(default_factory=list)  # names in the target that the source has nothing for


def account_for(
    source: Mapping[str, tuple[int, ...]], architecture: str, config: LSGAlbertConfig, strict: bool
) -> Account:
    """Compare the tensors of a source, by name and shape, with the parameters of an LSG class.

    Args:
        source: shapes of the source's tensors.
        architecture: the LSG class.
        config: a configuration with the source's sizes.
        strict: whether the source says itself that it is of this class. Then its head must be whole, and heads of
            other classes are kept too; otherwise they are dropped, and a missing head is drawn.

    Raises:
        ConversionError: the source's encoder is not whole, has other shapes, or tensors that ALBERT does not have.
    """
    expected = shapes_of(architecture, config)
    known = {name: shape for other in ARCHITECTURES for name, shape in shapes_of(other, config).items()} | expected
    source_prefix = "albert." if any(name.startswith("albert.") for name in source) else ""
    account = Account()
    for name, shape in source.items():
        base_name = name.removeprefix(source_prefix)
        is_base = name.startswith(source_prefix) and base_name.split(".")[0] in BASE_PARTS
        new_name = base_prefix(architecture) + base_name if is_base else name
        if is_base and base_name in BUFFERS:
            account.dropped[name] = "a buffer that the model makes itself"
        elif new_name in expected or base_name.startswith("pooler."):
            wanted = expected.get(new_name, known["albert." + base_name if is_base else name])
            if shape != wanted and not strict and not is_base:
                account.dropped[name] = f"the shape {shape} where {architecture} has {wanted}"
                continue
            if shape != wanted:
                raise ConversionError(
                    f"The source's tensor {name} has the shape {shape}, but its config asks for {wanted}."
                )
            account.copied[new_name] = name
        elif not strict:
            account.dropped[name] = f"{architecture} has no such parameter"
        elif new_name in known:
            account.copied[new_name] = name
        else:
            raise ConversionError(
                f"The source has the tensor {name}, which no ALBERT has. Name the class to make with `--architecture` "
                "to leave such tensors out."
            )
    check_missing(account, expected, config.tie_word_embeddings, strict)
    return account


def base_prefix(architecture: str) -> str:
    """What stands before the names of the base model in a class."""
    return "" if architecture == "LSGAlbertModel" else "albert."


def check_missing(account: Account, expected: Mapping[str, tuple[int, ...]], tied: bool, strict: bool) -> None:
    """Note the parameters that the source lacks; `ConversionError` where it is then damaged."""
    for twin, name in TWINS.items():
        is_shared = tied or twin != DECODER
        if is_shared and twin in account.copied and name not in account.copied and name in expected:
            account.copied[name] = account.copied.pop(twin)
    made = ("embeddings.global_embeddings.weight", *(twin for twin in TWINS if tied or twin != DECODER))
    account.missing = [name for name in expected if name not in account.copied and not name.endswith(made)]
    parts: dict[str, list[str]] = {}
    for name in account.missing:
        parts.setdefault(name.removeprefix("albert.").split(".")[0], []).append(name)
    for part, names in parts.items():
        whole_part_missing = not any(name.removeprefix("albert.").split(".")[0] == part for name in account.copied)
        if part == "pooler" and whole_part_missing:
            continue  # a model with a token-wise head has none
        if strict or part in BASE_PARTS or not whole_part_missing:
            head = "" if part in BASE_PARTS else " Name another class to make with `--architecture`, if that is right."
            raise ConversionError(
                f"The source lacks {names[0]}{f' and {len(names) - 1} more tensors' if len(names) > 1 else ''}.{head}"
            )


def read_checked(weights: SourceWeights, name: str) -> Tensor:
    """A tensor of the source.

    Raises:
        ConversionError: it holds no floating-point numbers, or some that are not finite.
    """
    tensor = weights[name]
    if not tensor.is_floating_point():
        raise ConversionError(f"{weights.files[name]} is damaged: {name} is of the type {tensor.dtype}.")
    if not torch.stack(tensor.aminmax()).isfinite().all():  # which makes no copy of the tensor, as others do
        count = int((~tensor.isfinite()).sum())
        raise ConversionError(
            f"{weights.files[name]} is damaged: {name} has {count} of {tensor.numel()} values that are NaN or "
            "infinite."
        )
    return tensor


class SourceTensors(Mapping[str, Tensor]):
    """The source's tensors by their names in the target, each mapped when asked for, and those drawn beside them."""

    def __init__(self, weights: SourceWeights, names: Mapping[str, str], drawn: Mapping[str, Tensor]):
        self.weights, self.names, self.drawn = weights, names, drawn

    def __getitem__(self, name: str) -> Tensor:
        return self.drawn[name] if name in self.drawn else self.weights[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.drawn or name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter((*self.names, *self.drawn))

    def __len__(self) -> int:
        return len(self.names) + len(self.drawn)


def draw_missing(account: Account, architecture: str, config: LSGAlbertConfig, seed: int) -> dict[str, Tensor]:
    """Fresh weights for the parameters that the source lacks, as for a new model."""
    if not account.missing:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(architecture)(copy.deepcopy(config))
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name in account.missing}


def build(architecture: str, config: PretrainedConfig, tensor: Callable[[str], Tensor]) -> PreTrainedModel:
    """A model in float32 whose parameters are `tensor(name)`, without a copy where that is in float32 already."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = model_class(architecture)(config)
    weights = {name: tensor(name).to(torch.float32) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def find_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor under its name or, if it has a second one that is not there, under its first."""
    return tensors[name if name in tensors else TWINS[name]]


def run(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """The outputs, by name, for ids (1, length).

    Raises:
        ConversionError: the model cannot be run.
    """
    if type(model).__name__.endswith("MultipleChoice"):
        input_ids = input_ids[None]
    inputs = {  # all of them, as the buffers that would stand in may be without content
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "token_type_ids": torch.zeros_like(input_ids),
        "position_ids": torch.arange(input_ids.shape[-1]).expand_as(input_ids),
    }
    try:
        with torch.inference_mode():
            outputs = model(**inputs, return_dict=True)
    except (RuntimeError, IndexError, MemoryError) as error:  # too little memory, or a size that a release cannot run
        raise ConversionError(
            f"{type(model).__name__} cannot be run on {input_ids.shape[-1]} tokens: {one_line(error)}. `--no-verify` "
            "leaves the comparison out."
        ) from error
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def largest_difference(outputs: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Between two models' outputs of the same names."""
    return max(float((outputs[name] - reference[name]).abs().max()) for name in reference)


def albert_config(source: dict[str, Any]) -> AlbertConfig:
    """The configuration of transformers' own ALBERT from a source's, which may be of an LSG-ALBERT."""
    config = AlbertConfig.from_dict({name: value for name, value in source.items() if name != "auto_map"})
    config._attn_implementation = "eager"
    return config


def lossless_config(config: LSGAlbertConfig, length: int) -> LSGAlbertConfig:
    """A configuration with which texts of that length are read as by ALBERT: one global token in [CLS]'s place."""
    config = copy.deepcopy(config)
    config.num_global_tokens, config.mask_first_token, config.pool_with_global = 1, True, True
    config.block_size, config.sparsity_type = max(config.block_size, length), "none"
    return config


def peak_memory_mb() -> float | None:
    """The most memory that this process has had at any time; None where the system does not say."""
    status = Path("/proc/self/status")  # Linux; the portable number counts what the parent process had, too
    if status.is_file():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        return round(int(found[1]) * 1024 / 1e6, 1) if found else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


@dataclass
class Comparison:
    """What the result computes, beside what the source does."""

    text: str | None  # None: random ids, as the source has no tokenizer
    tokens: int
    lossless_difference: float
    lossless_global_token: str  # "stored", or "computed" where the stored one is meant to differ from [CLS]
    chosen_difference: float
    source_top5: list[tuple[str, float]] | None
    target_top5: list[tuple[str, float]] | None
    full_length: int
    full_length_seconds: float
    peak_memory_mb: float | None  # of the whole process, up to the end of the forward of full length


class Verification:
    """Compares a result in files with its source. All models compute in float32; one is in memory at a time.

    Args:
        source: the source's tensors by their names in the target, with those drawn for it.
        source_config: the source's config.json.
        target: the directory with the result.
        architecture: its class.
        dtype: the type to which the source's tensors were rounded.
        bos_token_id, mask_token_id: as used for the global tokens.
        tokenizer: the source's, None if it has none.
        is_lsg: whether the source is an LSG-ALBERT already.
        global_is_cls: whether the first global token was made from [CLS] with its token type.
    """

    def __init__(
        self,
        source: Mapping[str, Tensor],
        source_config: dict[str, Any],
        target: Path,
        architecture: str,
        dtype: torch.dtype,
        bos_token_id: int,
        mask_token_id: int | None,
        tokenizer: PreTrainedTokenizerBase | None,
        is_lsg: bool,
        global_is_cls: bool,
    ):
        self.source, self.source_config, self.architecture, self.dtype = source, source_config, architecture, dtype
        self.bos_token_id, self.mask_token_id, self.tokenizer = bos_token_id, mask_token_id, tokenizer
        self.is_lsg, self.global_is_cls = is_lsg, global_is_cls
        self.config = LSGAlbertConfig.from_pretrained(target)
        self.target = SourceWeights(target)
        prefix = base_prefix(architecture)
        self.tables = [f"{prefix}embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type")]
        self.global_table = f"{prefix}embeddings.global_embeddings.weight"

    def compare(self) -> Comparison:
        """Run source and result on a short text, the result in two settings, and on one of full length.

        Raises:
            ConversionError: the result is not lossless where it must be, or gives numbers that are not finite.
        """
        text, input_ids = self.short_input()
        with tqdm(total=5, desc="comparing", unit="run", disable=None) as progress:
            albert = self.architecture.removeprefix("LSG")
            rounded = run(
                build(albert, albert_config(self.source_config), lambda name: self.source_tensor(name).to(self.dtype)),
                input_ids,
            )
            progress.update()
            as_it_was = self.run_source(input_ids) if self.is_lsg or self.is_rounded() else rounded
            progress.update()
            chosen = build(self.architecture, self.config, lambda name: find_tensor(self.target, name))
            difference, global_token = self.lossless_difference(chosen, input_ids, rounded)
            progress.update()
            outputs = run(chosen, input_ids)
            progress.update()
            seconds = self.time_full_length(chosen, input_ids)
            progress.update()
        return Comparison(
            text=text,
            tokens=input_ids.shape[1],
            lossless_difference=difference,
            lossless_global_token=global_token,
            chosen_difference=largest_difference(outputs, as_it_was),
            source_top5=self.top5(as_it_was, input_ids),
            target_top5=self.top5(outputs, input_ids),
            full_length=self.config.max_position_embeddings,
            full_length_seconds=round(seconds, 3),
            peak_memory_mb=peak_memory_mb(),
        )

    def short_input(self) -> tuple[str | None, Tensor]:
        """A text with a masked word, if there is a tokenizer, and its ids (1, length), the first of them [CLS].

        Raises:
            ConversionError: the tokenizer gives ids that the model has not.
        """
        if self.tokenizer is not None:
            text = SHORT_TEXT.format(mask=self.tokenizer.mask_token or "sea")
            ids = self.tokenizer(text)["input_ids"]
            if max(ids) >= self.config.vocab_size:
                raise ConversionError(
                    f"The tokenizer is not the model's: it gives the id {max(ids)}, where `vocab_size` is "
                    f"{self.config.vocab_size}."
                )
        else:
            generator = torch.Generator().manual_seed(0)
            text, ids = None, torch.randint(self.config.vocab_size, (30,), generator=generator).tolist()
            if self.mask_token_id is not None:
                ids[10] = self.mask_token_id
        length = min(len(ids), self.source_config_positions(), self.config.max_position_embeddings)
        return text, torch.tensor([[self.bos_token_id, *ids[1:length]]])

    def source_config_positions(self) -> int:
        """The longest text that the source reads."""
        return len(self.source[self.tables[1]])

    def source_tensor(self, name: str) -> Tensor:
        """A tensor of the source under its name in the target, of which it may be the second one."""
        return find_tensor(self.source, name)

    def is_rounded(self) -> bool:
        """Whether the result's tensors are of another type than the source's."""
        return self.source[self.tables[0]].dtype != self.dtype

    def run_source(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The outputs of the source as it is: with its own attention and its own rounding."""
        if self.is_lsg:
            own = {name: value for name, value in self.source_config.items() if name != "auto_map"}
            architecture, config = self.architecture, LSGAlbertConfig.from_dict(own)
        else:
            architecture, config = self.architecture.removeprefix("LSG"), albert_config(self.source_config)
        return run(build(architecture, config, self.source_tensor), input_ids)

    def lossless_difference(
        self, chosen: PreTrainedModel, input_ids: Tensor, reference: dict[str, Tensor]
    ) -> tuple[float, str]:
        """The largest difference to the source where only float32's rounding may make one.

        Raises:
            ConversionError: it is above `LOSSLESS`, or the first global token is not [CLS] where it was made so.
        """
        weights = chosen.state_dict()
        words, positions, types = (self.source[name] for name in self.tables)
        parts = [row.float() for row in (words[self.bos_token_id], positions[0], types[0])]
        cls, stored = sum(parts), weights[self.global_table][0]
        if self.global_is_cls:
            allowed = max(torch.finfo(x).eps for x in (self.dtype, torch.float32)) * sum(part.abs() for part in parts)
            if not bool(((stored - cls).abs() <= allowed).all()):
                raise ConversionError("The first global token is not the embedding of [CLS]: nothing is written.")
        # In half precision the row is rounded once more than the sum that the source makes in float32.
        computed = not self.global_is_cls or self.dtype.itemsize < 4
        if computed:
            table = weights[self.global_table].clone()
            rounded = (row.to(self.dtype).float() for row in (words[self.bos_token_id], positions[0], types[0]))
            table[0] = sum(rounded)
            weights = {**weights, self.global_table: table}
        model = build(self.architecture, lossless_config(self.config, input_ids.shape[1]), weights.__getitem__)
        difference = largest_difference(run(model, input_ids), reference)
        if not difference < LOSSLESS:  # also where it is NaN
            raise ConversionError(
                f"The conversion is not lossless: with `mask_first_token=True` an output differs by {difference:.2e} "
                f"from the source's, where less than {LOSSLESS:.0e} is right. Nothing is written."
            )
        return difference, "computed" if computed else "stored"

    def time_full_length(self, model: PreTrainedModel, input_ids: Tensor) -> float:
        """Seconds that the encoder takes for a text of full length.

        Raises:
            ConversionError: its states are not finite.
        """
        length = self.config.max_position_embeddings
        ids = input_ids.repeat(1, length // input_ids.shape[1] + 1)[:, :length]
        start = time.perf_counter()
        outputs = run(getattr(model, "albert", model), ids)
        seconds = time.perf_counter() - start
        if not bool(outputs["last_hidden_state"].isfinite().all()):
            raise ConversionError(
                f"The result gives numbers that are not finite on {length} tokens. Nothing is written."
            )
        return seconds

    def top5(self, outputs: dict[str, Tensor], input_ids: Tensor) -> list[tuple[str, float]] | None:
        """The five likeliest tokens in the mask's place with their probabilities; None without mask or such a head."""
        places = (input_ids[0] == (-1 if self.mask_token_id is None else self.mask_token_id)).nonzero().flatten()
        has_head = self.architecture in ("LSGAlbertForMaskedLM", "LSGAlbertForPreTraining")
        if not has_head or len(places) == 0:
            return None
        logits = outputs["prediction_logits"] if "prediction_logits" in outputs else outputs["logits"]
        values, ids = logits[0, places[0]].softmax(-1).topk(min(5, logits.shape[-1]))
        tokens = [str(i) for i in ids.tolist()]
        if self.tokenizer is not None:
            tokens = [str(token) for token in self.tokenizer.convert_ids_to_tokens(ids.tolist())]
        return list(zip(tokens, [round(value, 4) for value in values.tolist()], strict=True))
