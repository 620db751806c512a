"""Graphs that are recorded once and hold for all lengths and batches: torch.export, traces, ONNX, and torch.compile.

Exactness is tested in float64: in float32 two keys' norms may be so near each other that another order of additions
selects the other one.
"""

import contextlib
import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
from torch.export import Dim

import lsg_albert
from conftest import ROOT
from helpers import write_repository
from lsg_albert import LSGAlbertForMaskedLM, LSGAlbertModel, onnx_export
from lsg_albert.__main__ import main
from lsg_albert.lsg_pattern import SPARSITY_TYPES, LSGPattern
from lsg_albert.lsg_sparsity import select_sparse_tokens

TYPES = SPARSITY_TYPES
NAMES = ("input_ids", "attention_mask", "token_type_ids")
LENGTHS = (1, 2, 5, 8, 9, 15, 16, 17, 23, 24, 25, 64, 100, 176)  # in blocks of 8
ROOT_LENGTHS = (1, 5, 100, 128, 129, 200, 256, 257, 300, 384, 1000, 4095, 4096)  # in blocks of 128
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # of float64
SHORT, WHOLE, LONG = (2, 5), (2, 16), (3, 101)  # examples: within a block, two blocks exactly, many blocks and a part

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript"))),
    reason='onnxruntime and onnxscript are not installed (`pip install ".[test]"`)',
)


