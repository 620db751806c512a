"""What we rely on in torch and transformers beyond their documented names, and what they are about to rename."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from helpers import ROOT, checkpointing_arguments, run_in_new_process, write_repository
from lsg_albert import LSGAlbertForMaskedLM
from release_to_come import OUTPUT_FIELDS

RUNTIME_FILES = sorted(
    path for path in [*ROOT.glob("*.py"), *ROOT.glob("conversion/*.py")] if path.name != "noxfile.py"
)
LIBRARY_CLASSES = (PreTrainedModel, GenerationMixin, PretrainedConfig, nn.Module, torch.autograd.Function)

# Every underscore name of torch or transformers that runtime code touches, and what happens should it go.
PRIVATE_NAMES = {
    # Declarations that transformers reads. One that it no longer reads does nothing.
    "_autoset_attn_implementation": "overridden for 4.44 and 4.48; others do not call it",
    "_init_weights": "the documented hook for the initialization of a custom model",
    "_keys_to_ignore_on_load_unexpected": "silences a warning while loading",
    "_no_split_modules": "the documented declaration for `device_map`",
    "_supports_cache_class": "read by 4.44 and 4.48",
    "_supports_flex_attn": "declares an attention implementation",
    "_supports_param_buffer_assignment": "read by 4.44 and 4.48",
    "_supports_sdpa": "declares an attention implementation",
    "_tied_weights_keys": "the documented declaration of tied parameters",
    "_tie_weights": "called by 4.x after loading; the parameters are tied in `__init__` as well",
    # Attributes that we read.
    "_attn_implementation": "the documented way to ask which attention a config selects",
    "_is_hf_initialized": "read by `getattr` with a default",
    "_gradient_checkpointing_func": "set by transformers; read only by our own layer for releases before 4.53",
    "_forward_hooks": "of nn.Module; decides whether a fused kernel may replace a module",
    "_forward_pre_hooks": "as `_forward_hooks`",
    # Operators.
    "_linear_pointwise": "tried once; where it is missing or wrong, the plain layer runs",
    "_is_mkldnn_bf16_supported": "tried once, as `_linear_pointwise`",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name.strip("_") != ""


def names_in(path: Path) -> tuple[set[str], set[str]]:
    """The private names that a file uses as attributes or keywords, and those that it defines."""
    used, defined = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                defined.add(node.attr)
        elif isinstance(node, ast.alias):
            used.update(node.name.split("."))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr"):
            used.update(str(arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    return {name for name in used if is_private(name)}, {name for name in defined if is_private(name)}


def test_every_private_name_of_the_libraries_is_known():
    files = [names_in(path) for path in RUNTIME_FILES]
    used, defined = (set().union(*names) for names in zip(*files, strict=True))
    # A name that only we define is no business of the libraries; one that they have too, or read, is.
    theirs = {name for name in defined if name in PRIVATE_NAMES or any(hasattr(cls, name) for cls in LIBRARY_CLASSES)}
    touched = (used - defined) | theirs
    assert sorted(touched) == sorted(PRIVATE_NAMES), (
        "a private name of torch or transformers is new, or no longer used"
    )


def test_no_runtime_file_imports_a_private_module():
    for path in RUNTIME_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in modules:
                assert not module.startswith("transformers.models"), f"{path.name} imports {module}"
                assert not any(is_private(part) for part in module.split(".")), f"{path.name} imports {module}"


# What the libraries announce

JOURNEY = """
import logging, re, traceback, warnings
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification,
    AutoTokenizer, Trainer, TrainingArguments, pipeline,
)
from transformers.utils import logging as transformers_logging

complaints = []

def note(message):
    announces = re.search("deprecat|will be removed|has been removed|will be required|no longer", message, re.I)
    ours = [frame for frame in traceback.extract_stack() if "transformers_modules" in frame.filename]
    if announces and ours:
        complaints.append(f"{ours[-1].filename}:{ours[-1].lineno}: {message}")

class Handler(logging.Handler):
    def emit(self, record):
        note(record.getMessage())

transformers_logging.set_verbosity_warning()
logging.getLogger().addHandler(Handler())
logging.getLogger("transformers").addHandler(Handler())
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_, **__: note(str(message))

repo, saved, arguments = sys.argv[1], sys.argv[2], eval(sys.argv[3])
trusted = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(repo)
batch = tokenizer(["A ship came home. " * 9, "A river."], padding=True, return_tensors="pt")
labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
model = AutoModelForMaskedLM.from_pretrained(repo, **trusted, attn_implementation="eager")
model.set_attn_implementation("sdpa")
model(**batch, labels=labels, output_hidden_states=True, output_attentions=True).loss.backward()
model.resize_token_embeddings(len(tokenizer) + 8)
model.save_pretrained(saved)
AutoModel.from_pretrained(saved, **trusted)(**batch)
AutoConfig.from_pretrained(repo, **trusted).to_dict()
pipeline("fill-mask", model=repo, **trusted)("A [MASK] came home.")
seq2seq = AutoModelForSeq2SeqLM.from_pretrained(repo, **trusted)
seq2seq(**batch, labels=labels).loss.backward()
seq2seq.generate(**batch, num_beams=2, max_new_tokens=3, return_dict_in_generate=True)
seq2seq.generate(batch["input_ids"][:1], prompt_lookup_num_tokens=2, max_new_tokens=3)
seq2seq.save_pretrained(saved)
classifier = AutoModelForSequenceClassification.from_pretrained(repo, **trusted)
rows = [{**tokenizer("A ship. " * 3), "labels": n % 2} for n in range(8)]
args = TrainingArguments(saved, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_steps=1, **arguments)
trainer = Trainer(classifier, args, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.evaluate()
print("\\n".join(complaints) or "none")
"""


def test_our_calls_are_not_deprecated(tiny_config, tmp_path):
    config = tiny_config(vocab_size=16000, max_position_embeddings=4096)
    source = write_repository(tmp_path / "repository", LSGAlbertForMaskedLM(config))
    result = run_in_new_process(
        JOURNEY, source, tmp_path / "saved", checkpointing_arguments(use_reentrant=False),
        cwd=tmp_path, modules_cache=tmp_path / "modules",
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "none", result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not OUTPUT_FIELDS, reason="this release announces no removal of a name that we could use")
def test_seq2seq_works_without_the_names_that_are_to_go():
    tests = [f"tests/test_{name}.py" for name in ("seq2seq", "seq2seq_ecosystem")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "release_to_come", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0 and "without past_key_values" in result.stdout, result.stdout[-8000:]
