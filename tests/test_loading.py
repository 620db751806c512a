"""Loading and saving through transformers: Auto classes, copies, published layouts, other processes, plain ALBERT."""

import json
import re
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

import lsg_albert
from helpers import CODE, ROOT, logged_warnings, run_in_new_process, write_repository
from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM
from lsg_albert.configuration_lsg_albert import AUTO_MAP
from lsg_albert.conversion.tensors import convert_state_dict
from lsg_albert.lsg_pattern import SPARSITY_TYPES

TRANSFORMERS = Version(transformers.__version__)
HEADS = {name: target.split(".")[1] for name, target in AUTO_MAP.items() if name != "AutoConfig"}
WITH_MLM_HEAD = ("AutoModelForMaskedLM", "AutoModelForPreTraining", "AutoModelForSeq2SeqLM")
TRUST = {"trust_remote_code": True}
VOCAB = 16000  # of the root's tokenizer
IDS = torch.arange(5, 45)[None]  # five blocks: the sparse part has something to do


def load(auto_name, *args, **kwargs):
    return getattr(transformers, auto_name).from_pretrained(*args, **TRUST, **kwargs)


def make_model(config, auto_name="AutoModelForMaskedLM"):
    """A random model in which every parameter is drawn, so that none is right by being zero or one."""
    model = getattr(lsg_albert, HEADS[auto_name])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def first_output(model, ids=IDS):
    ids = ids[:, None].expand(-1, 3, -1) if "MultipleChoice" in type(model).__name__ else ids
    with torch.no_grad():
        return model(ids, return_dict=False)[0]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def is_tied(model):
    predictions = model.predictions
    return (
        predictions.decoder.weight is model.albert.embeddings.word_embeddings.weight
        and predictions.decoder.bias is predictions.bias
    )


@pytest.fixture
def model(tiny_config):
    return make_model(tiny_config())


