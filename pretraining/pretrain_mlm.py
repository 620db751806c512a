"""Masked-language-model training, from scratch (a plain ALBERT) or onwards from any checkpoint (LSG-ALBERT included).

    python -m pretraining.pretrain_mlm corpus.jsonl.gz --exclude-ids heldout.txt --tokenizer . --output runs/a \\
        --neighbour-heads --word-vectors --init-range 0.03
    python -m pretraining.pretrain_mlm corpus.jsonl.gz --exclude-ids heldout.txt --model runs/a/final --output runs/b

The held-out documents are the evaluation set. Started again with the same arguments, a killed run goes on from its
last checkpoint with the same data in the same order. The result lies in ``OUTPUT/final``. On a busy machine
``OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m pretraining.pretrain_mlm ...`` is faster than two threads, which
wait for each other after every operation. Several processes train as one does with their batches put together. Needs
transformers 4.48 or newer.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shutil
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
    TrainingArguments,
    set_seed,
)
from transformers.utils.versions import require_version

from pretraining.corpus import CorpusError, is_drawn, read_ids
from pretraining.initial_weights import POSITION_DIMS, extend_positions, look_at_neighbours, unshare_layers
from pretraining.masking import IGNORED, Masker
from pretraining.token_cache import cut_pieces, load_tokens
from pretraining.training_support import Arguments, MarkComplete, last_checkpoint, write_atomically
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
    folder = args.cache or args.output / "tokens"
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
        vocab_size=len(tokenizer),
        embedding_size=args.embedding_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_hidden_groups=args.groups or 1,
        num_attention_heads=args.heads,
        intermediate_size=args.intermediate_size,
        hidden_act=args.activation,
        max_position_embeddings=max(args.positions, args.max_length),
        initializer_range=args.init_range,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **dropout,
        **attention,
    )
    model = AlbertForMaskedLM(config)
    if args.neighbour_heads:
        look_at_neighbours(model)
    return model


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    return Arguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup,
        weight_decay=args.weight_decay,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        optim="adamw_torch_fused",
        gradient_accumulation_steps=args.gradient_accumulation,
        average_tokens_across_devices=True,  # a step's loss is one mean, however its samples are spread
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=args.log_every,
        save_steps=args.save_every,
        save_total_limit=2,
        eval_strategy="steps" if args.eval_every else "no",
        eval_steps=args.eval_every or None,
        seed=args.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )


def build_trainer(args: argparse.Namespace) -> MaskedLMTrainer:
    """Model, data and Trainer from the command line."""
    require_version("transformers>=4.48", "Older releases do not count the items of a step.")
    set_seed(args.seed)
    arguments = training_arguments(args)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    with arguments.main_process_first(desc="tokenizing"):
        train, evaluation = load_corpora(args, tokenizer)
    if not len(train) and not args.eval_only:
        raise CorpusError("nothing to train on: every document is empty or held out")
    masker = Masker.for_tokenizer(tokenizer, args.mask_rate, args.span_words)
    train_size = args.steps * args.batch_size * args.gradient_accumulation * arguments.world_size
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
        train_dataset=MaskedSamples(train, masker, tokenizer, args.seed, train_size, positions),
        eval_dataset=MaskedSamples(evaluation, masker, tokenizer, args.eval_seed, eval_size),
        data_collator=functools.partial(collate, pad_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
    )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files as they are: saved by transformers 5, they are without ``spiece.model``."""
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train (unless only an evaluation is asked for), evaluate, save; returns the final evaluation, in every process."""
    trainer = build_trainer(args)
    if not args.eval_only:
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output))
        if trainer.is_fsdp_enabled:  # whatever its checkpoints are
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(args.output / "final"))
        if trainer.is_world_process_zero():
            copy_tokenizer(Path(args.tokenizer or args.model), args.output / "final")
    metrics = trainer.evaluate() if len(trainer.eval_dataset) else {}
    if not args.eval_only and trainer.is_world_process_zero():
        history = {"history": trainer.state.log_history, "final": metrics}
        write_atomically(args.output / "history.json", (json.dumps(history, indent=1) + "\n").encode())
    return metrics


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Masked-language-model training of ALBERT and LSG-ALBERT.")
    parser.add_argument(
        "corpus", nargs="+", help="JSON lines (.jsonl, .jsonl.gz), text files or folders, or data sets"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the final model")
    parser.add_argument("--exclude-ids", nargs="*", default=[], help="files with one held-out document id per line")
    parser.add_argument(
        "--held-out-share", type=float, default=0.0, help="of the documents (0.01), held out by their ids"
    )
    parser.add_argument("--model", help="checkpoint directory to go on from (its own code is run if it has any)")
    parser.add_argument("--tokenizer", help="tokenizer directory; default: the --model directory")
    parser.add_argument("--cache", type=Path, help="folder for tokenized text; default: OUTPUT/tokens")
    _add_training_options(parser.add_argument_group("training"))
    _add_evaluation_options(parser.add_argument_group("evaluation"))
    _add_size_options(parser.add_argument_group("sizes of a model from scratch (without --model)"))
    args = parser.parse_args(argv)
    if args.model is None and args.tokenizer is None:
        parser.error("one of --model and --tokenizer is needed")
    if args.model is not None and (args.word_vectors or args.neighbour_heads):
        parser.error("--word-vectors and --neighbour-heads are for a model from scratch, not for --model")
    if args.model is None and args.extend_positions is not None:
        parser.error("--extend-positions is for a trained --model, not for one from scratch")
    if args.neighbour_heads and (
        args.hidden_size // args.heads < POSITION_DIMS or not POSITION_DIMS < args.embedding_size <= args.hidden_size
    ):
        parser.error(f"--neighbour-heads needs heads of {POSITION_DIMS} or more, and embeddings above that")
    if not 0 <= args.held_out_share < 1:
        parser.error(f"--held-out-share must be at least 0 and below 1, got {args.held_out_share}")
    if args.max_length < 3 or min(args.steps, args.batch_size, args.gradient_accumulation) < 1:
        parser.error("--max-length must be at least 3, --steps, --batch-size and --gradient-accumulation at least 1")
    return args


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-length", type=int, default=128, help="tokens of a piece, [CLS] and [SEP] included")
    group.add_argument("--batch-size", type=int, default=64, help="pieces per batch and process (see torchrun)")
    group.add_argument("--gradient-accumulation", type=int, default=1, help="batches that make a step")
    group.add_argument("--steps", type=int, default=1000)
    group.add_argument("--lr", type=float, default=1e-3)
    group.add_argument("--schedule", default="linear", help="learning-rate schedule, a name that the Trainer knows")
    group.add_argument("--warmup", type=int, default=100, help="steps")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--dropout", type=float, default=0.0)
    group.add_argument("--mask-rate", type=float, default=0.15)
    group.add_argument("--span-words", type=int, default=3, help="words that are masked together at most")
    group.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    group.add_argument("--attention", help="attention implementation, eager or sdpa; default: transformers' choice")
    group.add_argument("--shift-positions", action="store_true", help="place each piece anywhere in the positions")
    group.add_argument(
        "--extend-positions", type=int, metavar="N", help="set those after the first N, the trained ones"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    group.add_argument(
        "--groups", type=int, help="of layers with weights of their own; default: the --model's, or one"
    )
    group.add_argument("--seed", type=int, default=1)
    group.add_argument("--log-every", type=int, default=50, help="steps")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")


def _add_evaluation_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--eval-only", action="store_true", help="no training: evaluate --model and print the result")
    group.add_argument("--eval-every", type=int, default=0, help="steps; 0: at the end only")
    group.add_argument("--eval-tokens", type=int, default=262_144, help="about so many held-out tokens are read")
    group.add_argument("--eval-seed", type=int, default=12_345, help="fixes the held-out pieces and their masks")


def _add_size_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hidden-size", type=int, default=256)
    group.add_argument("--layers", type=int, default=6)
    group.add_argument("--heads", type=int, default=4)
    group.add_argument("--intermediate-size", type=int, default=1024)
    group.add_argument("--embedding-size", type=int, default=128)
    group.add_argument("--positions", type=int, default=512, help="position embeddings")
    group.add_argument("--word-vectors", action="store_true", help="start from counted word vectors (6 GB of memory)")
    group.add_argument("--neighbour-heads", action="store_true", help="start with heads that look at the next token")
    group.add_argument("--init-range", type=float, default=0.02, help="standard deviation of the first weights")
    group.add_argument("--activation", default="gelu_pytorch_tanh", help="gelu_new's function, in one fused kernel")


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
