"""The encoder and its heads: equal to ALBERT where they must be, to the oracle everywhere."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lsg_albert
from conftest import TINY
from helpers import checkpoint_activations
from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM, LSGAlbertModel
from lsg_albert.conversion.tensors import convert_state_dict
from lsg_albert.lsg_compat import is_checkpointing
from lsg_albert.lsg_outputs import select_states, token_loss
from lsg_albert.lsg_pattern import SPARSITY_TYPES
from oracle import oracle_encoder

TYPES = SPARSITY_TYPES
HEADS = [
    "Model",
    "ForPreTraining",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
]


def random_inputs(batch=2, length=45, vocab_size=TINY["vocab_size"], generator=None):
    input_ids = torch.randint(5, vocab_size, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, length - length // 3 :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def labels_for(head, batch=2, length=45):
    """The label arguments of a head."""
    if head == "ForPreTraining":
        return {"labels": torch.randint(0, 120, (batch, length)), "sentence_order_label": torch.tensor([0, 1])}
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([1, 500]), "end_positions": torch.tensor([3, -7])}
    if head in ("ForMaskedLM", "ForTokenClassification"):
        labels = torch.randint(0, 3, (batch, length))
        labels[:, 1::4] = -100
        return {"labels": labels}
    return {} if head == "Model" else {"labels": torch.tensor([0, 1])}


def albert_and_lsg(head, **fields):
    """transformers' own ALBERT with random weights, and its conversion with the first token masked."""
    sizes = {name: value for name, value in TINY.items() if "block" not in name}
    num_labels = 2 if head == "ForQuestionAnswering" else 3
    albert_config = transformers.AlbertConfig(**sizes, num_labels=num_labels)
    albert = getattr(transformers, "Albert" + head)(albert_config).eval()
    config = LSGAlbertConfig(
        **{**TINY, "num_labels": num_labels, "block_size": 32, "mask_first_token": True, **fields}
    )
    lsg = getattr(lsg_albert, "LSGAlbert" + head)(config).eval()
    converted = convert_state_dict(albert.state_dict(), max_length=176, bos_token_id=2, mask_token_id=4, stride=1)
    lsg.load_state_dict(converted)
    return albert, lsg


@pytest.mark.parametrize("length", [1, 2, 31, 63, 64])
@pytest.mark.parametrize("head", HEADS)
def test_short_texts_give_the_outputs_of_albert(head, length):
    albert, lsg = albert_and_lsg(head)
    inputs = random_inputs(length=length)
    inputs["input_ids"][:, 0] = 2  # [CLS], of which the global token is made
    inputs["token_type_ids"] = torch.arange(length).expand(2, -1) // 20 % 2
    inputs["token_type_ids"][:, 0] = 0
    if head == "ForMultipleChoice":
        inputs = {name: tensor[:, None].repeat(1, 3, 1) for name, tensor in inputs.items()}
    labels = labels_for(head, length=length)
    if head == "ForPreTraining":  # ALBERT's loss is for two orders only, whatever its number of labels
        labels.pop("sentence_order_label")
    with torch.no_grad():
        expected, actual = albert(**inputs, **labels), lsg(**inputs, **labels)
    compared = [name for name in expected.keys() if name in actual.keys()]
    assert len(compared) >= (2 if labels and head != "ForPreTraining" else 1)
    real = inputs["attention_mask"].bool()
    for name in compared:
        if name == "loss" and head == "ForQuestionAnswering":
            continue  # it reads masked positions, whose outputs mean nothing
        if expected[name].shape[:2] == real.shape and real.ndim == 2 and head != "ForSequenceClassification":
            expected[name], actual[name] = expected[name][real], actual[name][real]
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_loss_of_pretraining_is_the_sum_of_both(tiny_config):
    model = lsg_albert.LSGAlbertForPreTraining(tiny_config()).eval()
    inputs, labels = random_inputs(), labels_for("ForPreTraining")
    output = model(**inputs, **labels)
    expected = F.cross_entropy(output.prediction_logits.flatten(0, 1), labels["labels"].flatten())
    expected = expected + F.cross_entropy(output.sop_logits, labels["sentence_order_label"])
    torch.testing.assert_close(output.loss, expected)
    assert model(**inputs, labels=labels["labels"]).loss is None


