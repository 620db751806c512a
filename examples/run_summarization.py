"""Fine-tune a sequence-to-sequence model for summarization, and score it beside the documents' first words.

    python examples/run_summarization.py --train-file train.jsonl.gz --test-file test.jsonl.gz --output runs/summaries
    python examples/run_summarization.py --dataset ccdv/arxiv-summarization --document-field article \\
        --summary-field abstract --max-target-length 256 --bf16 --gradient-checkpointing --output runs/arxiv

Needs `pip install ".[summarization]"`. Started again with the same arguments, a killed run goes on from its last
complete checkpoint with the same data in the same order. OUTPUT then holds `final` (the model and its tokenizer),
`results.json`, `results.md` and `predictions.jsonl` (each test document's summary and scores). With several GPUs:
`torchrun --nproc-per-node 4 examples/run_summarization.py ...`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    set_seed,
)

from fine_tuning import (
    RESAMPLES,
    TOKENIZER_ARGUMENT,
    Field,
    MeanOverTokens,
    Seq2SeqArguments,
    Spread,
    add_data_options,
    add_training_options,
    check_data_options,
    check_length,
    check_same_run,
    check_validation,
    describe_run,
    enable_gradient_checkpointing,
    load_pretrained,
    load_splits,
    make_parser,
    positive,
    run_script,
    save_final,
    train,
    training_keywords,
    write_results,
)

ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
# A run may be taken up again with other values of these; all others belong to its checkpoints.
FREE = {"output", "test_file", "limit_test", "beams", "no_repeat_ngrams", "eval_batch_size", "log_every", "save_every"}


# --- Data


def data_fields(args: argparse.Namespace) -> dict[str, Field]:
    """The rows are ``{"document": ..., "summary": ...}``, whatever the data calls these fields."""
    return {"document": Field(args.document_field), "summary": Field(args.summary_field)}


class Examples(Dataset):
    """Token ids and labels of the rows, made when asked for.

    The labels are the summary and [SEP]; there is no [CLS], since that is what the decoder starts from.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        max_source_length: int,
        max_target_length: int,
    ):
        self.rows, self.tokenizer = rows, tokenizer
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        source = self.tokenizer(row["document"], truncation=True, max_length=self.max_source_length)
        target = self.tokenizer(
            row["summary"], add_special_tokens=False, truncation=True, max_length=self.max_target_length - 1
        )
        return {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "labels": [*target["input_ids"], self.tokenizer.eos_token_id],
        }


# --- Scores


def sentences(text: str) -> list[str]:
    """A plain split after full stops, question and exclamation marks, and at line ends."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\s*\n\s*", text.strip()) if part]


def mean_words(texts: Iterable[str]) -> float:
    return float(np.mean([len(text.split()) for text in texts]))


def lead(document: str, words: int) -> str:
    """The first words of a document."""
    return " ".join(document.split()[:words])


def rouge(predictions: Iterable[str], references: Iterable[str]) -> dict[str, list[float]]:
    """F-measures of every pair, in percent, with stemming; ROUGE-Lsum goes by `sentences`."""
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score(*("\n".join(sentences(text)) for text in (target, made))) for made, target in pairs]
    return {name: [100 * score[name].fmeasure for score in scores] for name in ROUGE}


def spread(values: Sequence[float]) -> Spread:
    """The mean of the documents' values; the interval is that of the means of resampled documents."""
    values = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return Spread(float(values.mean()), float(low), float(high))


def summarize_scores(texts: Sequence[str], scores: dict[str, list[float]]) -> dict:
    """What the results say of one system: the mean length of its summaries and its scores."""
    return {"words": mean_words(texts)} | {name: spread(values)._asdict() for name, values in scores.items()}


# --- Model and Trainer


class SummaryTrainer(MeanOverTokens, Seq2SeqTrainer):
    """A Trainer in whose steps all tokens of the summaries count alike."""


def check_lengths(args: argparse.Namespace, config: PretrainedConfig) -> None:
    """Complete the lengths from the model's, which they may not exceed."""
    args.max_source_length = check_length("--max-source-length", args.max_source_length, config)
    args.max_target_length = check_length("--max-target-length", args.max_target_length, config)


def load_model(path: str | Path, args: argparse.Namespace) -> PreTrainedModel:
    """The model, which generates as the command line says, also after it was saved."""
    model = load_pretrained(AutoModelForSeq2SeqLM, path)
    check_lengths(args, model.config)
    model.generation_config.update(
        max_length=args.max_target_length + 1,  # with the token that the decoder starts from
        num_beams=args.beams,
        no_repeat_ngram_size=args.no_repeat_ngrams,
    )
    return model


def training_arguments(args: argparse.Namespace) -> Seq2SeqArguments:
    return Seq2SeqArguments(
        **training_keywords(args), label_smoothing_factor=args.label_smoothing, predict_with_generate=True
    )


