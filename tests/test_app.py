"""The page for the browser: what it computes, what it shows, and the whole of it in a headless Chromium."""

import shutil
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from conftest import ROOT, TINY
from helpers import write_repository
from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM
from test_examples import example

TEXT = (
    "The ship left the harbour in the morning. " * 12
    + "It sailed to the [MASK] in spring. "
    + "The wind was strong. " * 9
)
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def app():
    return example("app")


def repository(folder, **fields):
    """A repository with a small random model that reads 176 tokens, in blocks of 8."""
    torch.manual_seed(0)
    config = LSGAlbertConfig(**{**TINY, "vocab_size": 16000, "num_global_tokens": 2, **fields})
    return str(write_repository(folder / "repository", LSGAlbertForMaskedLM(config)))


@pytest.fixture(scope="module")
def loaded(app, tmp_path_factory):
    return app.load(repository(tmp_path_factory.mktemp("app")))


@pytest.fixture(scope="module")
def reading(app, loaded):
    return app.read(*loaded, TEXT)


# --- what it computes


def test_guesses_are_those_of_the_pipeline(app, loaded, reading):
    model, tokenizer = loaded
    expected = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=10)(TEXT)
    assert [word for word, _ in reading.predictions] == [found["token_str"].strip() for found in expected]
    assert [p for _, p in reading.predictions] == pytest.approx([found["score"] for found in expected], rel=1e-4)


@pytest.mark.parametrize("fields", [
    {"sparsity_type": "norm"}, {"sparsity_type": "pooling", "sparsity_factor": 4}, {"sparsity_type": "lsh"},
    {"sparsity_type": "none"}, {"mask_first_token": True}, {"num_hidden_groups": 2},
], ids=lambda fields: "-".join(map(str, fields.values())))  # fmt: skip
def test_weights_are_the_models_own(app, tmp_path, fields):
    """The chosen token's row of every layer's and head's attention map, of a text of many blocks."""
    model, tokenizer = app.load(repository(tmp_path, **fields))
    reading = app.read(model, tokenizer, TEXT)
    inputs = tokenizer(TEXT, return_tensors="pt")
    maps = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0]  # (layers, heads, keys, keys)
    assert inputs["input_ids"].shape[1] > 8 * 8 and reading.rows.shape == maps[:, :, 0].shape
    torch.testing.assert_close(reading.rows, maps[:, :, 2 + reading.chosen], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reading.rows.sum(-1), torch.ones(reading.rows.shape[:2]))
    assert not any(module._forward_hooks for module in model.modules())


def test_kinds_follow_the_pattern(app, reading):
    """Blocks of 8 tokens: the local ones are those of the token's block and the two beside it."""
    weights = app.chosen_row(reading, 0, 0)
    kinds = app.kinds_of_keys(weights, reading.chosen, reading.num_globals, reading.block_size)
    block = reading.chosen // 8
    assert kinds[:2] == ["global"] * 2
    assert [i for i, kind in enumerate(kinds[2:]) if kind == "local"] == list(range(8 * block - 8, 8 * block + 16))
    for kind, weight in zip(kinds, weights.tolist(), strict=True):
        assert (weight == 0) == (kind == app.NOT_SEEN)
    assert kinds.count("sparse") == 16  # 8 on each side


def test_words_are_masked_and_found_again(app, loaded):
    found = app.read(*loaded, TEXT, "ship", 2)
    assert found.text.count("[MASK]") == 2 and found.text.index("[MASK]") == TEXT.index("ship", 20)
    word, score, rank = found.answer
    assert word == "ship" and 0 < score < 1 and rank >= 1
    text = "One \N{SHIP} two one."  # the ship is two of the browser's characters
    assert app.word_at(text, (4 + 2 + 1, 4 + 2 + 2), "[MASK]") == ("two", 1)
    assert app.word_at(text, (11, 14), "[MASK]") == ("one", 2)
    assert app.word_at("A [MASK].", (3, 4), "[MASK]") == ("[MASK]", 1)
    assert app.word_at("?!", (0, 1), "[MASK]") is None


@pytest.mark.parametrize(("text", "word", "occurrence", "message"), [
    ("", "", 1, "no text yet"),
    ("No mask.", "", 1, "has no [MASK]"),
    ("A ship.", "boat", 1, "does not have the word “boat”"),
    ("A ship.", "ship", 2, "“ship” occurs 1 times in the text: there is no number 2"),
    ("A ship. " * 90 + "The [MASK].", "", 1, "behind the 176 tokens"),
])  # fmt: skip
def test_what_cannot_be_guessed_is_named(app, loaded, text, word, occurrence, message):
    with pytest.raises(ValueError) as error:
        app.read(*loaded, text, word, occurrence)
    assert message in str(error.value)