@pytest.mark.parametrize(
    "head", ["ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForConditionalGeneration"]
)
@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda n: torch.tensor([[n]])])
def test_losses_of_the_batches_of_a_step_add_up_to_the_mean_over_its_labels(tiny_config, head, kind):
    model = getattr(lsg_albert, "LSGAlbert" + head)(tiny_config(num_labels=3)).eval()
    inputs = random_inputs(batch=4)
    labels = torch.randint(0, 3, (4, 45))
    for row, count in enumerate((0, 1, 7, 40)):
        labels[row, count:] = -100
    inputs["labels"] = labels
    if head == "ForPreTraining":
        inputs["sentence_order_label"] = torch.tensor([0, 1, 1, 2])
    with torch.no_grad():
        outputs = model(**inputs)
        whole = model(**inputs, num_items_in_batch=kind(48)).loss
        parts = [model(**{k: x[i : i + 2] for k, x in inputs.items()}, num_items_in_batch=kind(48)) for i in (0, 2)]
        single = model(**{k: x[:1] for k, x in inputs.items()}, num_items_in_batch=kind(48))
    expected = F.cross_entropy(outputs[1].flatten(0, 1), labels.flatten())
    if head == "ForPreTraining":  # each text's order counts as often as it has labels
        orders = F.cross_entropy(outputs.sop_logits, inputs["sentence_order_label"], reduction="none")
        expected = expected + (orders * torch.tensor([0, 1, 7, 40])).sum() / 48
    assert whole.shape == ()
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(parts[0].loss + parts[1].loss, expected)
    assert single.loss == 0  # a batch without labels adds nothing
    if head != "ForPreTraining":
        torch.testing.assert_close(whole, outputs.loss)


def test_loss_of_a_large_step_does_not_overflow_in_half_precision():
    logits = torch.randn(9000, 4).half() * 30
    labels = torch.randint(0, 4, (9000,))
    expected = F.cross_entropy(logits.float(), labels)
    torch.testing.assert_close(token_loss(logits, labels, 9000), expected, rtol=1e-3, atol=0)


@st.composite
def encoders(draw):
    """A small encoder in float64 and inputs for it."""
    block = draw(st.sampled_from([2, 4, 6]))
    factor = draw(st.sampled_from([f for f in range(1, block + 1) if block % f == 0]))
    mask_first = draw(st.booleans())
    groups = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 2, 2)]))
    fields = {
        "block_size": block,
        "sparse_block_size": draw(st.sampled_from([0, block // 2, block, 2 * block, 2 * block + 1])),
        "sparsity_factor": draw(st.sampled_from([0, factor])),
        "sparsity_type": draw(st.sampled_from(TYPES)),
        "num_global_tokens": draw(st.integers(1, 3)),
        "mask_first_token": mask_first,
        "pool_with_global": mask_first or draw(st.booleans()),
        "pack_padding": draw(st.booleans()),
        "lsh_num_pre_rounds": draw(st.integers(0, 2)),
        "num_hidden_layers": groups[0],
        "num_hidden_groups": groups[1],
        "inner_group_num": groups[2],
        "hidden_size": 8,
        "num_attention_heads": draw(st.sampled_from([1, 2])),
        "intermediate_size": 8,
        "embedding_size": 4,
    }
    try:
        config = LSGAlbertConfig(**{**TINY, **fields})
    except ValueError:
        assume(False)
    torch.manual_seed(draw(st.integers(0, 2**32)))
    model = LSGAlbertModel(config).double().eval()
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 7 * block))
    attention_mask = (torch.rand(batch, length) < draw(st.sampled_from([0.0, 0.7, 1.0]))).long()
    return model, torch.randint(5, 120, (batch, length)), attention_mask


def oracle_outputs(model, **inputs):
    projections = [[p.double() for p in call] for call in model.encoder.projections_of_calls()]
    state_dict = dict(model.named_parameters())
    return oracle_encoder(state_dict, model.config, projections_per_layer=projections, **inputs)


def blocks_of_padding(config, attention_mask):
    """Where `pack_padding` gives zeros, (batch, length) bool: in the blocks behind a row's last visible token, but for
    the first block, of texts that are not attended to as a whole."""
    length, block = attention_mask.shape[1], config.block_size
    if not config.pack_padding or length <= 2 * block:
        return torch.zeros_like(attention_mask, dtype=torch.bool)
    rows = []
    for row in attention_mask.tolist():
        visible = [j for j in range(config.mask_first_token, length) if row[j]]
        last_block = max(visible, default=0) // block
        rows.append([j // block > last_block for j in range(length)])
    return torch.tensor(rows)


@settings(max_examples=60, deadline=None)
@given(encoders())
def test_every_output_is_the_oracles(case):
    model, input_ids, attention_mask = case
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    with torch.no_grad():
        expected = oracle_outputs(model, **inputs)
        actual = model(**inputs, output_attentions=True, output_hidden_states=True)
    length = input_ids.shape[1]
    is_blank = blocks_of_padding(model.config, attention_mask)[..., None]
    states = expected["last_hidden_state"].masked_fill(is_blank, 0)
    torch.testing.assert_close(actual.last_hidden_state, states, rtol=0, atol=1e-9)
    for name in ("pooler_output", "global_hidden_states"):
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-9)
    assert len(actual.hidden_states) == model.config.num_hidden_layers + 1
    assert len(actual.attentions) == model.config.num_hidden_layers * model.config.inner_group_num
    for ours, theirs in zip(actual.hidden_states, expected["hidden_states"], strict=True):
        assert ours.shape == (*input_ids.shape, model.config.hidden_size)
        torch.testing.assert_close(ours, theirs.masked_fill(is_blank, 0), rtol=0, atol=1e-9)
    size = model.config.num_global_tokens + length
    for ours, theirs in zip(actual.attentions, expected["attentions"], strict=True):
        assert ours.shape == (len(input_ids), model.config.num_attention_heads, size, size)
        is_query = ~F.pad(is_blank, (0, 0, model.config.num_global_tokens, 0), value=False)[:, None]
        torch.testing.assert_close(ours * is_query, theirs[..., :size, :size] * is_query, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))


@settings(max_examples=25, deadline=None)
@given(encoders())
def test_gradients_of_all_parameters_are_the_oracles(case):
    model, input_ids, attention_mask = case
    parameters = dict(model.named_parameters())
    cotangent = torch.randn(*input_ids.shape, model.config.hidden_size, dtype=torch.float64)
    cotangent *= attention_mask[..., None]  # the outputs of padding mean nothing, and are zeros in blocks left out

    def gradients(last_hidden_state):
        return torch.autograd.grad((last_hidden_state * cotangent).sum(), parameters.values(), allow_unused=True)

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    ours = gradients(model(**inputs).last_hidden_state)
    expected = gradients(oracle_outputs(model, **inputs)["last_hidden_state"])
    for name, gradient, expected_gradient in zip(parameters, ours, expected, strict=True):
        zero = torch.zeros_like(parameters[name])
        gradient, expected_gradient = (zero if g is None else g for g in (gradient, expected_gradient))
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity_factor": 1, "sparse_block_size": 12},
        {"sparsity_factor": 2, "num_global_tokens": 2},
        {"sparsity_factor": 2, "sparse_block_size": 4, "mask_first_token": True},
        {"sparsity_factor": 8, "sparse_block_size": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_right_padding_changes_no_real_token(tiny_config, sparsity_type, fields):
    config = tiny_config(sparsity_type=sparsity_type, **fields)
    model = LSGAlbertForMaskedLM(config).eval()
    for length in (1, 7, 16, 17, 24, 45):
        text = torch.randint(5, 120, (1, length))
        alone = model(text).logits
        for padded_length in (length + 1, 16, 17, 48, 88, 131):
            if padded_length < length:
                continue
            input_ids = torch.randint(5, 120, (2, padded_length))  # a longer document beside it
            input_ids[0] = 0
            input_ids[0, :length] = text
            attention_mask = torch.ones(2, padded_length)
            attention_mask[0, length:] = 0
            padded = model(input_ids, attention_mask).logits[:1, :length]
            torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparsity_type", TYPES)
def test_rows_of_a_batch_do_not_meet(tiny_config, sparsity_type):
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type)).eval()
    inputs = random_inputs(3, 61)
    together = model(**inputs).last_hidden_state
    for row in range(3):
        alone = model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}).last_hidden_state
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("sparsity_type", TYPES)
def test_eager_and_sdpa_agree_and_switch_at_run_time(tiny_config, sparsity_type):
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type)).eval()
    assert model.config._attn_implementation == "sdpa"
    inputs = random_inputs()
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected)
    with pytest.raises(ValueError, match='"flash_attention_2".*"sdpa".*"eager"'):
        model.set_attn_implementation("flash_attention_2")


