"""The page: its two tabs, and what happens in them."""

from pathlib import Path
from typing import Any

import gradio as gr
from guess import MEAN, Reading, chosen_row, read, selected_word
from render import (
    render_documents,
    render_error,
    render_hits,
    render_notice,
    render_predictions,
    render_reading,
    render_strongest,
    render_tokens,
)
from search import MAKE_EMBEDDER, Document, read_document, search
from texts import EXAMPLE, EXAMPLE_QUESTION, EXAMPLE_WORD, LONG_EXAMPLE, name_of, read_uploads

STYLE = Path(__file__).resolve().with_name("style.css").read_text(encoding="utf-8")
CHOOSE_HINT = (
    "Choose a word and press **Guess** to see what the model would put there and which tokens it looked at. "
    "Double-click a word to choose it. On a touch screen, press and hold it. With the keyboard, put the cursor in front of "
    "it and press Ctrl+Shift+→ (Option+Shift+→ on a Mac)."
)
SEARCH_HINT = (
    "Add texts and ask a question in your own words. The passages nearest to the question in meaning come first. The "
    "model reads each text as a whole, so it understands a passage from the text around it."
)
NO_EMBEDDER = f"This needs an embedding model. Make one, and start the page with it:\n```shell\n{MAKE_EMBEDDER}\n```"
SCROLL_TO_CHOSEN = """() => setTimeout(() => {
  const chosen = document.querySelector(".lsg .tokens .chosen"), box = chosen && chosen.closest(".tokens");
  if (box) box.scrollTop = chosen.offsetTop - box.clientHeight / 2;
}, 100)"""

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
PRIVATE = {"api_visibility": "private"}
TEXT_FILES = {"file_types": [".txt"], "type": "filepath"}


def html(value: str = "", elem_id: str | None = None) -> gr.HTML:
    return gr.HTML(value, elem_id=elem_id, padding=False, apply_default_css=False)


def build(model: Any, tokenizer: Any, embedder: Any = None) -> gr.Blocks:
    """The page, to be launched."""
    with gr.Blocks(title="LSG-ALBERT", analytics_enabled=False) as blocks:
        html(f"<style>{STYLE}</style>")
        gr.Markdown("# LSG-ALBERT")
        with gr.Tab("Guess"):  # a longer title hides the other tab on a telephone
            guess_tab(model, tokenizer)
        with gr.Tab("Search in long documents"):
            if embedder is None:
                gr.Markdown(f"{SEARCH_HINT}\n\n{NO_EMBEDDER}")
            else:
                search_tab(embedder)
        blocks.load(None, js=SCROLL_TO_CHOSEN)
    return blocks


def guess_tab(model: Any, tokenizer: Any) -> None:
    config, mask = model.config, tokenizer.mask_token
    num_layers = config.num_hidden_layers * config.inner_group_num

    def choose(text: str, event: gr.SelectData) -> tuple[Any, Any]:
        return selected_word(text, event.index, mask) or (gr.skip(), gr.skip())

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
        return reading, render_reading(reading), render_predictions(reading), *show(reading, layer, head)

    def upload(path: str) -> dict[Any, Any]:
        try:
            [(_, content)] = read_uploads([path])
        except ValueError as error:
            return {notice: render_error(str(error))}
        return {text: content, occurrence: 1} | nothing_read

    example_reading, *shown = guess(EXAMPLE, EXAMPLE_WORD, 1, num_layers - 1, MEAN)
    gr.Markdown(CHOOSE_HINT)
    label = f"Text, up to {config.max_position_embeddings:,} tokens; {mask} stands for a missing word"
    text = gr.Textbox(EXAMPLE, label=label, lines=10, max_lines=10, elem_id="text")
    with gr.Row(equal_height=True):
        word = gr.Textbox(EXAMPLE_WORD, label="Word to guess", elem_id="word", max_lines=1)
        occurrence = gr.Number(1, label="Which occurrence", precision=0, minimum=1, elem_id="occurrence")
        with gr.Column(min_width=160):
            file = gr.UploadButton("Upload a .txt file", elem_id="file", **TEXT_FILES)
            example = gr.Button("Long example", elem_id="example")
        button = gr.Button("Guess", variant="primary", elem_id="guess")
    notice = html(shown[0], "notice")
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            layers = [(str(i + 1), i) for i in range(num_layers)] + [("mean of all", MEAN)]
            heads = [(str(i + 1), i) for i in range(config.num_attention_heads)] + [("mean of all", MEAN)]
            predictions = html(shown[1], "predictions")
            layer = gr.Dropdown(layers, value=num_layers - 1, label="Layer", elem_id="layer", filterable=False)
            head = gr.Dropdown(heads, value=MEAN, label="Attention head", elem_id="head", filterable=False)
        with gr.Column(scale=3, min_width=300):
            tokens = html(shown[2], "tokens")
    strongest = html(shown[3], "strongest")
    reading = gr.State(example_reading)

    results = [reading, notice, predictions, tokens, strongest]
    nothing_read = dict(zip(results, (None, "", "", "", ""), strict=True))
    text.select(choose, [text], [word, occurrence], show_progress="hidden", **PRIVATE)
    file.click(None, None, [notice], js="() => ''")  # clears it, since the browser itself may refuse the file
    file.upload(upload, [file], [text, occurrence, *results], **PRIVATE)
    example.click(
        lambda: {text: LONG_EXAMPLE.replace("[MASK]", mask), word: mask, occurrence: 1} | nothing_read,
        None, [text, word, occurrence, *results], **PRIVATE,
    )  # fmt: skip
    # One text at a time: the rows are collected by hooks in the model.
    asked = gr.on(
        [button.click, word.submit, occurrence.submit], guess, [text, word, occurrence, layer, head], results,
        concurrency_limit=1, **PRIVATE,
    )  # fmt: skip
    asked.then(None, js=SCROLL_TO_CHOSEN)
    changed = gr.on([layer.input, head.input], show, [reading, layer, head], [tokens, strongest], **PRIVATE)
    changed.then(None, js=SCROLL_TO_CHOSEN)


