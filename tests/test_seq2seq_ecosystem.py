"""Generation, training and loading of the sequence-to-sequence model as transformers' users do it."""

import inspect
import itertools

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EncoderDecoderCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    pipeline,
)

from helpers import (
    ROOT,
    cache_of,
    checkpointing_arguments,
    logged_warnings,
    run_in_new_process,
    write_repository,
)  # fmt: skip
from lsg_albert import LSGAlbertForConditionalGeneration, LSGAlbertForMaskedLM
from lsg_albert.lsg_compat import CACHE_FIELD

TRANSFORMERS = Version(transformers.__version__)
VOCAB = 16000  # of the root's tokenizer
START, EOS, PAD = 2, 3, 0


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


def make(config):
    """A random model whose choices depend on the text, and are not always the same."""
    model = LSGAlbertForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 2 else 0.1)
            if name.lower().endswith("norm.weight"):
                parameter.add_(1)
    return model


@pytest.fixture(scope="module")
def model(tiny_config):
    return make(tiny_config(vocab_size=20))


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    attention_mask = torch.ones(3, 45, dtype=torch.long)
    attention_mask[1, 11:], attention_mask[2, 30:] = 0, 0
    return {"input_ids": torch.randint(5, 20, (3, 45), generator=generator), "attention_mask": attention_mask}


# Generation


@torch.no_grad()
def next_scores(model, inputs, row, tokens):
    """Log-probabilities (V) of what follows some tokens: of one row, without cache."""
    one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    return model(**one, decoder_input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)


def greedy_reference(model, inputs, row, length):
    tokens = [START]
    while len(tokens) <= length and tokens[-1] != EOS:
        tokens.append(int(next_scores(model, inputs, row, tokens).argmax()))
    return tokens


def beam_reference(model, inputs, row, length, num_beams):
    """The best finished text of a beam search without length penalty, ended only by its length."""
    beams = [([START], 0.0)]
    for _ in range(length):
        longer = [
            ([*tokens, token], score + float(scores[token]))
            for tokens, score in beams
            for scores in [next_scores(model, inputs, row, tokens)]
            for token in range(model.config.vocab_size)
            if token != EOS
        ]
        beams = sorted(longer, key=lambda beam: -beam[1])[:num_beams]
    return beams


def without_padding(row):
    """A generated row up to its end token."""
    row = row.tolist()
    return row[: row.index(EOS) + 1] if EOS in row else row


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("passed", [True, False])
def test_greedy_search_is_the_reference_in_a_padded_batch(tiny_config, inputs, passed, use_cache):
    model = make(tiny_config(vocab_size=20, pass_global_tokens_to_decoder=passed, inner_group_num=2))
    tokens = model.generate(**inputs, max_new_tokens=9, use_cache=use_cache)
    for row in range(3):
        assert without_padding(tokens[row]) == greedy_reference(model, inputs, row, 9)
    assert len({tuple(row.tolist()) for row in tokens}) > 1, "the encoder's text makes no difference"


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_is_the_reference(model, inputs, num_beams):
    options = {"num_beams": num_beams, "max_new_tokens": 5, "min_new_tokens": 5, "num_return_sequences": num_beams}
    if TRANSFORMERS < Version("4.50"):
        options["length_penalty"] = 0.0  # older releases count the start token in, which all have
    output = model.generate(
        **inputs, **options, bad_words_ids=[[EOS]], return_dict_in_generate=True, output_scores=True
    )
    for row in range(3):
        expected = beam_reference(model, inputs, row, 5, num_beams)
        actual = output.sequences[row * num_beams : (row + 1) * num_beams].tolist()
        assert actual == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_caches_change_no_text(model, inputs, options):
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(model.generate(**inputs, **options, max_new_tokens=12, use_cache=use_cache))
    assert torch.equal(*texts)


def test_sampling_follows_the_probabilities(model, inputs):
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    drawn = model.generate(**one, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=2000)
    assert drawn.shape == (2000, 2) and set(drawn[:, 0].tolist()) == {START}
    shares = drawn[:, 1].bincount(minlength=20) / 2000
    expected = next_scores(model, inputs, 0, [START]).exp()
    torch.testing.assert_close(shares, expected, rtol=0, atol=5 * 0.5 / 2000**0.5)