@pytest.fixture(scope="module")
def repository(tiny_config, tmp_path_factory):
    """A repository like the root's with a small random masked language model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("repository") / "lsg_albert_tiny"
    return write_repository(folder, make_model(tiny_config(vocab_size=VOCAB)))


# Auto classes


def test_every_model_is_in_the_auto_map():
    models = {name for name in lsg_albert.__all__ if name.startswith("LSGAlbert")} - {"LSGAlbertPreTrainedModel"}
    assert models == {*HEADS.values(), "LSGAlbertConfig"}
    for auto_name, name in HEADS.items():
        assert getattr(lsg_albert, name)._auto_class == auto_name


@pytest.mark.parametrize("auto_name", HEADS)
def test_saved_head_loads_by_its_auto_class_whole_and_silent(tiny_config, tmp_path, auto_name):
    saved = make_model(tiny_config(), auto_name)
    saved.save_pretrained(tmp_path / "head")
    code = {path.name for path in (tmp_path / "head").glob("*.py")}
    assert code == set(CODE)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == [HEADS[auto_name]]

    with logged_warnings() as messages:
        loaded, info = load(auto_name, tmp_path / "head", output_loading_info=True)
    assert not messages
    assert not any(info.values())
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert type(loaded).__name__ == HEADS[auto_name]
    assert not loaded.training
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert_same(first_output(loaded), first_output(saved))
    if auto_name in WITH_MLM_HEAD:
        assert is_tied(loaded)


def test_config_loads_alone_and_makes_every_model(repository):
    config = AutoConfig.from_pretrained(repository, **TRUST)
    assert type(config).__name__ == "LSGAlbertConfig"
    assert config.to_dict().items() >= {"block_size": 8, "auto_map": AUTO_MAP, "vocab_size": VOCAB}.items()
    for auto_name, name in HEADS.items():
        with logged_warnings() as messages:
            made = getattr(transformers, auto_name).from_config(config, **TRUST)
        assert type(made).__name__ == name
        assert not messages
        assert made.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("auto_name", sorted(set(HEADS) - {"AutoModelForMaskedLM"}))
def test_other_heads_take_the_encoder_and_say_what_is_new(repository, auto_name):
    expected = load("AutoModelForMaskedLM", repository).albert.state_dict()
    loaded, info = load(auto_name, repository, output_loading_info=True)
    base = getattr(loaded, "albert", loaded).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(base[name], tensor), name
    new = r"pooler\.|classifier\.|qa_outputs\.|decoder\.cross_attentions\."
    assert all(re.search(new, name) for name in info["missing_keys"])
    assert all(name.startswith("predictions.") for name in info["unexpected_keys"])


OVERRIDES = [
    ("block_size", 16), ("sparse_block_size", 16), ("sparse_block_size", 0), ("sparse_block_size", None),
    ("sparsity_factor", 4), *[("sparsity_type", name) for name in (*SPARSITY_TYPES, None)],
    ("num_global_tokens", 7), ("mask_first_token", True), ("pool_with_global", False), ("adaptive", False),
    ("lsh_num_pre_rounds", 3), ("lsg_num_pre_rounds", 3), ("lsh_seed", 5), ("lsh_seed", None),
    ("pass_global_tokens_to_decoder", False),
    ("num_hidden_layers", 3), ("num_attention_heads", 2), ("hidden_act", "relu"), ("hidden_dropout_prob", 0.1),
    ("attention_probs_dropout_prob", 0.1), ("classifier_dropout_prob", None), ("initializer_range", 0.1),
    ("layer_norm_eps", 1e-6), ("position_embedding_type", "relative_key"), ("pad_token_id", 1), ("bos_token_id", 1),
    ("eos_token_id", 1), ("num_labels", 5),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), OVERRIDES)
def test_parameter_given_at_loading_is_the_one_of_the_model(repository, field, value):
    loaded = load("AutoModel", repository, **{field: value})
    assert getattr(loaded.config, field) == value
    # What it does is what it does in a model that was made with it.
    source = json.loads((repository / "config.json").read_text())
    expected = lsg_albert.LSGAlbertModel(LSGAlbertConfig(**{**source, field: value}))
    expected.load_state_dict(loaded.state_dict())
    if (field, value) != ("lsh_seed", None):
        assert_same(first_output(loaded), first_output(expected.eval()))


def test_bad_parameter_given_at_loading_is_refused(repository):
    for field, value in (("block_size", 7), ("sparsity_type", "nrom"), ("num_global_tokens", 513)):
        with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
            load("AutoModel", repository, **{field: value})


# Places


@pytest.mark.parametrize("name", ["lsg-albert", "lsg-albert-v1.0_4096", "4096", "lsg.albert"])
def test_copy_under_another_name_loads(repository, tmp_path, name):
    if "." in name and TRANSFORMERS < Version("4.54"):
        pytest.skip(f"transformers {TRANSFORMERS} makes a Python package of the folder's name, dots included")
    copy = shutil.copytree(repository, tmp_path / name)
    with logged_warnings() as messages:
        loaded = load("AutoModelForMaskedLM", copy)
    assert not messages
    assert_same(first_output(loaded), first_output(load("AutoModelForMaskedLM", repository)))


def test_folder_is_found_by_relative_paths(repository, monkeypatch):
    expected = first_output(load("AutoModelForMaskedLM", repository))
    monkeypatch.chdir(repository)
    for path in (".", "../lsg_albert_tiny", repository):
        assert_same(first_output(load("AutoModelForMaskedLM", path)), expected)


def test_new_process_offline_loads_everything_with_the_code_that_was_saved(repository, tmp_path):
    """One process, for it takes seconds to import transformers; nothing there knows this checkout."""
    remote = load("AutoModelForMaskedLM", repository, block_size=16)
    saved = tmp_path / "saved_again"
    remote.save_pretrained(saved)
    AutoTokenizer.from_pretrained(repository).save_pretrained(saved)
    assert set(CODE) <= {path.name for path in saved.iterdir()}
    torch.save((first_output(remote), first_output(remote.albert)), tmp_path / "expected.pt")
    (copy := tmp_path / "elsewhere").mkdir()
    shutil.copytree(repository, copy / "lsg-albert")

    code = """
import torch, transformers
saved, expected_file, heads = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
expected_logits, expected_states = torch.load(expected_file)
ids = torch.arange(5, 45)[None]

def check(folder, **overrides):
    trust = dict(trust_remote_code=True)
    config = transformers.AutoConfig.from_pretrained(folder, **trust, **overrides)
    assert type(config).__name__ == "LSGAlbertConfig" and config.block_size == 16
    for head in heads:
        model = getattr(transformers, head).from_pretrained(folder, **trust, **overrides)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert type(model).__name__.startswith("LSGAlbert") and model.config.block_size == 16
        with torch.no_grad():
            torch.testing.assert_close(getattr(model, "albert", model)(ids)[0], expected_states, rtol=0, atol=1e-6)
            if head == "AutoModelForMaskedLM":
                torch.testing.assert_close(model(ids).logits, expected_logits, rtol=0, atol=1e-6)