def build_trainer(
    args: argparse.Namespace,
    arguments: Seq2SeqArguments,
    rows: dict[str, Sequence[dict[str, str]] | None],
    model_path: str | Path,
) -> Seq2SeqTrainer:
    """Model, data and Trainer; without a metric of its own, it evaluates by the loss alone, which is quick."""
    set_seed(args.seed)
    model = load_model(model_path, args)
    enable_gradient_checkpointing(model, args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lengths = args.max_source_length, args.max_target_length
    examples = {split: found and Examples(found, tokenizer, *lengths) for split, found in rows.items()}
    return SummaryTrainer(
        model=model,
        args=arguments,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        **{TOKENIZER_ARGUMENT: tokenizer},
    )


def generate(trainer: Seq2SeqTrainer, examples: Examples) -> tuple[list[str], float]:
    """A summary for each example, and the loss on the summaries that were to be written."""
    output = trainer.predict(examples)
    tokenizer = examples.tokenizer
    ids = output.predictions[: len(examples)]  # with several processes, the last batch may have been filled up
    ids = np.where(ids < 0, tokenizer.pad_token_id, ids)  # padded with -100
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return texts, output.metrics["test_loss"]


# --- Results


def format_table(results: dict) -> str:
    """The results as Markdown."""
    lines = ["| system | words | " + " | ".join(ROUGE.values()) + " |", "| --- " * (2 + len(ROUGE)) + "|"]
    for system, scores in results["systems"].items():
        cells = ["{mean:.2f} ({low:.2f}-{high:.2f})".format_map(scores[name]) for name in ROUGE]
        lines.append(f"| {system} | {scores['words']:.0f} | " + " | ".join(cells) + " |")
    facts = (
        f"{results['test_documents']:,} test documents; F-measures in percent with stemming, means and 95 % bootstrap\n"
        f"intervals; the reference summaries have {results['reference_words']:.0f} words. "
        f"{results['steps']:,} steps, seed {results['seed']}, test loss {results['test_loss']:.3f};\n"
        f"{results['train_seconds']:,.0f} s of training and {results['test_seconds']:,.0f} s of testing on "
        f"{results['device']}."
    )
    return "\n".join(lines) + f"\n\n{facts}\n\n```text\n{results['command']}\n```\n"


def score_test(trainer: Seq2SeqTrainer, examples: Examples, lead_words: int) -> tuple[dict, list[dict]]:
    """The scores of the model and of the lead baseline on the same documents: a summary, and each document's own."""
    references = [row["summary"] for row in examples.rows]
    started = time.perf_counter()
    made, loss = generate(trainer, examples)
    seconds = time.perf_counter() - started
    texts = {"model": made, f"lead-{lead_words} words": [lead(row["document"], lead_words) for row in examples.rows]}
    scores = {system: rouge(found, references) for system, found in texts.items()}
    results = {
        "systems": {system: summarize_scores(texts[system], scores[system]) for system in texts},
        "reference_words": mean_words(references),
        "test_documents": len(references),
        "test_loss": loss,
        "test_seconds": seconds,
    }
    documents = [
        {"prediction": made[i], "reference": references[i]}
        | {system: {name: values[i] for name, values in found.items()} for system, found in scores.items()}
        for i in range(len(references))
    ]
    return results, documents


def run(args: argparse.Namespace, command: str) -> str | None:
    """Train, save, test; the table of results, or None without test data or in a process other than the first."""
    arguments = training_arguments(args)
    with arguments.main_process_first(desc="reading the data"):
        rows = load_splits(args, data_fields(args))
    check_validation(args, rows)
    if arguments.process_index == 0:
        check_same_run(args, FREE)
    trained = train(args.output, lambda checkpoint: build_trainer(args, arguments, rows, checkpoint or args.model))
    trainer = trained.trainer
    save_final(trainer, args.output)
    if rows["test"] is None:
        return None
    lead_words = round(mean_words(row["summary"] for row in rows["train"]))
    tested = Examples(rows["test"], trainer.train_dataset.tokenizer, args.max_source_length, args.max_target_length)
    scored, documents = score_test(trainer, tested, lead_words)
    if not trainer.is_world_process_zero():
        return None
    results = (
        scored
        | describe_run(args, command, trained)
        | {
            "train_documents": len(rows["train"]),
            "max_source_length": args.max_source_length,
            "max_target_length": args.max_target_length,
        }
    )
    table = format_table(results)
    write_results(args.output, results, table, documents)
    return table


# --- Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    data = add_data_options(parser, ["document", "summary"])
    data.add_argument("--max-source-length", type=positive, help="tokens; None: the model's positions")
    data.add_argument("--max-target-length", type=positive, default=128, help="tokens, the final [SEP] included")
    training = add_training_options(parser)
    training.add_argument("--label-smoothing", type=float, default=0.0)
    generation = parser.add_argument_group("generation")
    generation.add_argument("--beams", type=positive, default=4)
    generation.add_argument("--no-repeat-ngrams", type=int, default=3, help="no n tokens twice; 0: no rule")
    args = parser.parse_args(argv)
    check_data_options(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("run_summarization", lambda command: run(args, command), argv)


if __name__ == "__main__":
    sys.exit(main())
