"""Masked-language-model training, from scratch (a plain ALBERT) or onwards from any checkpoint (LSG-ALBERT included).

    python -m pretraining.pretrain_mlm corpus.jsonl.gz --exclude_ids heldout.txt --tokenizer . --output_dir runs/a \\
        --neighbour_heads --word_vectors --init_range 0.03
    python -m pretraining.pretrain_mlm corpus.jsonl.gz --exclude_ids heldout.txt --model runs/a/final --output_dir runs/b

The held-out documents are the evaluation set. Started again with the same arguments, a killed run goes on from its
last checkpoint with the same data in the same order. The result lies in ``OUTPUT_DIR/final``. On a busy machine
``OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m pretraining.pretrain_mlm ...`` is faster than two threads, which
wait for each other after every operation. Several processes train as one does with their batches put together. Needs
transformers 4.48 or newer.
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
    """Ids and labels, both of shape ``(length,)``, and the position of the first."""

    input_ids: np.ndarray
    labels: np.ndarray
    first_position: int = 0


class MaskedSamples(Dataset):
    """The samples of a whole run: sample ``i`` depends on the seed and ``i`` alone, so a run can be taken up anywhere.

    Every pass over the corpus has its own order and its own masks. With `positions`, each sample lies anywhere in that
    many positions, so that short samples train them all (Kiyono et al., "SHAPE: Shifted Absolute Position Embedding
    for Transformers", 2021).
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
    """A process's share of the samples: the same number in all processes, for a sharded model computes in all at once.

    Where there are none left, it is a sample without anything to predict.
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
    """Pad to the longest sample: ids, labels and what else the model needs, all of shape (batch, length).

    A batch without padding has no attention mask, since attention without one is faster; one whose samples all begin at
    position 0 has no positions.
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
    """Loss and predictions at the chosen positions only, a seventh of the work of the large output layer.

    Args:
        model: an ALBERT or LSG-ALBERT with a masked-language-model head.
        input_ids, labels, attention_mask, position_ids: (batch, length).
        num_items_in_batch: the chosen positions of the whole step: of all its batches, in all processes.

    Returns:
        ``loss``, the sum of cross-entropies over that number, by default over the chosen positions here; ``logits``
        (chosen, vocabulary) and ``targets`` (chosen,).
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
    """Writes what is logged as lines of step, values and time left, where there is no terminal to draw a bar on."""

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
    """Take away ``predictions.bias``, which is ``predictions.decoder.bias``, and which nothing computes with.

    Accelerate shards the output layer apart from the rest, and PyTorch no parameter that lies in two such parts.
    """
    decoder, words = model.predictions.decoder, model.get_input_embeddings()
    is_tied = decoder.weight is words.weight

    def tie_weights(*args: object, **kwargs: object) -> None:  # the model's own would look for the name
        if is_tied:
            decoder.weight = words.weight

    del model.predictions.bias
    model.tie_weights = tie_weights


class MaskedLMTrainer(Trainer):
    """Trainer that takes the samples in their order and whose model computes the head at the chosen positions only."""

    def __init__(self, model: PreTrainedModel, **kwargs):
        model.forward = functools.partial(masked_lm_forward, model)  # not a wrapper module: saved as what it is
        model.accepts_loss_kwargs = True  # the Trainer is to count the chosen positions of a step
        super().__init__(model=model, callbacks=[MarkComplete()], **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if getattr(plugin, "fsdp_version", 1) == 2:
            keep_one_bias(model)
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
    """The checkpoint to go on from, or a new ALBERT of the sizes asked for; dropout as asked for in both cases.

    The weights of a killed run come from here too: transformers 5.0.0 saves those of a loaded ALBERT under names that
    its own Trainer passes over.
    """
    dropout = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    attention = {"attn_implementation": args.attention}
    checkpoint = last_checkpoint(args.output)
    if checkpoint and not (Path(checkpoint) / "config.json").is_file():
        checkpoint = None  # in shards, by FSDP: the Trainer loads them
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
        # DDP would hand them to the other processes, but FSDP takes each one's part from itself
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
    )


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train (unless only an evaluation is asked for), evaluate, save; returns the final evaluation, in every process."""
    trainer = build_trainer(args)
    if not args.eval_only:
        checkpoint = last_checkpoint(args.output)
        if checkpoint and trainer.is_world_process_zero():
            print(f"resuming from {checkpoint}", file=sys.stderr)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_fsdp_enabled:  # whatever its checkpoints are
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.model.config.use_cache = True  # transformers 5's Trainer has set it to False
        trainer.save_model(str(args.output / "final"))
        if trainer.is_world_process_zero():
            copy_tokenizer(Path(args.tokenizer or args.model), args.output / "final")
    metrics = trainer.evaluate() if len(trainer.eval_dataset) else {}
    if not args.eval_only and trainer.is_world_process_zero():
        history = {"history": trainer.state.log_history, "final": metrics}
        write_atomically(args.output / "history.json", (json.dumps(history, indent=1) + "\n").encode())
    return metrics


@dataclass
class Options:  # beside the Trainer's own arguments
    exclude_ids: list[str] = HfArg(default_factory=list, help="files with one held-out document id per line")
    held_out_share: float = HfArg(default=0.0, help="of the documents (0.01), held out by their ids")
    model: str | None = HfArg(
        default=None, help="checkpoint directory to go on from (its own code is run if it has any)"
    )
    tokenizer: str | None = HfArg(default=None, help="tokenizer directory; None: the --model directory")
    cache: str | None = HfArg(default=None, help="folder for tokenized text; None: tokens in the output directory")
    max_length: int = HfArg(default=128, help="tokens of a piece, [CLS] and [SEP] included")
    dropout: float = HfArg(default=0.0, help="of hidden states and attention")
    mask_rate: float = HfArg(default=0.15, help="share of the tokens that are predicted")
    span_words: int = HfArg(default=3, help="words that are masked together at most")
    attention: str | None = HfArg(default=None, help="eager or sdpa; None: transformers' choice")
    shift_positions: bool = HfArg(default=False, help="place each piece anywhere in the positions")
    extend_positions: int | None = HfArg(default=None, help="set the positions after so many, the trained ones")
    compile: bool = HfArg(default=False, help="torch.compile the encoder")
    groups: int | None = HfArg(default=None, help="of layers with weights of their own; None: the --model's, or one")
    eval_only: bool = HfArg(default=False, help="no training: evaluate --model and print the result")
    eval_tokens: int = HfArg(default=262_144, help="about so many held-out tokens are read")
    eval_seed: int = HfArg(default=12_345, help="fixes the held-out pieces and their masks")
    hidden_size: int = HfArg(default=256, help="of a model from scratch")
    layers: int = HfArg(default=6, help="of a model from scratch")
    heads: int = HfArg(default=4, help="of a model from scratch")
    intermediate_size: int = HfArg(default=1024, help="of a model from scratch")
    embedding_size: int = HfArg(default=128, help="of a model from scratch")
    positions: int = HfArg(default=512, help="position embeddings of a model from scratch")
    word_vectors: bool = HfArg(default=False, help="start from counted word vectors (6 GB of memory)")
    neighbour_heads: bool = HfArg(default=False, help="start with heads that look at the next token")
    init_range: float = HfArg(default=0.02, help="standard deviation of the first weights")
    activation: str = HfArg(default="gelu_pytorch_tanh", help="gelu_new's function, in one fused kernel")


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
        parser.error("one of --model and --tokenizer is needed")
    if args.model is not None and (args.word_vectors or args.neighbour_heads):
        parser.error("--word_vectors and --neighbour_heads are for a model from scratch, not for --model")
    if args.model is None and args.extend_positions is not None:
        parser.error("--extend_positions is for a trained --model, not for one from scratch")
    if args.neighbour_heads and (
        args.hidden_size // args.heads < POSITION_DIMS or not POSITION_DIMS < args.embedding_size <= args.hidden_size
    ):
        parser.error(f"--neighbour_heads needs heads of {POSITION_DIMS} or more, and embeddings above that")
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
