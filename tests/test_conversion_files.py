"""Reading and writing checkpoints: a target is there whole or not at all, whatever happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from albert_sources import VOCABULARY, fingerprint, make_albert, save
from conftest import ROOT
from helpers import CODE
from lsg_albert.conversion.families import ALBERT
from lsg_albert.conversion.files import (
    ConversionError,
    SourceWeights,
    copy_code,
    copy_tokenizer,
    fetch_source,
    recover,
    whole_directory,
    write_weights,
)

VOCABULARIES = ALBERT.vocabularies

# Converts in a child process that is killed right before its n-th operation on a file below the given folder, for
# every n, with and without a target to overwrite; says how often each kind of target was left.
_KILLED_EVERYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
import conftest
from albert_sources import fingerprint
from lsg_albert.conversion.convert import convert_checkpoint
from lsg_albert.conversion.files import recover

folder = Path(sys.argv[1])
source, old, place, target = folder / "source", folder / "old", folder / "new", folder / "new" / "target"
os.fsync = lambda descriptor: None  # slow, and of no effect on what a killed process leaves
allowed = None  # operations before the end

def watch(event, arguments):
    global allowed
    if allowed is not None and any(str(place) in str(argument) for argument in arguments):
        allowed -= 1
        if allowed < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def prepare(overwrite):
    shutil.rmtree(place, ignore_errors=True)
    if overwrite:
        shutil.copytree(old, target)

def convert():
    convert_checkpoint(source, target, max_length=64, block_size=16, overwrite=True, verify=False)

def kill_after(operations):
    global allowed
    pid = os.fork()
    if pid == 0:
        allowed = operations
        convert()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)

convert()
kinds = {str(fingerprint(target)): "new", str(fingerprint(old)): "old"}
source_before = fingerprint(source)
sys.addaudithook(watch)
outcomes = {}
for overwrite in (False, True):
    count = outcomes["overwrite" if overwrite else "first"] = {"none": 0, "old": 0, "new": 0}
    prepare(overwrite)
    while kill_after(sum(count.values())):
        outcome = kinds[str(fingerprint(target))] if target.exists() else "none"
        count[outcome] += 1
        assert fingerprint(source) == source_before
        if place.exists():
            recover(target)  # as the next conversion does
            whole = outcome != "none" or overwrite
            assert [path.name for path in place.iterdir()] == ["target"] * whole
            assert not whole or kinds[str(fingerprint(target))] == outcome.replace("none", "old")
        prepare(overwrite)
print(json.dumps(outcomes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_any_file_operation_it_leaves_a_whole_target_or_none(tmp_path):
    save(make_albert(vocab_size=100), tmp_path / "source", tokenizer=False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_EVERYWHERE, tmp_path, ROOT / "tests"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    assert outcomes["first"]["none"] > 20 and outcomes["first"]["old"] == 0 and outcomes["first"]["new"] > 0
    assert outcomes["overwrite"]["old"] > 20 and outcomes["overwrite"]["new"] > 0
    assert outcomes["overwrite"]["none"] == 1, "between the two renames"


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    left = tmp_path / ".target.partial-00000000"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with whole_directory(tmp_path / "target") as partial:
        assert not left.exists()
        recover(tmp_path / "target")  # as a second run would
        assert partial.exists()
        (partial / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_names_with_special_characters(tmp_path):
    target = tmp_path / "a [b] *"
    (tmp_path / ".a [b] *.partial-0").mkdir()
    with whole_directory(target) as partial:
        (partial / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_an_exception_leaves_nothing_and_the_old_target(tmp_path):
    target = tmp_path / "deep" / "target"
    with pytest.raises(KeyboardInterrupt), whole_directory(target) as partial:
        (partial / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_directory(target, overwrite=True) as partial:
        raise KeyboardInterrupt
    assert fingerprint(target.parent).keys() == {"target/config.json"}


def test_a_target_is_replaced_only_on_request_and_only_if_it_is_a_model(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ConversionError, match="exists. .*--overwrite"), whole_directory(target):
        pass
    with whole_directory(target, overwrite=True) as partial:  # an empty directory
        (partial / "notes").write_text("mine")
    with pytest.raises(ConversionError, match="it has no config.json"), whole_directory(target, overwrite=True):
        pass
    assert (target / "notes").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConversionError, match="is not replaced"), whole_directory(tmp_path / "file", overwrite=True):
        pass


def test_a_target_that_another_run_made_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(ConversionError, match="exists"), whole_directory(target) as partial:
        (partial / "config.json").write_text("mine")
        target.mkdir()
        (target / "config.json").write_text("theirs")
    assert fingerprint(tmp_path).keys() == {"target/config.json"}
    assert (target / "config.json").read_text() == "theirs"


def test_weights_are_mapped_and_not_read(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = SourceWeights(tmp_path)
    assert weights.shapes == {"a": (3, 4), "b": (2,)}
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())


def test_an_index_that_promises_too_much_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}')
    with pytest.raises(ConversionError, match="one.safetensors is damaged: it lacks b"):
        SourceWeights(tmp_path)
    index.write_text("{}")
    with pytest.raises(ConversionError, match="has no `weight_map`"):
        SourceWeights(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_weights_may_be_read_by_whom_the_umask_allows(tmp_path):
    write_weights(tmp_path, {"a": torch.ones(1)})
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_code_that_is_copied_is_what_the_modeling_file_needs(tmp_path):
    assert copy_code(tmp_path) == sorted(CODE)


def test_tokenizers_of_all_forms_are_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    assert copy_tokenizer(source, target, VOCABULARIES, 10) is None
    (source / "vocab.txt").write_text("[PAD]\n")
    assert copy_tokenizer(source, target, VOCABULARIES, 10) == "BertTokenizer"
    assert copy_tokenizer(source, target, VOCABULARIES, 10, "Named") == "Named"
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "X", "model_max_length": 5}')
    (source / "spiece.model").write_bytes(VOCABULARY.read_bytes())
    assert copy_tokenizer(source, target, VOCABULARIES, 10, "Named") == "X"
    assert (target / "tokenizer_config.json").read_text() == '{\n  "model_max_length": 10\n}\n'
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "AlbertTokenizerFast"}')
    assert copy_tokenizer(source, target, VOCABULARIES, 10) == "AlbertTokenizerFast"
    assert json.loads((target / "tokenizer_config.json").read_text())["tokenizer_class"] == "AlbertTokenizerFast"


@pytest.mark.parametrize("source", ["/no/such/place", "./nothing", "a/b/c", "spaces in it"])
def test_a_source_that_is_no_place_is_named(source):
    with pytest.raises(ConversionError, match="neither a directory nor the name of a repository"):
        fetch_source(source)


def test_a_repository_out_of_reach_is_named():
    with pytest.raises(ConversionError, match="someone/nothing is not a directory, and loading it from the Hub"):
        fetch_source("someone/nothing")  # offline, as all tests are


def test_a_file_is_no_source(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConversionError, match="neither a directory"):
        fetch_source(str(path))
    assert isinstance(fetch_source(str(tmp_path)), Path)
