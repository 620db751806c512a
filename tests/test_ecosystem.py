"""Pipelines on long documents, and the Trainer, with small random models and the root's tokenizer."""

import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from helpers import ROOT, checkpointing_arguments, logged_warnings, write_repository
from lsg_albert import (
    LSGAlbertForConditionalGeneration,
    LSGAlbertForMaskedLM,
    LSGAlbertForPreTraining,
    LSGAlbertForQuestionAnswering,
    LSGAlbertForSequenceClassification,
    LSGAlbertForTokenClassification,
    LSGAlbertModel,
)
from lsg_albert.lsg_compat import is_checkpointing

VOCAB = 16000  # of the root's tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def document(tokenizer):
    words = ["A lawyer met the old captain near the harbour in London.", "He had lost his ship, and nobody asked why."]
    text = " ".join(f"{words[i % 2]} That was on day {i}." for i in range(130))
    assert 2000 < len(tokenizer(text).input_ids) < 4000
    return text


# Pipelines


@pytest.fixture(scope="module")
def pipe(tiny_config, tmp_path_factory):
    """A factory of pipelines, made from a saved repository as users do, and the model in it."""

    def make(task, model_class, **config):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "max_position_embeddings": 4096, "block_size": 32, "sparse_block_size": 32}
        folder = tmp_path_factory.mktemp("pipeline") / "repository"
        write_repository(folder, model_class(tiny_config(**sizes, **config)))
        with logged_warnings() as messages:
            made = pipeline(task, model=str(folder), trust_remote_code=True, device="cpu")
        ignored = ["Device set to use"]
        if Version(transformers.__version__) < Version("4.48"):
            ignored.append("is not supported for")  # it knows no other classes than its own
        assert not [message for message in messages if not any(part in message for part in ignored)]
        assert type(made.model).__module__.startswith("transformers_modules.")
        assert type(made.model).__name__ == model_class.__name__
        return made

    return make


def outputs_of(pipe, *text):
    with torch.no_grad():
        return pipe.model(**pipe.tokenizer(*text, return_tensors="pt"))


def test_fill_mask(pipe, document):
    fill = pipe("fill-mask", LSGAlbertForMaskedLM)
    half = len(document) // 2
    text = f"{document[:half]} [MASK] {document[half:]}"
    answers = fill(text, top_k=3)
    ids = fill.tokenizer(text, return_tensors="pt")["input_ids"][0]
    (position,) = (ids == fill.tokenizer.mask_token_id).nonzero()[0]
    assert len(ids) > 2000 and position > 1000
    scores, tokens = outputs_of(fill, text).logits[0, position].softmax(-1).topk(3)
    assert [answer["token"] for answer in answers] == tokens.tolist()
    torch.testing.assert_close(torch.tensor([answer["score"] for answer in answers]), scores, rtol=1e-4, atol=0)


def test_feature_extraction(pipe, document):
    extract = pipe("feature-extraction", LSGAlbertModel)
    features = extract(document, return_tensors=True)
    assert features.shape[1] > 2000
    torch.testing.assert_close(features, outputs_of(extract, document).last_hidden_state, rtol=0, atol=1e-5)


def test_text_classification_alone_and_in_a_batch(pipe, document):
    labels = {0: "good", 1: "bad", 2: "ugly"}
    classify = pipe("text-classification", LSGAlbertForSequenceClassification, id2label=labels)
    texts = [document, "A short one.", document[:700]]
    alone = [classify(text, top_k=None) for text in texts]
    together = classify(texts, top_k=None, batch_size=3, padding=True)
    for text, answer, batched in zip(texts, alone, together, strict=True):
        scores = outputs_of(classify, text).logits[0].softmax(-1)
        for answers in (answer, batched):
            assert {a["label"]: pytest.approx(a["score"], abs=1e-5) for a in answers} == {
                labels[i]: score for i, score in enumerate(scores.tolist())
            }


@pytest.mark.parametrize("aggregation", ["none", "simple", "first"])
def test_token_classification(pipe, document, aggregation):
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    tag = pipe("token-classification", LSGAlbertForTokenClassification, id2label=labels)
    answers = tag(document, aggregation_strategy=aggregation, ignore_labels=[])
    if aggregation == "none":
        scores = outputs_of(tag, document).logits[0, 1:-1].softmax(-1)  # without [CLS] and [SEP]
        assert len(answers) == len(scores) > 2000
        assert [answer["entity"] for answer in answers] == [labels[i] for i in scores.argmax(-1).tolist()]
        for answer, score in zip(answers, scores.max(-1).values.tolist(), strict=True):
            assert answer["score"] == pytest.approx(score, abs=1e-5)
    assert answers[-1]["end"] == len(document)