# --- what it shows


def test_a_text_cannot_bring_code_along(app, loaded):
    text = '<script>alert("1")</script> & <img src=x onerror=alert(1)> [MASK] <b>bold</b>'
    reading = app.read(*loaded, text)
    weights = app.chosen_row(reading, app.MEAN, app.MEAN)
    shown = app.render_tokens(reading, weights) + app.render_strongest(reading, weights) + app.render_error(text)
    shown += app.render_predictions(reading._replace(predictions=[("<script>", 0.5)], answer=("<script>", 0.1, 2)))
    assert "<script" not in shown and "<img" not in shown and "<b>bold" not in shown and "&lt;" in shown


def test_a_text_that_is_too_long_is_cut_with_a_notice(app, loaded):
    reading = app.read(*loaded, "The [MASK]. " + "A ship. " * 200)
    assert len(reading.spans) == 176 and reading.length > 600
    notice = app.render_notice(reading)
    assert "The text was cut" in notice and f"the last {reading.length - 176:,}" in notice
    assert "cut" not in app.render_notice(app.read(*loaded, "The [MASK]."))


def test_uploads_are_text(app, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffA [MASK].".encode())
    assert app.read_upload(path) == "A [MASK]."
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"Cannot read a\.txt"):
        app.read_upload(path)


def test_what_is_missing_is_named_in_one_line(app, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert app.main([]) == 1
    assert 'pip install ".[app]"' in capsys.readouterr().err
    there = ModuleType("gradio")
    there.__spec__ = ModuleSpec("gradio", None)
    monkeypatch.setitem(sys.modules, "gradio", there)
    assert app.main(["--model", str(tmp_path)]) == 1
    assert "cannot load --model" in capsys.readouterr().err.splitlines()[-1]


# --- the browser


def listening_addresses(port: int) -> set[str]:
    """The local addresses, as Linux writes them, at which something listens on a port."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


@pytest.fixture
def server(tmp_path):
    """The app as a user starts it, with the repository's own model, from another directory: its port."""
    pytest.importorskip("gradio", reason="the page is made with it (the `app` extra)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "app.py"), "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        yield port
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no `chromium`")
def test_the_page_in_a_browser(server, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="it drives the browser")
    address, requests = f"http://127.0.0.1:{server}", []
    assert listening_addresses(server) == {"0100007F"}  # 127.0.0.1 alone
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.fill("#text textarea", "The second world [MASK] ended in 1945. <script>document.title = 'bad'</script>")
        page.click("#guess")
        page.wait_for_selector("#predictions table")
        model = AutoModelForMaskedLM.from_pretrained(ROOT, trust_remote_code=True)
        fill_mask = pipeline("fill-mask", model=model, tokenizer=AutoTokenizer.from_pretrained(ROOT))
        best = fill_mask("The second world [MASK] ended in 1945. <script>document.title = 'bad'</script>")[0]
        assert page.inner_text("#predictions td").strip() == best["token_str"].strip()
        assert page.inner_text(".lsg .tokens .chosen") == "[MASK]" and page.title() == "LSG-ALBERT"
        assert page.locator(".lsg .tokens .local").count() > 8

        page.click("#example")  # thousands of tokens: all kinds are there, and the chosen one is in sight
        page.wait_for_function("document.querySelector('#text textarea').value.length > 9000")
        page.fill("#occurrence input", "3")
        page.click("#guess")
        page.wait_for_function("document.querySelector('#notice').innerText.includes('3,947 tokens')")
        page.wait_for_function("document.querySelector('.lsg .tokens').scrollTop > 1000")
        for kind in ("local", "sparse"):
            assert page.locator(f".lsg .tokens .{kind}").count() > 100
        assert page.locator(".lsg .globals .global").count() == 1

        (tmp_path / "upload.txt").write_text("He shook his [MASK].")
        page.set_input_files("#file input[type=file], input[type=file]", tmp_path / "upload.txt")
        page.wait_for_function("document.querySelector('#text textarea').value.startsWith('He shook')")
        page.click("#guess")
        page.wait_for_function("document.querySelector('#predictions').innerText.includes('head')")
        browser.close()
    local = ("data:", "blob:")
    assert requests and all(url.startswith((address, *local)) for url in requests), requests
