"""Verification of a conversion: the target, read from its files, must give the same outputs as the source."""

import contextlib
import copy
import re
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AlbertConfig, PretrainedConfig, PreTrainedModel

from ..configuration_lsg_albert import LSGAlbertConfig
from .account import OVERRULED, TWINS, base_prefix, model_class
from .files import ConversionError, SourceWeights, one_line
from .plan import NOT_KEPT, Plan, Tokens
from .tensors import GLOBAL_TABLE, POSITION_TABLE, TOKEN_TYPE_TABLE, WORD_TABLE

Reader = Callable[[str], Tensor]  # gives a tensor by its name in the target
Inputs = dict[str, Tensor]  # by their names
Outputs = dict[str, Tensor]

LOSSLESS = 1e-4  # largest difference of outputs in the lossless setting, where only rounding differs
SHORT_TEXT = (
    "The river flows from the mountains into the {mask}. Ships go up and down on it, and towns lie on both sides."
)


@dataclass
class Comparison:
    """The outputs of the target compared with those of the source."""

    text: str | None  # None: random ids, because the source has no tokenizer
    tokens: int
    lossless_difference: float
    lossless_global_token: str  # "stored", or "computed" if the stored one should differ from [CLS]
    chosen_difference: float
    chosen_cosine: float  # of a token's last hidden states in both models, mean over all tokens
    source_top5: list[tuple[str, float]] | None
    target_top5: list[tuple[str, float]] | None
    full_length: int
    full_length_seconds: float
    peak_memory_mb: float | None  # of the whole process, until the forward pass of full length has ended


def compare(plan: Plan, tokens: Tokens, made: Mapping[str, Tensor], folder: Path) -> Comparison:
    """Run source and target on a short text and a part of it, the target in two settings and on full length.

    All models compute in float32; one is in memory at a time.

    Args:
        plan, tokens: of the conversion.
        made: the tensors that the source or its family lacks, as they were made for the target.
        folder: the target.

    Raises:
        ConversionError: the target is not lossless in the lossless setting, or gives numbers that are not finite.
    """
    source, target = source_reader(plan, made), SourceWeights(folder)
    config = LSGAlbertConfig.from_pretrained(folder)
    text, inputs = short_inputs(plan, tokens)
    with tqdm(total=5, desc="comparing", unit="run", disable=None) as progress:
        rounded = run_source(plan, source, inputs, plan.dtype)
        progress.update()
        as_it_was = rounded
        if plan.is_lsg:
            as_it_was = run(build(plan.architecture, plan.sizes, source), inputs)
        elif plan.dtype != plan.source_dtype:
            as_it_was = run_source(plan, source, inputs)
        progress.update()
        chosen = build(plan.architecture, config, lambda name: target[first_name(name, target.shapes)])
        difference, global_token = lossless_difference(plan, tokens, source, chosen, inputs, rounded)
        progress.update()
        outputs = run(chosen, inputs)
        progress.update()
        input_ids = inputs["input_ids"][:1]
        seconds = time_full_length(chosen, input_ids)
        progress.update()
    return Comparison(
        text=text,
        tokens=input_ids.shape[1],
        lossless_difference=difference,
        lossless_global_token=global_token,
        chosen_difference=largest_difference(outputs, as_it_was),
        chosen_cosine=mean_cosine(outputs, as_it_was, inputs["attention_mask"]),
        source_top5=top5(plan, tokens, as_it_was, input_ids),
        target_top5=top5(plan, tokens, outputs, input_ids),
        full_length=plan.config.max_position_embeddings,
        full_length_seconds=round(seconds, 3),
        peak_memory_mb=peak_memory_mb(),
    )


def source_reader(plan: Plan, made: Mapping[str, Tensor]) -> Reader:
    """A function that reads the source's tensors and those in `made` by their names in the target."""
    copied = plan.account.copied

    def read(name: str) -> Tensor:
        name = first_name(name, copied.keys() | made.keys())
        return made[name] if name in made else plan.source.weights[copied[name]]

    return read


def first_name(name: str, known: Container[str]) -> str:
    """The name itself if it is known, or else the first name of the tensor that has it as its second name."""
    return name if name in known else TWINS[name]