def test_nothing_that_was_passed_in_is_modified(tiny_config):
    for head in HEADS:
        model = getattr(lsg_albert, "LSGAlbert" + head)(tiny_config(mask_first_token=True, num_labels=2)).train()
        before_config = model.config.to_dict()
        inputs = {**random_inputs(), **labels_for(head), "position_ids": torch.arange(45)[None]}
        if head == "ForTokenClassification":
            inputs["labels"] = inputs["labels"].clamp(max=1)
        if head == "ForMultipleChoice":
            inputs = {n: x[:, None].repeat(1, 2, 1) if x.ndim == 2 else x for n, x in inputs.items()}
            inputs["position_ids"] = inputs["position_ids"].repeat(2, 1, 1)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
        if "loss" in output:
            output.loss.backward()
        assert all(torch.equal(inputs[name], before[name]) for name in inputs), head
        assert model.config.to_dict() == before_config, head


@pytest.mark.parametrize("mask", ["bool", "int", "float"])
def test_masks_of_any_dtype_mean_the_same(tiny_config, mask):
    model = LSGAlbertModel(tiny_config()).eval()
    inputs = random_inputs()
    expected = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].to({"bool": torch.bool, "int": torch.int32, "float": torch.float32}[mask])
    assert torch.equal(model(inputs["input_ids"], mask).last_hidden_state, expected)


