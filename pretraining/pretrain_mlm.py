"""Train a masked language model, from scratch (a plain ALBERT) or from any checkpoint (LSG-ALBERT included).

    python -m pretraining.pretrain_mlm corpus.jsonl.gz --exclude_ids heldout.txt --tokenizer . --output_dir runs/a \\
        --neighbour_heads --word_vectors --init_range 0.03
    python -m pretraining.pretrain_mlm corpus.jsonl.gz --exclude_ids heldout.txt --model runs/a/final --output_dir runs/b

The held-out documents are the evaluation set. If a killed run is started again with the same arguments, it continues
from its last checkpoint, with the same data in the same order. The result is in ``OUTPUT_DIR/final``. On a busy
machine, ``OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m pretraining.pretrain_mlm ...`` is faster than two threads,
which wait for each other after every operation. Several processes train like one process with their combined batches.
This needs transformers 4.48 or newer.
"""

import argparse
import datetime
import functools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.utils.versions import require_version

from pretraining.corpus import CorpusError, is_drawn, read_ids
from pretraining.initial_weights import POSITION_DIMS, extend_positions, look_at_neighbours, unshare_layers
from pretraining.masking import IGNORED, Masker
from pretraining.token_cache import cut_pieces, load_tokens
from pretraining.training_support import Arguments, MarkComplete, copy_tokenizer, last_checkpoint, write_atomically
from pretraining.word_vectors import set_word_embeddings


@dataclass(frozen=True)
class Corpus:
    """Training or evaluation pieces: ``(file, start, end)`` in ``pieces[i]`` means ``tokens[file][start:end]``."""

    tokens: list[np.ndarray]
    pieces: np.ndarray

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> np.ndarray:
        file, start, end = self.pieces[index]
        return np.asarray(self.tokens[file][start:end])


class Sample(NamedTuple):
    """Ids and labels, both of shape ``(length,)``, and the position of the first token."""

    input_ids: np.ndarray
    labels: np.ndarray
    first_position: int = 0


class MaskedSamples(Dataset):
    """The samples of a whole run. Sample ``i`` depends only on the seed and on ``i``, so a run can resume anywhere.

    Every pass over the corpus has its own order and its own masks. With `positions`, each sample has a random place
    among so many positions, so that short samples train them all (Kiyono et al., "SHAPE: Shifted Absolute Position
    Embedding for Transformers", 2021).
    """

    def __init__(
        self,
        corpus: Corpus,
        masker: Masker,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        size: int,
        positions: int | None = None,
    ):
        self.corpus, self.masker, self.seed, self.size, self.positions = corpus, masker, seed, size, positions
        self.cls_id, self.sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.corpus))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        """A piece with some tokens hidden, between `[CLS]` and `[SEP]`."""
        epoch, place = divmod(index, len(self.corpus))
        tokens = self.corpus[self._order(epoch)[place]].astype(np.int64)
        rng = np.random.default_rng((self.seed, 1, index))
        chosen = self.masker.choose(tokens, rng)
        hidden = self.masker.hide(tokens, chosen, rng)
        labels = np.where(chosen, tokens, IGNORED)
        input_ids = np.array([self.cls_id, *hidden, self.sep_id])
        first = 0 if self.positions is None else int(rng.integers(self.positions - len(input_ids) + 1))
        return Sample(input_ids, np.array([IGNORED, *labels, IGNORED]), first)


