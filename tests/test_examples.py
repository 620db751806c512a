"""The example scripts, run as a new user runs them."""

import subprocess
import sys

import pytest
import torch
from transformers import AlbertForMaskedLM, AutoTokenizer

from conftest import ROOT
from helpers import example, write_repository
from lsg_albert import LSGAlbertForMaskedLM


@pytest.fixture(scope="module")
def fill_mask():
    return example("fill_mask")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with a small random model that reads 600 tokens."""
    from conftest import TINY
    from lsg_albert import LSGAlbertConfig

    torch.manual_seed(0)
    config = LSGAlbertConfig(**{**TINY, "vocab_size": 16000, "max_position_embeddings": 600, "mask_first_token": True})
    return write_repository(tmp_path_factory.mktemp("examples") / "repository", LSGAlbertForMaskedLM(config))


def document(tmp_path, text):
    path = tmp_path / "document.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_fill_mask_shows_each_mask_with_its_words(fill_mask, repository, tmp_path, capsys):
    text = "The ship left the harbour. " * 40 + "It sailed to the [MASK] in spring. " + "The wind was strong. " * 40
    path = document(tmp_path, text + "At last it reached the [MASK].")
    assert fill_mask.main([str(path), "--model", str(repository), "--top-k", "3"]) == 0
    captured = capsys.readouterr()
    assert "It sailed to the [MASK] in spring. The wind" in captured.out
    assert captured.out.count("%") == 6 and "2 masked" in captured.out
    assert "reading" in captured.err and "tokens" in captured.err


def test_fill_mask_masks_words_of_a_text_without_masks(fill_mask, repository, tmp_path, capsys):
    path = document(tmp_path, "The ship left the harbour in the morning. " * 30)
    assert fill_mask.main([str(path), "--model", str(repository), "--words", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("masked word: ") == 4
    assert path.read_text() == "The ship left the harbour in the morning. " * 30


def test_fill_mask_says_what_lies_beyond_the_models_length(fill_mask, repository, tmp_path, capsys):
    path = document(tmp_path, "A [MASK] at first. " + "The wind was strong. " * 400 + "The last [MASK].")
    assert fill_mask.main([str(path), "--model", str(repository)]) == 0
    captured = capsys.readouterr()
    assert "600 tokens in one pass" in captured.out and "1 masked" in captured.out
    assert "1 more masks lie beyond the 600 tokens" in captured.out
    assert "600 of 2,0" in captured.err


@pytest.mark.parametrize("text", ["", "1 2 3"])
def test_fill_mask_refuses_a_text_with_nothing_to_fill(fill_mask, repository, tmp_path, capsys, text):
    assert fill_mask.main([str(document(tmp_path, text)), "--model", str(repository)]) == 1
    assert "no word to mask" in capsys.readouterr().err


def test_fill_mask_checks_its_arguments_before_it_imports_torch():
    """Which takes seconds."""
    code = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
    for arguments, message in (["no such file"], "cannot read no such file"), (["x", "--words", "0"], "at least 1"):
        command = [sys.executable, "-c", code, str(ROOT / "examples" / "fill_mask.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_fill_mask_names_what_it_cannot_read(fill_mask, repository, tmp_path, capsys):
    assert fill_mask.main([str(tmp_path / "none.txt")]) == 1
    assert "cannot read" in capsys.readouterr().err
    path = document(tmp_path, "A [MASK].")
    path.write_bytes(b"\xff\xfe\x00")
    assert fill_mask.main([str(path)]) == 1
    assert "cannot read" in capsys.readouterr().err
    path.write_text("A [MASK].")
    assert fill_mask.main([str(path), "--model", str(tmp_path / "nowhere")]) == 1
    assert "cannot load --model" in capsys.readouterr().err


def test_mask_words_spreads_them_and_keeps_the_rest(fill_mask):
    text = " ".join(f"word{chr(97 + i % 26)} and" for i in range(100))
    masked, words = fill_mask.mask_words(text, 10, "[MASK]")
    assert masked.count("[MASK]") == len(words) == 10
    for word in words:
        masked = masked.replace("[MASK]", word, 1)
    assert masked == text
    assert fill_mask.mask_words("only two words here", 10, "[MASK]")[1] == ["only", "words", "here"]


def test_the_long_document_is_long_and_has_its_masks():
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(ROOT)((ROOT / "examples" / "long_document.txt").read_text())["input_ids"]
    assert 3000 < len(ids) <= 4096
    assert ids.count(4) == 5 and max(i for i, token in enumerate(ids) if token == 4) > 3000


def test_plot_attention_draws_every_kind_of_key(repository, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot_attention = example("plot_attention")
    path = document(tmp_path, "The ship left the harbour in the morning. " * 40)
    output = tmp_path / "attn.png"
    command = [str(path), "--model", str(repository), "--output", str(output)]
    assert plot_attention.main(command) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "last layer, first head" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plot_attention.main(command)
    assert "attn.png exists; choose another --output" in capsys.readouterr().err
    command.append("--overwrite")
    weights, num_globals, which = plot_attention.attention_map(
        plot_attention.parse_args([*command, "--layer", "0", "--head", "2"]), path.read_text()
    )
    assert which == "first layer, head 2 (from 0)"
    kinds = plot_attention.kinds_of_keys(weights, num_globals, 16)
    assert set(kinds.unique().tolist()) == {0, 1, 2, 3}
    assert plot_attention.main([*command, "--layer", "99"]) == 1
    assert "--layer 99: the model has 2 layers, 0 to 1" in capsys.readouterr().err


def test_plot_attention_leaves_the_repositorys_picture_alone(tmp_path):
    pytest.importorskip("matplotlib")
    assert example("plot_attention").parse_args(["document.txt"]).output.name != "attn.png"


def test_fill_mask_reads_a_held_out_article_of_more_than_three_thousand_tokens(fill_mask, shared, tmp_path, capsys):
    """The main job on real input, with the model of this repository."""
    import gzip
    import json

    if not (ROOT / "model.safetensors").exists():
        pytest.skip("the root has no weights yet")
    corpus = shared / "data" / "corpus"
    held_out = set((corpus / "HELDOUT_wikispeedia_ids.txt").read_text().split())
    with gzip.open(corpus / "wikispeedia.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        article = next(row for row in rows if row["id"] in held_out and 2600 < len(row["text"].split()) < 2900)
    assert fill_mask.main([str(document(tmp_path, article["text"])), "--words", "8"]) == 0
    out = capsys.readouterr().out
    length = int(out.split(": ")[1].split(" tokens")[0].replace(",", ""))
    assert 3000 < length <= 4096
    assert out.count("masked word: ") == 8


# --- the card's widget


def test_widget_shows_what_both_loaders_answer(repository, capsys):
    """The card's examples, answered as our model and as transformers' ALBERT would by themselves."""
    texts = ["A [MASK] at sea.", "The [MASK]."]
    widget = "".join(f'- text: "{text}"\n' for text in texts)
    (repository / "README.md").write_text(f"---\nlicense: apache-2.0\nwidget:\n{widget}---\n# Card\n")
    assert example("widget").main(["--model", str(repository)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    tokenizer = AutoTokenizer.from_pretrained(repository)
    expected = []
    for text in texts:
        for model_class in (LSGAlbertForMaskedLM, AlbertForMaskedLM):
            inputs = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                logits = model_class.from_pretrained(repository).eval()(**inputs).logits
            scores, ids = logits[inputs["input_ids"] == tokenizer.mask_token_id][0].softmax(-1).topk(5)
            words = [f"{tokenizer.decode([i]).strip()} {s:.1%}" for i, s in zip(ids, scores, strict=True)]
            expected.append(", ".join(words))
    assert [row.split(" | ")[2].removesuffix(" |") for row in rows] == expected
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [text for text in texts for _ in range(2)]


def test_widget_names_a_card_without_examples(repository, capsys):
    (repository / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    assert example("widget").main(["--model", str(repository)]) == 1
    assert "no `widget:` examples" in capsys.readouterr().err