@pytest.mark.parametrize("sparsity_type", TYPES)
def test_a_row_without_real_tokens_stays_finite(tiny_config, sparsity_type):
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type, mask_first_token=True))
    inputs = random_inputs()
    inputs["attention_mask"][1] = 0
    output = model(**inputs)
    output.last_hidden_state.square().sum().backward()
    assert torch.isfinite(output.last_hidden_state).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_inputs_embeds_and_positions_stand_for_ids(tiny_config):
    model = LSGAlbertModel(tiny_config()).eval()
    inputs = random_inputs()
    expected = model(**inputs).last_hidden_state
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(by_embeds.last_hidden_state, expected)
    positions = torch.arange(45)[None]
    for position_ids in (positions, positions.repeat(2, 1)):
        assert torch.equal(model(**inputs, position_ids=position_ids).last_hidden_state, expected)
    assert not torch.equal(model(**inputs, position_ids=positions + 1).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": torch.ones(1, 4).long(), "inputs_embeds": torch.ones(1, 4, 16)}, "exactly one"),
        ({"input_ids": torch.ones(4).long()}, r"`input_ids` must have the shape \(batch, length\), got \(4,\)"),
        ({"inputs_embeds": torch.ones(1, 4, 32)}, r"`embedding_size` \(16\)"),
        ({"input_ids": torch.ones(1, 0).long()}, "length 0"),
        ({"input_ids": torch.ones(1, 177).long()}, "177 tokens.*`max_position_embeddings` is 176.*convert"),
        ({"input_ids": torch.ones(2, 9).long(), "attention_mask": torch.ones(2, 1, 9)}, r"got the shape \(2, 1, 9\)"),
        ({"input_ids": torch.ones(2, 9).long(), "attention_mask": torch.ones(9)}, "`attention_mask`"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[0, -1e4]])},
            "1 for real .* other values",
        ),
        ({"input_ids": torch.ones(1, 4).long(), "head_mask": torch.ones(2, 4)}, "`head_mask` is not supported"),
    ],
)
def test_wrong_inputs_are_named(tiny_config, call, message):
    with pytest.raises(ValueError, match=message):
        LSGAlbertModel(tiny_config())(**call)


def test_without_adaptive_a_bad_length_is_an_error_and_a_good_one_is_not(tiny_config):
    model = LSGAlbertModel(tiny_config(adaptive=False)).eval()
    adaptive = LSGAlbertModel(tiny_config()).eval()
    adaptive.load_state_dict(model.state_dict())
    for length in (1, 13, 16, 24, 88):
        ids = torch.randint(5, 120, (1, length))
        assert torch.equal(model(ids).last_hidden_state, adaptive(ids).last_hidden_state)
    with pytest.raises(ValueError, match=r"length 45 .*`block_size` \(8\).*adaptive=True"):
        model(torch.ones(1, 45).long())


def test_multiple_choice_names_the_shape_that_it_was_given(tiny_config):
    model = lsg_albert.LSGAlbertForMultipleChoice(tiny_config())
    with pytest.raises(ValueError, match=r"`attention_mask` must have .* = \(2, 3, 9\), got \(2, 9\)"):
        model(torch.ones(2, 3, 9).long(), torch.ones(2, 9))


def test_decoders_are_refused(tiny_config):
    with pytest.raises(ValueError, match="`is_decoder=True` is not supported"):
        LSGAlbertModel(tiny_config(is_decoder=True))


def test_hidden_act_that_does_not_exist_is_named(tiny_config):
    with pytest.raises(ValueError, match="`hidden_act` 'gelu_nev' is unknown.*'gelu_new'"):
        LSGAlbertModel(tiny_config(hidden_act="gelu_nev"))


def test_fields_set_after_construction_are_checked_by_the_model(tiny_config):
    config = tiny_config()
    config.sparsity_factor = 3
    with pytest.raises(ValueError, match=r"`block_size` \(8\) must be divisible by `sparsity_factor` \(3\)"):
        LSGAlbertModel(config)


@pytest.mark.parametrize("problem", ["single", "multi", "regression", "regression2"])
def test_losses_of_sequence_classification(tiny_config, problem):
    num_labels = {"single": 3, "multi": 3, "regression": 1, "regression2": 2}[problem]
    problem_type = "regression" if problem == "regression2" else None
    config = tiny_config(num_labels=num_labels, problem_type=problem_type, classifier_dropout_prob=0.0)
    model = lsg_albert.LSGAlbertForSequenceClassification(config)
    labels = {
        "single": torch.tensor([2, 0]),
        "multi": torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
        "regression": torch.tensor([0.3, -2]),
        "regression2": torch.tensor([[0.3, -2], [1, 0]]),
    }[problem]
    output = model(**random_inputs(), labels=labels)
    expected = {
        "single": lambda x: F.cross_entropy(x, labels),
        "multi": lambda x: F.binary_cross_entropy_with_logits(x, labels),
        "regression": lambda x: F.mse_loss(x[:, 0], labels),
        "regression2": lambda x: F.mse_loss(x, labels),
    }[problem](output.logits)
    torch.testing.assert_close(output.loss, expected)