def test_zero_shot_classification(pipe, document):
    classify = pipe(
        "zero-shot-classification",
        LSGAlbertForSequenceClassification,
        id2label={0: "contradiction", 1: "neutral", 2: "entailment"},
        label2id={"contradiction": 0, "neutral": 1, "entailment": 2},
    )
    topics = ["the sea", "cooking", "law"]
    answer = classify(document, candidate_labels=topics)
    entailment = torch.stack(
        [outputs_of(classify, document, f"This example is {topic}.").logits[0, 2] for topic in topics]
    ).softmax(0)
    expected = dict(zip(topics, entailment.tolist(), strict=True))
    assert answer["labels"] == sorted(topics, key=expected.get, reverse=True)
    assert answer["scores"] == [pytest.approx(expected[topic], abs=1e-5) for topic in answer["labels"]]


# Trainer


@pytest.fixture
def train(tmp_path):
    """A factory of trainers on the CPU, quick and quiet; keywords with a `trainer_` prefix go to the Trainer."""

    def make(model, data, **arguments):
        to_trainer = {key[8:]: arguments.pop(key) for key in list(arguments) if key.startswith("trainer_")}
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": 5e-3, "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        args = TrainingArguments(**{**defaults, **arguments})
        return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, **to_trainer)

    return make