def test_lengths_and_returned_sequences_are_as_asked(model, inputs):
    assert model.generate(**inputs, max_new_tokens=6, min_new_tokens=6).shape == (3, 7)
    assert model.generate(**inputs, max_length=6, min_length=6).shape == (3, 6)
    tokens = model.generate(**inputs, max_length=8, num_beams=4, num_return_sequences=3)
    assert tokens.shape[0] == 9 and tokens.shape[1] <= 8 and (tokens[:, 0] == START).all()
    sampled = model.generate(**inputs, max_new_tokens=8, do_sample=True, num_return_sequences=2)
    assert sampled.shape[0] == 6
    forced = model.generate(**inputs, decoder_input_ids=torch.tensor([[START, 9, 11]] * 3), max_new_tokens=2)
    assert (forced[:, 1:3] == torch.tensor([9, 11])).all()


def test_prompts_of_unequal_length_go_on_as_each_alone(model, inputs):
    prompts = [[START, 9, 11, 7], [START, 8]]
    two = {name: tensor[:2] for name, tensor in inputs.items()}
    tokens = model.generate(
        **two,
        decoder_input_ids=torch.tensor([prompts[0], [PAD, PAD, *prompts[1]]]),
        decoder_attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        max_new_tokens=5, min_new_tokens=5,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        one = {name: tensor[row : row + 1] for name, tensor in two.items()}
        alone = model.generate(**one, decoder_input_ids=torch.tensor([prompt]), max_new_tokens=5, min_new_tokens=5)
        assert tokens[row, -5:].tolist() == alone[0, -5:].tolist()


def test_encoder_runs_once_and_each_token_once(model, inputs):
    calls = []
    hooks = [
        model.albert.register_forward_hook(lambda *_: calls.append("encoder")),
        model.decoder.layer.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[1])),
        model.decoder.cross_attentions[0][0].key.register_forward_hook(lambda *_: calls.append("keys")),
    ]
    model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, num_beams=3)
    for hook in hooks:
        hook.remove()
    assert calls == ["encoder", "keys", *[1] * 12]


def test_encoder_outputs_stand_for_the_text(model, inputs):
    expected = model.generate(**inputs, max_new_tokens=7, num_beams=2)
    encoder_outputs = model.get_encoder()(**inputs)
    given = {"encoder_outputs": encoder_outputs, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(model.generate(**given, max_new_tokens=7, num_beams=2), expected)


def test_generation_goes_on_from_the_cache_that_it_returned(model, inputs):
    options = {"return_dict_in_generate": True, "min_new_tokens": 1}
    whole = model.generate(**inputs, max_new_tokens=7, min_new_tokens=7)
    first = model.generate(**inputs, max_new_tokens=4, **{**options, "min_new_tokens": 4})
    rest = model.generate(
        **inputs, decoder_input_ids=first.sequences, **{CACHE_FIELD: cache_of(first)},
        max_new_tokens=3, **{**options, "min_new_tokens": 3},
    )  # fmt: skip
    assert torch.equal(rest.sequences, whole)


def test_all_that_generate_can_return_has_its_shape(model, inputs):
    output = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, num_beams=2, return_dict_in_generate=True,
        output_attentions=True, output_hidden_states=True, output_scores=True,
    )  # fmt: skip
    assert len(output.decoder_attentions) == len(output.cross_attentions) == len(output.scores) == 4
    for step in range(4):
        assert [x.shape for x in output.decoder_attentions[step]] == [(6, 4, 1, step + 1)] * 2
        assert [x.shape for x in output.cross_attentions[step]] == [(6, 4, 1, 46)] * 2
        assert [x.shape for x in output.decoder_hidden_states[step]] == [(6, 1, 32)] * 3
    assert [x.shape for x in output.encoder_hidden_states] == [(3, 45, 32)] * 3
    assert [x.shape for x in output.encoder_attentions] == [(3, 4, 46, 46)] * 2
    cache = cache_of(output)
    assert isinstance(cache, EncoderDecoderCache) or (TRANSFORMERS < Version("4.50") and isinstance(cache, tuple))
    assert len(cache) == 2


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_assisted_generation_changes_no_text(tiny_config, model, inputs, way):
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    expected = model.generate(**one, max_new_tokens=14)
    assistant = LSGAlbertForConditionalGeneration(tiny_config(vocab_size=20)).eval()
    options = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {"assistant_model": assistant}
    assert torch.equal(model.generate(**one, max_new_tokens=14, **options), expected)