check(saved)
check("lsg-albert", block_size=16)
assert not any(name.split(".")[0] == "lsg_albert" for name in sys.modules)
print("loaded")
"""
    result = run_in_new_process(
        code, saved, tmp_path / "expected.pt", ",".join(HEADS), cwd=copy, modules_cache=tmp_path / "modules"
    )
    assert result.stdout.endswith("loaded\n"), result.stdout + result.stderr


def test_every_saved_class_carries_all_code_and_loads_as_every_other(repository, tmp_path):
    """In processes of their own: what a file imports late, or from the module that imports it, shows only there."""
    save = """
from pathlib import Path
import transformers
repository, target, heads, code = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","), set(sys.argv[4].split(","))
for head in heads:
    model = getattr(transformers, head).from_pretrained(repository, trust_remote_code=True, num_labels=3)
    model.save_pretrained(target / head)
    assert {path.name for path in (target / head).glob("*.py")} == code, head
print("saved")
"""
    load = """
from pathlib import Path
import transformers
source, heads = Path(sys.argv[1]), sys.argv[2].split(",")
for saved in heads:
    for head in heads:
        # Classifiers differ in size. Not by a factor of two, for which 4.44 has a rule of its own.
        options = dict(trust_remote_code=True, ignore_mismatched_sizes=True)
        model = getattr(transformers, head).from_pretrained(source / saved, **options)
        assert type(model).__module__.startswith("transformers_modules."), (saved, head)
print("loaded")
"""
    heads, modules_cache = ",".join(HEADS), tmp_path / "modules"
    arguments = (tmp_path / "saved", heads)
    for code, given in ((save, (repository, *arguments, ",".join(CODE))), (load, arguments)):
        result = run_in_new_process(code, *given, cwd=tmp_path, modules_cache=modules_cache)
        assert result.returncode == 0, result.stdout + result.stderr
        shutil.rmtree(modules_cache)


def test_tokenizer_loads_without_trust_question_or_warning(repository, tmp_path):
    """In a process of its own, where a question finds no one to answer and all that is printed is seen."""
    code = """
from transformers import AutoTokenizer
for stream in (sys.stdout, sys.stderr):
    print("-- imported --", file=stream, flush=True)
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__module__.startswith("transformers."), type(tokenizer)
    assert tokenizer("[CLS] [MASK]", add_special_tokens=False).input_ids == [2, 4]
    print(len(tokenizer), tokenizer.model_max_length)
"""
    result = run_in_new_process(code, repository, ROOT, cwd=tmp_path, modules_cache=tmp_path / "modules")
    printed, logged = (text.rpartition("-- imported --\n")[2] for text in (result.stdout, result.stderr))
    assert (result.returncode, printed, logged) == (0, f"{VOCAB} 4096\n" * 2, "")
    assert not list(tmp_path.rglob("*lsg*"))  # no code was copied to be run


# Layouts


def test_published_layout_loads_with_our_code_in_its_place(tiny_config, tmp_path):
    """`pytorch_model.bin` with all names of a tied tensor, the old buffer and a pooler, one file for all classes."""
    model = make_model(tiny_config(), "AutoModelForPreTraining")
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state_dict["albert.embeddings.position_ids"] = torch.arange(tiny_config().max_position_embeddings)[None]
    masked_lm = {name: tensor for name, tensor in state_dict.items() if not name.startswith("sop_classifier.")}
    assert {"albert.pooler.weight", "predictions.decoder.weight", "predictions.decoder.bias"} <= masked_lm.keys()
    config = {**model.config.to_dict(), "architectures": ["LSGAlbertForMaskedLM"]}
    config["auto_map"] = {name: f"modeling_lsg_albert.{name_in_file}" for name, name_in_file in HEADS.items()}
    config["auto_map"]["AutoConfig"] = "modeling_lsg_albert.LSGAlbertConfig"
    for name, weights in (("pretraining", state_dict), ("masked_lm", masked_lm)):
        (folder := tmp_path / name).mkdir()
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(config))
        for file in CODE:
            shutil.copyfile(ROOT / file, folder / file)

    for name, auto_name in (("pretraining", "AutoModelForPreTraining"), ("masked_lm", "AutoModelForMaskedLM")):
        with logged_warnings() as messages:
            loaded, info = load(auto_name, tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert type(loaded.config).__name__ == "LSGAlbertConfig"
        if TRANSFORMERS == Version("5.0.0"):  # it ties nothing that a file has under both names, and says so
            assert len(messages) == 2 and all("so we will NOT tie them" in message for message in messages)
        else:
            assert not messages
            assert is_tied(loaded)
        assert_same(first_output(loaded), first_output(model))
    for auto_name in HEADS:
        base = load(auto_name, tmp_path / "masked_lm")
        base = getattr(base, "albert", base)
        assert_same(first_output(base), first_output(model.albert))


def test_safetensors_hold_tied_weights_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
        assert file.metadata()["format"] == "pt"
    tied = {"predictions.decoder.weight", "predictions.decoder.bias"}
    assert stored.keys() == model.state_dict().keys() - tied
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=str)
def test_bias_of_the_decoder_is_found_under_either_name(model, tmp_path, options):
    model.save_pretrained(tmp_path)
    rename_bias(tmp_path)
    with logged_warnings() as messages:
        loaded, info = load("AutoModelForMaskedLM", tmp_path, output_loading_info=True, **options)
    assert not messages
    assert not any(info.values())
    assert is_tied(loaded)
    assert_same(first_output(loaded), first_output(model))


def rename_bias(folder):
    """Store the bias of the decoder by the decoder's name for it."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    stored["predictions.decoder.bias"] = stored.pop("predictions.bias")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


