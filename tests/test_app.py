"""The app: what it computes and shows, without gradio; and the page itself, as a user meets it in a browser."""

import contextlib
import html.parser
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from transformers import pipeline

from conftest import ROOT, TINY
from helpers import example, write_repository
from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM
from lsg_albert.configuration_lsg_albert import SPARSITY_TYPES

TEXT = "The ship left the harbour. " * 6 + "It sailed to the [MASK] in spring. " + "The wind was strong. " * 6
ATTACK = "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'> \"&amp; & "
LIMIT = 600


@pytest.fixture(scope="module")
def app():
    return example("app/app")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with a small random model: blocks of 8 tokens, and at most 600 tokens."""
    torch.manual_seed(0)
    fields = {"vocab_size": 16000, "max_position_embeddings": LIMIT, "mask_first_token": True, "num_global_tokens": 2}
    config = LSGAlbertConfig(**{**TINY, **fields})
    return write_repository(tmp_path_factory.mktemp("app") / "repository", LSGAlbertForMaskedLM(config))


@pytest.fixture(scope="module")
def loaded(app, repository):
    return app.load(str(repository))


def test_module_does_not_need_gradio():
    code = "import sys; sys.modules['gradio'] = None; sys.path.insert(0, sys.argv[1]); import app"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "examples" / "app")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_read_predicts_as_the_fill_mask_pipeline(app, loaded):
    model, tokenizer = loaded
    expected = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)(TEXT)
    reading = app.read(model, tokenizer, TEXT, top_k=5)
    assert [word for word, _ in reading.predictions] == [guess["token_str"].strip() for guess in expected]
    scores = [guess["score"] for guess in expected]
    torch.testing.assert_close([score for _, score in reading.predictions], scores, rtol=1e-4, atol=1e-8)
    assert reading.answer is None


@pytest.mark.parametrize("words", [4, 60], ids=["all tokens see all", "blocks"])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_rows_are_those_of_output_attentions(app, loaded, tiny_config, sparsity_type, words):
    _, tokenizer = loaded
    fields = {"vocab_size": 16000, "max_position_embeddings": LIMIT, "sparsity_factor": 4, "num_global_tokens": 2}
    config = tiny_config(**fields, sparsity_type=sparsity_type, inner_group_num=2)
    model = LSGAlbertForMaskedLM(config).eval().requires_grad_(False)
    text = " ".join(TEXT.split()[36 - words // 2 : 36 + words // 2])
    reading = app.read(model, tokenizer, text)
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"][0, reading.chosen] == tokenizer.mask_token_id
    maps = model(**inputs, output_attentions=True).attentions
    expected = torch.stack([layer[0, :, 2 + reading.chosen] for layer in maps])
    assert reading.rows.shape == expected.shape == (4, 4, 2 + inputs["input_ids"].shape[1])
    torch.testing.assert_close(reading.rows, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reading.rows.sum(-1), torch.ones(4, 4))
    assert ((reading.rows > 0) == (expected > 0)).all()


def test_rows_leave_the_model_as_it_was(app, loaded):
    model, tokenizer = loaded
    before = model(**tokenizer(TEXT, return_tensors="pt")).logits
    app.read(model, tokenizer, TEXT)
    with contextlib.suppress(RuntimeError), app.attention_rows(model, 0):
        raise RuntimeError
    after = model(**tokenizer(TEXT, return_tensors="pt")).logits
    assert torch.equal(before, after) and not after.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_chosen_row_is_one_head_or_a_mean(app, loaded):
    reading = app.read(*loaded, TEXT)
    assert torch.equal(app.chosen_row(reading, 1, 2), reading.rows[1, 2])
    torch.testing.assert_close(app.chosen_row(reading, 1, app.MEAN), reading.rows[1].mean(0))
    torch.testing.assert_close(app.chosen_row(reading, app.MEAN, 2), reading.rows[:, 2].mean(0))
    torch.testing.assert_close(app.chosen_row(reading, app.MEAN, app.MEAN).sum(), torch.tensor(1.0))


def test_kinds_are_those_of_the_pattern(app, loaded):
    """Blocks of 8 tokens; each head sees 4 sparse tokens of 8 outside the three blocks, two blocks to each side."""
    reading = app.read(*loaded, TEXT)
    kinds = app.kinds_of_keys(reading.rows[0, 0], reading.chosen, reading.num_globals, reading.block_size)
    assert kinds[:2] == ["global"] * 2 and "global" not in kinds[2:]
    kinds, block = kinds[2:], reading.chosen // 8
    assert block >= 4 and len(kinds) >= 8 * (block + 4), "the text has room for the whole pattern"
    assert [i for i, kind in enumerate(kinds) if kind == "local"] == list(range(8 * (block - 1), 8 * (block + 2)))
    sparse = [i // 8 - block for i, kind in enumerate(kinds) if kind == "sparse"]
    assert set(sparse) == {-3, -2, 2, 3} and len(sparse) == 16
    assert kinds[0] == app.NOT_SEEN, "the model hides [CLS]"


@pytest.mark.parametrize(
    ("word", "occurrence", "expected"),
    [("harbour", 1, (18, 25)), ("HARBOUR ", 2, (45, 52)), ("", 1, (179, 185)), ("[MASK]", 1, (179, 185))],
)
def test_find_word_finds_whole_words(app, word, occurrence, expected):
    assert app.find_word(TEXT, word, occurrence, "[MASK]") == expected


@pytest.mark.parametrize(
    ("text", "word", "occurrence", "message"),
    [
        (" \n", "", 1, "no text yet"),
        ("A ship.", "", 1, r"no \[MASK\]: double-click"),
        ("A ship.", "shi", 1, "does not have the word “shi”"),
        ("A ship.", "ship", 2, "occurs 1 times in the text: there is no number 2"),
        ("A ship.", "ship", 0, "no number 0"),
    ],
)
def test_find_word_says_what_is_wrong(app, text, word, occurrence, message):
    with pytest.raises(ValueError, match=message):
        app.find_word(text, word, occurrence, "[MASK]")


def test_word_at_takes_what_a_selection_touches(app):
    text = "A ship, 🚢 a Ship and a [MASK]."

    def at(part, start=0, end=None):  # in UTF-16, as a browser counts
        first = len(text[: text.index(part)].encode("utf-16-le")) // 2
        return app.word_at(text, (first + start, first + (len(part) if end is None else end)), "[MASK]")

    assert at("ship") == ("ship", 1)
    assert at("Ship and") == ("Ship", 2)
    assert at("Ship", 1, 3) == ("Ship", 2)
    assert at("MASK") == ("[MASK]", 1)
    assert at(", ") is None and at("and", 1, 1) is None, "nothing is selected"


def test_read_masks_a_word_and_tells_how_it_fared(app, loaded):
    model, tokenizer = loaded
    reading = app.read(model, tokenizer, TEXT, "harbour", 2, top_k=16000)
    assert reading.text == TEXT[:45] + "[MASK]" + TEXT[52:]
    word, score, rank = reading.answer
    assert word == "harbour" and reading.predictions[rank - 1] == ("harbour", pytest.approx(score))
    assert app.read(model, tokenizer, "A qwrtzpsdf here.", "qwrtzpsdf").answer is None, "several tokens"


def test_read_cuts_a_text_and_says_so(app, loaded):
    text = "A [MASK] at first. " + "The wind was strong. " * 200 + "The last [MASK]."
    reading = app.read(*loaded, text)
    assert len(reading.spans) == LIMIT < reading.length == len(loaded[1](text)["input_ids"])
    assert f"model reads {LIMIT}: it did not see the last {reading.length - LIMIT:,}" in app.render_notice(reading)
    assert "was cut" not in app.render_notice(app.read(*loaded, TEXT))
    assert "last" not in visible_text(app.render_tokens(reading, reading.rows[0, 0])).split("global token 2")[1]
    with pytest.raises(ValueError, match=rf"stands behind the {LIMIT} tokens"):
        app.read(*loaded, text, occurrence=2)


class Page(html.parser.HTMLParser):
    """The text and the elements' names and attributes of a piece of HTML."""

    def __init__(self, content):
        super().__init__()
        self.text, self.elements = "", []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def visible_text(content):
    return Page(content).text


