"""Fine-tune a model to tag the words of long documents, and score the entities that it finds.

    python examples/run_token_classification.py --train-file train.jsonl.gz --test-file test.jsonl.gz --output runs/ner
    python examples/run_token_classification.py --dataset eriktks/conll2003 --tags-field ner_tags --bf16 --output runs/conll

A row has a list of words and, as long, a list of their BIO tags. A document is read in one pass of --max-length tokens;
words beyond are not read, and their entities count as missed. With --pieces the rest is read as well, in further pieces
of --max-length tokens without overlap: so a short length shows what the context of a long one is worth.

Needs `pip install ".[fine-tuning]"`. Started again with the same arguments, a killed run goes on from its last complete
checkpoint with the same data in the same order. OUTPUT then holds `final` (the model and its tokenizer), `results.json`,
`results.md` and `predictions.jsonl` (each test document's entities, those to be found and those found). With several
GPUs: `torchrun --nproc-per-node 4 examples/run_token_classification.py ...`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from fine_tuning import (
    TOKENIZER_ARGUMENT,
    Arguments,
    Field,
    MeanOverTokens,
    UsageError,
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
    ratio_spread,
    run_script,
    save_final,
    train,
    training_keywords,
    write_results,
)

# A run may be taken up again with other values of these; all others belong to its checkpoints.
FREE = {"output", "test_file", "limit_test", "eval_batch_size", "log_every", "save_every"}
IGNORED = -100  # the label of tokens that are no word's first
TAG = re.compile(r"O|[BI]-.+")


class Entity(NamedTuple):
    """Words from `start` up to, but not including, `stop`."""

    start: int
    stop: int
    type: str


class Part(NamedTuple):
    """The words of a row, from `start` up to, but not including, `stop`, that the model reads at once."""

    row: int
    start: int
    stop: int


# --- Tags and entities


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that BIO tags mark, in order; an I- tag that goes on with no entity of its type begins one."""
    found, start, type_ = [], 0, None
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, named = tag.partition("-")
        if type_ is not None and (prefix != "I" or named != type_):
            found.append(Entity(start, index, type_))
            type_ = None
        if prefix != "O" and type_ is None:
            start, type_ = index, named
    return found


def entity_types(tags: Iterable[Sequence[str]]) -> list[str]:
    """The types of entities that occur in the documents' tags, sorted."""
    return sorted({tag[2:] for document in tags for tag in document if tag != "O"})


def tag_names(types: Iterable[str]) -> list[str]:
    """The model's classes: O, then the two tags of each type."""
    return ["O", *(f"{prefix}-{type_}" for type_ in types for prefix in "BI")]


def count_entities(found: Sequence[Entity], gold: Sequence[Entity], types: Sequence[str]) -> np.ndarray:
    """How many entities of each type are right (same words and type), found, and to be found: (types, 3)."""
    right = set(found) & set(gold)
    return np.array(
        [[sum(entity.type == type_ for entity in group) for group in (right, found, gold)] for type_ in types]
    )


def scores(counts: np.ndarray) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 in percent, with intervals, of the documents' counts (documents, 3)."""
    right, found, gold = counts.T
    pairs = {"precision": (right, found), "recall": (right, gold), "f1": (2 * right, found + gold)}
    return {name: ratio_spread(*pair)._asdict() for name, pair in pairs.items()} | {"entities": int(gold.sum())}


# --- Words and tokens


def first_tokens(word_ids: Sequence[int | None]) -> list[int]:
    """The position of each word's first token, where the word is labelled and its tag read."""
    before = [None, *word_ids][: len(word_ids)]
    return [index for index, word in enumerate(word_ids) if word is not None and word != before[index]]


