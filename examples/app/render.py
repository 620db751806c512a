"""Render what the page shows, as HTML. Everything from a text or a tokenizer passes through `escape`."""

import html

from guess import KINDS, NOT_SEEN, Reading, kinds_of_keys
from search import Document, Hit
from torch import Tensor

STRONGEST = 20  # tokens in the table
CONTEXT = 30  # characters shown on each side of a token in the table
AROUND = 250  # characters shown on each side of a passage
CELLS = 256  # at most so many in the strip that shows the whole text


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def page(content: str) -> str:
    return f'<div class="lsg">{content}</div>'


def render_notice(content: str, kind: str = "") -> str:
    """A line about what was done; `content` is HTML."""
    return page(f'<div class="notice {kind}" role="status">{content}</div>')


def render_error(message: str) -> str:
    return page(f'<div class="notice error" role="alert">{escape(message)}</div>')


def surroundings(text: str, start: int, end: int, size: int) -> tuple[str, str]:
    """The text before and after a part of a text: whole words, at most `size` characters each."""
    before, after = text[max(0, start - size) : start], text[end : end + size]
    if start > size:
        before = "…" + before.partition(" ")[2]
    if end + size < len(text):
        after = after.rpartition(" ")[0] + "…"
    return before, after


# The guesses


def render_reading(reading: Reading) -> str:
    """How much was read, and what was cut off."""
    read_tokens = len(reading.spans)
    notice = f"Read {read_tokens:,} tokens in {reading.seconds:.1f} s."
    if reading.length <= read_tokens:
        return render_notice(notice)
    return render_notice(
        f"<b>The text was cut.</b> It has {reading.length:,} tokens, and the model reads {read_tokens:,}: it did not see "
        f"the last {reading.length - read_tokens:,}. {notice}",
        "cut",
    )


def render_predictions(reading: Reading) -> str:
    """The guesses with their probabilities, and the rank of the masked word."""
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
    """The opacity of a token's colour. With the square root, small weights remain distinct."""
    return 0.12 + 0.68 * (weight / largest) ** 0.5


def render_strip(weights: Tensor, kinds: list[str], chosen: int) -> str:
    """The whole text as one strip. A cell shows the token with the most weight in its part of the text."""
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
    """The text below a legend and an overview. A token's colour shows how it was attended to."""
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
        shown = reading.text[first:last].lstrip()  # the span of [MASK] includes the space before it
        first = last - len(shown)
        parts.append(escape(reading.text[end:first]))
        parts.append(mark(shown, num_globals + token, "chosen" * (token == reading.chosen)))
        end = last
    strip = render_strip(weights[num_globals:], kinds[num_globals:], reading.chosen)
    parts.append(escape(reading.text[end:]) if len(reading.spans) == reading.length else " …")
    box = (
        f'<div class="tokens" tabindex="0" role="group" aria-label="What the word attended to">{"".join(parts)}</div>'
    )
    return page(f'{render_legend(weights, kinds)}<div class="globals">{global_tokens}</div>{strip}{box}')


def in_the_text(reading: Reading, token: int) -> str:
    """A token with the text around it, as HTML; negative tokens are the global ones."""
    if token < 0:
        return f"global token {reading.num_globals + token + 1}"
    text, (first, last) = reading.text, reading.spans[token]
    if first < last:
        before, after = surroundings(text, first, last, CONTEXT)
        return f"{escape(before)}<b>{escape(text[first:last])}</b>{escape(after)}"
    if token == 0:  # [CLS]
        return f"<b>(start of the text)</b> {escape(surroundings(text, 0, 0, CONTEXT)[1])}"
    end = reading.spans[-2][1]
    whole = "text" if len(reading.spans) == reading.length else "part that was read"
    return f"{escape(surroundings(text, end, end, CONTEXT)[0])} <b>(end of the {whole})</b>"


def render_strongest(reading: Reading, weights: Tensor) -> str:
    """A table of the tokens that got the most weight, with the text around them."""
    kinds = kinds_of_keys(weights, reading.chosen, reading.num_globals, reading.block_size)
    scores, indices = weights.topk(min(STRONGEST, len(weights)))
    rows = []
    for score, index in zip(scores.tolist(), indices.tolist(), strict=True):
        token = index - reading.num_globals
        color = f'<i class="{kinds[index]}"></i>' if kinds[index] in KINDS else ""
        rows.append(
            f'<tr><td class="number">{score:.2%}</td><td>{color}{kinds[index]}</td>'
            f'<td class="number">{f"{token + 1:,}" if token >= 0 else ""}</td><td>{in_the_text(reading, token)}</td></tr>'
        )
    head = '<tr><th class="number">weight</th><th>kind</th><th class="number">token</th><th>in the text</th></tr>'
    return page(f'<table class="strongest">{head}{"".join(rows)}</table>')


# The search


def render_documents(documents: list[Document]) -> str:
    """The documents that are searched."""
    if not documents:
        return page('<p class="legend">No text has been added yet.</p>')
    rows = [
        f'<tr><td>{escape(document.name)}</td><td class="number">{document.num_tokens:,}</td>'
        f'<td class="number">{len(document.passages):,}</td></tr>'
        for document in documents
    ]
    head = '<tr><th>text</th><th class="number">tokens</th><th class="number">passages</th></tr>'
    return page(f'<table class="documents">{head}{"".join(rows)}</table>')


def render_hits(hits: list[Hit]) -> str:
    """The passages that were found. Each is marked in the text around it; a bar shows its place in the document."""
    items = []
    for hit in hits:
        text, (start, end) = hit.document.text, hit.passage
        before, after = surroundings(text, start, end, AROUND)
        place, width = start / len(text), (end - start) / len(text)
        items.append(
            f'<li><p class="source"><b>{escape(hit.document.name)}</b>, similarity {hit.score:.2f}</p>'
            f'<div class="place" title="{place:.0%} of the way through the text">'
            f'<span style="margin-left: {place:.2%}; width: {width:.2%}"></span></div>'
            f'<p class="passage">{escape(before)}<mark>{escape(text[start:end])}</mark>{escape(after)}</p></li>'
        )
    return page(f'<ol class="hits">{"".join(items)}</ol>')