class Share(Dataset):
    """A process's share of the samples. All have the same number, because a sharded model computes in all at once.

    If there are no samples left, the process gets a sample without labels.
    """

    def __init__(self, samples: MaskedSamples, process: int, processes: int):
        self.samples, self.process, self.processes = samples, process, processes

    def __len__(self) -> int:
        return -(-len(self.samples) // self.processes)

    def __getitem__(self, index: int) -> Sample:
        index = index * self.processes + self.process
        sample = self.samples[min(index, len(self.samples) - 1)]
        return sample if index < len(self.samples) else sample._replace(labels=np.full_like(sample.labels, IGNORED))


def collate(samples: list[Sample], pad_id: int) -> dict[str, Tensor]:
    """Pad to the longest sample. Returns ids, labels and other inputs of the model, all of shape (batch, length).

    A batch without padding has no attention mask, because attention without a mask is faster. If all samples begin at
    position 0, the batch has no positions.
    """
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = np.full((len(samples), length), pad_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORED)
    mask = np.zeros_like(input_ids)
    for row, (ids, targets, _) in enumerate(samples):
        input_ids[row, : len(ids)], labels[row, : len(ids)], mask[row, : len(ids)] = ids, targets, 1
    batch = {"input_ids": input_ids, "labels": labels}
    if not mask.all():
        batch["attention_mask"] = mask
    first = np.array([sample.first_position for sample in samples])
    if first.any():
        batch["position_ids"] = np.where(mask, first[:, None] + np.arange(length), 0)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def masked_lm_forward(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> dict[str, Tensor]:
    """Loss and predictions at the chosen positions only. This takes a seventh of the work of the large output layer.

    Args:
        model: an ALBERT or LSG-ALBERT with a masked-language-model head.
        input_ids, labels, attention_mask, position_ids: (batch, length).
        num_items_in_batch: the number of chosen positions in all batches of the step, in all processes.

    Returns:
        ``loss``, the sum of cross-entropies divided by that number, or by default by the number of positions chosen
        here; ``logits`` (chosen, vocabulary) and ``targets`` (chosen,).
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    states = model.albert(**inputs)[0]  # (batch, length, hidden)
    chosen = labels != IGNORED
    logits, targets = model.predictions(states[chosen]).float(), labels[chosen]
    losses = nn.functional.cross_entropy(logits, targets, reduction="sum")
    count = len(targets) if num_items_in_batch is None else num_items_in_batch
    return {"loss": losses / count, "logits": logits, "targets": targets}


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums of loss, top-1 hits, top-5 hits, and the number of targets, shape (4,)."""
    hits = logits.topk(5).indices == targets[:, None]
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(targets))]).double()


