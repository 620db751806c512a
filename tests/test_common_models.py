"""transformers' own common tests of models, from its source distribution, on our classes."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.24"),
        reason="the common tests of transformers differ from release to release; common_models.py is for the newest",
    ),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The source distribution of the installed transformers, of which the index is asked; nothing of it is kept."""
    folder = tmp_path_factory.mktemp("transformers")
    name = f"transformers-{transformers.__version__}"
    wanted = name.replace("-", "==")
    command = ["download", "-q", "--no-deps", "--no-binary", "transformers", "--dest", folder, wanted]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"the package index gives no source distribution {wanted}: {done.stderr.strip()[-200:]}")
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, [m for m in archive if m.name.startswith(f"{name}/tests/")], filter="data")
    if not (folder / name / "tests" / "test_modeling_common.py").is_file():
        pytest.skip(f"the source distribution {wanted} has no tests/test_modeling_common.py")
    return folder / name


@pytest.mark.parametrize("case", ["EncoderTest", "Seq2SeqTest"])
def test_the_common_tests_of_transformers_pass(sources, tmp_path, case):
    """In a process of its own, where `tests` is their package, and without the settings of this checkout's pytest."""
    pytest.importorskip("parameterized", reason="the common tests of transformers need it")
    options = ["-q", "-rs", "--tb=short", "-c", os.devnull, "--rootdir", tmp_path]
    plugins = ["-p", "no:cacheprovider", "-p", "no:warnings"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *plugins, f"{ROOT / 'tests' / 'common_models.py'}::{case}"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(sources)}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.fail(done.stdout[-20_000:] + done.stderr[-2_000:], pytrace=False)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100  # most of the others need an accelerator