def test_whatever_a_text_holds_is_shown_and_not_run(app, loaded):
    reading = app.read(*loaded, ATTACK + "It sailed to the [MASK]. " + ATTACK)
    guesses = [(ATTACK, 0.5), ("ship", 0.4)]
    reading = reading._replace(predictions=guesses, answer=(ATTACK, 0.5, 1))
    weights = app.chosen_row(reading, 0, app.MEAN)
    tokens = app.render_tokens(reading, weights)
    everything = [app.render_notice(reading), app.render_predictions(reading), app.render_error(ATTACK)]
    everything += [tokens, app.render_strongest(reading, weights)]
    for content in everything:
        elements = Page(content).elements
        assert {tag for tag, _ in elements} <= {"div", "span", "table", "tr", "td", "th", "p", "b", "i"}
        assert {name for _, attrs in elements for name in attrs} <= {"class", "style", "title", "role", "tabindex"}
    assert reading.text in visible_text(tokens), "as it was written"
    assert ATTACK in visible_text(app.render_predictions(reading))


def test_tokens_are_coloured_by_kind_and_weight(app, loaded):
    reading = app.read(*loaded, TEXT)
    weights = reading.rows[1, 0]
    content = app.render_tokens(reading, weights)
    box = [attrs for tag, attrs in Page(content).elements if "%" in attrs.get("title", "")]
    kinds = app.kinds_of_keys(weights, reading.chosen, 2, 8)
    for kind in app.KINDS:
        shown = [attrs for attrs in box if kind in attrs["class"].split()]
        assert len(shown) == kinds.count(kind) > 0
        assert f"{kind}: {len(shown)} token" in visible_text(content)
    strongest = max(box, key=lambda attrs: float(attrs["style"].removeprefix("--a: ")))
    assert f"{weights.max():.3%}" in strongest["title"]
    assert sum("chosen" in attrs["class"] for attrs in box) == 1
    assert re.search(r'chosen"[^>]*>\[MASK\]<', content)