def random_inputs(batch_size, length, vocab_size=120, seed=0):
    """Ids, mask and types; of three rows the second and the third are padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, vocab_size, (batch_size, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if batch_size == 3:
        mask[1, max(1, 2 * length // 3) :] = 0
        mask[2, max(1, length // 3) :] = 0
    types = torch.randint(0, 2, (batch_size, length), generator=generator)
    return {"input_ids": input_ids * mask, "attention_mask": mask, "token_type_ids": types}


def dynamic_shapes(max_length=176):
    batch, length = Dim("batch", min=1), Dim("length", min=1, max=max_length)
    return {name: {0: batch, 1: length} for name in NAMES}


@torch.no_grad()
def assert_equals_eager(model, run, lengths=LENGTHS, vocab_size=120, texts=1, **tolerances):
    """`run` takes inputs and gives the first output of the model; compared at real tokens.

    Of so many texts one must be equal. More than one is for float32 and thousands of tokens: two of 16 batches of 3 x
    4,096 random tokens have a selection in which the norms of the last key that is kept and of the first that is not
    differ by 2e-7 of their size, and falls the other way; turned round in the model, it gives what the graph gives.
    """
    assert not model.training
    for length in lengths:
        for batch_size in (1, 2, 3):
            for seed in range(texts):
                inputs = random_inputs(batch_size, length, vocab_size, seed)
                expected, actual = model(**inputs, return_dict=False)[0], torch.as_tensor(run(inputs))
                assert actual.shape == expected.shape
                if expected.ndim == 3:
                    expected, actual = (x[inputs["attention_mask"].bool()] for x in (expected, actual))
                if torch.allclose(actual, expected, **(tolerances or EXACT)):
                    break
            place = f"{batch_size} rows of {length} tokens"
            torch.testing.assert_close(
                actual, expected, msg=lambda text, place=place: f"{place}: {text}", **(tolerances or EXACT)
            )


@torch.no_grad()
def export(model, example, **options):
    return torch.export.export(model, (), random_inputs(*example), dynamic_shapes=dynamic_shapes(), **options)


@torch.no_grad()
def trace(model, example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, tuple(random_inputs(*example)[name] for name in NAMES), strict=False)


@pytest.mark.parametrize("example", [SHORT, WHOLE, LONG])
def test_an_export_holds_for_all_lengths_and_batches(tiny_config, example):
    model = LSGAlbertModel(tiny_config(num_hidden_layers=1)).double().eval()
    exported = export(model, example, strict=False).module()
    assert_equals_eager(model, lambda inputs: exported(**inputs).last_hidden_state)
    with pytest.raises(Exception, match="176"):
        exported(**random_inputs(1, 177))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("example", [SHORT, WHOLE, LONG])
def test_every_selection_exports(tiny_config, sparsity_type, example, strict):
    fields = {"num_global_tokens": 2, "mask_first_token": True, "chunk_size_feed_forward": 7}
    model = LSGAlbertForMaskedLM(tiny_config(sparsity_type=sparsity_type, **fields)).double().eval()
    exported = export(model, example, strict=strict).module()
    assert_equals_eager(model, lambda inputs: exported(**inputs).logits)


@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("example", [SHORT, WHOLE, LONG])
def test_a_trace_holds_for_all_lengths_and_batches(tiny_config, sparsity_type, example):
    fields = {"num_hidden_layers": 1, "chunk_size_feed_forward": 7, "num_global_tokens": 2, "mask_first_token": True}
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type, **fields)).double().eval()
    traced = trace(model, example)
    run = lambda inputs: traced(*(inputs[name] for name in NAMES))["last_hidden_state"]  # noqa: E731
    assert_equals_eager(model, run, lengths=(1, 8, 17, 24, 101))


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention"])
def test_a_trace_is_the_same_attention_by_any_implementation(tiny_config, attn_implementation):
    model = LSGAlbertModel(tiny_config(num_hidden_layers=1)).double().eval()
    model.set_attn_implementation(attn_implementation)
    traced = trace(model, SHORT)
    model.set_attn_implementation("sdpa")
    run = lambda inputs: traced(*(inputs[name] for name in NAMES))["last_hidden_state"]  # noqa: E731
    assert_equals_eager(model, run, lengths=(5, 17, 101))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_saved_trace_holds_for_other_masks_than_its_example(tiny_config, tmp_path):
    model = LSGAlbertModel(tiny_config(max_position_embeddings=64)).eval()
    input_ids, mask = torch.randint(5, 99, (1, 64)), torch.ones(1, 64, dtype=torch.long)
    short = mask.clone()
    short[:, 20:] = 0
    torch.jit.trace(model, (input_ids, short), strict=False).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    for attention_mask in (short, mask):
        expected = model(input_ids, attention_mask).last_hidden_state
        torch.testing.assert_close(traced(input_ids, attention_mask)["last_hidden_state"], expected)


@torch.no_grad()
def test_states_and_maps_of_a_trace_are_those_of_the_model(tiny_config):
    class All(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *args):
            output = self.model(*args, output_hidden_states=True, output_attentions=True)
            return (*output.hidden_states, *output.attentions)

    model = LSGAlbertModel(tiny_config()).double().eval()
    traced = trace(All(), SHORT)
    for length in (3, 16, 17, 40):
        inputs = tuple(random_inputs(2, length)[name] for name in NAMES)
        for actual, expected in zip(traced(*inputs), All()(*inputs), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_an_export_compiled_ahead_of_time_holds_for_all_lengths(tiny_config, tmp_path):
    model = LSGAlbertModel(tiny_config()).double().eval()
    exported = export(model, SHORT)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    assert_equals_eager(model, lambda inputs: compiled(**inputs).last_hidden_state)


@pytest.mark.slow
@torch.no_grad()
def test_compilations_for_changing_lengths_and_batches_are_few(tiny_config):
    """Full and block attention, with rows to pad or not, each for one row and for several, and one token alone."""
    model = LSGAlbertModel(tiny_config(num_hidden_layers=1)).double().eval()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()  # the limit of compilations counts those of other tests' models
    compiled = torch.compile(model, backend=count, dynamic=True, fullgraph=True)
    assert_equals_eager(model, lambda inputs: compiled(**inputs).last_hidden_state)
    after_one_round = len(graphs)
    assert after_one_round <= 8
    more = [length for length in range(3, 176, 13) if length not in LENGTHS]
    assert_equals_eager(model, lambda inputs: compiled(**inputs).last_hidden_state, lengths=more)
    assert len(graphs) == after_one_round


@torch.no_grad()
def export_onnx(model, file, example, vocab_size=120, max_length=176, dynamo=True):
    """Write an ONNX file of the first output; the function that runs it."""
    import onnxruntime

    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            return self.model(*inputs, return_dict=False)[0]

    inputs = tuple(random_inputs(*example, vocab_size)[name] for name in NAMES)
    axes = {0: "batch", 1: "length"}
    if dynamo:
        shapes = {"dynamic_shapes": ((axes,) * 3,)}
    else:
        shapes = {"dynamic_axes": dict.fromkeys(NAMES, axes), "opset_version": 18}
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        torch.onnx.export(First().eval(), inputs, str(file), dynamo=dynamo, input_names=list(NAMES), **shapes)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: inputs[name].numpy() for name in NAMES})[0]


@needs_onnx
@pytest.mark.parametrize(
    "example, dynamo",
    [(SHORT, False), (LONG, False), (SHORT, True), pytest.param(LONG, True, marks=pytest.mark.slow)],
)
def test_an_onnx_file_holds_for_all_lengths_and_batches(tiny_config, tmp_path, example, dynamo):
    model = LSGAlbertModel(tiny_config(num_hidden_layers=1)).eval()
    run = export_onnx(model, tmp_path / "model.onnx", example, dynamo=dynamo)
    assert_equals_eager(model, run, rtol=0, atol=1e-4)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_every_selection_has_an_onnx_file(tiny_config, tmp_path, sparsity_type, dynamo):
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type, num_global_tokens=2, mask_first_token=True)).eval()
    run = export_onnx(model, tmp_path / "model.onnx", WHOLE, dynamo=dynamo)
    assert_equals_eager(model, run, rtol=0, atol=1e-4)


class Selection(torch.nn.Module):
    """The keys that "norm" selects."""

    def forward(self, key):
        pattern = LSGPattern(1, 8, "norm", 8, 2)
        visible = torch.ones_like(key[:, :1, :, 0], dtype=torch.bool)
        return select_sparse_tokens(key[:, :, ::8], key, key, visible, pattern).key


def keys_of_equal_norm():
    """Whole numbers, with the place as the last one's square root in disguise: the norms tie, the keys differ."""
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(1, 4, (2, 2, 32, 1), generator=generator).float()
    direction = torch.randint(0, 4, (2, 2, 32), generator=generator)
    return length * torch.nn.functional.one_hot(direction, 4)