WITHOUT_MLM_HEAD = (
    "AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering", "AutoModelForMultipleChoice",
)  # fmt: skip
BIAS = {"predictions.bias", "predictions.decoder.bias"}


def on_meta(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.is_meta]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("auto_name", WITH_MLM_HEAD)
@pytest.mark.parametrize("source", WITHOUT_MLM_HEAD)
def test_head_that_a_checkpoint_has_not_is_drawn_and_named(tiny_config, tmp_path, source, auto_name, tied):
    saved = make_model(tiny_config(tie_word_embeddings=tied), source)
    saved.save_pretrained(tmp_path)
    for options in ({}, {"device_map": "cpu"}):
        loaded, info = load(auto_name, tmp_path, output_loading_info=True, **options)
        assert set(info["missing_keys"]) >= BIAS
        assert not on_meta(loaded)
        assert loaded.predictions.bias.count_nonzero() == 0
        assert loaded.predictions.decoder.bias is loaded.predictions.bias
        words = loaded.albert.embeddings.word_embeddings.weight
        assert torch.equal(words, getattr(saved, "albert", saved).embeddings.word_embeddings.weight)
        assert (loaded.predictions.decoder.weight is words) == tied
        assert first_output(loaded).isfinite().all()
    load(auto_name, tmp_path).save_pretrained(tmp_path / "again")
    assert not any(load(auto_name, tmp_path / "again", output_loading_info=True)[1].values())