def test_strongest_tokens_are_listed_in_order(app, loaded):
    reading = app.read(*loaded, TEXT)
    weights = reading.rows[1, 0]
    shown = visible_text(app.render_strongest(reading, weights))
    percents = [float(x) for x in re.findall(r"([\d.]+)%", shown)]
    assert len(percents) == app.STRONGEST and percents == sorted(percents, reverse=True)
    assert percents[0] == pytest.approx(100 * weights.max().item(), abs=0.005)


def test_strip_has_a_cell_for_each_part_of_the_text(app):
    weights = torch.zeros(1000)
    weights[900] = 0.5
    kinds = [app.NOT_SEEN] * 1000
    kinds[900] = "sparse"
    cells = [attrs["class"] for tag, attrs in Page(app.render_strip(weights, kinds, 10)).elements if tag == "span"]
    assert len(cells) == 250 and cells[225] == "sparse" and cells[2] == "chosen"


def test_read_upload_takes_text_only(app, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffA café.\r\nA ship.".encode())
    assert app.read_upload(path) == "A café.\nA ship."
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="Cannot read text.txt: give a text file in UTF-8"):
        app.read_upload(path)


def test_command_says_in_one_line_what_is_wrong(app, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert app.main([]) == 1
    assert capsys.readouterr().err == 'app: gradio is not installed: pip install ".[app]"\n'
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert app.main(["--model", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("app: cannot load --model") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        app.main(["--port", "0"])
    assert "--port must be from 1 to 65535, got 0" in capsys.readouterr().err
    assert (app.parse_args([]).host, app.parse_args([]).share) == ("127.0.0.1", False)


def test_command_names_a_port_that_is_taken(app, repository, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert app.main(["--model", str(repository), "--port", str(port)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"app: cannot listen on 127.0.0.1: port {port}: ") and error.count("\n") == 1
        assert app.free_port("127.0.0.1", [port, free_port()]) != port


# The page in a browser. Slow: gradio, torch and a browser are started.

# Imported by every Python process on its start: writes down what it connects to, and refuses all but loopback.
WATCH = """
import ipaddress, os, sys
def watch(event, args):
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    host = args[0] if event == "socket.getaddrinfo" else args[1][0] if isinstance(args[1], tuple) else "127.0.0.1"
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "localhost") or host.replace(".", "").isdigit() and ipaddress.ip_address(host).is_loopback:
        return
    if host == "::1":
        return
    with open(os.environ["WATCH_LOG"], "a") as log:
        log.write(f"{event} {host}\\n")
    raise OSError(f"refused: {event} {host}")
sys.addaudithook(watch)
"""


def browser_or_skip():
    """Debian's chromium, or another by one of its usual names."""
    pytest.importorskip("gradio", reason='the page needs gradio: pip install ".[app]"')
    pytest.importorskip("playwright", reason="the page's test needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening_addresses(pid):
    """The addresses, as /proc writes them, on which a process waits for TCP connections."""
    files = (os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir())
    sockets = {name[len("socket:[") : -1] for name in files if name.startswith("socket:[")}
    tables = (Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and row[9] in sockets}


@pytest.fixture(scope="module")
def served(repository, tmp_path_factory):
    """The app, started by its command in another directory: process, port, and what it tried to reach."""
    browser_or_skip()
    folder = tmp_path_factory.mktemp("served")
    (folder / "watch").mkdir()
    (folder / "uploads").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    port, log = free_port(), folder / "log"
    env = {**os.environ, "PYTHONPATH": str(folder / "watch"), "WATCH_LOG": str(log), "PYTHONUNBUFFERED": "1"}
    env |= {"TMPDIR": str(folder / "uploads"), "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
    command = [sys.executable, ROOT / "examples" / "app" / "app.py", "--model", repository, "--port", port]
    process = subprocess.Popen(
        [*map(str, command)], cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = []
    killer = threading.Timer(240, process.kill)  # ends the wait for a line that does not come
    killer.start()
    try:
        for line in process.stdout:
            output.append(line)
            if line.startswith("Open "):
                break
        else:
            pytest.fail(f"the app did not start: {''.join(output)}")
        assert f"http://127.0.0.1:{port}" in line
        killer.cancel()
        yield process, port, log, folder / "uploads"
    finally:
        killer.cancel()
        process.terminate()
        process.wait(60)
    assert process.returncode == 0 and not list((folder / "uploads").glob("lsg_albert_app_*")), "cleaned up"


@pytest.fixture
def page(served):
    """The page, opened; with the hosts that it asked for anything, and the errors in its console."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # chromium refuses to make one for root
        browser = playwright.chromium.launch(executable_path=browser_or_skip(), args=sandbox)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("websocket", lambda websocket: page.requests.append(websocket.url))
        page.goto(f"http://127.0.0.1:{served[1]}/")
        page.wait_for_selector("#text textarea")
        yield page
        browser.close()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.click("#file")
    chooser.value.set_files(path)


def outside(urls):
    """Those that are not on this machine."""
    parts = [(url, urlsplit(url)) for url in urls]
    return [url for url, part in parts if part.scheme not in ("data", "blob") and part.hostname != "127.0.0.1"]


@pytest.mark.slow
def test_page_guesses_a_word_and_shows_what_it_attended_to(page, served, app, loaded):
    page.fill("#text textarea", TEXT)
    page.click("#guess")
    page.wait_for_selector("#predictions .predictions tr")
    expected = app.read(*loaded, TEXT)
    shown = [row.inner_text() for row in page.locator("#predictions tr td:first-child").all()]
    assert shown == [word for word, _ in expected.predictions]
    counts = {kind: page.locator(f"#tokens .tokens span.{kind}").count() for kind in ("local", "sparse")}
    kinds = app.kinds_of_keys(app.chosen_row(expected, 1, app.MEAN), expected.chosen, 2, 8)
    assert counts == {kind: kinds.count(kind) for kind in counts} and min(counts.values()) > 0
    assert page.locator("#tokens .globals span.global").count() == 2
    color = "e => getComputedStyle(e).backgroundColor"
    assert page.locator("#tokens .tokens span.sparse").first.evaluate(color).startswith("rgba(239, 134, 54")
    assert page.locator("#strongest tr").count() == 1 + app.STRONGEST

    one_head = app.render_strongest(expected, app.chosen_row(expected, 1, 0))
    weights = re.findall(r'<td class="number">([\d.]+%)', one_head)
    page.click("#head input")
    page.get_by_role("option", name="1", exact=True).click()
    wait_for(lambda: page.locator("#strongest td:first-child").all_inner_texts() == weights)
    assert page.requests and outside(page.requests) == []


@pytest.mark.slow
def test_page_takes_a_file_and_the_word_that_is_double_clicked(page, served, tmp_path):
    text = ATTACK + "The ship left. " * 300 + "The end. " + "The wind was strong. " * 60
    path = tmp_path / "text.txt"
    path.write_text(text)
    upload(page, path)
    wait_for(lambda: page.input_value("#text textarea") == text)
    left = [file.read_text() for file in served[3].rglob("*") if file.is_file()]
    assert not any(left), "the upload is not kept"

    # A double click on the first line, where the first word of the text is "script".
    page.locator("#text textarea").dblclick(position={"x": 30, "y": 20})
    wait_for(lambda: page.input_value("#word textarea, #word input") == "script")
    page.fill("#word textarea, #word input", "SHIP")
    page.fill("#occurrence input", "90")
    page.click("#guess")
    page.wait_for_selector("#tokens .chosen")
    assert "The text was cut." in page.inner_text("#notice")
    assert ATTACK.strip() in page.inner_text("#tokens .tokens").replace("\n", " ")
    assert page.evaluate("window.attacked") is None
    assert page.locator("#tokens script, #tokens img, #strongest img, #notice img").count() == 0
    wait_for(lambda: page.locator("#tokens .tokens").evaluate("e => e.scrollTop") > 0)
    box, chosen = (page.locator(f"#tokens .tokens{part}").bounding_box() for part in ("", " .chosen"))
    assert box["y"] < chosen["y"] < box["y"] + box["height"], "scrolled to the chosen token"

    page.fill("#word textarea, #word input", "<img src=x onerror='window.attacked = 1'>x")
    page.click("#guess")
    page.wait_for_selector("#notice .error")
    assert "does not have the word “<img" in page.inner_text("#notice")
    path.write_bytes(b"\xff\xfe\x00")
    upload(page, path)
    wait_for(lambda: "Cannot read" in page.inner_text("#notice"))
    assert page.evaluate("window.attacked") is None
    assert page.requests and outside(page.requests) == []


@pytest.mark.slow
def test_server_listens_on_loopback_only_and_reaches_for_nothing(served):
    process, port, log, _ = served
    assert process.poll() is None
    assert listening_addresses(process.pid) == {f"0100007F:{port:04X}"}
    assert not log.exists(), log.read_text()