def build(architecture: str, config: PretrainedConfig, read: Reader) -> PreTrainedModel:
    """A model in float32 whose parameters are `read(name)`, without a copy if those are in float32 already."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = model_class(architecture)(config)
    weights = {name: read(name).to(torch.float32) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def build_albert(plan: Plan, read: Reader) -> PreTrainedModel:
    """The source as transformers' own ALBERT. Tensors that only an LSG-ALBERT has are left out."""
    # Only one of the fractions matters in evaluation. transformers 5 refuses None and integers for all of them.
    fractions = {name for name, value in AlbertConfig().to_dict().items() if isinstance(value, float)}
    fields = {name: value for name, value in plan.source.fields.items() if name not in fractions}
    config = AlbertConfig.from_dict({**fields, "layer_norm_eps": float(plan.sizes.layer_norm_eps)})
    config._attn_implementation = "eager"
    return build(plan.architecture.removeprefix("LSG"), config, read)


def load_source(plan: Plan) -> PreTrainedModel:
    """The source, loaded by its own class from its own files: a model in float32, without its head if that is new.

    No code of the conversion is used, so that a wrong name or rule is found.

    Raises:
        ConversionError: transformers cannot load it.
    """
    source, head = plan.source, plan.architecture.removeprefix("LSGAlbert")
    cls = getattr(transformers, source.family.class_name + ("Model" if plan.account.missing else head))
    fields = {name: value for name, value in source.config.items() if name not in NOT_KEPT}
    try:
        config = cls.config_class.from_dict(fields)
        config._attn_implementation = "eager"
        with quiet():
            model = load_files(cls, config, plan)
    except Exception as error:  # each release raises its own errors
        raise ConversionError(
            f"transformers cannot load {source.folder} as {cls.__name__} for the comparison: {one_line(error)}. "
            "`--no-verify` skips the comparison."
        ) from error
    return model.float().eval()


def load_files(cls: type[PreTrainedModel], config: PretrainedConfig, plan: Plan) -> PreTrainedModel:
    """A model that its class reads from the source's files. Faults of releases before 5 are corrected."""
    source, prefix, weights = plan.source, cls.base_model_prefix + ".", plan.source.weights
    bare = getattr(transformers, source.family.class_name + "Model")
    names = {name: name for name in weights.shapes}
    if cls is not bare and not any(name.startswith(prefix) for name in names):
        # For a head on a base without prefix, those releases report a damaged file.
        with torch.device("meta"):
            parts = {name for name, _ in bare(copy.deepcopy(config)).named_children()}
        names = {prefix * (name.split(".")[0] in parts) + name: name for name in names}
        state_dict = {name: weights.whole(file_name) for name, file_name in names.items()}
        model = cls.from_pretrained(None, config=config, state_dict=state_dict)
    else:
        model = cls.from_pretrained(source.folder, config=config)
    # Release 4.44 loses the bias of RoBERTa's decoder if the file has only one of its two names. If both names have
    # different values, releases before 5 differ in which they use.
    state_dict = model.state_dict()
    for name in [name for name in names.keys() & state_dict.keys() if name.endswith("bias")]:
        if plan.account.dropped.get(names[name]) != OVERRULED:
            state_dict[name].copy_(weights.whole(names[name]))
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn off the library's progress bars, and its warnings about missing and unexpected tensors."""
    logging = transformers.logging
    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def run_source(plan: Plan, read: Reader, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Outputs:
    """The source's outputs in float32, from weights rounded to `dtype`.

    An ALBERT, and the ALBERT inside an LSG model, is built from its tensors, because they have the same names in the
    target. All other sources are loaded from their own files.
    """
    if plan.is_lsg or plan.source.family.shares_layers:
        return run(build_albert(plan, lambda name: read(name).to(dtype)), inputs)
    model = load_source(plan).to(dtype).float()
    # The class numbers positions in its own way, and not every class knows token types.
    outputs = run(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    if plan.account.missing:
        return {"last_hidden_state": outputs["last_hidden_state"]}
    renamed = {"seq_relationship_logits": "sop_logits"}
    return {renamed.get(name, name): output for name, output in outputs.items()}


def short_inputs(plan: Plan, tokens: Tokens) -> tuple[str | None, Inputs]:
    """A text with a masked word (with a tokenizer), and inputs (2, length): the text, and half of it with padding.

    Raises:
        ConversionError: the tokenizer gives ids that the model does not have.
    """
    vocab_size, pad = plan.config.vocab_size, plan.config.pad_token_id or 0
    if tokens.tokenizer is not None:
        text = SHORT_TEXT.format(mask=tokens.tokenizer.mask_token or "sea")
        ids = tokens.tokenizer(text)["input_ids"]
        if max(ids) >= vocab_size:
            raise ConversionError(
                f"The tokenizer is not the model's: it gives the id {max(ids)}, but `vocab_size` is {vocab_size}."
            )
    else:
        text, ids = None, torch.randint(vocab_size, (30,), generator=torch.Generator().manual_seed(0)).tolist()
        ids = [(pad + 1) % vocab_size if token_id == pad else token_id for token_id in ids]
        if tokens.mask is not None:
            ids[10] = tokens.mask
    length = min(len(ids), plan.sizes.max_position_embeddings, plan.config.max_position_embeddings)
    ids = [tokens.bos, *ids[1:length]]
    half = (length + 1) // 2
    input_ids = torch.tensor([ids, ids[:half] + [pad] * (length - half)])
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, half:] = 0
    return text, all_inputs(input_ids, attention_mask)


def all_inputs(input_ids: Tensor, attention_mask: Tensor | None = None) -> Inputs:
    """All inputs for ids (batch, length). None is left to a default, because the model's buffers may be empty."""
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        "token_type_ids": torch.zeros_like(input_ids),
        "position_ids": torch.arange(input_ids.shape[-1]).expand_as(input_ids),
    }


