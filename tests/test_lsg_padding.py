"""Batches listed block by block: the listing itself, and that leaving padding out changes nothing that is real."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lsg_albert
from helpers import checkpoint_activations
from lsg_albert.lsg_padding import list_blocks
from lsg_albert.lsg_pattern import SPARSITY_TYPES
from lsg_albert.modeling_lsg_albert import LSGAlbertForMaskedLM, LSGAlbertModel

LENGTHS = [45, 3, 17, 24, 40, 0]  # of rows, in blocks of 8; the last has no real token at all


def ragged_inputs(lengths=LENGTHS):
    length = max(lengths)
    attention_mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    attention_mask[0, 5:20] = 0  # a hole is no padding
    return {"input_ids": torch.randint(5, 120, (len(lengths), length)), "attention_mask": attention_mask}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4), st.integers(1, 3))
def test_blocks_up_to_the_last_visible_token_are_kept(rows, num_globals):
    visible = torch.tensor(rows)
    x = torch.randn(len(rows), num_globals + 12, 2)
    dropped, blanked, kept = (list_blocks(visible, 3, padding) for padding in ("drop", "blank", "keep"))
    used = [max(1, -(-max((j + 1 for j in range(12) if row[j]), default=0) // 3)) for row in rows]
    assert dropped.row.tolist() == [i for i, blocks in enumerate(used) for _ in range(blocks)]
    assert dropped.pack(x).shape == (len(rows) * num_globals + 3 * sum(used), 2)
    assert torch.equal(kept.unpack(kept.pack(x)), x)
    for blocks in (dropped, blanked):
        expected = x.clone()
        for i, count in enumerate(used):
            expected[i, num_globals + 3 * count :] = 0
        assert torch.equal(blocks.unpack(blocks.pack(x)), expected)


def test_first_of_row_is_the_place_of_its_first_block():
    visible = torch.ones(3, 12, dtype=torch.bool)
    visible[1, 4:] = False
    blocks = list_blocks(visible, 3, "drop")
    assert blocks.row.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert blocks.first_of_row().tolist() == [0, 0, 0, 0, 4, 4, 6, 6, 6, 6]


def test_accelerate_moves_blocks_to_a_layers_device():
    send_to_device = pytest.importorskip("accelerate.utils").send_to_device
    visible = torch.ones(2, 12, dtype=torch.bool)
    visible[1, 4:] = False
    moved = send_to_device(list_blocks(visible, 3, "drop"), torch.device("meta"))
    assert moved.row.is_meta and moved.visible.is_meta and moved.kept.is_meta and moved.row_length == 12


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("num_globals", [1, 3])
def test_leaving_padding_out_changes_no_output_and_no_gradient(tiny_config, sparsity_type, num_globals):
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type, num_global_tokens=num_globals)).double().eval()
    inputs = ragged_inputs()
    real = inputs["attention_mask"].bool()
    results = []
    for pack_padding in (True, False):
        model.config.pack_padding = pack_padding
        output = model(**inputs, output_hidden_states=True)
        states = [x[real] for x in (*output.hidden_states, output.last_hidden_state)]
        results.append([*states, output.pooler_output, output.global_hidden_states])
        model.zero_grad()
        sum(x.square().sum() for x in results[-1]).backward()
        results[-1] += [p.grad for p in model.parameters() if p.grad is not None]
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)


def test_packed_rows_equal_those_rows_alone(tiny_config):
    model = LSGAlbertModel(tiny_config()).double().eval()
    inputs = ragged_inputs([45, 3, 17, 24, 40])
    packed = model(**inputs).last_hidden_state
    for i, length in enumerate([45, 3, 17, 24, 40]):
        alone = model(inputs["input_ids"][i : i + 1, :length], inputs["attention_mask"][i : i + 1, :length])
        real = inputs["attention_mask"][i, :length].bool()
        torch.testing.assert_close(packed[i, :length][real], alone.last_hidden_state[0][real])


def count_rows(model, inputs):
    """Tokens that go through the first feed-forward layer of a forward pass."""
    seen = []
    layer = model.encoder.albert_layer_groups[0].albert_layers[0].ffn
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    model(**inputs)
    hook.remove()
    return sum(seen) // model.config.num_hidden_layers


def test_work_is_done_for_real_blocks_only(tiny_config):
    model = LSGAlbertModel(tiny_config(num_global_tokens=2)).eval()
    blocks = 6 + 1 + 3 + 3 + 5 + 1
    with torch.no_grad():
        assert count_rows(model, ragged_inputs()) == len(LENGTHS) * 2 + 8 * blocks
        model.config.pack_padding = False
        assert count_rows(model, ragged_inputs()) == len(LENGTHS) * (2 + 48)


def test_blocks_left_out_are_zeros_compiled_or_not(tiny_config):
    model = LSGAlbertModel(tiny_config()).eval()
    inputs = ragged_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        outputs = [model(**inputs).last_hidden_state, compiled(**inputs).last_hidden_state]
    torch.testing.assert_close(*outputs)
    assert not outputs[0][1, 8:].any() and not outputs[0][2, 24:].any() and outputs[0][2, 17:24].any()


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification", "ForSequenceClassification"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_in_training_are_those_of_padding(tiny_config, head, checkpointing):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    model = getattr(lsg_albert, "LSGAlbert" + head)(tiny_config(**no_dropout)).double().train()
    if checkpointing:
        checkpoint_activations(model, use_reentrant=False)
    inputs = ragged_inputs()
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 2, -100)
    if head == "ForSequenceClassification":
        labels = torch.tensor([0, 1, 0, 1, 0, 1])
    results = []
    for pack_padding in (True, False):
        model.config.pack_padding = pack_padding
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)


def test_question_answering_reads_padding_and_so_keeps_it(tiny_config):
    """Its loss is a softmax over all tokens, as in ALBERT: zeros for padding would change it."""
    model = lsg_albert.LSGAlbertForQuestionAnswering(tiny_config()).eval()
    inputs = ragged_inputs()
    with torch.no_grad():
        output = model(**inputs).start_logits
        model.config.pack_padding = False
        torch.testing.assert_close(output, model(**inputs).start_logits)


def test_the_switch_is_saved_and_maps_of_real_tokens_are_those_of_padding(tiny_config, tmp_path):
    model = LSGAlbertForMaskedLM(tiny_config(pack_padding=False)).eval()
    model.save_pretrained(tmp_path)
    assert LSGAlbertForMaskedLM.from_pretrained(tmp_path).config.pack_padding is False
    inputs = ragged_inputs()
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
        model.config.pack_padding = True
        is_query = torch.nn.functional.pad(inputs["attention_mask"], (1, 0), value=1)[:, None, :, None]
        for packed, padded in zip(model(**inputs, output_attentions=True).attentions, maps, strict=True):
            assert torch.equal(packed * is_query, padded * is_query)