@pytest.mark.skipif(TRANSFORMERS >= Version("4.56"), reason="it left transformers")
def test_contrastive_search_runs_and_ends(model, inputs):
    tokens = model.generate(**inputs, penalty_alpha=0.6, top_k=3, max_new_tokens=6, min_new_tokens=6)
    assert tokens.shape == (3, 7)


def test_generation_ends_at_a_string(tiny_config, tokenizer):
    """`generate` then hands the tokenizer from step to step, which is no input of the model."""
    model = make(tiny_config(vocab_size=VOCAB))
    batch = tokenizer("The ship is old.", return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=12, min_new_tokens=12)
    stop = tokenizer.decode(tokens[0, 4:6])
    stopped = model.generate(**batch, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped.shape[1] < 13 and torch.equal(stopped[0], tokens[0, : stopped.shape[1]])


def test_generation_past_the_last_position_is_named(tiny_config):
    model = make(tiny_config(vocab_size=20, max_position_embeddings=12))
    with pytest.raises(ValueError, match="after the 12 in the cache.*`max_position_embeddings` is 12"):
        model.generate(torch.ones(1, 9).long(), max_new_tokens=20, min_new_tokens=20)


# Training


def examples(tokenizer, count=24):
    """Documents of different lengths, and the word in them that matters."""
    words = ["river", "ship", "king", "night"]
    made = []
    for i in range(count):
        word = words[i % len(words)]
        ids = tokenizer(f"The {word} is old. " * (1 + i % 5)).input_ids
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": tokenizer(word).input_ids})
    return made


@pytest.fixture
def train(tokenizer, tmp_path):
    """A factory of trainers on the CPU, quick and quiet."""

    def make_trainer(model, data, **arguments):
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 8,
            "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        return Seq2SeqTrainer(
            model=model, args=Seq2SeqTrainingArguments(**{**defaults, **arguments}), train_dataset=data,
            eval_dataset=data[:8], data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            **{"tokenizer" if TRANSFORMERS < Version("4.46") else "processing_class": tokenizer},
        )  # fmt: skip

    return make_trainer


def test_trainer_learns_generates_and_saves_a_repository(tiny_config, tokenizer, train, tmp_path):
    source = write_repository(tmp_path / "source", LSGAlbertForMaskedLM(tiny_config(vocab_size=VOCAB)))
    model = AutoModelForSeq2SeqLM.from_pretrained(source, trust_remote_code=True)
    data = examples(tokenizer)
    trainer = train(
        model, data, max_steps=30, save_strategy="steps", save_steps=30, predict_with_generate=True,
        generation_max_length=6, generation_num_beams=2,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    result = trainer.predict(data[:8])
    assert result.metrics["test_loss"] < before - 4
    texts = torch.tensor(result.predictions)  # filled up to the default length
    assert len(texts) == 8 and (texts[:, 0] == START).all()
    assert ((texts[:, 6:] == PAD) | (texts[:, 6:] == -100)).all()

    with logged_warnings() as messages:
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "checkpoint-30", trust_remote_code=True)
    assert not messages
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = tokenizer("The ship is old.", return_tensors="pt")
    assert loaded.generate(**batch, max_new_tokens=4).shape[1] <= 5


def test_trainer_predicts_without_labels_although_a_cache_is_returned(tiny_config, tokenizer, train):
    model = LSGAlbertForConditionalGeneration(tiny_config(vocab_size=VOCAB))
    in_args = {"use_cache": True} if "use_cache" in inspect.signature(TrainingArguments).parameters else {}
    data = [{name: x for name, x in example.items() if name != "labels"} for example in examples(tokenizer, 8)]
    trainer = train(model, data, **in_args)
    trainer.data_collator = DataCollatorWithPadding(tokenizer)
    assert model.config.use_cache
    logits, *states = trainer.predict(data).predictions
    assert logits.shape[0] == 8 and logits.shape[2] == VOCAB
    assert [x.shape[0] for x in states] == [8], "only the encoder's states go with the logits"


