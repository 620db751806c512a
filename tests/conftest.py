"""The checkout as the package `lsg_albert`, small models, and transformers kept offline and away from the user's cache."""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Before transformers is imported anywhere. A cache of its own, or stale copies of the code would be run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="lsg_albert_modules_")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _import_checkout() -> None:
    """Make `import lsg_albert` mean this checkout, also where another copy is installed."""
    spec = importlib.util.spec_from_file_location(
        "lsg_albert", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["lsg_albert"] = package
    spec.loader.exec_module(package)


_import_checkout()

import pytest  # noqa: E402
import torch  # noqa: E402

from lsg_albert import LSGAlbertConfig  # noqa: E402

TINY = {
    "vocab_size": 120,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 176,
    "block_size": 8,
    "sparse_block_size": 8,
    "initializer_range": 0.2,
}


class RootIsNoTestPackage:
    """Pytest takes a folder with an `__init__.py` for a package of tests, and imports that file before the first test.

    The root's would be imported under the name of the folder, as a second copy, or fail where that name is no identifier.
    """

    @staticmethod
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path.resolve() == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoTestPackage)  # the hooks of this file are not asked about folders above it
    # One thread for each process of `pytest -n`: most tests are too small for more threads to help.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_precision_left_over() -> Iterator[None]:
    """Older releases of the Trainer keep one test's ``--bf16`` in the environment for those after it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(scope="session")
def tiny_config():
    """A factory of small configurations; keywords replace fields."""
    return lambda **fields: LSGAlbertConfig(**{**TINY, **fields})


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout with data and golden cases; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("../shared (data and golden cases of the project's authors) is not there")
    return SHARED


@pytest.fixture(scope="session")
def masked_lm(tmp_path_factory) -> Path:
    """An AlbertForMaskedLM in a directory, for tests of the conversion that do not change it."""
    from albert_sources import make_albert, save  # which itself imports from here

    return save(make_albert(), tmp_path_factory.mktemp("sources") / "albert")


@pytest.fixture
def source(masked_lm, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(masked_lm, tmp_path / "source")


@pytest.fixture
def target(tmp_path) -> Path:
    """A place for its conversion."""
    return tmp_path / "target"