def test_kind_of_loss_with_a_typing_mistake_trains_nothing(tiny_config):
    model = lsg_albert.LSGAlbertForSequenceClassification(tiny_config(num_labels=3))
    model.config.problem_type = "singel_label_classification"
    with pytest.raises(ValueError, match="`problem_type` .* did you mean 'single_label_classification'"):
        model(**random_inputs(), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("length", [12, 100])
@pytest.mark.parametrize("head", [*HEADS, "ForConditionalGeneration"])
def test_outputs_of_an_empty_batch_are_empty(tiny_config, head, length):
    model = getattr(lsg_albert, "LSGAlbert" + head)(tiny_config()).eval()
    ids = torch.randint(5, 120, (2, 3, length) if head == "ForMultipleChoice" else (2, length))
    asked = {"output_attentions": True, "output_hidden_states": True}
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        full = model(**inputs, **asked)
        empty = model(**{name: x[:0] for name, x in inputs.items()}, **asked)
        assert empty.keys() == full.keys()
        for name, tensors in full.items():
            if isinstance(tensors, (tuple, torch.Tensor)):
                pairs = (
                    zip(tensors, empty[name], strict=True) if isinstance(tensors, tuple) else [(tensors, empty[name])]
                )
                assert all(none.shape == (0, *some.shape[1:]) for some, none in pairs), name
    embeds = torch.zeros(0, *ids.shape[1:], 16)
    assert model(inputs_embeds=embeds, **({"decoder_input_ids": ids[:0]} if "Gen" in head else {}))[0].shape[0] == 0
    if head != "ForMultipleChoice":
        for rows in (0, 1):  # positions of each row, or of all
            positions = torch.arange(length).expand(rows, length)
            assert model(ids[:0], position_ids=positions)[0].shape[0] == 0


@pytest.mark.parametrize("head", ["Model", "ForQuestionAnswering"])
@pytest.mark.parametrize("fields", [{}, {"pack_padding": False}, {"mask_first_token": True}], ids=str)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_asking_for_maps_changes_nothing_else(tiny_config, sparsity_type, fields, head):
    model = getattr(lsg_albert, "LSGAlbert" + head)(tiny_config(sparsity_type=sparsity_type, **fields)).eval()
    for length in (12, 45):
        inputs = random_inputs(4, length)
        inputs["attention_mask"][1, length // 3 :] = 0  # whole blocks of padding
        inputs["attention_mask"][2, : length // 2] = 0
        inputs["attention_mask"][3] = 0
        with torch.no_grad():
            expected = model(**inputs, output_hidden_states=True)
            actual = model(**inputs, output_hidden_states=True, output_attentions=True)
            maps_alone = model(**inputs, output_attentions=True).attentions
        for name, tensors in expected.items():
            torch.testing.assert_close(actual[name], tensors, rtol=0, atol=2e-5)
        torch.testing.assert_close(maps_alone, actual.attentions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("length", [12, 45])
def test_hooks_on_any_module_get_tensors_and_may_replace_them(tiny_config, length, maps):
    """As captum hooks the output of a layer: each is a tensor, or a tuple of nothing but tensors."""
    model = lsg_albert.LSGAlbertForSequenceClassification(tiny_config()).eval()
    inputs = random_inputs(length=length)
    expected = model(**inputs, output_attentions=maps).logits

    def double(module, args, output):
        assert all(isinstance(x, torch.Tensor) for x in args[:1]), type(module)
        if isinstance(output, tuple):
            assert output[0].ndim >= 2
            return tuple(x.clone() * 2 for x in output)
        return output.clone() * 2

    group = model.albert.encoder.albert_layer_groups[0]
    for module in (group.albert_layers[0], group.albert_layers[0].attention, model.albert.embeddings):
        hook = module.register_forward_hook(double)
        assert not torch.allclose(model(**inputs, output_attentions=maps).logits, expected)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        model(inputs_embeds=embeds, output_attentions=maps)
        hook.remove()


@pytest.mark.parametrize("head", HEADS)
def test_tuples_hold_what_the_outputs_hold(tiny_config, head):
    model = getattr(lsg_albert, "LSGAlbert" + head)(tiny_config(num_labels=2)).eval()
    inputs = random_inputs()
    if head == "ForMultipleChoice":
        inputs = {name: tensor[:, None] for name, tensor in inputs.items()}
    by_name = model(**inputs, output_hidden_states=True)
    by_place = model(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(by_place, tuple)
    for one, other in zip(by_place, by_name.to_tuple(), strict=True):
        torch.testing.assert_close(one, other)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_select_states_takes_indices():
    states = [torch.tensor(i) for i in range(4)]
    assert select_states(states, None) is None and select_states(states, False) is None
    assert select_states(states, True) == tuple(states)
    assert select_states(states, 0) == (states[0], None, None, None)
    assert select_states(states, [1, -1, 9]) == (None, states[1], None, states[3])


def test_feed_forward_in_chunks_changes_nothing(tiny_config):
    whole = LSGAlbertModel(tiny_config()).eval()
    chunked = LSGAlbertModel(tiny_config(chunk_size_feed_forward=5)).eval()
    chunked.load_state_dict(whole.state_dict())
    inputs = random_inputs()
    torch.testing.assert_close(chunked(**inputs).last_hidden_state, whole(**inputs).last_hidden_state)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("sparsity_type", ["norm", "lsh"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_config, sparsity_type, use_reentrant):
    model = LSGAlbertForMaskedLM(tiny_config(sparsity_type=sparsity_type, lsh_seed=None)).train()
    inputs, labels = random_inputs(), labels_for("ForMaskedLM")

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        model(**inputs, **labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    checkpoint_activations(model, use_reentrant=use_reentrant)
    assert is_checkpointing(model)
    calls = []
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    layer.attention.register_forward_hook(lambda *_: calls.append(1))
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(calls) == 2 * model.config.num_hidden_layers, "the layers were not computed again"


@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_alberts(sparsity_type, dtype):
    albert, lsg = albert_and_lsg("Model", sparsity_type=sparsity_type, block_size=8)
    inputs = random_inputs(length=61)
    exact_albert, exact = albert(**inputs).last_hidden_state, lsg(**inputs).last_hidden_state
    low_albert = albert.to(dtype)(**inputs).last_hidden_state
    low = lsg.to(dtype)(**inputs).last_hidden_state
    assert low.dtype == dtype
    # In the mean: a single token may move further where rounding changes which keys are selected.
    allowed = 2 * (low_albert.float() - exact_albert).abs().mean()
    assert (low.float() - exact).abs().mean() <= allowed


@pytest.mark.parametrize("new_size", [100, 130])
def test_resized_embeddings_stay_tied(tiny_config, new_size, tmp_path):
    model = LSGAlbertForMaskedLM(tiny_config()).eval()
    ids = torch.randint(5, 90, (1, 30))
    before = model(ids).logits
    model.resize_token_embeddings(new_size)
    words, head = model.get_input_embeddings(), model.predictions
    assert model.config.vocab_size == words.num_embeddings == len(head.decoder.weight) == len(head.bias) == new_size
    assert head.decoder.weight is words.weight and head.decoder.bias is head.bias
    kept = min(new_size, 120)
    torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    again = LSGAlbertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.predictions.decoder.weight is again.get_input_embeddings().weight


def test_untied_embeddings_are_two(tiny_config):
    model = LSGAlbertForMaskedLM(tiny_config(tie_word_embeddings=False))
    assert model.predictions.decoder.weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("sparsity_type", TYPES)
def test_compiles_without_graph_breaks(tiny_config, sparsity_type):
    model = LSGAlbertForMaskedLM(tiny_config(sparsity_type=sparsity_type)).eval()
    inputs = random_inputs()
    expected = model(**inputs).logits
    torch._dynamo.reset()  # the limit of compilations counts those of other tests' models
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected)
    model.train()
    labels = labels_for("ForMaskedLM")
    torch.testing.assert_close(compiled(**inputs, **labels).loss, model(**inputs, **labels).loss)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity_type", ["norm", "lsh"])
def test_compiled_by_inductor_gives_the_same_outputs_and_gradients(tiny_config, sparsity_type):
    model = LSGAlbertForMaskedLM(tiny_config(sparsity_type=sparsity_type))
    inputs = {**random_inputs(), **labels_for("ForMaskedLM")}
    expected = model(**inputs)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True)(**inputs)
    actual.loss.backward()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_lsh_is_the_same_on_every_call_and_leaves_the_random_state_alone(tiny_config):
    model = LSGAlbertModel(tiny_config(sparsity_type="lsh")).eval()
    inputs = random_inputs()
    state = torch.get_rng_state()
    first, second = model(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    other = LSGAlbertModel(tiny_config(sparsity_type="lsh", lsh_seed=1)).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.equal(other(**inputs).last_hidden_state, first)


@torch.no_grad()
def test_lsh_keeps_its_projections_in_every_dtype_and_however_it_was_made(tiny_config, tmp_path):
    config = tiny_config(sparsity_type="lsh")
    model = LSGAlbertModel(config).eval()
    expected = [call[0] for call in model.encoder.projections_of_calls()]
    model.save_pretrained(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        in_float64 = LSGAlbertModel(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        on_meta = LSGAlbertModel(config)
    on_meta = on_meta.to_empty(device="cpu")
    on_meta.apply(on_meta._init_weights)
    for other in (model.half().float(), in_float64, on_meta, LSGAlbertModel.from_pretrained(tmp_path)):
        calls = other.encoder.projections_of_calls()
        assert all(torch.equal(call[0], drawn) for call, drawn in zip(calls, expected, strict=True))


def test_offloaded_weights_are_fetched_for_every_part(tiny_config):
    accelerate = pytest.importorskip("accelerate")
    model = LSGAlbertForMaskedLM(tiny_config()).eval()
    inputs = random_inputs()
    expected = model(**inputs).logits
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(offloaded(**inputs).logits, expected)


@pytest.mark.parametrize("sparsity_type", TYPES)
def test_runs_on_the_meta_device(tiny_config, sparsity_type):
    model = LSGAlbertForMaskedLM(tiny_config(sparsity_type=sparsity_type)).to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in random_inputs().items()}
    assert model(**inputs).logits.shape == (2, 45, 120)


@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(tiny_config, sparsity_type, dtype):
    model = LSGAlbertForMaskedLM(tiny_config(sparsity_type=sparsity_type))
    inputs = {**random_inputs(), **labels_for("ForMaskedLM")}
    expected = model(**inputs).loss
    with torch.autocast("cpu", dtype):
        loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_fields_set_after_the_model_was_made_do_not_change_it(tiny_config):
    model = LSGAlbertModel(tiny_config()).eval()
    inputs = random_inputs()
    expected = model(**inputs).last_hidden_state
    model.config.num_global_tokens, model.config.block_size, model.config.sparsity_type = 3, 4, "pooling"
    assert torch.equal(model(**inputs).last_hidden_state, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_gives_the_same_outputs_on_a_gpu(tiny_config, sparsity_type):
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type)).eval()
    inputs = random_inputs()
    expected = model(**inputs).last_hidden_state
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    actual = model.cuda()(**inputs).last_hidden_state
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.isfinite(model(**inputs).last_hidden_state).all()


def test_lsh_without_a_seed_draws_anew_from_the_global_generator(tiny_config):
    model = LSGAlbertModel(tiny_config(sparsity_type="lsh", lsh_seed=None)).eval()
    inputs = random_inputs()
    torch.manual_seed(3)
    first, second = model(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model(**inputs).last_hidden_state, first)


def test_dropout_acts_in_training_only(tiny_config):
    config = tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = LSGAlbertModel(config).train()
    inputs = random_inputs()
    assert not torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    model.eval()
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_position_embedding_types_without_positions_add_none(tiny_config):
    model = LSGAlbertModel(tiny_config(position_embedding_type="relative_key")).eval()
    ids = torch.randint(5, 120, (1, 12))
    shifted = torch.arange(12)[None] + 5
    assert torch.equal(model(ids).last_hidden_state, model(ids, position_ids=shifted).last_hidden_state)


def test_long_documents_of_the_base_size_run(tiny_config):
    config = tiny_config(block_size=128, sparse_block_size=128, max_position_embeddings=4096)
    model = LSGAlbertForMaskedLM(config).eval()
    with torch.no_grad():
        output = model(torch.randint(5, 120, (1, 4001)))
    assert output.logits.shape == (1, 4001, 120) and torch.isfinite(output.logits).all()


@pytest.mark.parametrize("length", [12, 45])
def test_gradients_reach_the_states_and_maps_that_are_returned(tiny_config, length):
    model = LSGAlbertModel(tiny_config()).eval()
    output = model(**random_inputs(length=length), output_attentions=True, output_hidden_states=True)
    returned = [*output.hidden_states, *output.attentions]
    for tensor in returned:
        tensor.retain_grad()
    output.last_hidden_state[0, 0, 0].backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in returned)


def test_what_is_not_asked_for_is_not_kept(tiny_config):
    model = LSGAlbertModel(tiny_config())
    states, text_states, maps = model.encoder(torch.randn(1, 21, 16), torch.ones(1, 20, dtype=torch.bool))
    assert not text_states and not maps
    output = model(**random_inputs(), output_hidden_states=[0])
    assert output.attentions is None and [x is None for x in output.hidden_states] == [False, True, True]
    assert model(**random_inputs(), output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_fused_activation_is_the_plain_one_and_steps_aside_for_a_hook(tiny_config, hidden_act):
    """With gradients, or with somebody who listens to the linear layer, the plain modules run."""
    model = LSGAlbertModel(tiny_config(hidden_act=hidden_act)).eval()
    inputs, heard = random_inputs(), []
    plain = model(**inputs).last_hidden_state
    with torch.no_grad():
        fused = model(**inputs).last_hidden_state
        layer = model.encoder.albert_layer_groups[0].albert_layers[0].ffn
        layer.register_forward_hook(lambda module, args, output: heard.append(output))
        hooked = model(**inputs).last_hidden_state
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hooked, plain, rtol=1e-5, atol=1e-5)
    assert len(heard) == model.config.num_hidden_layers


# Several texts in a row

LENGTHS = (3, 45, 16, 1, 100)


def packed(lengths=LENGTHS, first=0):
    """Texts one by one (1, length), and all of them in one row with the positions that tell them apart."""
    texts = [torch.randint(5, 120, (1, length)) for length in lengths]
    positions = torch.cat([torch.arange(first, first + length) for length in lengths])[None]
    return texts, {"input_ids": torch.cat(texts, dim=1), "position_ids": positions}


@pytest.mark.parametrize("fields", [{}, {"mask_first_token": True, "num_global_tokens": 3}], ids=str)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_packed_texts_are_what_they_are_alone(tiny_config, sparsity_type, fields):
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type, max_position_embeddings=100, **fields)).eval()
    texts, row = packed()
    types = torch.randint(0, 2, row["input_ids"].shape)
    alone = [
        model(text, token_type_ids=part, output_hidden_states=True)
        for text, part in zip(texts, types.split(LENGTHS, dim=1), strict=True)
    ]
    embeds = {"inputs_embeds": model.get_input_embeddings()(row["input_ids"]), "position_ids": row["position_ids"]}
    for inputs in (row, embeds):
        output = model(**inputs, token_type_ids=types, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        for i, states in enumerate(output.hidden_states):
            expected = torch.cat([x.hidden_states[i] for x in alone], dim=1)
            torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
        assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
        for name in ("pooler_output", "global_hidden_states"):
            torch.testing.assert_close(output[name], torch.cat([x[name] for x in alone]), rtol=0, atol=1e-5)


def test_packed_texts_give_the_gradients_that_they_give_alone(tiny_config):
    model = LSGAlbertForMaskedLM(tiny_config())
    texts, row = packed()
    labels = torch.randint(5, 120, row["input_ids"].shape)
    parts = zip(texts, labels.split(LENGTHS, dim=1), strict=True)
    losses = [model(text, labels=part, num_items_in_batch=labels.numel()).loss for text, part in parts]
    expected = torch.autograd.grad(sum(losses), model.parameters())
    loss = model(**row, labels=labels).loss
    torch.testing.assert_close(loss, sum(losses))
    for actual, exact in zip(torch.autograd.grad(loss, model.parameters()), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-6)


def test_rows_of_packed_texts_may_be_several_and_padded(tiny_config):
    model = LSGAlbertModel(tiny_config()).eval()
    (first, second), row = packed((30, 15))
    (third,), _ = packed((40,))
    ids = torch.cat([row["input_ids"], F.pad(third, (0, 5))])
    mask = (ids != 0).long()
    for padding in (0, 1, 40):  # positions of padding are of any kind
        positions = torch.cat([row["position_ids"], F.pad(torch.arange(40), (0, 5), value=padding)[None]])
        states = model(ids, mask, position_ids=positions).last_hidden_state
        torch.testing.assert_close(states[:1, :30], model(first).last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(states[:1, 30:], model(second).last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(states[1:, :40], model(third).last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model(ids[:1].repeat(2, 1), position_ids=row["position_ids"]).last_hidden_state, states[:1].repeat(2, 1, 1)
    )


def test_packed_positions_may_begin_above_zero(tiny_config):
    model = LSGAlbertModel(tiny_config()).eval()
    texts, row = packed((20, 30), first=2)
    alone = [model(text, position_ids=torch.arange(2, 2 + text.shape[1])[None]).last_hidden_state for text in texts]
    torch.testing.assert_close(model(**row).last_hidden_state, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        (torch.arange(7, 47), torch.ones(40)),
        (torch.zeros(40).long(), torch.ones(40)),
        (torch.randperm(40), torch.ones(40)),
        (torch.arange(40) // 2, torch.ones(40)),
        (F.pad(torch.arange(30), (10, 0)), torch.arange(40) >= 10),  # padding on the left, in two conventions
        (F.pad(torch.arange(30), (10, 0), value=1), torch.arange(40) >= 10),
        (F.pad(torch.arange(30), (0, 10)), torch.arange(40) < 30),
    ],
)
def test_positions_of_one_text_stay_positions(tiny_config, positions, mask):
    model = LSGAlbertModel(tiny_config()).eval()
    inputs = {
        "input_ids": torch.randint(5, 120, (1, 40)), "attention_mask": mask.bool()[None],
        "position_ids": positions[None],
    }  # fmt: skip
    expected = oracle_outputs(model, **inputs)["last_hidden_state"].float()
    actual = model(**inputs).last_hidden_state
    torch.testing.assert_close(actual[0, mask.bool()], expected[0, mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "head",
    [
        "ForPreTraining",
        "ForSequenceClassification",
        "ForQuestionAnswering",
        "ForMultipleChoice",
        "ForConditionalGeneration",
    ],
)
def test_packed_texts_below_a_head_for_rows_are_refused(tiny_config, head):
    model = getattr(lsg_albert, "LSGAlbert" + head)(tiny_config()).eval()
    _, row = packed()
    if head == "ForMultipleChoice":
        row = {name: x[:, None] for name, x in row.items()}
    with pytest.raises(ValueError, match="`position_ids` begin again within a row.*head"):
        model(**row)


def test_packed_texts_in_ways_that_do_not_work_are_refused(tiny_config):
    model = LSGAlbertModel(tiny_config()).eval()
    _, row = packed()
    with pytest.raises(ValueError, match="`position_ids` begin again within a row.*maps"):
        model(**row, output_attentions=True)
    with pytest.raises(ValueError, match="`position_ids` must have the shape"):
        model(row["input_ids"], position_ids=row["position_ids"][0])
    with pytest.raises(ValueError, match="`input_ids` has 177 tokens"):
        model(**packed((3, 177))[1])
    for name in ("seq_idx", "cu_seq_lens_q", "max_length_k"):
        with pytest.raises(ValueError, match=f"`{name}` is not supported.*`position_ids`"):
            LSGAlbertForMaskedLM(tiny_config())(**row, **{name: torch.zeros(1, 165)})
    with pytest.raises(ValueError, match="trace"):
        torch.jit.trace(lambda ids, positions: model(ids, position_ids=positions)[0], tuple(row.values()))


@pytest.mark.slow
def test_packed_texts_are_told_apart_in_a_compiled_model(tiny_config):
    model = LSGAlbertModel(tiny_config()).eval()
    compiled = torch.compile(model, backend="eager")
    for lengths in ((20, 30), (50,)):
        _, row = packed(lengths)
        torch.testing.assert_close(compiled(**row).last_hidden_state, model(**row).last_hidden_state)
