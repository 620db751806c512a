"""The model card: its Python runs, its head is what the Hub accepts, and its tables tell the truth."""

import inspect
import re

import pytest
import yaml

from conftest import ROOT
from lsg_albert import LSGAlbertConfig
from lsg_albert.configuration_lsg_albert import AUTO_MAP, SPARSITY_TYPES

README = (ROOT / "README.md").read_text(encoding="utf-8")
_, CARD_HEAD, BODY = README.split("---\n", 2)


def table_under(heading: str) -> list[list[str]]:
    """The rows, without their head, of the first table under a heading."""
    section = BODY.split(f"# {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE).group().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_python_blocks_run_in_order(monkeypatch):
    if not (ROOT / "model.safetensors").exists():
        pytest.skip("the root has no weights yet")
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", BODY, re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["outputs"].last_hidden_state.shape[1] == namespace["inputs"]["input_ids"].shape[1] > 1000


def test_card_head_is_what_the_hub_accepts():
    from huggingface_hub import ModelCardData

    head = yaml.safe_load(CARD_HEAD)
    card = ModelCardData(**head)
    assert (card.library_name, card.pipeline_tag, card.license) == ("transformers", "fill-mask", "apache-2.0")
    assert "base_model" not in head, "the weights here were not made from another model's"
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


def test_pictures_and_files_that_are_named_exist():
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", BODY):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"(?:examples|pretraining|benchmarks|tests)/[\w/]+\.\w+", README):
        assert (ROOT / name).is_file(), name