@pytest.mark.parametrize("auto_name", WITH_MLM_HEAD)
def test_bias_that_a_file_has_under_no_name_is_zero_and_named(model, tmp_path, auto_name):
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["predictions.bias"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = load(auto_name, tmp_path, output_loading_info=True)
    assert {name for name in info["missing_keys"] if name.startswith("predictions.")} == BIAS
    assert not on_meta(loaded) and is_tied(loaded)
    assert loaded.predictions.bias.count_nonzero() == 0
    assert torch.equal(loaded.predictions.dense.weight, model.predictions.dense.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "names", [{"predictions.bias"}, {"predictions.decoder.bias"}, BIAS], ids=["bias", "decoder", "both"]
)
def test_model_on_meta_takes_the_tensors_assigned_to_it(tiny_config, names, tied):
    model = make_model(tiny_config(tie_word_embeddings=tied))
    state_dict = {name: x for name, x in model.state_dict().items() if name not in BIAS - names}
    if tied:
        del state_dict["predictions.decoder.weight"]
    with torch.device("meta"):
        assigned = LSGAlbertForMaskedLM(model.config).eval()
    assigned.load_state_dict(state_dict, strict=False, assign=True)
    assigned.tie_weights()
    assert assigned.predictions.decoder.bias is assigned.predictions.bias
    assert not [name for name in on_meta(assigned) if "projections" not in name]
    assigned.albert.encoder.to_empty(device="cpu", recurse=False).reset_projections()  # not in a state dict
    assert_same(first_output(assigned), first_output(model))


def test_untied_head_is_stored_whole_but_for_the_bias(tiny_config, tmp_path):
    model = make_model(tiny_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    with logged_warnings() as messages:
        loaded, info = load("AutoModelForMaskedLM", tmp_path, output_loading_info=True)
    assert not messages
    assert not any(info.values())
    assert loaded.predictions.decoder.weight is not loaded.albert.embeddings.word_embeddings.weight
    assert loaded.predictions.decoder.bias is loaded.predictions.bias
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_other_file_layouts_load_the_same(model, tmp_path, safe, shard_size):
    if not safe and TRANSFORMERS >= Version("5"):
        pytest.skip(f"transformers {TRANSFORMERS} saves safetensors only")
    options = {} if safe else {"safe_serialization": False}
    model.save_pretrained(tmp_path, max_shard_size=shard_size, **options)
    files = sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".safetensors"))
    assert all(name.endswith(".safetensors" if safe else ".bin") for name in files)
    assert len(files) == 1 if shard_size == "5GB" else len(files) > 2
    with logged_warnings() as messages:
        loaded = load("AutoModelForMaskedLM", tmp_path)
    assert not messages
    assert is_tied(loaded)
    assert_same(first_output(loaded), first_output(model))


# Arguments