def run(model: PreTrainedModel, inputs: Inputs, with_states: bool = True) -> Outputs:
    """The outputs for inputs (batch, length), with zeros at padding; `ConversionError` if the model cannot be run.

    With `with_states`, the last hidden states are among them.
    """
    name = type(model).__name__
    mask = inputs["attention_mask"]
    if name.endswith("MultipleChoice"):
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    try:
        with torch.inference_mode():
            outputs = model(**inputs, output_hidden_states=with_states, return_dict=True)
    except (RuntimeError, IndexError, MemoryError) as error:  # too little memory, or a size that a release cannot run
        raise ConversionError(
            f"{name} cannot be run on {mask.shape[-1]} tokens: {one_line(error)}. `--no-verify` skips the comparison."
        ) from error
    found = {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
    if with_states:
        found["last_hidden_state"] = outputs["hidden_states"][-1]
    text_outputs = {"pooler_output", "sop_logits", "seq_relationship_logits", "global_hidden_states"}
    if name.endswith(("SequenceClassification", "MultipleChoice")):
        text_outputs.add("logits")
    for key in found.keys() - text_outputs:
        padding = (mask == 0).view(*mask.shape, *[1] * (found[key].dim() - 2))
        found[key] = found[key].masked_fill(padding, 0)
    return found


def largest_difference(outputs: Outputs, reference: Outputs) -> float:
    """The largest difference between two models' outputs of the same names."""
    return max(float((outputs[name] - reference[name]).abs().max()) for name in reference)


def mean_cosine(outputs: Outputs, reference: Outputs, attention_mask: Tensor) -> float:
    """Cosine similarity of two models' last hidden states (batch, length, hidden), mean over the real tokens."""
    states, others = outputs["last_hidden_state"], reference["last_hidden_state"]
    return float(torch.cosine_similarity(states, others, dim=-1)[attention_mask.bool()].mean())


def lossless_difference(
    plan: Plan, tokens: Tokens, source: Reader, chosen: PreTrainedModel, inputs: Inputs, reference: Outputs
) -> tuple[float, str]:
    """The largest difference from the source in the lossless setting, where only rounding in float32 may differ.

    Args:
        plan, tokens, source: of the conversion.
        chosen: the target.
        inputs, reference: the inputs of the models, and the source's outputs for them.

    Returns:
        The difference, and "stored" or "computed" for the first global token that was used.

    Raises:
        ConversionError: it is not below `LOSSLESS`, or the first global token should be [CLS] but is not.
    """
    prefix, weights = base_prefix(plan.architecture), chosen.state_dict()
    first_rows = {WORD_TABLE: tokens.bos, POSITION_TABLE: 0, TOKEN_TYPE_TABLE: 0}
    cls_parts = [source(prefix + table)[row].float() for table, row in first_rows.items()]
    table = weights[prefix + GLOBAL_TABLE]
    is_cls = plan.options.use_token_type and not plan.is_lsg
    if is_cls:
        rounding = max(torch.finfo(dtype).eps for dtype in (plan.dtype, torch.float32))
        allowed = rounding * sum(part.abs() for part in cls_parts)
        if not bool(((table[0] - sum(cls_parts)).abs() <= allowed).all()):
            raise ConversionError("The first global token is not the embedding of [CLS]. Nothing was written.")
    # In half precision, the stored row is rounded once more than the sum that the source computes in float32.
    is_stored = is_cls and plan.dtype.itemsize >= 4
    if not is_stored:
        table = table.clone()
        table[0] = sum(part.to(plan.dtype).float() for part in cls_parts)
        weights = {**weights, prefix + GLOBAL_TABLE: table}
    config = lossless_config(chosen.config, inputs["input_ids"].shape[1])
    model = build(plan.architecture, config, weights.__getitem__)
    difference = largest_difference(run(model, inputs), reference)
    if not difference < LOSSLESS:  # also true for NaN
        raise ConversionError(
            f"The conversion is not lossless: with `mask_first_token=True` an output differs by {difference:.2e} "
            f"from the source's, but must differ by less than {LOSSLESS:.0e}. Nothing was written."
        )
    return difference, "stored" if is_stored else "computed"


def lossless_config(config: LSGAlbertConfig, length: int) -> LSGAlbertConfig:
    """A configuration that reads texts of that length as ALBERT does: one global token takes [CLS]'s place."""
    config = copy.deepcopy(config)
    config.num_global_tokens, config.mask_first_token, config.pool_with_global = 1, True, True
    config.block_size, config.sparsity_type = max(config.block_size, length), "none"
    return config


def time_full_length(model: PreTrainedModel, input_ids: Tensor) -> float:
    """The encoder's seconds for `input_ids` (1, length) repeated to full length. The states must be finite."""
    length = model.config.max_position_embeddings
    ids = input_ids.repeat(1, length // input_ids.shape[1] + 1)[:, :length]
    start = time.perf_counter()
    outputs = run(getattr(model, "albert", model), all_inputs(ids), with_states=False)
    seconds = time.perf_counter() - start
    if not bool(outputs["last_hidden_state"].isfinite().all()):
        raise ConversionError(f"The result gives numbers that are not finite on {length} tokens. Nothing was written.")
    return seconds


def top5(plan: Plan, tokens: Tokens, outputs: Outputs, input_ids: Tensor) -> list[tuple[str, float]] | None:
    """The five likeliest tokens for the mask with their probabilities; None without a mask or a head for it."""
    places = (input_ids[0] == (-1 if tokens.mask is None else tokens.mask)).nonzero().flatten()
    has_head = plan.architecture in ("LSGAlbertForMaskedLM", "LSGAlbertForPreTraining")
    logits = outputs.get("prediction_logits", outputs.get("logits"))
    if not has_head or logits is None or len(places) == 0:
        return None
    values, ids = logits[0, places[0]].softmax(-1).topk(min(5, logits.shape[-1]))
    names = ids.tolist() if tokens.tokenizer is None else tokens.tokenizer.convert_ids_to_tokens(ids.tolist())
    return list(zip(map(str, names), [round(value, 4) for value in values.tolist()], strict=True))


def peak_memory_mb() -> float | None:
    """The peak memory of this process so far; None if the system does not tell."""
    status = Path("/proc/self/status")  # Linux; the portable number also counts the parent process's memory
    if status.is_file():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        return round(int(found[1]) * 1024 / 1e6, 1) if found else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