def search_tab(embedder: Any) -> None:
    def add(documents: list[Document], texts: list[tuple[str, str]]) -> list[Document]:
        """Add texts to the documents, but none that is already there."""
        for name, text in texts:
            if all(text != document.text for document in documents):
                documents = [*documents, read_document(embedder, name, text)]
        return documents

    def add_pasted(pasted: str, documents: list[Document]) -> dict[Any, Any]:
        try:
            if not pasted.strip():
                raise ValueError("There is no text to add: paste one, or upload files.")
            documents = add(documents, [(name_of(pasted), pasted)])
        except ValueError as error:
            return {notice: render_error(str(error))}
        return {text: "", added: documents, table: render_documents(documents), notice: ""}

    def add_files(paths: list[str], documents: list[Document]) -> dict[Any, Any]:
        try:
            documents = add(documents, read_uploads(paths))
        except ValueError as error:
            return {notice: render_error(str(error))}
        return {added: documents, table: render_documents(documents), notice: ""}

    def ask(query: str, pasted: str, documents: list[Document]) -> dict[Any, Any]:
        """Search in the texts that were added, and in a text that is still in the box."""
        try:
            if not query.strip():
                raise ValueError("There is no question yet: write one.")
            if pasted.strip():
                documents = add(documents, [(name_of(pasted), pasted)])
            if not documents:
                raise ValueError("There is no text to search in: paste one, or upload files.")
        except ValueError as error:
            return {notice: render_error(str(error)), results: ""}
        hits = search(embedder, documents, query)
        total = sum(len(document.passages) for document in documents)
        found = render_notice(f"The best {len(hits):,} of {total:,} passages.")
        changed = {text: "", added: documents, table: render_documents(documents)}
        return changed | {notice: found, results: render_hits(hits)}

    gr.Markdown(SEARCH_HINT)
    text = gr.Textbox(LONG_EXAMPLE, label="Text", lines=6, max_lines=6, placeholder="Paste a text", elem_id="paste")
    with gr.Row():
        add_button = gr.Button("Add this text", elem_id="add")
        files = gr.UploadButton("Upload .txt files", file_count="multiple", elem_id="files", **TEXT_FILES)
        clear = gr.Button("Remove all texts", elem_id="clear")
    table = html(render_documents([]), "documents")
    with gr.Row(equal_height=True):
        question = gr.Textbox(EXAMPLE_QUESTION, label="Question", max_lines=1, scale=4, elem_id="question")
        button = gr.Button("Search", variant="primary", elem_id="search")
    notice = html("", "search-notice")
    results = html("", "hits")
    added = gr.State([])

    one_by_one = PRIVATE | {"concurrency_id": "search", "concurrency_limit": 1}  # each sees the last one's texts
    add_button.click(add_pasted, [text, added], [text, added, table, notice], **one_by_one)
    files.click(None, None, [notice], js="() => ''")
    files.upload(add_files, [files, added], [added, table, notice], **one_by_one)
    clear.click(lambda: ([], render_documents([]), "", ""), None, [added, table, notice, results], **one_by_one)
    asked = [button.click, question.submit]
    gr.on(asked, ask, [question, text, added], [text, added, table, notice, results], **one_by_one)