class Progress(TrainerCallback):
    """Prints log lines with the step, the values and the time left, if there is no terminal for a progress bar."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.started = state.global_step, time.monotonic()

    def on_log(self, args, state, control, logs, **kwargs):
        done = state.global_step - self.first_step if state.global_step else 0
        if not (state.is_world_process_zero and done):
            return
        seconds = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        values = ", ".join(f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch")
        left = datetime.timedelta(seconds=round(seconds))
        print(f"step {state.global_step} of {state.max_steps}, {left} left: {values}", file=sys.stderr, flush=True)


def keep_one_bias(model: PreTrainedModel) -> None:
    """Remove ``predictions.bias``. It is another name of ``predictions.decoder.bias``, and no computation uses it.

    Accelerate shards the output layer separately, and PyTorch cannot shard a parameter that lies in two such parts.
    """
    decoder, words = model.predictions.decoder, model.get_input_embeddings()
    is_tied = decoder.weight is words.weight

    def tie_weights(*args: object, **kwargs: object) -> None:  # the model's own method would look for the name
        if is_tied:
            decoder.weight = words.weight

    del model.predictions.bias
    model.tie_weights = tie_weights


def muon(model: PreTrainedModel, args: Arguments) -> tuple[type[torch.optim.Optimizer], dict]:
    """Class and arguments of an optimizer for the Trainer: Muon for the layers' matrices, AdamW for everything else.

    An update of a matrix has the size that it usually has with AdamW, so both use the same learning rate (Jordan et
    al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is Scalable for LLM
    Training", 2025, section 2.2).
    """
    from pytorch_optimizer import Muon  # only --muon needs the package

    layers = model.albert.encoder.albert_layer_groups
    matrices = dict.fromkeys(weight for weight in layers.parameters() if weight.ndim == 2)
    rest = [weight for weight in model.parameters() if weight not in matrices]
    of_matrices = {"use_muon": True, "use_adjusted_lr": True, "weight_decay": args.weight_decay}
    of_rest = {"use_muon": False, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    groups = [{"params": list(matrices), **of_matrices}, {"params": rest, "weight_decay": 0.0, **of_rest}]
    return Muon, {"params": [{"lr": args.learning_rate, **group} for group in groups]}


class MaskedLMTrainer(Trainer):
    """A Trainer that keeps the samples in order, and whose model computes the head only at the chosen positions."""

    def __init__(self, model: PreTrainedModel, **kwargs):
        # Not a wrapper module, so that the model is saved as it is.
        model.forward = functools.partial(masked_lm_forward, model)
        model.accepts_loss_kwargs = True  # the Trainer then counts the chosen positions of a step
        super().__init__(model=model, callbacks=[MarkComplete()], **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if getattr(plugin, "fsdp_version", 1) == 2:
            keep_one_bias(model)
        if plugin is not None and self.optimizer_cls_and_kwargs:
            raise ValueError("--muon cannot be used with FSDP, which replaces the weights that it would train")
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.add_callback(Progress())

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Mean loss and top-1 and top-5 accuracy over all chosen positions of the evaluation samples."""
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        mine = Share(samples, self.args.process_index, self.args.world_size)
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        for batch in DataLoader(mine, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator):
            with self.accelerator.autocast():
                outputs = self.model(**{name: each.to(self.args.device) for name, each in batch.items()})
            sums += score(outputs["logits"], outputs["targets"])
        sums = self.accelerator.reduce(sums, reduction="sum")
        loss, top1, top5 = (sums[:3] / sums[3]).tolist()
        metrics = {"loss": loss, "top1": top1, "top5": top5, "masked_tokens": int(sums[3])}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        return metrics


def load_corpora(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Corpus, Corpus]:
    """Training pieces (documents that are not held out) and evaluation pieces (documents that are)."""
    held_out = read_ids(args.exclude_ids)
    folder = Path(args.cache) if args.cache else args.output / "tokens"
    tokens, train, evaluation = [], [], []
    for number, source in enumerate(args.corpus):
        documents = load_tokens(source, tokenizer, folder)
        tokens.append(documents.tokens)
        drawn = [name in held_out or is_drawn(name, args.held_out_share) for name in documents.ids]
        kept = ~np.array(drawn)
        for pieces, keep in ((train, kept), (evaluation, ~kept)):
            cuts = cut_pieces(documents, args.max_length - 2, keep)  # 2: [CLS] and [SEP]
            pieces.append(np.insert(cuts, 0, number, axis=1))
    return Corpus(tokens, np.concatenate(train)), Corpus(tokens, np.concatenate(evaluation))


def load_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The checkpoint to continue from, or a new ALBERT of the given sizes; both with the given dropout.

    This also loads the weights of a killed run, because transformers 5.0.0 saves the weights of a loaded ALBERT under
    names that its own Trainer ignores.
    """
    dropout = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    attention = {"attn_implementation": args.attention}
    checkpoint = last_checkpoint(args.output)
    if checkpoint and not (Path(checkpoint) / "config.json").is_file():
        checkpoint = None  # FSDP has saved shards: the Trainer loads them
    source = args.model if args.eval_only else checkpoint or args.model
    if source is not None:
        model = AutoModelForMaskedLM.from_pretrained(source, trust_remote_code=True, **dropout, **attention)
        if args.extend_positions is not None and not checkpoint:
            extend_positions(model, args.extend_positions)
        parted = args.groups is None or model.config.num_hidden_groups == args.groups
        return model if parted else unshare_layers(model, args.groups)
    config = AlbertConfig(
        vocab_size=len(tokenizer), embedding_size=args.embedding_size, hidden_size=args.hidden_size,
        num_hidden_layers=args.layers, num_hidden_groups=args.groups or 1, num_attention_heads=args.heads,
        intermediate_size=args.intermediate_size, hidden_act=args.activation, initializer_range=args.init_range,
        max_position_embeddings=max(args.positions, args.max_length), pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, **dropout, **attention,
    )  # fmt: skip
    model = AlbertForMaskedLM(config)
    if args.neighbour_heads:
        look_at_neighbours(model)
    return model


def build_trainer(args: argparse.Namespace) -> MaskedLMTrainer:
    """Model, data and Trainer from the command line."""
    require_version("transformers>=4.48", "Older releases do not count the items of a step.")
    set_seed(args.training.seed)
    arguments = args.training
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    with arguments.main_process_first(desc="tokenizing"):
        train, evaluation = load_corpora(args, tokenizer)
    if not len(train) and not args.eval_only:
        raise CorpusError("nothing to train on: every document is empty or held out")
    masker = Masker.for_tokenizer(tokenizer, args.mask_rate, args.span_words)
    train_size = arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
    train_size *= arguments.world_size
    eval_size = min(len(evaluation), max(1, args.eval_tokens // args.max_length))
    model = load_model(args, tokenizer)
    positions = model.config.max_position_embeddings if args.shift_positions else None
    if args.word_vectors and not args.eval_only and not last_checkpoint(args.output):
        embeddings = model.get_input_embeddings().weight.detach()
        if arguments.process_index == 0:
            tokens = np.concatenate([train[index] for index in range(len(train))])
            set_word_embeddings(embeddings[:, POSITION_DIMS if args.neighbour_heads else 0 :], tokens)
        # DDP would send them to the other processes, but with FSDP each process uses its own values
        embeddings.copy_(broadcast(embeddings.to(arguments.device)))
    if args.compile:
        model.albert.compile()
    return MaskedLMTrainer(
        model=model,
        args=arguments,
        train_dataset=MaskedSamples(train, masker, tokenizer, arguments.seed, train_size, positions),
        eval_dataset=MaskedSamples(evaluation, masker, tokenizer, args.eval_seed, eval_size),
        data_collator=functools.partial(collate, pad_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=muon(model, arguments) if args.muon else None,
    )


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train (except with `--eval_only`), save and evaluate. Returns the final evaluation in every process."""
    trainer = build_trainer(args)
    if not args.eval_only:
        checkpoint = last_checkpoint(args.output)
        if checkpoint and trainer.is_world_process_zero():
            print(f"resuming from {checkpoint}", file=sys.stderr)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_fsdp_enabled:  # its checkpoints may have another type
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.model.config.use_cache = True  # the Trainer of transformers 5 sets it to False
        trainer.save_model(str(args.output / "final"))
        if trainer.is_world_process_zero():
            copy_tokenizer(Path(args.tokenizer or args.model), args.output / "final")
    metrics = trainer.evaluate() if len(trainer.eval_dataset) else {}
    if not args.eval_only and trainer.is_world_process_zero():
        history = {"history": trainer.state.log_history, "final": metrics}
        write_atomically(args.output / "history.json", (json.dumps(history, indent=1) + "\n").encode())
    return metrics


@dataclass
class Options:  # in addition to the Trainer's own arguments
    exclude_ids: list[str] = HfArg(default_factory=list, help="files with one held-out document id per line")
    held_out_share: float = HfArg(
        default=0.0, help="share of the documents to hold out, such as 0.01, chosen by their ids"
    )
    model: str | None = HfArg(
        default=None, help="checkpoint directory to continue from (its own code is run if it has any)"
    )
    tokenizer: str | None = HfArg(default=None, help="tokenizer directory; None: the --model directory")
    cache: str | None = HfArg(
        default=None, help="folder for tokenized text; None: the folder tokens in the output directory"
    )
    max_length: int = HfArg(default=128, help="number of tokens in a piece, [CLS] and [SEP] included")
    dropout: float = HfArg(default=0.0, help="dropout of hidden states and attention")
    mask_rate: float = HfArg(default=0.15, help="share of tokens that are predicted")
    span_words: int = HfArg(default=3, help="largest number of adjacent words that are masked together")
    attention: str | None = HfArg(default=None, help="eager or sdpa; None: transformers' choice")
    shift_positions: bool = HfArg(default=False, help="give each piece a random place among the positions")
    extend_positions: int | None = HfArg(
        default=None, help="number of trained positions; those after them are set to continue them"
    )
    compile: bool = HfArg(default=False, help="torch.compile the encoder")
    muon: bool = HfArg(default=False, help="train the layers' matrices with Muon, and the rest with AdamW")
    groups: int | None = HfArg(
        default=None, help="number of layer groups with their own weights; None: as in --model, or one"
    )
    eval_only: bool = HfArg(default=False, help="do not train: evaluate --model and print the result")
    eval_tokens: int = HfArg(default=262_144, help="approximate number of held-out tokens to evaluate on")
    eval_seed: int = HfArg(default=12_345, help="random seed for the held-out pieces and their masks")
    hidden_size: int = HfArg(default=256, help="hidden size of a model from scratch")
    layers: int = HfArg(default=6, help="number of layers of a model from scratch")
    heads: int = HfArg(default=4, help="number of attention heads of a model from scratch")
    intermediate_size: int = HfArg(default=1024, help="feed-forward size of a model from scratch")
    embedding_size: int = HfArg(default=128, help="embedding size of a model from scratch")
    positions: int = HfArg(default=512, help="number of position embeddings of a model from scratch")
    word_vectors: bool = HfArg(default=False, help="start with word vectors from counts (needs 6 GB of memory)")
    neighbour_heads: bool = HfArg(default=False, help="start with heads that attend to neighbouring tokens")
    init_range: float = HfArg(default=0.02, help="standard deviation of the initial weights")
    activation: str = HfArg(
        default="gelu_pytorch_tanh", help="activation; the default is gelu_new's function in one fused kernel"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with ``corpus`` and, as ``training``, the Trainer's arguments."""
    parser = HfArgumentParser((Options, Arguments), description=__doc__.splitlines()[0])
    parser.add_argument("corpus", nargs="+", help="JSON lines (also .gz), text files or folders, or data sets")
    parser.set_defaults(
        max_steps=1000, per_device_train_batch_size=64, learning_rate=1e-3, warmup_steps=100, weight_decay=0.01,
        adam_beta2=0.98, adam_epsilon=1e-6, optim="adamw_torch_fused", logging_steps=50, save_steps=500, save_total_limit=2,
        seed=1, average_tokens_across_devices=True, remove_unused_columns=False, ddp_find_unused_parameters=False,
        disable_tqdm=not sys.stderr.isatty(), use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(), report_to="none",
    )  # fmt: skip
    options, training, rest = parser.parse_args_into_dataclasses(argv)
    args = argparse.Namespace(**vars(options), corpus=rest.corpus, training=training, output=Path(training.output_dir))
    if args.model is None and args.tokenizer is None:
        parser.error("give --model or --tokenizer")
    if args.model is not None and (args.word_vectors or args.neighbour_heads):
        parser.error("--word_vectors and --neighbour_heads are for a model from scratch, not for --model")
    if args.model is None and args.extend_positions is not None:
        parser.error("--extend_positions is for a trained --model, not for one from scratch")
    if args.neighbour_heads and (
        args.hidden_size // args.heads < POSITION_DIMS or not POSITION_DIMS < args.embedding_size <= args.hidden_size
    ):
        parser.error(
            f"--neighbour_heads needs heads of at least {POSITION_DIMS}, and larger embeddings, up to --hidden_size"
        )
    if not 0 <= args.held_out_share < 1:
        parser.error(f"--held_out_share must be at least 0 and below 1, got {args.held_out_share}")
    if args.max_length < 3 or training.max_steps < 1:
        parser.error("--max_length must be at least 3, --max_steps at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        metrics = run(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", "0")) == 0:  # the first of torchrun's processes
        print(json.dumps(metrics))
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads may abort an interpreter that ends before them
    return 0


if __name__ == "__main__":
    sys.exit(main())