def test_label_smoothing_is_that_of_torch(tiny_config, tokenizer, train):
    model = LSGAlbertForConditionalGeneration(tiny_config(vocab_size=VOCAB))
    data = examples(tokenizer, 8)
    trainer = train(model, data, label_smoothing_factor=0.2)
    batch = trainer.data_collator([dict(example) for example in data])
    assert torch.equal(batch["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(batch["labels"]))
    logits = model(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)
    assert trainer.train().global_step == 4


def test_gradient_checkpointing_and_bfloat16_train_the_same(tiny_config, tokenizer, train):
    losses = {}
    for checkpointing, bf16 in itertools.product([False, True], [False, True]):
        torch.manual_seed(0)
        model = LSGAlbertForConditionalGeneration(tiny_config(vocab_size=VOCAB))
        trainer = train(
            model, examples(tokenizer, 16), max_steps=3, learning_rate=1e-3, bf16=bf16,
            **(checkpointing_arguments() if checkpointing else {}),
        )  # fmt: skip
        losses[checkpointing, bf16] = trainer.train().training_loss
    assert losses[True, False] == pytest.approx(losses[False, False], abs=1e-3)
    assert losses[True, True] == pytest.approx(losses[False, True], abs=1e-2)
    assert losses[False, True] == pytest.approx(losses[False, False], rel=0.05)


# Loading


def test_published_usage_runs_in_a_new_process(tiny_config, tmp_path):
    """As the cards of the published LSG checkpoints have it, with an encoder's repository in their place."""
    source = write_repository(
        tmp_path / "repository", LSGAlbertForMaskedLM(tiny_config(vocab_size=VOCAB, max_position_embeddings=4096))
    )
    code = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
repo = sys.argv[1]
model = AutoModelForSeq2SeqLM.from_pretrained(repo, trust_remote_code=True, pass_global_tokens_to_decoder=True)
tokenizer = AutoTokenizer.from_pretrained(repo)
text = "Replace by what you want."
tokenizer.model_max_length = 512
inputs = tokenizer(text, return_tensors="pt", padding="max_length", truncation=True)
outputs = model(**inputs)
assert outputs.logits.shape == (1, 512, 16000), outputs.logits.shape
assert model.config.pass_global_tokens_to_decoder and model.config.is_encoder_decoder
other = AutoModelForSeq2SeqLM.from_pretrained(repo, trust_remote_code=True, pass_global_tokens_to_decoder=False)
assert not other.config.pass_global_tokens_to_decoder
assert type(model).__module__.startswith("transformers_modules.")
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
again = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[2], trust_remote_code=True)
short = tokenizer(text, return_tensors="pt")
assert (again.generate(**short, max_new_tokens=5) == model.generate(**short, max_new_tokens=5)).all()
print("done")
"""
    result = run_in_new_process(code, source, tmp_path / "saved", cwd=tmp_path, modules_cache=tmp_path / "modules")
    assert result.stdout.endswith("done\n"), result.stdout + result.stderr


@pytest.mark.skipif(TRANSFORMERS >= Version("5"), reason="these pipelines left transformers")
@pytest.mark.parametrize(
    ("task", "key"), [("summarization", "summary_text"), ("text2text-generation", "generated_text")]
)
def test_pipelines_give_what_generate_gives(tiny_config, tmp_path, task, key):
    config = tiny_config(vocab_size=VOCAB, max_position_embeddings=4096)
    folder = write_repository(tmp_path / "repository", make(config))
    pipe = pipeline(task, model=str(folder), trust_remote_code=True, device="cpu")
    texts = ["A ship came home. " * 40, "A short text about a ship."]
    options = {"max_new_tokens": 11, "num_beams": 1}  # the pipelines of some releases have their own defaults
    answers = pipe(texts, batch_size=2, **options)
    for text, answer in zip(texts, answers, strict=True):
        tokens = pipe.model.generate(**pipe.tokenizer(text, return_tensors="pt"), **options)
        expected = pipe.tokenizer.decode(tokens[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answer[key].strip() == expected.strip()