def test_of_equal_norms_the_first_is_kept():
    key = keys_of_equal_norm()
    chunks = key.unflatten(2, (-1, 8)).flatten(0, 2)
    expected = []
    for chunk in chunks:
        by_norm = sorted(range(8), key=lambda i: (-float(chunk[i].max()), i))  # one coordinate alone is not 0
        expected.append(chunk[by_norm[:4][::-1]])
    assert torch.equal(Selection()(key), torch.cat(expected).view(2, 2, 16, 4))


@needs_onnx
@pytest.mark.parametrize("dynamo", [False, True])
def test_ties_fall_the_same_way_in_graphs(tmp_path, dynamo):
    import onnxruntime

    key = keys_of_equal_norm()
    expected = Selection()(key)
    assert torch.equal(torch.export.export(Selection(), (key,)).module()(key), expected)
    assert torch.equal(torch.jit.trace(Selection(), key)(key), expected)
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        torch.onnx.export(Selection(), (key,), str(tmp_path / "ties.onnx"), dynamo=dynamo, input_names=["key"])
    session = onnxruntime.InferenceSession(str(tmp_path / "ties.onnx"), providers=["CPUExecutionProvider"])
    assert torch.equal(torch.from_numpy(session.run(None, {"key": key.numpy()})[0]), expected)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "example"),
    [
        ("Model", (2, 300)),
        ("ForMaskedLM", (2, 1024)),
        ("ForSequenceClassification", (2, 16)),
        ("ForTokenClassification", (2, 16)),
    ],
)
def test_the_shipped_model_has_an_onnx_file_for_all_lengths(tmp_path, head, example):
    model = getattr(lsg_albert, "LSGAlbert" + head).from_pretrained(ROOT).eval()
    vocab_size = model.config.vocab_size
    run = export_onnx(model, tmp_path / "model.onnx", example, vocab_size, max_length=4096)
    lengths = ROOT_LENGTHS if head == "Model" else (5, 257, 1000)
    scale = 10 if head == "ForMaskedLM" else 1  # its scores are larger than states
    assert_equals_eager(model, run, lengths, vocab_size, texts=3, rtol=0, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, head",
    [
        ("feature-extraction", "Model"),
        ("fill-mask", "ForMaskedLM"),
        ("text-classification", "ForSequenceClassification"),
        ("token-classification", "ForTokenClassification"),
    ],
)
def test_optimum_exports_for_all_lengths(tmp_path, task, head):
    pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed, or not for this transformers")
    import onnxruntime

    torch.manual_seed(0)
    model = getattr(lsg_albert, "LSGAlbert" + head).from_pretrained(ROOT).eval()
    source = write_repository(tmp_path / "source", model)
    command = ["-m", "optimum.commands.optimum_cli", "export", "onnx", "--trust-remote-code", "--task", task]
    done = subprocess.run(
        [sys.executable, *command, "--model", str(source), str(tmp_path / "onnx")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    run = lambda inputs: session.run(None, {name: inputs[name].numpy() for name in names})[0]  # noqa: E731
    lengths = ROOT_LENGTHS if head == "Model" else (5, 257, 1000)
    scale = 10 if head == "ForMaskedLM" else 1
    assert_equals_eager(model, run, lengths, model.config.vocab_size, texts=3, rtol=0, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    LSGAlbertForMaskedLM(tiny_config(num_hidden_layers=1)).save_pretrained(folder)
    return folder


@needs_onnx
def test_the_command_writes_a_file_for_all_lengths(checkpoint, tmp_path, capsys):
    import onnxruntime

    assert main(["export-onnx", str(checkpoint), str(tmp_path / "model.onnx")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "within" in line] == ["1", "17", "49"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == list(NAMES)
    assert [x.name for x in session.get_outputs()] == ["logits"]
    model = LSGAlbertForMaskedLM.from_pretrained(checkpoint).eval()
    run = lambda inputs: session.run(None, {name: inputs[name].numpy() for name in NAMES})[0]  # noqa: E731
    assert_equals_eager(model, run, rtol=0, atol=1e-4)


@needs_onnx
def test_a_file_that_computes_something_else_is_not_written(checkpoint, tiny_config, tmp_path, monkeypatch, capsys):
    """Full attention, as a graph frozen at a short example has it, is right for short texts and wrong for long ones."""

    def write_full_attention(model, file):
        full = LSGAlbertForMaskedLM(tiny_config(num_hidden_layers=1, block_size=128, sparse_block_size=128)).eval()
        full.load_state_dict(model.state_dict())
        export_onnx(full, file, SHORT, dynamo=False)

    monkeypatch.setattr(onnx_export, "write_graph", write_full_attention)
    assert main(["export-onnx", str(checkpoint), str(tmp_path / "model.onnx")]) == 1
    message = capsys.readouterr().err
    assert "differs from the model" in message and "17 tokens" in message and not any(tmp_path.iterdir())


@needs_onnx
def test_a_class_without_a_file_is_refused(checkpoint, tmp_path, capsys):
    command = ["export-onnx", str(checkpoint), str(tmp_path / "model.onnx"), "--architecture"]
    assert main([*command, "LSGAlbertForConditionalGeneration"]) == 1
    message = capsys.readouterr().err
    assert "LSGAlbertForConditionalGeneration" in message and "LSGAlbertForMaskedLM" in message


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export-onnx", str(ROOT), str(tmp_path / "model.onnx")]) == 1
    assert "`onnxruntime` is not installed" in capsys.readouterr().err and not any(tmp_path.iterdir())