def cut(sizes: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Consecutive parts of the words (first, one past the last), as long as the room allows.

    Args:
        sizes: tokens of each word.
        room: tokens of a part; a word that has more is a part of its own.
    """
    starts, used = [0], 0
    for index, size in enumerate(sizes):
        if used + size > room and index > starts[-1]:
            starts.append(index)
            used = 0
        used += size
    return list(zip(starts, [*starts[1:], len(sizes)], strict=True))


def token_counts(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How many tokens each word has; none if it consists of what the tokenizer leaves out."""
    encoding = tokenizer(words, is_split_into_words=True, add_special_tokens=False, verbose=False)
    counts = Counter(encoding.word_ids())
    return [counts[index] for index in range(len(words))]


class Examples(Dataset):
    """Token ids of the rows' parts, made when asked for, and the tags' numbers as labels.

    Args:
        rows: with ``words`` and ``tags``.
        names: the tags in the order of their numbers; words with other tags have no label.
        max_length: tokens of a part, the special ones included.
        pieces: whether parts after a row's first are read too.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, list[str]]],
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        max_length: int,
        pieces: bool,
    ):
        self.rows, self.tokenizer, self.max_length = rows, tokenizer, max_length
        self.numbers = {name: number for number, name in enumerate(names)}
        room = max_length - tokenizer.num_special_tokens_to_add()
        self.parts = []
        for number, row in enumerate(rows):
            sizes = token_counts(row["words"], tokenizer)
            parts = cut(sizes, room) if pieces else cut(sizes, room)[:1]
            # without a token there is no label, and the mean loss of no labels is no number
            self.parts += [Part(number, *part) for part in parts if any(sizes[slice(*part)])]

    def __len__(self) -> int:
        return len(self.parts)

    def encode(self, part: Part) -> tuple[dict[str, list[int]], dict[int, int]]:
        """The tokens of a part, and the position of the first one of each word that has any, by the word's number."""
        words = self.rows[part.row]["words"][part.start : part.stop]
        encoding = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        word_ids = encoding.word_ids()
        positions = {part.start + word_ids[index]: index for index in first_tokens(word_ids)}
        return dict(encoding), positions

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        part = self.parts[index]
        features, positions = self.encode(part)
        labels = [IGNORED] * len(features["input_ids"])
        for word, position in positions.items():
            labels[position] = self.numbers.get(self.rows[part.row]["tags"][word], IGNORED)
        return features | {"labels": labels}

    def tags(self, predictions: np.ndarray) -> list[list[str | None]]:
        """The tag of each row's words, None for those that were not read, from numbers of tags (parts, tokens)."""
        names = list(self.numbers)
        tags = [[None] * len(row["words"]) for row in self.rows]
        for part, numbers in zip(self.parts, predictions, strict=True):
            for word, position in self.encode(part)[1].items():
                tags[part.row][word] = names[numbers[position]]
        return tags


# --- Data


def data_fields(args: argparse.Namespace) -> dict[str, Field]:
    """The rows are ``{"words": [...], "tags": [...]}``, whatever the data calls these fields."""
    return {
        "words": Field(args.tokens_field, (list,), "list of words"),
        "tags": Field(args.tags_field, (list,), "list of tags"),
    }


def check_rows(rows: Sequence[dict[str, list]] | None, split: str) -> list[dict[str, list[str]]] | None:
    """The rows, which have words, and a BIO tag for each."""
    if rows is None:
        return None
    checked = []
    for number, row in enumerate(rows, start=1):
        words, tags, place = row["words"], row["tags"], f"{split} data, row {number}"
        if not words or len(words) != len(tags):
            raise UsageError(f"{place}: {len(words)} words and {len(tags)} tags; each word needs a tag, a row words")
        for word in words:
            if not isinstance(word, str):
                raise UsageError(f"{place}: {word!r} is no word; the words are to be strings")
        for tag in tags:
            if not isinstance(tag, str) or not TAG.fullmatch(tag):
                raise UsageError(f"{place}: {tag!r} is no BIO tag; the tags are to be O, B-TYPE and I-TYPE")
        checked.append({"words": words, "tags": tags})
    return checked


# --- Scores


def frequent_tags(rows: Iterable[dict[str, list[str]]]) -> dict[str, str]:
    """Each word's most frequent tag, the baseline that knows no context."""
    seen = defaultdict(Counter)
    for row in rows:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            seen[word][tag] += 1
    return {word: tags.most_common(1)[0][0] for word, tags in seen.items()}


def score_system(
    found: Sequence[Sequence[Entity]], gold: Sequence[Sequence[Entity]], types: Sequence[str]
) -> dict[str, dict]:
    """The scores over all types (of the summed counts), and those of each type."""
    counts = np.stack([count_entities(*pair, types) for pair in zip(found, gold, strict=True)])  # by document and type
    return {"all": scores(counts.sum(1))} | {type_: scores(counts[:, i]) for i, type_ in enumerate(types)}


def describe(document: Sequence[Entity], words: Sequence[str]) -> list[dict]:
    return [entity._asdict() | {"text": " ".join(words[entity.start : entity.stop])} for entity in document]


def score_test(trainer: Trainer, examples: Examples, lookup: Mapping[str, str]) -> tuple[dict, list[dict]]:
    """The scores of the model and of the baseline on the same documents: a summary, and each document's entities."""
    started = time.perf_counter()
    output = trainer.predict(examples)
    seconds = time.perf_counter() - started
    # with several processes, the last batch may have been filled up
    tags = examples.tags(output.predictions[: len(examples)])
    rows = examples.rows
    gold = [entities(row["tags"]) for row in rows]
    found = [entities([tag or "O" for tag in document]) for document in tags]
    looked_up = [entities([lookup.get(word, "O") for word in row["words"]]) for row in rows]
    types = entity_types([*(row["tags"] for row in rows), examples.numbers])
    results = {
        "systems": {
            "model": score_system(found, gold, types),
            "each word's most frequent tag": score_system(looked_up, gold, types),
        },
        "test_documents": len(rows),
        "words": sum(map(len, tags)),
        "words_not_read": sum(document.count(None) for document in tags),
        "entities_not_read": sum(
            None in document[entity.start : entity.stop]
            for document, wanted in zip(tags, gold, strict=True)
            for entity in wanted
        ),
        "test_loss": output.metrics["test_loss"],
        "test_seconds": seconds,
    }
    documents = [
        {"predictions": describe(made, row["words"]), "references": describe(wanted, row["words"])}
        for made, wanted, row in zip(found, gold, rows, strict=True)
    ]
    return results, documents


def format_table(results: dict) -> str:
    """The results as Markdown."""
    lines = ["| system | type | entities | precision | recall | F1 |", "| --- | --- | --- | --- | --- | --- |"]
    for system, found in results["systems"].items():
        shown = found if system == "model" else {"all": found["all"]}
        for type_, score in shown.items():
            cells = [
                "{mean:.1f} ({low:.1f}-{high:.1f})".format_map(score[name]) for name in ("precision", "recall", "f1")
            ]
            lines.append(f"| {system} | {type_} | {score['entities']:,} | " + " | ".join(cells) + " |")
    facts = (
        f"{results['test_documents']:,} test documents read {results['max_length']:,} tokens at a time"
        f"{', in pieces' if results['pieces'] else ''}; {results['words_not_read']:,} of their {results['words']:,} words "
        f"were not read,\nand so {results['entities_not_read']:,} entities missed. Exact spans, in percent, with 95 % "
        f"bootstrap intervals over documents.\n{results['steps']:,} steps, seed {results['seed']}, test loss "
        f"{results['test_loss']:.3f}; {results['train_seconds']:,.0f} s of training and "
        f"{results['test_seconds']:,.0f} s of testing on {results['device']}."
    )
    return "\n".join(lines) + f"\n\n{facts}\n\n```text\n{results['command']}\n```\n"


# --- Model and Trainer


class TagTrainer(MeanOverTokens, Trainer):
    """A Trainer in whose steps all tags count alike."""


def build_trainer(
    args: argparse.Namespace,
    arguments: Arguments,
    examples: Mapping[str, Examples | None],
    model_path: str | Path,
) -> Trainer:
    """Model and Trainer, which predicts the tags' numbers."""
    set_seed(args.seed)
    numbers, tokenizer = examples["train"].numbers, examples["train"].tokenizer
    model = load_pretrained(
        AutoModelForTokenClassification,
        model_path,
        id2label={number: name for name, number in numbers.items()},
        label2id=numbers,
    )
    enable_gradient_checkpointing(model, args)
    return TagTrainer(
        model=model,
        args=arguments,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        data_collator=DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED),
        preprocess_logits_for_metrics=best_classes,
        **{TOKENIZER_ARGUMENT: tokenizer},
    )