@pytest.mark.parametrize(
    "options",
    [{"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}],
    ids=str,
)
def test_lean_loading_keeps_weights_tied(repository, options):
    with logged_warnings() as messages:
        loaded = load("AutoModelForMaskedLM", repository, **options)
    assert not messages
    assert is_tied(loaded)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert_same(first_output(loaded), first_output(load("AutoModelForMaskedLM", repository)))


@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"])
def test_dtype_can_be_chosen(repository, argument, dtype):
    if argument == "dtype" and TRANSFORMERS < Version("4.56"):
        pytest.skip(f"transformers {TRANSFORMERS} knows `torch_dtype` only")
    loaded = load("AutoModelForMaskedLM", repository, **{argument: dtype})
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32 if dtype == "auto" else dtype}
    assert is_tied(loaded)
    exact = first_output(load("AutoModelForMaskedLM", repository))
    error = (first_output(loaded).float() - exact).abs().max()
    assert error < 0.1 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_saved_as_such(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, torch_dtype="auto", **TRUST)
    assert loaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_can_be_chosen_in_every_way(repository, implementation):
    config = AutoConfig.from_pretrained(repository, **TRUST, attn_implementation=implementation)
    models = {
        "keyword": load("AutoModel", repository, attn_implementation=implementation),
        "config": load("AutoModel", repository, config=config),
        "config alone": AutoModel.from_config(config, **TRUST),
        "from_config": AutoModel.from_config(
            AutoConfig.from_pretrained(repository, **TRUST), attn_implementation=implementation, **TRUST
        ),
        "later": load("AutoModelForMaskedLM", repository),
    }
    models["later"].set_attn_implementation(implementation)
    for way, loaded in models.items():
        assert {module.config._attn_implementation for module in loaded.modules() if hasattr(module, "config")} == {
            implementation
        }, way
    expected = first_output(load("AutoModel", repository))
    torch.testing.assert_close(first_output(models["keyword"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flax_attention", "sdpaa"])
def test_attention_that_lsg_has_not_is_refused_in_every_way(repository, implementation):
    def config():
        return LSGAlbertConfig.from_pretrained(repository)

    def set_by_hand(config):
        config._attn_implementation = implementation
        return config

    asked = {"attn_implementation": implementation}
    loaded = LSGAlbertForMaskedLM(config()).eval()
    ways = {
        "from_pretrained": lambda: load("AutoModelForMaskedLM", repository, **asked),
        "from_pretrained of the class": lambda: LSGAlbertForMaskedLM.from_pretrained(repository, **asked),
        "with a config": lambda: LSGAlbertForMaskedLM.from_pretrained(repository, config=config(), **asked),
        "from_config": lambda: AutoModel.from_config(
            AutoConfig.from_pretrained(repository, **TRUST), **TRUST, **asked
        ),
        "config": lambda: LSGAlbertConfig.from_pretrained(repository, **asked),
        "config by hand": lambda: LSGAlbertForMaskedLM(set_by_hand(config())),
        "set_attn_implementation": lambda: loaded.set_attn_implementation(implementation),
        "model's config by hand": lambda: (set_by_hand(loaded.config), first_output(loaded)),
    }
    for way, ask in ways.items():
        with pytest.raises(ValueError) as error:
            ask()
        for part in (implementation, "sdpa", "eager"):
            assert part in str(error.value), way


# Plain ALBERT


@pytest.mark.parametrize("bias", ["predictions.bias", "predictions.decoder.bias"])
def test_without_remote_code_it_is_a_plain_albert_with_the_same_logits(tiny_config, tmp_path, bias):
    """What a server does that may not run remote code. The globals must be made from [CLS] for equal logits."""
    if bias == "predictions.bias":
        skip_where_albert_loses_its_bias()
    fields = {key: value for key, value in tiny_config().to_dict().items() if key in AlbertConfig().to_dict()}
    albert = AlbertForMaskedLM(AlbertConfig(**{**fields, "auto_map": None, "vocab_size": VOCAB})).eval()
    with torch.no_grad():
        for parameter in albert.parameters():
            parameter.normal_(std=0.2)
    converted = convert_state_dict(
        albert.state_dict(), max_length=fields["max_position_embeddings"], bos_token_id=2, mask_token_id=4
    )
    lsg = LSGAlbertForMaskedLM(tiny_config(vocab_size=VOCAB, mask_first_token=True)).eval()
    lsg.load_state_dict(converted)
    folder = write_repository(tmp_path / "converted", lsg)
    if bias == "predictions.decoder.bias":
        rename_bias(folder)

    plain, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert type(plain) is AlbertForMaskedLM
    assert type(AutoConfig.from_pretrained(folder)) is AlbertConfig
    assert set(info["unexpected_keys"]) == {"albert.embeddings.global_embeddings.weight"}
    assert not info["missing_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["The cat [MASK].", "A cat sat on the [MASK] and"], padding=True, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    assert (batch["attention_mask"] == 0).any() and length <= 2 * lsg.config.block_size
    remote = load("AutoModelForMaskedLM", folder)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = albert(**batch).logits
        for model in (plain, remote):
            torch.testing.assert_close(model(**batch).logits[real], expected[real], rtol=0, atol=1e-5)


def skip_where_albert_loses_its_bias():
    if TRANSFORMERS < Version("4.49"):
        pytest.skip(f"AlbertForMaskedLM of transformers {TRANSFORMERS} loses `predictions.bias`, of its own files too")


# The root itself


@pytest.fixture(scope="module")
def root():
    if not (ROOT / "model.safetensors").is_file():
        pytest.skip("the root has no model.safetensors yet")
    return ROOT


def test_root_loads_whole_and_silent_and_fits_its_tokenizer(root):
    with logged_warnings() as messages:
        loaded, info = load("AutoModelForMaskedLM", root, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(root)
    assert not messages
    assert not any(info.values())
    config = json.loads((root / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["model_type"] == "albert"
    assert loaded.config.vocab_size == len(tokenizer)
    assert loaded.config.max_position_embeddings == tokenizer.model_max_length == 4096
    assert (loaded.config.pad_token_id, loaded.config.bos_token_id, loaded.config.eos_token_id) == (
        tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id,
    )  # fmt: skip
    assert is_tied(loaded)
    for auto_name in HEADS:
        assert type(load(auto_name, root)).__name__ == HEADS[auto_name]


def test_root_predicts_the_same_without_remote_code_on_short_text(root):
    with safe_open(root / "model.safetensors", "pt") as file:
        if "predictions.decoder.bias" not in file.keys():
            skip_where_albert_loses_its_bias()
    tokenizer = AutoTokenizer.from_pretrained(root)
    batch = tokenizer("She opened the [MASK] and looked into the dark room.", return_tensors="pt")
    ours, plain = load("AutoModelForMaskedLM", root), AutoModelForMaskedLM.from_pretrained(root)
    assert type(plain) is AlbertForMaskedLM
    at_mask = batch["input_ids"][0] == tokenizer.mask_token_id
    with torch.no_grad():
        scores = [model(**batch).logits[0, at_mask].softmax(-1) for model in (ours, plain)]
    assert scores[0].topk(5).indices.tolist() == scores[1].topk(5).indices.tolist()
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