def texts(count=16, **labels):
    """Token ids of lengths from less than one to more than five blocks, with labels made by functions of them."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i in range(count):
        ids = [2, *torch.randint(5, 100, (5 + 3 * i,), generator=generator).tolist(), 3]
        examples.append({"input_ids": ids, **{name: label(ids) for name, label in labels.items()}})
    return examples


def parity(ids):
    return ids[1] % 2


@pytest.fixture
def make_classifier(tiny_config):
    def make(seed=0, **config):
        torch.manual_seed(seed)
        return LSGAlbertForSequenceClassification(tiny_config(classifier_dropout_prob=0, **config))

    return make


def assert_same_weights(model, expected, atol=1e-6):
    weights, expected = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def test_masked_language_model_learns_and_its_checkpoint_is_a_repository(tiny_config, tokenizer, train, tmp_path):
    source = write_repository(tmp_path / "source", LSGAlbertForMaskedLM(tiny_config(vocab_size=VOCAB)))
    model = AutoModelForMaskedLM.from_pretrained(source, trust_remote_code=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = train(
        model,
        texts(),
        max_steps=10,
        learning_rate=0.02,
        save_strategy="steps",
        save_steps=10,
        trainer_data_collator=collator,
    )
    assert trainer.label_names == ["labels"]
    before = trainer.evaluate()["eval_loss"]
    result = trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert result.global_step == 10
    assert after < before - 1
    assert model.predictions.decoder.weight is model.albert.embeddings.word_embeddings.weight

    checkpoint = tmp_path / "run" / "checkpoint-10"
    assert "auto_map" in json.loads((checkpoint / "config.json").read_text())
    with logged_warnings() as messages:
        loaded = AutoModelForMaskedLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert not messages
    assert_same_weights(loaded, model)


def test_classifier_is_evaluated_and_the_best_checkpoint_is_loaded(make_classifier, tokenizer, train):
    # A rate at which the loss soon rises again, so that the best step is not the last one.
    trainer = train(
        make_classifier(), texts(labels=parity), max_steps=6, learning_rate=0.3, lr_scheduler_type="constant",
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", trainer_data_collator=DataCollatorWithPadding(tokenizer),
        trainer_compute_metrics=lambda result: {
            "accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())
        },
    )  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(losses) == 6
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert_same_weights(
        trainer.model, LSGAlbertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(losses[best], abs=1e-5)
    assert 0 <= metrics["eval_accuracy"] <= 1


@pytest.mark.parametrize(("sparsity_type", "use_reentrant"), [("norm", None), ("lsh", False), ("lsh", True)])
def test_gradient_checkpointing_trains_the_same(make_classifier, tokenizer, train, sparsity_type, use_reentrant):
    trained = []
    for checkpointing in (False, True):
        kwargs = {} if use_reentrant is None else {"use_reentrant": use_reentrant}
        options = checkpointing_arguments(**kwargs) if checkpointing else {}
        trainer = train(
            make_classifier(sparsity_type=sparsity_type), texts(labels=parity), max_steps=2, **options,
            trainer_data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        trainer.train()
        assert is_checkpointing(trainer.model) == checkpointing
        trained.append(trainer.model)
    # AdamW divides by the root of a mean square: a rounding difference in a gradient near zero grows.
    assert_same_weights(*trained, atol=1e-4)


def test_resumed_training_ends_where_the_other_one_did(make_classifier, tokenizer, train, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
    collator = DataCollatorWithPadding(tokenizer)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    data = texts(labels=parity)
    straight = train(make_classifier(**dropout), data, **options, trainer_data_collator=collator)
    straight.train()
    resumed = train(make_classifier(seed=1, **dropout), data, **options, trainer_data_collator=collator)
    # The state of NumPy's generator is in the checkpoint; transformers 4.44 does not tell torch >= 2.6 to read it.
    numpy_state = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np._core.multiarray._reconstruct]
    with torch.serialization.safe_globals(numpy_state):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same_weights(resumed.model, straight.model)


def test_label_smoothing_is_that_of_torch(make_classifier, tokenizer, train):
    data = texts(8, labels=parity)
    trainer = train(
        make_classifier(), data, label_smoothing_factor=0.2, trainer_data_collator=DataCollatorWithPadding(tokenizer)
    )
    batch = DataCollatorWithPadding(tokenizer)(data)
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    expected = torch.nn.functional.cross_entropy(outputs["logits"], batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)
    assert trainer.train().global_step == 4


def test_bfloat16_autocast_trains_near_float32(make_classifier, tokenizer, train):
    losses = []
    for bf16 in (False, True):
        trainer = train(
            make_classifier(), texts(labels=parity), max_steps=2, bf16=bf16,
            trainer_data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_question_answering_labels_are_found_and_scored(tiny_config, tokenizer, train):
    data = texts(8, start_positions=lambda ids: 1, end_positions=lambda ids: len(ids) - 2)
    trainer = train(
        LSGAlbertForQuestionAnswering(tiny_config()), data, trainer_data_collator=DataCollatorWithPadding(tokenizer)
    )
    assert trainer.label_names == ["start_positions", "end_positions"]
    assert trainer.train().global_step == 4
    result = trainer.predict(data)
    longest = max(len(example["input_ids"]) for example in data)
    assert [scores.shape for scores in result.predictions] == [(8, longest)] * 2
    assert [positions.shape for positions in result.label_ids] == [(8,)] * 2
    assert result.metrics["test_loss"] > 0


def test_pretraining_labels_are_found(tiny_config, train):
    trainer = train(LSGAlbertForPreTraining(tiny_config()), texts(1))
    assert trainer.label_names == ["labels", "sentence_order_label"]


def pad_rows(examples):
    """A batch of examples whose labels are as long as their ids; what has no length is stacked."""
    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([[*row[name], *[fill[name]] * (longest - len(row[name]))] for row in examples])
        for name in fill
    }
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    if "sentence_order_label" in examples[0]:
        batch["sentence_order_label"] = torch.tensor([row["sentence_order_label"] for row in examples])
    return batch


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.48"), reason="its Trainer does not count the labels of a step"
)
@pytest.mark.parametrize(
    "model_class",
    [
        LSGAlbertForMaskedLM,
        LSGAlbertForPreTraining,
        LSGAlbertForTokenClassification,
        LSGAlbertForConditionalGeneration,
    ],
)
def test_a_step_does_not_depend_on_how_it_is_cut_into_batches(tiny_config, train, model_class):
    """Eight texts with 1 to 50 labels each, as one batch, two and eight."""
    examples = []
    for i, count in enumerate((1, 50, 3, 40, 2, 25, 1, 10)):
        ids = torch.randint(5, 100, (60 + 7 * i,)).tolist()
        labels = torch.full((len(ids),), -100)
        labels[torch.randperm(len(ids))[:count]] = torch.randint(0, 2, (count,))
        examples.append({"input_ids": ids, "labels": labels.tolist()})
        if model_class is LSGAlbertForPreTraining:
            examples[-1]["sentence_order_label"] = i % 2
    config = tiny_config(classifier_dropout_prob=0)
    start = model_class(config).state_dict()
    results = {}
    for size in (8, 4, 1):
        model = model_class(config)
        model.load_state_dict(start)
        trainer = train(
            model, examples, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1,
            optim="sgd", learning_rate=0.1, max_grad_norm=0, trainer_data_collator=pad_rows,
        )  # fmt: skip
        loss = trainer.train().training_loss
        results[size] = loss, {name: weight - start[name] for name, weight in model.state_dict().items()}
    for size in (4, 1):
        assert results[size][0] == pytest.approx(results[8][0], rel=1e-5)
        for name, update in results[8][1].items():
            torch.testing.assert_close(results[size][1][name], update, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("model_class", [LSGAlbertForMaskedLM, LSGAlbertForTokenClassification])
def test_texts_flattened_into_a_row_train_as_they_do_apart(tiny_config, train, model_class):
    """`DataCollatorWithFlattening` labels the first token of no text."""
    examples = texts(8, labels=lambda ids: [-100, *(token % 2 for token in ids[1:])])
    config = tiny_config(classifier_dropout_prob=0)
    start = model_class(config).state_dict()
    results = []
    for collator in (DataCollatorWithFlattening(), pad_rows):
        model = model_class(config)
        model.load_state_dict(start)
        options = {"per_device_train_batch_size": 8, "max_steps": 2, "trainer_data_collator": collator}
        results.append((train(model, examples, **options).train().training_loss, model))
    (loss, flattened), (expected, padded) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_weights(flattened, padded, atol=1e-4)


def test_models_whose_loss_is_a_mean_over_texts_say_so():
    """The Trainer then divides by the number of batches of a step itself."""
    for model_class in (LSGAlbertForSequenceClassification, LSGAlbertForQuestionAnswering):
        assert not hasattr(model_class, "accepts_loss_kwargs")
        parameters = inspect.signature(model_class.forward).parameters.values()
        assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