def build_examples(
    args: argparse.Namespace, rows: Mapping[str, list[dict[str, list[str]]] | None], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Examples | None]:
    """Each split's documents, with the tags of the training data."""
    types = entity_types(row["tags"] for row in rows["train"])
    if not types:
        raise UsageError("the train data has no entities: all its tags are O, and some are to be B-TYPE and I-TYPE")
    names = tag_names(types)
    examples = {
        split: found and Examples(found, tokenizer, names, args.max_length, args.pieces)
        for split, found in rows.items()
    }
    for split, found in examples.items():
        if found is not None and not len(found):
            raise UsageError(f"the {split} data has no word that the tokenizer knows")
    return examples


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which must be able to say which word a token belongs to; there must be room for one."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not tokenizer.is_fast:
        raise UsageError(
            f"--model {args.model} has no fast tokenizer (tokenizer.json), which says whose tokens are whose"
        )
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if args.max_length < shortest:
        raise UsageError(f"--max-length {args.max_length} leaves no room for words: it is to be {shortest} or more")
    return tokenizer


def best_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What is kept of the logits (batch, tokens, classes): a number for each token."""
    return logits.argmax(-1)


def run(args: argparse.Namespace, command: str) -> str | None:
    """Train, save, test; the table of results, or None without test data or in a process other than the first."""
    arguments = Arguments(**training_keywords(args))
    with arguments.main_process_first(desc="reading the data"):
        rows = {split: check_rows(found, split) for split, found in load_splits(args, data_fields(args)).items()}
    check_validation(args, rows)
    args.max_length = check_length("--max-length", args.max_length, load_pretrained(AutoConfig, args.model))
    examples = build_examples(args, rows, load_tokenizer(args))
    if arguments.process_index == 0:
        check_same_run(args, FREE)
    trained = train(args.output, lambda checkpoint: build_trainer(args, arguments, examples, checkpoint or args.model))
    trainer = trained.trainer
    save_final(trainer, args.output)
    if rows["test"] is None:
        return None
    scored, documents = score_test(trainer, examples["test"], frequent_tags(rows["train"]))
    if not trainer.is_world_process_zero():
        return None
    results = (
        scored
        | describe_run(args, command, trained)
        | {
            "train_documents": len(rows["train"]),
            "max_length": args.max_length,
            "pieces": args.pieces,
        }
    )
    table = format_table(results)
    write_results(args.output, results, table, documents)
    return table


# --- Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    data = add_data_options(parser, ["tokens", "tags"])
    data.add_argument("--max-length", type=positive, help="tokens read at once; None: the model's positions")
    data.add_argument("--pieces", action="store_true", help="read what is beyond in further pieces of that length")
    add_training_options(parser)
    args = parser.parse_args(argv)
    check_data_options(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("run_token_classification", lambda command: run(args, command), argv)


if __name__ == "__main__":
    sys.exit(main())
