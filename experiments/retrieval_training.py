"""Train an embedder to find the paper that a question is about among the other papers of a batch.

    python -m experiments.retrieval_training DATA --model runs/retrieval/lsg --output runs/retrieval/trained-lsg --bf16
    python -m experiments.retrieval_training DATA --model SOURCE --chunked --output runs/retrieval/trained-source --bf16

The documents are those of COVID-QA's training split. Training moves the one vector of a document and its best passage of
128 tokens (late chunking) towards its questions. With `--chunked`, it moves the mean of the chunks and the best chunk.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from experiments.retrieval import PASSAGES, covid_qa, encode_chunks, encode_pass
from pretraining.training_support import describe_machine, write_atomically

SCALE = 20.0  # scale of cosines, as in sentence-transformers' MultipleNegativesRankingLoss
PASSAGE = 128  # tokens


def training_rows(data: Path, epochs: int, questions: int) -> list[dict[str, str]]:
    """Each training document once per epoch, each time with random questions from its own."""
    collection, generator, rows = covid_qa(data), random.Random(0), []
    for _ in range(epochs):
        for number, document in enumerate(collection.documents):
            own = [each.text for each in collection.queries if each.document == number and not each.is_test]
            if own:
                chosen = (
                    generator.sample(own * questions, questions)
                    if len(own) < questions
                    else generator.sample(own, questions)
                )
                rows.append({"document": document} | {f"question {i}": text for i, text in enumerate(chosen)})
    return rows


class PassageLoss(torch.nn.Module):
    """The mean of two cross-entropies of the right document: by its one vector and by its best passage.

    Negatives are the other documents of the batch. Few long documents fit into a batch, so vectors of past batches are
    negatives, too (cross-batch memory: Wang et al., 2020, arXiv 1912.06798). The model reads documents one by one."""

    def __init__(self, model: SentenceTransformer, chunked: bool):
        super().__init__()
        self.model, self.memory = model, {}
        if chunked:
            self.encode, self.names = partial(encode_chunks, length=PASSAGE), ("mean of chunks", "best chunk")
        else:
            self.encode = partial(encode_pass, length=model.max_seq_length)
            self.names = ("one vector", f"late chunking, {PASSAGE}")

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: None = None) -> Tensor:
        documents, *questions = sentence_features
        asked = torch.cat([normalize(self.model(each)["sentence_embedding"], dim=-1) for each in questions])
        made = {}
        for ids, mask in zip(documents["input_ids"], documents["attention_mask"], strict=True):
            inner = tuple(ids[mask.bool()][1:-1].tolist())  # without [CLS] and [SEP]
            made[inner] = self.encode(self.model[0].auto_model, self.model.tokenizer, inner)
        right = torch.arange(len(made)).repeat(len(questions))
        candidates = [*made.values(), *(past for ids, past in self.memory.items() if ids not in made)]
        self.memory |= {ids: {name: each[name].detach() for name in self.names} for ids, each in made.items()}
        scores = [best_scores(asked, [each[name] for each in candidates]) for name in self.names]
        return sum(cross_entropy(SCALE * each, right) for each in scores) / len(scores)


def best_scores(asked: Tensor, documents: list[Tensor]) -> Tensor:
    """The cosine (questions, documents) between each question and the nearest vector of each document."""
    return torch.stack([(asked @ vectors.T).amax(1) for vectors in documents], dim=1)


def train(args: argparse.Namespace) -> None:
    """Train, and write the model with `training.json` in its folder.

    Raises:
        ValueError: `--length` is too short for late chunking.
    """
    if args.length <= max(PASSAGES):
        raise ValueError(
            f"--length {args.length} is too short for passages of up to {max(PASSAGES)} tokens: give a larger one."
        )
    model = SentenceTransformer(
        args.model, trust_remote_code=not args.chunked, device="cpu", config_kwargs=json.loads(args.config)
    )
    usual, model.max_seq_length = model.max_seq_length, args.length
    options = SentenceTransformerTrainingArguments(
        output_dir=str(args.output / "checkpoints"), use_cpu=True, bf16=args.bf16, per_device_train_batch_size=args.batch_size,
        num_train_epochs=1, max_steps=args.max_steps, learning_rate=args.learning_rate, warmup_ratio=0.1, logging_steps=1,
        save_strategy="no", report_to=[], batch_sampler="no_duplicates", seed=args.seed,
    )  # fmt: skip
    rows = Dataset.from_list(training_rows(args.data, args.epochs, args.questions))
    started = time.process_time()
    trainer = SentenceTransformerTrainer(model, options, train_dataset=rows, loss=PassageLoss(model, args.chunked))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.train()
    with torch.no_grad():  # a mean of old and new often generalizes better (Wortsman et al., 2022, arXiv 2109.01903)
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.lerp_(old, args.keep)
    model.max_seq_length = usual
    model.save(str(args.output))
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    facts = {"arguments": arguments, "machine": describe_machine(), "CPU seconds": time.process_time() - started}
    write_atomically(
        args.output / "training.json", json.dumps(facts | {"history": trainer.state.log_history}, indent=1).encode()
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", type=Path, help="folder with qa/covid_qa/")
    parser.add_argument(
        "--model", required=True, default=argparse.SUPPRESS, help="folder of a sentence-transformers model"
    )
    parser.add_argument(
        "--output", type=Path, required=True, default=argparse.SUPPRESS, help="folder for the trained model"
    )
    parser.add_argument("--chunked", action="store_true", help="embed each chunk alone, for models of short texts")
    parser.add_argument("--config", default="{}", help="fields of the model's config to replace, as JSON")
    parser.add_argument("--length", type=int, default=4096, help="tokens to read from a document")
    parser.add_argument("--epochs", type=int, default=1, help="how often each document is read")
    parser.add_argument("--questions", type=int, default=8, help="questions for each document in a batch")
    parser.add_argument("--batch-size", type=int, default=4, help="documents in a batch")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps; -1: only --epochs counts")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak, reached after a tenth of the steps")
    parser.add_argument("--keep", type=float, default=0.0, help="share of the old weights in the final ones")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the order of documents")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe")
    args = parser.parse_args(argv)
    try:
        train(args)
    except (OSError, ValueError) as error:
        print(f"retrieval_training: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
