"""The sequence-to-sequence model: equal to its definition, with and without caches and padding, in every class."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors import safe_open
from transformers import AlbertConfig, AlbertForMaskedLM, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import lsg_albert
from conftest import TINY
from helpers import cache_of, checkpoint_activations, logged_warnings
from lsg_albert import LSGAlbertConfig, LSGAlbertForConditionalGeneration, LSGAlbertForMaskedLM
from lsg_albert.conversion.tensors import convert_state_dict
from lsg_albert.lsg_compat import as_encoder_decoder_cache, cached
from lsg_albert.lsg_decoder import causal_visibility, shift_right, token_positions
from oracle import oracle_decoder, oracle_encoder

TRANSFORMERS = Version(transformers.__version__)
ENCODERS = sorted({name for name in lsg_albert.__all__ if name.startswith("LSGAlbertFor")} | {"LSGAlbertModel"})
ENCODERS.remove("LSGAlbertForConditionalGeneration")


def make(config, seed=0):
    """A model in which every parameter is drawn, so that none is right by being zero, one or a copy."""
    torch.manual_seed(seed)
    model = LSGAlbertForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture
def model(tiny_config):
    return make(tiny_config())


def random_inputs(batch=2, length=45, target_length=9):
    attention_mask = torch.ones(batch, length, dtype=torch.long)
    attention_mask[-1, length - length // 3 :] = 0
    return {
        "input_ids": torch.randint(5, 120, (batch, length)),
        "attention_mask": attention_mask,
        "decoder_input_ids": torch.randint(5, 120, (batch, target_length)),
    }


def oracle(model, inputs):
    encoder_inputs = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "token_type_ids")}
    weights = dict(model.albert.named_parameters())
    encoder = oracle_encoder(weights, model.config, **encoder_inputs)
    decoder_inputs = {name: x for name, x in inputs.items() if name.startswith("decoder_") or name == "attention_mask"}
    return encoder, oracle_decoder(dict(model.named_parameters()), model.config, encoder, **decoder_inputs)


# The definition


@st.composite
def models(draw):
    """A small model in float64 and inputs for it."""
    groups = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 2, 2)]))
    fields = {
        "block_size": 4,
        "sparse_block_size": 4,
        "sparsity_type": draw(st.sampled_from(["norm", "pooling", "none"])),
        "num_global_tokens": draw(st.integers(1, 3)),
        "mask_first_token": draw(st.booleans()),
        "pass_global_tokens_to_decoder": draw(st.booleans()),
        "num_hidden_layers": groups[0],
        "num_hidden_groups": groups[1],
        "inner_group_num": groups[2],
        "hidden_size": 8,
        "num_attention_heads": draw(st.sampled_from([1, 2])),
        "intermediate_size": 8,
        "embedding_size": 4,
        "position_embedding_type": draw(st.sampled_from(["absolute", "absolute", "relative_key"])),
        "attn_implementation": draw(st.sampled_from(["sdpa", "eager"])),
    }
    model = make(LSGAlbertConfig(**{**TINY, **fields}), seed=draw(st.integers(0, 2**32))).double()
    batch, length, target_length = draw(st.integers(1, 2)), draw(st.integers(1, 15)), draw(st.integers(1, 6))
    inputs = random_inputs(batch, length, target_length)
    inputs["attention_mask"] = (torch.rand(batch, length) < 0.7).long()
    inputs["attention_mask"][:, -1] = 1
    mask = draw(st.sampled_from([None, "right", "left", "random"]))
    if mask is not None:
        inputs["decoder_attention_mask"] = torch.ones(batch, target_length)
        hidden = {"right": slice(target_length // 2 + 1, None), "left": slice(target_length // 2)}
        if mask == "random":
            inputs["decoder_attention_mask"] = (torch.rand(batch, target_length) < 0.7).float()
        else:
            inputs["decoder_attention_mask"][0, hidden[mask]] = 0
    return model, inputs


@settings(max_examples=40, deadline=None)
@given(models())
def test_every_output_is_the_oracles(case):
    model, inputs = case
    with torch.no_grad():
        encoder, decoder = oracle(model, inputs)
        actual = model(**inputs, output_attentions=True, output_hidden_states=True)
        without_maps = model(**inputs).logits
    torch.testing.assert_close(actual.logits, decoder["logits"], rtol=0, atol=1e-9)
    torch.testing.assert_close(without_maps, decoder["logits"], rtol=0, atol=1e-9)
    torch.testing.assert_close(actual.encoder_last_hidden_state, encoder["last_hidden_state"], rtol=0, atol=1e-9)
    expected = {
        "decoder_hidden_states": decoder["hidden_states"],
        "decoder_attentions": decoder["attentions"],
        "cross_attentions": decoder["cross_attentions"],
        "encoder_hidden_states": encoder["hidden_states"],
    }
    for name, tensors in expected.items():
        assert len(actual[name]) == len(tensors), name
        for ours, theirs in zip(actual[name], tensors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert len(actual.encoder_attentions) == len(actual.decoder_attentions)


@settings(max_examples=12, deadline=None)
@given(models())
def test_gradients_of_all_parameters_are_the_oracles(case):
    model, inputs = case
    parameters = dict(model.named_parameters())
    cotangent = torch.randn(*inputs["decoder_input_ids"].shape, 120, dtype=torch.float64)

    def gradients(logits):
        return torch.autograd.grad((logits * cotangent).sum(), parameters.values(), allow_unused=True)

    ours, expected = gradients(model(**inputs).logits), gradients(oracle(model, inputs)[1]["logits"])
    for name, gradient, other in zip(parameters, ours, expected, strict=True):
        zero = torch.zeros_like(parameters[name])
        gradient, other = (zero if g is None else g for g in (gradient, other))
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_causal_visibility_is_the_pattern():
    mask = torch.tensor([[0, 1, 0, 1]], dtype=torch.bool)
    expected = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    assert torch.equal(causal_visibility(mask, 2, 2, mask.device)[0, 0], expected)
    assert torch.equal(causal_visibility(None, 0, 3, mask.device)[0, 0], torch.ones(3, 3).tril().bool())
    assert token_positions(mask, 2, 2, mask.device).tolist() == [[0, 1]]
    assert token_positions(None, 2, 2, mask.device).tolist() == [[2, 3]]


def test_both_attentions_agree_and_switch_at_run_time(model):
    inputs = random_inputs()
    inputs["decoder_attention_mask"] = torch.ones(2, 9)
    inputs["decoder_attention_mask"][0, :4] = 0
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


# What the decoder reads


@pytest.mark.parametrize("given", ["input_ids", "labels"])
def test_without_decoder_inputs_they_are_shifted_right(model, given):
    inputs = random_inputs(length=12)
    inputs.pop("decoder_input_ids")
    ids = inputs["input_ids"]
    if given == "labels":
        ids = inputs["labels"] = torch.randint(5, 120, (2, 7))
        ids[0, 3:] = -100
    shifted = torch.cat([torch.full((2, 1), 2), ids[:, :-1].clamp(min=0)], dim=1)
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(ids), shifted)
    output = model(**inputs)
    inputs.pop("labels", None)
    torch.testing.assert_close(output.logits, model(**inputs, decoder_input_ids=shifted).logits)


def test_start_token_comes_from_the_config_or_is_asked_for(tiny_config):
    assert make(tiny_config()).config.decoder_start_token_id == 2
    assert make(tiny_config(decoder_start_token_id=7)).config.decoder_start_token_id == 7
    model = make(tiny_config(bos_token_id=None))
    ids = torch.randint(5, 120, (1, 6))
    with pytest.raises(ValueError, match="no `decoder_start_token_id`.*`bos_token_id`.*`decoder_input_ids`"):
        model(ids)
    assert model(ids, decoder_input_ids=ids).logits.shape == (1, 6, 120)
    with pytest.raises(ValueError, match="no `pad_token_id`"):
        shift_right(ids, 2, None)


def test_loss_is_the_cross_entropy_of_unshifted_labels(model):
    inputs = random_inputs()
    labels = torch.randint(5, 120, (2, 9))
    labels[1, 4:] = -100
    output = model(**inputs, labels=labels)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    assert cache_of(output) is None
    torch.testing.assert_close(output.logits, model(**inputs).logits)


def test_embeddings_stand_for_ids(model):
    inputs = random_inputs()
    expected = model(**inputs).logits
    words = model.get_input_embeddings()
    by_embeds = model(
        inputs_embeds=words(inputs["input_ids"]),
        attention_mask=inputs["attention_mask"],
        decoder_inputs_embeds=words(inputs["decoder_input_ids"]),
    )
    assert torch.equal(by_embeds.logits, expected)


def test_token_types_and_positions_are_the_encoders(model):
    inputs = random_inputs()
    extra = {"token_type_ids": torch.arange(45).expand(2, -1) % 2, "position_ids": torch.arange(45)[None] + 3}
    encoder_outputs = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"], **extra)
    expected = model(**{**inputs, "input_ids": None}, encoder_outputs=encoder_outputs).logits
    torch.testing.assert_close(model(**inputs, **extra).logits, expected)
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)


@pytest.mark.parametrize("passed", [True, False])
def test_global_tokens_reach_the_decoder_only_if_passed_on(tiny_config, passed):
    model = make(tiny_config(num_global_tokens=3, pass_global_tokens_to_decoder=passed))
    inputs = random_inputs()
    output = model(**inputs, output_attentions=True)
    assert output.cross_attentions[0].shape == (2, 4, 9, 45 + 3 * passed)
    encoder_outputs = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
    encoder_outputs.global_hidden_states = encoder_outputs["global_hidden_states"] = torch.randn(2, 3, 32)
    inputs.pop("input_ids")
    logits = model(**inputs, encoder_outputs=encoder_outputs).logits
    assert torch.allclose(logits, output.logits, atol=1e-5) != passed


@pytest.mark.parametrize("passed", [True, False])
def test_outputs_of_the_encoder_come_by_name_or_as_a_tuple(tiny_config, passed):
    model = make(tiny_config(pass_global_tokens_to_decoder=passed))
    inputs = random_inputs()
    expected = model(**inputs, output_attentions=True, output_hidden_states=True)
    encoder_inputs = {name: inputs.pop(name) for name in ("input_ids",)}
    for wanted in ({}, {"output_attentions": True}, {"output_hidden_states": True}, {"output_hidden_states": [0]}):
        outputs = {
            return_dict: model.get_encoder()(
                **encoder_inputs, attention_mask=inputs["attention_mask"], return_dict=return_dict, **wanted
            )
            for return_dict in (True, False)
        }
        for encoder_outputs in outputs.values():
            actual = model(**inputs, encoder_outputs=encoder_outputs)
            torch.testing.assert_close(actual.logits, expected.logits)
            assert (actual.encoder_attentions is None) == ("output_attentions" not in wanted)
            assert (actual.encoder_hidden_states is None) == ("output_hidden_states" not in wanted)
    states = expected.encoder_last_hidden_state
    for encoder_outputs in (BaseModelOutput(states), (states,)):
        if passed:
            with pytest.raises(ValueError, match="no `global_hidden_states`.*`pass_global_tokens_to_decoder=False`"):
                model(**inputs, encoder_outputs=encoder_outputs)
        else:
            torch.testing.assert_close(model(**inputs, encoder_outputs=encoder_outputs).logits, expected.logits)


# Padding


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("sparsity_type", ["norm", "pooling", "bos_pooling"])
def test_padding_of_the_encoders_batch_changes_nothing(tiny_config, sparsity_type, passed):
    model = make(tiny_config(sparsity_type=sparsity_type, pass_global_tokens_to_decoder=passed))
    for length in (1, 16, 45):
        text, target = torch.randint(5, 120, (1, length)), torch.randint(5, 120, (1, 6))
        alone = model(text, decoder_input_ids=target).logits
        for padded_length in (length + 1, 60, 131):
            input_ids = torch.randint(5, 120, (2, padded_length))
            input_ids[0, length:] = 0
            input_ids[0, :length] = text
            attention_mask = torch.ones(2, padded_length)
            attention_mask[0, length:] = 0
            padded = model(input_ids, attention_mask, decoder_input_ids=target.expand(2, -1)).logits[:1]
            torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_of_the_decoder_on_either_side_changes_nothing(tiny_config, implementation, side):
    model = make(tiny_config(attn_implementation=implementation))
    inputs = random_inputs(target_length=5)
    expected = model(**inputs).logits
    before = (3, 0) if side == "left" else (0, 3)
    padded = {
        "decoder_input_ids": F.pad(inputs["decoder_input_ids"], before),
        "decoder_attention_mask": F.pad(torch.ones(2, 5), before),
    }
    real = padded["decoder_attention_mask"][0].bool()
    output = model(**{**inputs, **padded}).logits
    torch.testing.assert_close(output[:, real], expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_row_without_real_tokens_sees_them_all(tiny_config, implementation):
    model = make(tiny_config(pass_global_tokens_to_decoder=False, attn_implementation=implementation))
    inputs = random_inputs()
    states = model.get_encoder()(inputs.pop("input_ids"))
    inputs["attention_mask"] = torch.stack([torch.zeros(45), torch.ones(45)])
    output = model(**inputs, encoder_outputs=states).logits
    assert torch.equal(output, model(**{**inputs, "attention_mask": None}, encoder_outputs=states).logits)


def test_rows_of_a_batch_do_not_meet(model):
    inputs = random_inputs(3)
    together = model(**inputs).logits
    for row in range(3):
        alone = model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


# Caches


def decode_in_parts(model, inputs, parts, cache=None):
    """The logits of a decoder that reads its tokens in parts of those lengths, with what the encoder returned once."""
    inputs = dict(inputs)
    encoder_inputs = (inputs.pop("input_ids"), inputs["attention_mask"])
    encoder_outputs = model.get_encoder()(*encoder_inputs)
    tokens, mask = inputs.pop("decoder_input_ids"), inputs.pop("decoder_attention_mask", None)
    logits, done = [], 0
    for part in parts:
        done += part
        if mask is not None:
            inputs["decoder_attention_mask"] = mask[:, :done]
        output = model(
            **inputs,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=tokens[:, done - part : done],
            cache=cache,
            use_cache=True,
        )
        cache = cache_of(output)
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("groups", [(2, 1, 1), (3, 2, 1), (2, 1, 2), (4, 2, 3)], ids=str)
def test_cached_and_uncached_logits_agree(tiny_config, groups, padding):
    sizes = dict(zip(("num_hidden_layers", "num_hidden_groups", "inner_group_num"), groups, strict=True))
    model = make(tiny_config(**sizes))
    inputs = random_inputs(target_length=7)
    if padding is not None:
        inputs["decoder_attention_mask"] = torch.ones(2, 7)
        inputs["decoder_attention_mask"][0, slice(3) if padding == "left" else slice(4, None)] = 0
    expected = model(**inputs, use_cache=False)
    assert cache_of(expected) is None
    for parts in ([1] * 7, [3, 1, 1, 2], [7], [1, 6]):
        actual, cache = decode_in_parts(model, inputs, parts)
        torch.testing.assert_close(actual, expected.logits, rtol=1e-5, atol=1e-5)
    assert isinstance(cache, EncoderDecoderCache)
    num_entries = groups[0] * groups[2]
    for part, length in ((cache.self_attention_cache, 7), (cache.cross_attention_cache, 46)):
        assert len(part) == num_entries
        assert cached(part, 0)[0].shape == cached(part, 0)[1].shape == (2, 4, length, 8)
    # Layers of one group share what the encoder's states give: it is held once, with one token for the others.
    lengths = [cached(cache.cross_attention_cache, i)[0].shape[2] for i in range(num_entries)]
    assert sorted(lengths) == [1] * (num_entries - groups[1] * groups[2]) + [46] * (groups[1] * groups[2])


def test_cache_that_was_cropped_goes_on_from_there(model):
    inputs = random_inputs(target_length=8)
    expected = model(**inputs, use_cache=False).logits
    _, cache = decode_in_parts(model, inputs, [6])
    cache.crop(4 if TRANSFORMERS < Version("5.1") else -2)
    rest = model(
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=inputs["decoder_input_ids"][:, 4:],
        cache=cache,
    )
    torch.testing.assert_close(rest.logits, expected[:, 4:], rtol=1e-5, atol=1e-5)


def test_reordered_cache_is_that_of_the_reordered_batch(model):
    inputs = random_inputs(3, target_length=5)
    order = torch.tensor([2, 0, 0])
    expected = model(**{name: tensor[order] for name, tensor in inputs.items()}).logits[:, -1]
    tokens = inputs.pop("decoder_input_ids")
    cache = cache_of(model(**inputs, decoder_input_ids=tokens[:, :4]))
    cache.reorder_cache(order)
    output = model(
        attention_mask=inputs["attention_mask"][order],
        decoder_input_ids=tokens[order, 4:],
        cache=cache,
    )
    torch.testing.assert_close(output.logits[:, -1], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_caches_of_every_kind_are_taken(model):
    inputs = random_inputs(target_length=5)
    expected = model(**inputs).logits[:, -1:]
    tokens = inputs.pop("decoder_input_ids")
    cache = cache_of(model(**inputs, decoder_input_ids=tokens[:, :4]))
    ways = {"whole": copy.deepcopy(cache), "self-attention alone": copy.deepcopy(cache.self_attention_cache)}
    if hasattr(cache, "to_legacy_cache"):
        ways["legacy"] = cache.to_legacy_cache()
        assert len(ways["legacy"]) == len(cache)
    for way, cache in ways.items():
        output = model(**inputs, decoder_input_ids=tokens[:, 4:], cache=cache)
        torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5, msg=lambda m, w=way: f"{w}: {m}")
        assert len(cached(cache_of(output).self_attention_cache, 1)[0][0, 0]) == 5
    empty = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert cache_of(model(**inputs, decoder_input_ids=tokens, cache=empty)) is empty
    with pytest.raises(ValueError, match="`EncoderDecoderCache`.*got dict"):
        model(**inputs, decoder_input_ids=tokens, cache={})
    assert as_encoder_decoder_cache(empty) is empty


@torch.no_grad()
def test_cache_is_taken_under_either_name_but_not_under_both(model):
    inputs = random_inputs(target_length=5)
    tokens = inputs.pop("decoder_input_ids")
    logits = []
    for name in ("cache", "past_key_values"):
        cache = cache_of(model(**inputs, decoder_input_ids=tokens[:, :4]))
        logits.append(model(**inputs, decoder_input_ids=tokens[:, 4:], **{name: cache}).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        model(**inputs, decoder_input_ids=tokens, cache=cache, past_key_values=cache)


def test_next_token_costs_no_encoder_and_no_keys_again(model):
    inputs = random_inputs()
    cache = cache_of(model(**inputs))
    calls, cross_attention = [], model.decoder.cross_attentions[0][0]
    modules = {
        "encoder": model.albert.encoder, "keys": cross_attention.key, "values": cross_attention.value,
        "layer": model.decoder.layer, "words": model.albert.embeddings.word_embeddings,
    }  # fmt: skip
    for name, module in modules.items():
        module.register_forward_hook(lambda _, args, __, name=name: calls.append((name, args[0].shape[1])))
    output = model(attention_mask=inputs["attention_mask"], decoder_input_ids=torch.tensor([[7], [8]]), cache=cache)
    assert calls == [("words", 1), ("layer", 1), ("layer", 1)]
    assert output.logits.shape == (2, 1, 120) and output.encoder_last_hidden_state is None


def test_a_decoding_step_gets_what_it_needs_and_nothing_else(model):
    inputs = random_inputs(target_length=5)
    tokens, encoder_outputs = inputs["decoder_input_ids"], model.get_encoder()(inputs["input_ids"])
    cache = cache_of(model(**inputs))
    given = {"encoder_outputs": encoder_outputs, "attention_mask": inputs["attention_mask"], "use_cache": True}
    used_up = {"token_type_ids": tokens, "cache_position": torch.arange(5), "is_first_iteration": False, "new": 1}
    longer = torch.cat([tokens, tokens[:, :2]], dim=1)
    step = model.prepare_inputs_for_generation(longer, cache=cache, **given, **used_up)
    assert step.keys() == {*given, "decoder_input_ids", "cache"}
    assert torch.equal(step["decoder_input_ids"], tokens[:, :2]) and step["cache"] is cache
    only_new = model.prepare_inputs_for_generation(tokens[:, :1], cache=cache, **given)
    assert torch.equal(only_new["decoder_input_ids"], tokens[:, :1])
    first = model.prepare_inputs_for_generation(tokens, **given)
    assert torch.equal(first["decoder_input_ids"], tokens) and first["cache"] is None


def test_generate_may_call_the_cache_what_it_likes(model):
    """What 5.24 did to `past_key_values`, the next release may do to `cache`."""
    inputs = random_inputs(target_length=5)
    tokens, cache = inputs["decoder_input_ids"], cache_of(model(**inputs))
    longer = torch.cat([tokens, tokens[:, :1]], dim=1)
    for caches in (
        {"an_invented_name": cache},
        {"self_attention": cache.self_attention_cache},
        {"of_the_caller": cache, "of_generate": EncoderDecoderCache(DynamicCache(), DynamicCache())},
        {"of_generate": EncoderDecoderCache(DynamicCache(), DynamicCache()), "of_the_caller": cache},
    ):
        step = model.prepare_inputs_for_generation(longer, **caches, attention_mask=inputs["attention_mask"])
        assert step["cache"].self_attention_cache is cache.self_attention_cache
        assert torch.equal(step["decoder_input_ids"], longer[:, -1:])


# Configurations


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
@pytest.mark.parametrize("name", [*ENCODERS, "LSGAlbertForConditionalGeneration"])
def test_each_class_has_its_own_kind_of_config_and_alters_no_other(tiny_config, name, is_encoder_decoder):
    config = tiny_config(is_encoder_decoder=is_encoder_decoder)
    config._attn_implementation_autoset = True  # which transformers 4.48 itself notes in a caller's config
    before = config.to_dict()
    model = getattr(lsg_albert, name)(config)
    is_seq2seq = name == "LSGAlbertForConditionalGeneration"
    assert model.config.is_encoder_decoder == is_seq2seq
    assert config.to_dict() == before
    assert (model.config is config) == (is_encoder_decoder == is_seq2seq and not is_seq2seq)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(other is model.config for other in configs) and len(configs) > 2
    assert model.can_generate() == is_seq2seq


def test_encoder_and_decoder_are_found(model):
    assert model.get_encoder() is model.base_model is model.albert and model.get_decoder() is model.decoder
    assert model.get_input_embeddings() is model.albert.embeddings.word_embeddings
    assert model.main_input_name == "input_ids"


# New cross-attentions, saving and loading


def cross_attention_pairs(model):
    """Each parameter of a cross-attention, and its counterpart in the self-attention."""
    for group, layers in enumerate(model.decoder.cross_attentions):
        for inner, cross_attention in enumerate(layers):
            attention = model.albert.encoder.albert_layer_groups[group].albert_layers[inner].attention
            for name, parameter in cross_attention.named_parameters():
                if not name.startswith("LayerNorm"):
                    yield parameter, attention.get_parameter(name)


def is_copy(model):
    return [torch.equal(*pair) and pair[0] is not pair[1] for pair in cross_attention_pairs(model)]


def test_new_cross_attention_is_a_copy_of_the_self_attention(tiny_config):
    config = tiny_config(num_hidden_groups=2, inner_group_num=2)
    model = LSGAlbertForConditionalGeneration(config)
    assert len(is_copy(model)) == 32 and all(is_copy(model))
    assert not torch.equal(*(layers[0].query.weight for layers in model.decoder.cross_attentions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_cross_attention_normalizes_without_change(tiny_config, tmp_path, dtype):
    """Features of a trained encoder have unequal scales and shifts, and a second normalization must not repeat them."""
    encoder = lsg_albert.LSGAlbertModel(tiny_config(hidden_size=512, num_attention_heads=4))
    norm = encoder.encoder.albert_layer_groups[0].albert_layers[0].attention.LayerNorm
    with torch.no_grad():
        norm.weight.uniform_(0.1, 1.5)
        norm.bias.normal_(0.1, 0.5)
    encoder.save_pretrained(tmp_path)
    model = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path, torch_dtype=dtype)
    attention = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    states = attention.LayerNorm(torch.randn(64, 512, dtype=dtype)).float()
    again = model.decoder.cross_attentions[0][0].LayerNorm.float()(states)
    twice = attention.LayerNorm.float()(states)
    assert (again - states).norm() < 0.08 * states.norm() < 0.3 * (twice - states).norm()


@pytest.mark.parametrize("name", ENCODERS)
def test_any_encoder_becomes_a_seq2seq_model_and_the_reverse(tiny_config, tmp_path, name):
    encoder = getattr(lsg_albert, name)(tiny_config(num_labels=2))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.2)
    encoder.save_pretrained(tmp_path / "encoder")
    model, info = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    new = {key for key in info["missing_keys"] if not key.startswith("predictions.")}
    assert new == {f"decoder.{key}" for key, _ in model.decoder.named_parameters()}
    assert all(is_copy(model))
    base = getattr(encoder, "albert", encoder).state_dict()
    for key, tensor in model.albert.state_dict().items():
        assert torch.equal(tensor, base[key]), key
    assert model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id == 2

    trained = make(tiny_config(num_labels=2), seed=1)
    trained.save_pretrained(tmp_path / "trained")
    with logged_warnings() as messages:
        again, info = getattr(lsg_albert, name).from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not any("cross_attention" in text for text in (*messages, *info["unexpected_keys"]))
    assert not again.config.is_encoder_decoder
    for key, tensor in trained.albert.state_dict().items():
        assert torch.equal(getattr(again, "albert", again).state_dict()[key], tensor), key
    if name == "LSGAlbertForMaskedLM":
        assert not messages and not any(info.values())
        assert torch.equal(again.predictions.bias, trained.predictions.bias)


def test_plain_albert_becomes_a_seq2seq_model(tiny_config, tmp_path):
    sizes = {name: value for name, value in TINY.items() if "block" not in name}
    albert = AlbertForMaskedLM(AlbertConfig(**sizes, bos_token_id=2, eos_token_id=3, pad_token_id=0))
    weights = convert_state_dict(albert.state_dict(), max_length=176, bos_token_id=2, mask_token_id=4, stride=1)
    encoder = LSGAlbertForMaskedLM(tiny_config(mask_first_token=True))
    encoder.load_state_dict(weights)
    encoder.save_pretrained(tmp_path)
    model = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path)
    attention = albert.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    assert torch.equal(model.decoder.cross_attentions[0][0].value.weight, attention.value.weight)
    assert torch.equal(model.predictions.decoder.weight, albert.albert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_saved_model_loads_whole_silent_and_tied(model, tmp_path, shard_size):
    with logged_warnings() as messages:
        model.save_pretrained(tmp_path, max_shard_size=shard_size)
        loaded, info = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not messages and not any(info.values())
    assert not any(is_copy(loaded)), "what was trained was written over"
    stored = []
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += file.keys()
    assert sorted(stored) == sorted(name for name, _ in model.named_parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.predictions.decoder.weight is loaded.get_input_embeddings().weight
    assert loaded.predictions.decoder.bias is loaded.predictions.bias
    assert json.loads((tmp_path / "config.json").read_text())["is_encoder_decoder"] is True


def test_one_missing_cross_attention_is_made_and_the_other_kept(tiny_config, tmp_path):
    model = make(tiny_config(inner_group_num=2))
    weights = {name: x for name, x in model.state_dict().items() if "cross_attentions.0.1." not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path)
    assert is_copy(loaded) == [False] * 8 + [True] * 8


@pytest.mark.parametrize(
    "options", [{"low_cpu_mem_usage": True}, {"device_map": "auto"}, {"torch_dtype": torch.bfloat16}], ids=str
)
def test_lean_loading_of_an_encoder_makes_the_cross_attention_too(tiny_config, tmp_path, options):
    LSGAlbertForMaskedLM(tiny_config()).save_pretrained(tmp_path)
    model = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path, **options)
    assert all(is_copy(model)) and {p.device.type for p in model.parameters()} == {"cpu"}
    assert {p.dtype for p in model.parameters()} == {options.get("torch_dtype", torch.float32)}
    assert model.predictions.decoder.weight is model.get_input_embeddings().weight
    assert torch.isfinite(model(IDS).logits).all()


def test_generation_config_is_saved_with_the_right_ids(tiny_config, tmp_path):
    encoder = LSGAlbertForMaskedLM(tiny_config(bos_token_id=7, eos_token_id=8, pad_token_id=9))
    encoder.save_pretrained(tmp_path / "encoder")
    made = LSGAlbertForConditionalGeneration(encoder.config)
    for model in (made, LSGAlbertForConditionalGeneration.from_pretrained(tmp_path / "encoder")):
        model.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
        ids = {"decoder_start_token_id": 7, "bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9}
        assert {name: saved.get(name) for name in ids} == ids
    own = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path / "saved")
    own.generation_config.decoder_start_token_id, own.generation_config.num_beams = 11, 3
    own.save_pretrained(tmp_path / "own")
    again = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path / "own").generation_config
    assert (again.decoder_start_token_id, again.num_beams) == (11, 3)


@pytest.mark.parametrize("new_size", [100, 130])
def test_resized_embeddings_stay_tied(model, new_size, tmp_path):
    ids = torch.randint(5, 90, (1, 30))
    before = model(ids).logits
    model.resize_token_embeddings(new_size)
    words, head = model.get_input_embeddings(), model.predictions
    assert model.config.vocab_size == words.num_embeddings == len(head.bias) == new_size
    assert head.decoder.weight is words.weight and head.decoder.bias is head.bias
    kept = min(new_size, 120)
    torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    again = LSGAlbertForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_every_shared_tensor_is_counted_once(model):
    encoder = LSGAlbertForMaskedLM(model.config)
    names = {name for name, _ in model.named_parameters()} - {name for name, _ in encoder.named_parameters()}
    assert names == {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    assert len(names) == 10  # query, key, value, dense and LayerNorm, each a weight and a bias
    assert {name for name in model.state_dict() if name not in encoder.state_dict()} == names


# Training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_config, use_reentrant):
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = LSGAlbertForConditionalGeneration(tiny_config(num_hidden_layers=3, num_hidden_groups=2, **dropout)).train()
    inputs = random_inputs()
    labels = inputs["decoder_input_ids"].clone()

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    checkpoint_activations(model, use_reentrant=use_reentrant)
    calls = []
    shared = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    shared.attention.query.register_forward_hook(lambda *_: calls.append(1))
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert len(calls) == 2 * 2 * 2, "layers of encoder and decoder were not computed again"


def test_gradient_checkpointing_gives_up_the_cache_in_training_only(model):
    checkpoint_activations(model)
    with logged_warnings() as messages:
        assert cache_of(model.train()(**random_inputs())) is None
        assert cache_of(model(**random_inputs())) is None
    assert len([message for message in messages if "use_cache" in message]) == 1
    assert cache_of(model.eval()(**random_inputs())) is not None


def test_dropout_acts_in_training_only(tiny_config):
    model = LSGAlbertForConditionalGeneration(tiny_config())
    inputs = {**random_inputs(), "output_attentions": False}
    states = model.get_encoder()(inputs.pop("input_ids"), inputs["attention_mask"])
    expected = model.eval()(**inputs, encoder_outputs=states).logits
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        dropped = LSGAlbertForConditionalGeneration(tiny_config(**{field: 0.3}))
        dropped.load_state_dict(model.state_dict())
        for maps in (False, True):
            inputs["output_attentions"] = maps
            torch.testing.assert_close(dropped.eval()(**inputs, encoder_outputs=states).logits, expected)
            assert not torch.allclose(dropped.train()(**inputs, encoder_outputs=states).logits, expected, atol=1e-3)


def test_gradients_reach_the_states_and_maps_that_are_returned(model):
    output = model(**random_inputs(), output_attentions=True, output_hidden_states=True)
    names = ("decoder_hidden_states", "decoder_attentions", "cross_attentions")
    returned = [x for name in (*names, "encoder_hidden_states", "encoder_attentions") for x in output[name]]
    for tensor in returned:
        tensor.retain_grad()
    output.logits[0, -1, 0].backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in returned)


def test_tuples_hold_what_the_outputs_hold(model):
    inputs = random_inputs()
    wanted = {"output_hidden_states": True, "output_attentions": True, "labels": inputs["decoder_input_ids"]}
    by_name, by_place = model(**inputs, **wanted), model(**inputs, **wanted, return_dict=False)
    assert isinstance(by_place, tuple) and len(by_place) == len(by_name.to_tuple()) == 8
    for one, other in zip(by_place, by_name.to_tuple(), strict=True):
        torch.testing.assert_close(one, other)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_selected_states_only(model):
    output = model(**random_inputs(), output_hidden_states=[0, -1])
    assert [x is None for x in output.decoder_hidden_states] == [False, True, False]
    assert [x is None for x in output.encoder_hidden_states] == [False, True, False]
    assert output.decoder_attentions is output.cross_attentions is None


def test_nothing_that_was_passed_in_is_modified(model):
    inputs = {**random_inputs(), "labels": torch.randint(5, 120, (2, 9)), "decoder_attention_mask": torch.ones(2, 9)}
    inputs["labels"][0, 3:] = -100
    before, config = {name: tensor.clone() for name, tensor in inputs.items()}, model.config.to_dict()
    model.train()(**inputs, output_attentions=True, output_hidden_states=True).loss.backward()
    model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert model.config.to_dict() == config


def test_compiles_without_graph_breaks(model):
    inputs = {**random_inputs(), "decoder_attention_mask": torch.ones(2, 9)}
    expected = model(**inputs, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)
    labels = torch.randint(5, 120, (2, 9))
    model.train()
    torch.testing.assert_close(compiled(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_masked_language_models(tiny_config, dtype):
    torch.manual_seed(0)
    model = LSGAlbertForConditionalGeneration(tiny_config(initializer_range=0.05)).eval()
    masked_lm = LSGAlbertForMaskedLM(tiny_config(initializer_range=0.05)).eval()
    masked_lm.load_state_dict(model.state_dict(), strict=False)
    inputs = random_inputs()
    errors = []
    for other in (masked_lm, model):
        given = inputs if other is model else {"input_ids": inputs["input_ids"]}
        exact = other(**given).logits
        low = other.to(dtype)(**given).logits
        assert low.dtype == dtype
        errors.append((low.float() - exact).abs().mean() / exact.abs().mean())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(tiny_config, dtype):
    model = LSGAlbertForConditionalGeneration(tiny_config())
    inputs = {**random_inputs(), "labels": torch.randint(5, 120, (2, 9))}
    expected = model(**inputs).loss
    with torch.autocast("cpu", dtype):
        loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_offloaded_and_deferred_weights_work(tiny_config):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = make(tiny_config()), random_inputs()
    expected = model(**inputs).logits
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(offloaded(**inputs).logits, expected)
    with torch.device("meta"):
        on_meta = LSGAlbertForConditionalGeneration(tiny_config())
    assert on_meta(**{name: x.to("meta") for name, x in inputs.items()}).logits.shape == (2, 9, 120)


@pytest.mark.gpu
def test_gives_the_same_outputs_on_a_gpu(model):
    inputs = {**random_inputs(), "decoder_attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])}
    expected = model(**inputs).logits
    tokens = model.generate(inputs["input_ids"], max_new_tokens=8)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    torch.testing.assert_close(model.cuda()(**inputs).logits.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=8).cpu(), tokens)


# Errors

IDS = torch.full((2, 9), 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"inputs_embeds": torch.ones(2, 9, 16)}, "`decoder_input_ids` or `decoder_inputs_embeds`.*`input_ids`"),
        ({"decoder_input_ids": IDS, "decoder_inputs_embeds": torch.ones(2, 9, 16)}, "not both"),
        ({"decoder_input_ids": IDS[0]}, r"`decoder_input_ids` must have .*\(batch, length\), got \(9,\)"),
        ({"decoder_input_ids": IDS[:, :0]}, "`decoder_input_ids` has the length 0"),
        ({"decoder_inputs_embeds": torch.ones(2, 9, 32)}, r"`decoder_inputs_embeds` .* `embedding_size` \(16\)"),
        ({"decoder_input_ids": torch.ones(2, 177).long()}, "`decoder_input_ids` has 177 tokens.* is 176.*convert"),
        ({"decoder_input_ids": IDS[:1]}, "`decoder_input_ids` has a batch of 1, but the encoder has a batch of 2"),
        ({"decoder_inputs_embeds": torch.ones(3, 9, 16)}, "`decoder_inputs_embeds` has a batch of 3"),
        ({"labels": IDS[:1]}, "a batch of 1, but the encoder has a batch of 2"),
        ({"labels": IDS[:, :4], "decoder_input_ids": IDS}, r"`labels` must have .* = \(2, 9\), got \(2, 4\)"),
        (
            {"decoder_input_ids": IDS, "decoder_attention_mask": torch.ones(2, 8)},
            r"`decoder_attention_mask`.*\(2, 9\)",
        ),
        ({"decoder_input_ids": IDS, "decoder_attention_mask": torch.full((2, 9), -1e4)}, "hold 1 for real"),
        ({"attention_mask": torch.ones(1, 9)}, r"`attention_mask` must have .* = \(2, 9\)"),
        ({"past_key_values": 3}, "`cache` .or `past_key_values`. must be .* got int"),
        ({"cache": 3}, "`cache` .or `past_key_values`. must be .* got int"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_wrong_inputs_are_named(model, call, message):
    call = {**({} if not call or "inputs_embeds" in call else {"input_ids": IDS}), **call}
    with pytest.raises(ValueError, match=message):
        model(**call)


def test_outputs_of_another_encoder_are_named(model):
    outputs = model.get_encoder()(IDS)
    with pytest.raises(ValueError, match=r"`attention_mask` must have .* = \(2, 9\).*got the shape \(2, 8\)"):
        model(encoder_outputs=outputs, attention_mask=torch.ones(2, 8), decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="a batch of 1, but the encoder has a batch of 2"):
        model(encoder_outputs=outputs, decoder_input_ids=IDS[:1])
    outputs.global_hidden_states = outputs["global_hidden_states"] = torch.ones(1, 1, 32)
    with pytest.raises(ValueError, match="`global_hidden_states` of 1 rows and a `last_hidden_state` of 2"):
        model(encoder_outputs=outputs, decoder_input_ids=IDS)


def test_cache_of_another_batch_or_at_its_end_is_named(tiny_config):
    model = make(tiny_config(max_position_embeddings=12))
    cache = cache_of(model(IDS, decoder_input_ids=IDS))
    with pytest.raises(ValueError, match="a batch of 1, but the encoder has a batch of 2"):
        model(decoder_input_ids=IDS[:1, :1], cache=cache)
    with pytest.raises(ValueError, match="The decoder has no inputs"):
        model(IDS, cache=cache)
    with pytest.raises(ValueError, match="4 tokens after the 9 in the cache.* is 12"):
        model(decoder_input_ids=IDS[:, :4], cache=cache)
    with pytest.raises(ValueError, match=r"`decoder_attention_mask` must have .*\(2, 10\)"):
        model(decoder_input_ids=IDS[:, :1], decoder_attention_mask=torch.ones(2, 1), cache=cache)
    with pytest.raises(ValueError, match="1 tokens after the 12 in the cache.* is 12.*`generate`"):
        model.generate(IDS, max_new_tokens=20, eos_token_id=119, pad_token_id=0, min_new_tokens=20)


def test_unknown_arguments_are_named(model):
    with pytest.raises(TypeError, match="decoder_token_type_ids"):
        model(IDS, decoder_token_type_ids=IDS)
    with pytest.raises(ValueError, match="decoder_token_type_ids"):
        model.generate(IDS, decoder_token_type_ids=IDS)
    with pytest.raises(TypeError, match="pass_global_token"):
        LSGAlbertForConditionalGeneration(model.config, pass_global_token=True)


def test_attention_that_is_not_there_is_named_while_decoding(model):
    cache = cache_of(model(IDS, decoder_input_ids=IDS))
    model.config._attn_implementation = "flax_attention"
    with pytest.raises(ValueError, match="flax_attention.*sdpa.*eager"):
        model(decoder_input_ids=IDS, cache=cache)


def test_caches_of_a_fixed_size_are_refused(model):
    from transformers import StaticCache

    cache = EncoderDecoderCache.__new__(EncoderDecoderCache)
    torch.nn.Module.__init__(cache) if isinstance(cache, torch.nn.Module) else None
    cache.self_attention_cache = StaticCache.__new__(StaticCache)
    cache.cross_attention_cache = DynamicCache()
    with pytest.raises(ValueError, match="two `DynamicCache`.*got EncoderDecoderCache.*`cache_implementation`"):
        model(IDS, cache=cache)
