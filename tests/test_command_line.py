"""`lsg-albert convert`: its options, what it prints, how it fails, the Hub, and its need of memory."""

import importlib.metadata
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from albert_sources import fingerprint
from conftest import ROOT
from hub_stand_in import COMMIT, stand_in_hub
from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM
from lsg_albert.__main__ import main
from lsg_albert.configuration_lsg_albert import LSG_FIELDS

SHORT = ["--max-length", "64", "--block-size", "16"]


@pytest.fixture
def installed(tmp_path_factory):
    """A folder with the checkout under the package's name, as if installed."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "lsg_albert").symlink_to(ROOT)
    return folder


def run(*command, cwd=None, limits=None, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=600, preexec_fn=limits,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def test_options_reach_the_target_and_the_report(masked_lm, target, tmp_path, capsys):
    options = "--block-size 16 --sparse-block-size none --sparsity-type lsh --sparsity-factor 4 --num-global-tokens 7 "
    options += "--mask-first-token --no-adaptive --lsh-num-pre-rounds 2 --lsh-seed none --max-length 64 --seed 3"
    assert convert(masked_lm, target, *options.split(), "--report", tmp_path / "report.json") == 0
    expected = {
        "block_size": 16, "sparse_block_size": None, "sparsity_type": "lsh", "sparsity_factor": 4,
        "num_global_tokens": 7, "mask_first_token": True, "pool_with_global": True, "adaptive": False,
        "pack_padding": True, "lsh_num_pre_rounds": 2, "lsh_seed": None, "pass_global_tokens_to_decoder": True,
    }  # fmt: skip
    assert json.loads((target / "config.json").read_text()).items() >= expected.items()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["lsg_parameters"] == expected and report["seed"] == 3
    assert report["parameters_after"] - report["parameters_before"] == (512 + 64 - 512) * 16
    seen = report["comparison"]
    assert seen["lossless_difference"] < 1e-4 and seen["chosen_difference"] >= 0 and seen["full_length"] == 64
    assert seen["full_length_seconds"] > 0 and seen["peak_memory_mb"] > 0 and len(seen["source_top5"]) == 5
    printed = capsys.readouterr()
    for text in ("parameters", "lossless setting", "chosen setting", "source's top 5", "full length", "64 tokens in"):
        assert text in printed.out
    assert "%|" not in printed.err, "no progress bar without a terminal"


def test_every_lsg_parameter_has_an_option_with_a_description(capsys):
    with pytest.raises(SystemExit):
        convert("--help")
    text = " ".join(capsys.readouterr().out.split())
    parameters = inspect.signature(LSGAlbertConfig.__init__).parameters
    for name in LSG_FIELDS:
        assert re.search(rf"--{name.replace('_', '-')} .*\w.*\(default: {parameters[name].default}\)", text), name


# What the command has imported when it has answered.
_ANSWERED = """
import sys
from lsg_albert.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("code", end.code, *sorted({"torch", "transformers", "huggingface_hub", "numpy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("line", "code"),
    [("--version", 0), ("--help", 0), ("convert --help", 0), ("convert a b --blocksize 3", 2), ("convert a", 2)],
)
def test_help_and_wrong_arguments_are_answered_before_anything_slow_is_imported(installed, tmp_path, line, code):
    done = run("-c", _ANSWERED, *line.split(), cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.splitlines()[-1] == f"code {code}", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "many"], "argument --block-size: invalid int value: 'many'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--blocksize", "3"], "unrecognized arguments"),
        (["--block-size", "{'a': 1}"], "invalid int value"),
    ],
)
def test_options_of_a_wrong_type_are_usage_errors(masked_lm, target, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        convert(masked_lm, target, *arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err and not target.exists()


def test_values_are_checked_by_the_configuration(masked_lm, target, capsys):
    assert convert(masked_lm, target, "--sparsity-type", "hlsh") == 1
    assert convert(masked_lm, target, "--sparsity-factor", "3") == 1
    lines = capsys.readouterr().err.splitlines()
    assert "did you mean 'lsh'" in lines[0] and "`block_size` (128) must be divisible" in lines[1] and len(lines) == 2


def test_errors_are_one_line_and_exit_code_1(source, target, tmp_path, capsys):
    target.mkdir()
    cases = [
        ([source, target], "exists"),
        ([source, source], "must be apart"),
        ([source, source / "inside", "--overwrite"], "must be apart"),
        ([source, tmp_path, "--overwrite"], "must be apart"),
        ([tmp_path / "none", tmp_path / "b"], "neither a directory nor"),
        ([source, source / "config.json" / "x"], "must be apart"),
        ([source, ROOT / "LICENSE" / "x"], "LICENSE"),
        ([source, tmp_path / "b", "--report", tmp_path / "no" / "report.json"], "No such file or directory"),
        ([source, tmp_path / "b", "--max-length", "7"], "must be at least 256"),
    ]
    before = fingerprint(source)
    for arguments, message in cases:
        assert convert(*arguments) == 1, arguments
        printed = capsys.readouterr()
        assert re.fullmatch(r"error: .+\n", printed.err) and message in printed.err, printed.err
        assert printed.out == ""
    assert fingerprint(source) == before and sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_overwrite_replaces_the_target(masked_lm, target, capsys):
    assert convert(masked_lm, target, *SHORT, "--no-verify") == 0
    (target / "left-over").touch()
    assert convert(masked_lm, target, *SHORT, "--no-verify", "--overwrite", "--sparsity-type", "stride") == 0
    assert not (target / "left-over").exists() and '"stride"' in (target / "config.json").read_text()
    assert "verified" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes are POSIX's")
def test_a_place_that_takes_no_more_is_one_line(masked_lm, target, tmp_path, installed):
    """The system refuses to write on, here by a limit, as it does on a full disk."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))  # above the vocabulary, below the weights

    done = run(
        "-m", "lsg_albert", "convert", masked_lm, target, *SHORT, "--no-verify",
        cwd=tmp_path, limits=limit, PYTHONPATH=str(installed), PYTHONDONTWRITEBYTECODE="1",
    )  # fmt: skip
    assert done.returncode == 1 and re.fullmatch(r"error: .*cannot write .*\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_line(masked_lm, small_disk, capsys, monkeypatch):
    arguments = [masked_lm, small_disk / "target", *SHORT, "--no-verify"]
    assert convert(*arguments) == 1
    assert re.fullmatch(r"error: .* too full: the weights take .*\n", capsys.readouterr().err)
    enough = shutil.disk_usage("/")._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: enough)  # as if it filled up meanwhile
    assert convert(*arguments) == 1
    assert re.fullmatch(r"error: cannot write .*No space left.*\n", capsys.readouterr().err)
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
def test_it_runs_from_a_clone(masked_lm, target, tmp_path):
    assert convert(masked_lm, target, *SHORT, "--no-verify") == 0
    other = tmp_path / "other"
    done = run(ROOT / "convert_albert_to_lsg.py", masked_lm, other, *SHORT, "--no-verify", cwd=tmp_path)
    assert done.returncode == 0 and "parameters" in done.stdout and done.stderr == "", done.stderr
    assert fingerprint(target) == fingerprint(other)


def test_the_console_script_is_this_command():
    try:
        scripts = importlib.metadata.distribution("lsg-albert").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert {script.value for script in scripts if script.name == "lsg-albert"} == {"lsg_albert.__main__:main"}


# Runs several commands in one process and tells what each returned and said.
_SEVERAL = """
import contextlib, io, json, sys
from lsg_albert.__main__ import main
results = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        results.append((main(arguments), said.getvalue()))
print(json.dumps(results))
"""


def test_from_the_hub_and_to_the_hub(source, target, tmp_path, installed):
    (source / "notes.txt").write_text("not needed")
    download = ["convert", "someone/albert", str(target), *SHORT, "--revision", "v1", "--token", "hf_a", "--no-verify"]
    upload = ["--push-to-hub", "me/lsg-albert", "--private", "--report", str(tmp_path / "report.json")]
    nothing = ["convert", "someone/nothing-here", str(tmp_path / "none")]
    refused = [*download, "--overwrite", "--push-to-hub", "me/forbidden", "--report", str(tmp_path / "refused.json")]
    with stand_in_hub(source) as hub:
        environment = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(installed),
        }  # fmt: skip
        commands = json.dumps([[*download, *upload], nothing, refused])
        done = run("-c", _SEVERAL, commands, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [code for code, _ in results] == [0, 1, 1], results

    assert ("GET", "/api/models/someone/albert/revision/v1", "Bearer hf_a") in hub.requests
    assert not any("notes.txt" in path for _, path, _ in hub.requests)
    created = hub.created[0]
    assert created["name"] == "lsg-albert" and created["organization"] == "me"
    assert created.get("private") or created.get("visibility") == "private"
    assert hub.uploaded == {path.name: path.read_bytes() for path in target.iterdir()}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["source_commit"] == COMMIT and report["pushed_to"] == f"{hub.url}/me/lsg-albert"
    card = (target / "README.md").read_text()
    assert "base_model: someone/albert" in card and COMMIT in card and "hf_a" not in card

    assert re.fullmatch(r"error: someone/nothing-here is not a directory.*\n", results[1][1])
    assert re.fullmatch(r"error: .*is complete, but could not be pushed to me/forbidden.*\n", results[2][1])
    assert json.loads((tmp_path / "refused.json").read_text())["pushed_to"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "home",
        "refused.json",
        "report.json",
        "source",
        "target",
    ]


CONVERSION_PAGE = (ROOT / "conversion" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_runs_as_written_on_a_local_source(masked_lm, tmp_path, installed, monkeypatch):
    scripts = tmp_path / "bin"
    scripts.mkdir()
    script = scripts / "lsg-albert"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lsg_albert "$@"\n')
    script.chmod(0o755)
    folder = tmp_path / "work"
    shutil.copytree(masked_lm, folder / "my-albert")
    environment = {
        **os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    blocks = re.findall(r"```(bash|py)\n(.*?)```", CONVERSION_PAGE, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "py", "py"]
    for kind, block in blocks:
        command = ["bash", "-e", "-o", "pipefail", "-c", block] if kind == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, block + done.stdout + done.stderr
    assert LSGAlbertForMaskedLM.from_pretrained(folder / "my-lsg-albert").config.max_position_embeddings == 8192


def test_the_page_lists_the_options(capsys):
    with pytest.raises(SystemExit):
        convert("--help")
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    parameters = {"--" + name.replace("_", "-") for name in LSG_FIELDS}
    assert len(options) > 20 and options - parameters - set(re.findall(r"`(--[a-z-]+)", CONVERSION_PAGE)) == set()


@pytest.mark.slow
def test_killed_at_any_time_it_leaves_a_whole_target_or_none(source, target, tmp_path, installed):
    command = [sys.executable, "-m", "lsg_albert", "convert", str(source), str(target), *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    duration = time.perf_counter() - start
    whole, before = fingerprint(target), fingerprint(source)
    shutil.rmtree(target)
    for i in range(12):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        time.sleep(duration * (0.5 + 0.05 * i))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert fingerprint(source) == before
        if target.exists():
            assert fingerprint(target) == whole
            shutil.rmtree(target)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


# Of the size of albert-xxlarge: 223 million parameters with its heads. Made in a process of its own: this stays small.
_MAKE_XXLARGE = """
import sys
sys.path.insert(0, sys.argv[1])
from albert_sources import make_albert, save
model = make_albert(
    "AlbertForPreTraining", vocab_size=30_000, embedding_size=128, hidden_size=4096, num_attention_heads=64,
    intermediate_size=16384, num_hidden_layers=12, initializer_range=0.02,
)
assert 222e6 < sum(p.numel() for p in model.parameters()) < 224e6
save(model, sys.argv[2], tokenizer=False)
"""
_MEASURED = """
import re, sys
from lsg_albert.__main__ import main
code = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def xxlarge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "xxlarge"
    done = run("-c", _MAKE_XXLARGE, ROOT / "tests", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.parametrize("options", [["--no-verify"], ["--max-length", "256"]])
def test_memory_stays_below_2_2_times_the_weights_and_a_constant(xxlarge, target, tmp_path, installed, options):
    weights = (xxlarge / "model.safetensors").stat().st_size
    done = run("-c", _MEASURED, "convert", xxlarge, target, *options, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(done.stdout.split("peak")[-1])
    assert peak < 2.2 * weights + 500e6, f"weights {weights / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB"
