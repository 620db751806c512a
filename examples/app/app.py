"""Try the model in the browser: the guesses for a masked word, and the tokens that it attended to.

    python examples/app/app.py
    python examples/app/app.py --model my-lsg-albert --port 8000

Needs gradio (`pip install ".[app]"`). Only this machine reaches the page, and nothing leaves it, unless --host or --share
asks for that. What is shown are the model's own weights, taken from the very pass that made the guesses.
"""

import argparse
import contextlib
import html
import importlib.util
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
LONG_EXAMPLE = FOLDER.parent / "long_document.txt"
KINDS = ("local", "sparse", "global")  # of tokens, and their classes in style.css
NOT_SEEN = "not seen"
MEAN = "mean"
TOP_K = 10
STRONGEST = 20  # tokens in the table
CONTEXT = 30  # characters shown on each side of a token there
CELLS = 256  # of the strip that shows the whole text, at most
MAX_FILE_SIZE = "5mb"
PORTS = range(7860, 7960)  # the first free one is taken where none is given


class Reading(NamedTuple):
    """What the model made of a text, in which one masked token was chosen.

    Args:
        text: as it was read, the chosen word masked.
        spans: for each token that was read, its first character and the one behind its last; the same for [CLS], [SEP].
        length: tokens of the whole text; more than there are spans where it was cut.
        chosen: index of the chosen token.
        predictions: guesses for it and their probabilities, best first.
        answer: the word that was masked, its probability, and its rank from 1; None where it was [MASK] before, or is
            more than one token.
        rows: (layers, heads, globals + tokens), the weights with which the chosen token attended to each.
        num_globals: how many global tokens come first in `rows`.
        block_size: tokens per block of the pattern.
        seconds: what it took.
    """

    text: str
    spans: list[tuple[int, int]]
    length: int
    chosen: int
    predictions: list[tuple[str, float]]
    answer: tuple[str, float, int] | None
    rows: Tensor
    num_globals: int
    block_size: int
    seconds: float


# The word


def places_of_word(text: str, word: str, mask_token: str) -> list[tuple[int, int]]:
    """Where the text has a whole word, in whatever case, or [MASK]."""
    before, after = ("", "") if word == mask_token else (r"(?<!\w)", r"(?!\w)")
    return [match.span() for match in re.finditer(before + re.escape(word) + after, text, re.IGNORECASE)]


def find_word(text: str, word: str, occurrence: int, mask_token: str) -> tuple[int, int]:
    """Where the text has a word for the n-th time; no word means [MASK].

    Raises:
        ValueError: it does not.
    """
    if not text.strip():
        raise ValueError("There is no text yet: paste one, or upload a file.")
    word = word.strip() or mask_token
    places = places_of_word(text, word, mask_token)
    if not places and word == mask_token:
        raise ValueError(f"The text has no {mask_token}: double-click a word in it, or name one.")
    if not places:
        raise ValueError(f"The text does not have the word “{word}”.")
    if not 1 <= occurrence <= len(places):
        raise ValueError(f"“{word}” occurs {len(places):,} times in the text: there is no number {occurrence:,}.")
    return places[occurrence - 1]


def word_at(text: str, selection: tuple[int, int], mask_token: str) -> tuple[str, int] | None:
    """The first word that a selection touches, and which of its occurrences that is; None where there is no word.

    Browsers count in UTF-16: a character beyond the first 65,536 is two of theirs.
    """
    encoded = text.encode("utf-16-le", "surrogatepass")
    start, end = (len(encoded[: 2 * i].decode("utf-16-le", "ignore")) for i in selection)
    for match in re.finditer(rf"{re.escape(mask_token)}|\w+", text):
        if max(start, match.start()) < min(end, match.end()):
            return match.group(), places_of_word(text, match.group(), mask_token).index(match.span()) + 1
    return None


# The model


def load(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        OSError, ValueError: there is none, or it is of another kind.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)
    if type(model).__name__ != "LSGAlbertForMaskedLM":
        raise ValueError(f"it holds a {type(model).__name__}, not an LSGAlbertForMaskedLM")
    if not tokenizer.is_fast:
        raise ValueError("its tokenizer does not tell which characters a token is of: it needs a tokenizer.json")
    return model.float().eval().requires_grad_(False), tokenizer


@contextlib.contextmanager
def attention_rows(model: Any, token: int) -> Iterator[list[Tensor]]:
    """Collect the weights with which the text's token number `token` attends, for a batch of one text.

    A context is the sum of the values under these weights, so they are its derivative by the values. That is exact for
    every selection of sparse tokens, and takes about as much memory as a pass, where whole maps would be quadratic.

    Yields:
        A list that gets (heads, globals + length [+ padding]) from every layer in turn.
    """
    rows: list[Tensor] = []
    values: list[Tensor] = []
    num_heads, place = model.config.num_attention_heads, model.config.num_global_tokens + token

    def by_head(x: Tensor) -> Tensor:  # whether a batch or listed by blocks: (tokens, heads, head size)
        return x.reshape(-1, num_heads, x.shape[-1] // num_heads)

    def before(module: Any, args: Any, value: Tensor) -> Tensor:
        values.append(value.detach().requires_grad_())
        return values[-1]

    def after(module: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        context, *maps = output
        (gradient,) = torch.autograd.grad(by_head(context)[place, :, 0].sum(), values.pop())
        rows.append(by_head(gradient)[:, :, 0].T.clone())
        return context.detach(), *maps

    attentions = [layer.attention for g in model.albert.encoder.albert_layer_groups for layer in g.albert_layers]
    hooks = [attention.value.register_forward_hook(before) for attention in attentions]
    hooks += [attention.register_forward_hook(after) for attention in attentions]
    try:
        with torch.enable_grad():
            yield rows
    finally:
        for hook in hooks:
            hook.remove()


def read(model: Any, tokenizer: Any, text: str, word: str = "", occurrence: int = 1, top_k: int = TOP_K) -> Reading:
    """Mask a word of the text, or choose a [MASK] in it, and let the model read it, cut to what it can read.

    Raises:
        ValueError: there is no such word, or it was cut off.
    """
    began = time.perf_counter()
    mask = tokenizer.mask_token
    start, end = find_word(text, word, occurrence, mask)
    masked = text[:start] + mask + text[end:]
    limit = model.config.max_position_embeddings
    inputs = tokenizer(masked, truncation=True, max_length=limit, return_offsets_mapping=True)
    ids, spans = inputs["input_ids"], inputs["offset_mapping"]
    length = len(tokenizer(masked, verbose=False)["input_ids"])
    masks = [i for i, token_id in enumerate(ids) if token_id == tokenizer.mask_token_id]
    number = masked[:start].count(mask)
    if number >= len(masks):
        raise ValueError(
            f"“{text[start:end]}” stands behind the {limit:,} tokens that the model reads of the text's {length:,}: "
            "choose an earlier word, or a shorter text."
        )
    chosen = masks[number]
    with attention_rows(model, chosen) as rows:
        states = model.albert(torch.tensor([ids])).last_hidden_state
    scores = model.predictions(states[0, chosen]).detach().softmax(-1)
    top, top_ids = scores.topk(min(top_k, len(scores)))
    words = [tokenizer.decode([token_id]).strip() for token_id in top_ids.tolist()]
    answer = None
    answer_ids = ids_of_span(tokenizer, text, start, end)
    if len(answer_ids) == 1 and text[start:end] != mask:
        score = scores[answer_ids[0]]
        answer = text[start:end], score.item(), int((scores > score).sum()) + 1
    num_globals = model.config.num_global_tokens
    return Reading(
        text=masked, spans=[tuple(span) for span in spans], length=length, chosen=chosen,
        predictions=list(zip(words, top.tolist(), strict=True)), answer=answer,
        rows=torch.stack(rows)[..., : num_globals + len(ids)], num_globals=num_globals,
        block_size=model.config.block_size, seconds=time.perf_counter() - began,
    )  # fmt: skip


def ids_of_span(tokenizer: Any, text: str, start: int, end: int) -> list[int]:
    """The tokens that some characters of a text are in."""
    inputs = tokenizer(text, verbose=False, return_offsets_mapping=True)
    pairs = zip(inputs["input_ids"], inputs["offset_mapping"], strict=True)
    return [token_id for token_id, (first, last) in pairs if first < end and last > start]


# What it attended to


def chosen_row(reading: Reading, layer: int | str, head: int | str) -> Tensor:
    """The weights (globals + tokens) of a layer and a head, from 0, or their mean."""
    rows = reading.rows.mean(0) if layer == MEAN else reading.rows[layer]
    return rows.mean(0) if head == MEAN else rows[head]


def kinds_of_keys(weights: Tensor, chosen: int, num_globals: int, block_size: int) -> list[str]:
    """How the chosen token attended to each of the globals and tokens: as the pattern has it, which looks at all of
    its block and the two beside it, and beyond these at sparse tokens only. Where no weight is, it did not look."""
    blocks = [token // block_size for token in range(len(weights) - num_globals)]
    kinds = ["global"] * num_globals
    kinds += ["local" if abs(block - chosen // block_size) <= 1 else "sparse" for block in blocks]
    return [kind if weight > 0 else NOT_SEEN for kind, weight in zip(kinds, weights.tolist(), strict=True)]


# What the page shows. Nothing from a text or a tokenizer gets into it but through `escape`.


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def page(content: str) -> str:
    return f'<div class="lsg">{content}</div>'


def render_error(message: str) -> str:
    return page(f'<div class="notice error" role="alert">{escape(message)}</div>')


def render_notice(reading: Reading) -> str:
    """How much was read, and what was cut off."""
    read_tokens = len(reading.spans)
    notice = f"Read {read_tokens:,} tokens in {reading.seconds:.1f} s."
    if reading.length <= read_tokens:
        return page(f'<div class="notice" role="status">{notice}</div>')
    notice = (
        f"<b>The text was cut.</b> It has {reading.length:,} tokens, and the model reads {read_tokens:,}: it did not see "
        f"the last {reading.length - read_tokens:,}. {notice}"
    )
    return page(f'<div class="notice cut" role="status">{notice}</div>')


def render_predictions(reading: Reading) -> str:
    """The guesses with their probabilities, and how the masked word fared."""
    longest = max(score for _, score in reading.predictions)
    rows = [
        f'<tr><td>{escape(word)}</td><td class="number">{score:.1%}</td>'
        f'<td style="width: 40%"><span class="bar" style="width: {score / longest:.1%}"></span></td></tr>'
        for word, score in reading.predictions
    ]
    answer = ""
    if reading.answer is not None:
        word, score, rank = reading.answer
        answer = f'<p class="legend">The word was “{escape(word)}”: guess number {rank:,}, {score:.2%}.</p>'
    return page(f'{answer}<table class="predictions">{"".join(rows)}</table>')


def render_legend(weights: Tensor, kinds: list[str]) -> str:
    """The colours, and how many tokens and how much of the weight each kind has."""
    entries = []
    for kind in KINDS:
        of_kind = [weight for weight, k in zip(weights.tolist(), kinds, strict=True) if k == kind]
        plural = "" if len(of_kind) == 1 else "s"
        entries.append(
            f'<span><i class="{kind}"></i>{kind}: {len(of_kind):,} token{plural}, {sum(of_kind):.1%} of the weight</span>'
        )
    entries.append(f"<span>grey: not seen, {kinds.count(NOT_SEEN):,}</span>")
    entries.append("<span>the stronger the colour, the more weight; framed: the chosen token</span>")
    return f'<div class="legend">{"".join(entries)}</div>'


def opacity(weight: float, largest: float) -> float:
    """Of a token's colour. The square root lets small weights be told apart."""
    return 0.12 + 0.68 * (weight / largest) ** 0.5


def render_strip(weights: Tensor, kinds: list[str], chosen: int) -> str:
    """The whole text in one line: what has the most weight in each part of it."""
    size = -(-len(kinds) // CELLS)
    parts = [range(first, min(first + size, len(kinds))) for first in range(0, len(kinds), size)]
    values = weights.tolist()
    peaks = [max(part, key=values.__getitem__) for part in parts]
    largest, cells = max(values), []
    for part, peak in zip(parts, peaks, strict=True):
        names = ([kinds[peak]] if kinds[peak] in KINDS else []) + (["chosen"] if chosen in part else [])
        cells.append(f'<span class="{" ".join(names)}" style="--a: {opacity(values[peak], largest):.2f}"></span>')
    return f'<div class="strip" title="The whole text, from its start to its end">{"".join(cells)}</div>'


def render_tokens(reading: Reading, weights: Tensor) -> str:
    """The text, each token coloured by how it was attended to, below a legend and an overview."""
    num_globals, values = reading.num_globals, weights.tolist()
    kinds = kinds_of_keys(weights, reading.chosen, num_globals, reading.block_size)
    largest = max(values)

    def mark(shown: str, index: int, extra: str = "") -> str:
        kind = kinds[index]
        if kind == NOT_SEEN and not extra:
            return escape(shown)
        names = f"{kind if kind in KINDS else ''} {extra}".strip()
        style = f"--a: {opacity(values[index], largest):.2f}"
        return f'<span class="{names}" style="{style}" title="{kind}, {values[index]:.3%}">{escape(shown)}</span>'

    global_tokens = "".join(mark(f"global token {i + 1}", i, "global-token") for i in range(num_globals))
    parts, end = [], 0
    for token, (first, last) in enumerate(reading.spans):
        first = max(first, end)  # where one character gave several tokens, all but the first are empty
        if last <= first:
            continue
        shown = reading.text[first:last].lstrip()  # that of [MASK] has the space before it
        first = last - len(shown)
        parts.append(escape(reading.text[end:first]))
        parts.append(mark(shown, num_globals + token, "chosen" * (token == reading.chosen)))
        end = last
    strip = render_strip(weights[num_globals:], kinds[num_globals:], reading.chosen)
    parts.append(escape(reading.text[end:]) if len(reading.spans) == reading.length else " …")
    box = f'<div class="tokens" tabindex="0">{"".join(parts)}</div>'
    return page(f'{render_legend(weights, kinds)}<div class="globals">{global_tokens}</div>{strip}{box}')


def render_strongest(reading: Reading, weights: Tensor) -> str:
    """A table of the tokens that got the most weight, with the text around them."""
    kinds = kinds_of_keys(weights, reading.chosen, reading.num_globals, reading.block_size)
    scores, indices = weights.topk(min(STRONGEST, len(weights)))
    rows = []
    for score, index in zip(scores.tolist(), indices.tolist(), strict=True):
        token = index - reading.num_globals
        place, shown = "", f"global token {index + 1}"
        if token >= 0:
            first, last = reading.spans[token]
            before, after = reading.text[max(0, first - CONTEXT) : first], reading.text[last : last + CONTEXT]
            place = f"{token + 1:,}"
            shown = f"{escape(before)}<b>{escape(reading.text[first:last]) or 'start or end of the text'}</b>{escape(after)}"
        color = f'<i class="{kinds[index]}"></i>' if kinds[index] in KINDS else ""
        rows.append(
            f'<tr><td class="number">{score:.2%}</td><td>{color}{kinds[index]}</td>'
            f'<td class="number">{place}</td><td>{shown}</td></tr>'
        )
    head = '<tr><th class="number">weight</th><th>kind</th><th class="number">token</th><th>in the text</th></tr>'
    return page(f'<table class="strongest">{head}{"".join(rows)}</table>')


def read_upload(path: Path) -> str:
    """The text of an uploaded file.

    Raises:
        ValueError: it is no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read {path.name}: give a text file in UTF-8 ({error}).") from error


# The page itself

SCROLL_TO_CHOSEN = """() => setTimeout(() => {
  const chosen = document.querySelector(".lsg .tokens .chosen"), box = chosen && chosen.closest(".tokens");
  if (box) box.scrollTop = chosen.offsetTop - box.clientHeight / 2;
}, 100)"""


def build(model: Any, tokenizer: Any) -> Any:
    """The page, to be launched."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    mask = tokenizer.mask_token

    def choose(text: str, event: gr.SelectData) -> tuple[Any, Any]:
        found = word_at(text, event.index, mask)
        return found or (gr.skip(), gr.skip())

    def upload(path: str) -> tuple[Any, Any, str]:
        try:
            return read_upload(Path(path)), 1, ""
        except ValueError as error:
            return gr.skip(), gr.skip(), render_error(str(error))
        finally:
            Path(path).unlink(missing_ok=True)

    def show(reading: Reading | None, layer: int | str, head: int | str) -> tuple[str, str]:
        if reading is None:
            return "", ""
        weights = chosen_row(reading, layer, head)
        return render_tokens(reading, weights), render_strongest(reading, weights)

    def guess(
        text: str, word: str, occurrence: float | None, layer: int | str, head: int | str
    ) -> tuple[Reading | None, str, str, str, str]:
        try:
            reading = read(model, tokenizer, text, word, int(occurrence or 1))
        except ValueError as error:
            return None, render_error(str(error)), "", "", ""
        return reading, render_notice(reading), render_predictions(reading), *show(reading, layer, head)

    config = model.config
    num_layers = config.num_hidden_layers * config.inner_group_num
    with gr.Blocks(title="LSG-ALBERT", analytics_enabled=False) as blocks:
        gr.HTML(f"<style>{(FOLDER / 'style.css').read_text()}</style>", padding=False, apply_default_css=False)
        gr.Markdown(
            f"# LSG-ALBERT\nPaste a text of up to {config.max_position_embeddings:,} tokens, **double-click a word** in it, "
            f"or write {mask} for one, and see what the model puts there and which tokens it looked at."
        )
        text = gr.Textbox(label="Text", lines=10, max_lines=10, elem_id="text", autofocus=True)
        with gr.Row(equal_height=True):
            word = gr.Textbox(mask, label="Word to guess", elem_id="word", max_lines=1)
            occurrence = gr.Number(1, label="Which of its occurrences", precision=0, minimum=1, elem_id="occurrence")
            with gr.Column(min_width=160):
                file = gr.UploadButton("Upload a .txt file", file_types=[".txt"], type="filepath", elem_id="file")
                example = gr.Button("Long example", elem_id="example")
            button = gr.Button("Guess", variant="primary", elem_id="guess")
        notice = gr.HTML(elem_id="notice", padding=False, apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                layers = [(str(i + 1), i) for i in range(num_layers)] + [("mean of all", MEAN)]
                heads = [(str(i + 1), i) for i in range(config.num_attention_heads)] + [("mean of all", MEAN)]
                predictions = gr.HTML(elem_id="predictions", padding=False, apply_default_css=False)
                layer = gr.Dropdown(layers, value=num_layers - 1, label="Layer", elem_id="layer", filterable=False)
                head = gr.Dropdown(heads, value=MEAN, label="Attention head", elem_id="head", filterable=False)
            with gr.Column(scale=3, min_width=400):
                tokens = gr.HTML(elem_id="tokens", padding=False, apply_default_css=False)
        strongest = gr.HTML(elem_id="strongest", padding=False, apply_default_css=False)
        reading = gr.State()

        private = {"api_visibility": "private"}
        text.select(choose, [text], [word, occurrence], show_progress="hidden", **private)
        file.upload(upload, [file], [text, occurrence, notice], **private)
        example.click(
            lambda: (LONG_EXAMPLE.read_text(encoding="utf-8"), mask, 1), None, [text, word, occurrence], **private
        )
        # One text at a time: the rows are collected by hooks in the model.
        asked = gr.on(
            [button.click, word.submit, occurrence.submit], guess, [text, word, occurrence, layer, head],
            [reading, notice, predictions, tokens, strongest], concurrency_limit=1, **private,
        )  # fmt: skip
        asked.then(None, js=SCROLL_TO_CHOSEN)
        changed = gr.on([layer.input, head.input], show, [reading, layer, head], [tokens, strongest], **private)
        changed.then(None, js=SCROLL_TO_CHOSEN)
    return blocks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT), help="directory or Hub id (default: this repository)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="let gradio make a public address for it")
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port must be from 1 to 65535, got {args.port}")
    return args


def free_port(host: str, ports: Iterable[int]) -> int:
    """The first port that can be listened on at an address.

    Raises:
        OSError: there is none.
    """
    for port in ports:
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return port
        except OSError as error:
            failure = error
    raise OSError(f"port {port}: {failure.strerror}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        print('app: gradio is not installed: pip install ".[app]"', file=sys.stderr)
        return 1
    try:
        port = free_port(args.host, PORTS if args.port is None else [args.port])
    except OSError as error:
        print(f"app: cannot listen on {args.host}: {error}", file=sys.stderr)
        return 1
    try:
        model, tokenizer = load(args.model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        print(f"app: cannot load --model {args.model}: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it, uploads are removed
    with tempfile.TemporaryDirectory(prefix="lsg_albert_app_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        blocks = build(model, tokenizer)
        # All is said here, so that no variable of gradio's can open the page to others. It keeps no history.
        _, url, public_url = blocks.launch(
            server_name=args.host, server_port=port, share=args.share, max_file_size=MAX_FILE_SIZE,
            run_history=False, ssr_mode=False, mcp_server=False, footer_links=[], quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
        print(f"Open {public_url or url} in a browser; Ctrl+C ends it.", flush=True)
        blocks.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
