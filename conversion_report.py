"""What a conversion did: as text, as JSON, and as the model card of its result."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard

from .checkpoint_files import write_json
from .conversion_checks import LOSSLESS, Comparison

PIPELINE_TAGS = {
    "LSGAlbertModel": "feature-extraction",
    "LSGAlbertForMaskedLM": "fill-mask",
    "LSGAlbertForSequenceClassification": "text-classification",
    "LSGAlbertForTokenClassification": "token-classification",
    "LSGAlbertForQuestionAnswering": "question-answering",
    "LSGAlbertForMultipleChoice": "multiple-choice",
}


@dataclass
class Report:
    """Facts of one conversion."""

    source: str
    source_commit: str | None  # on the Hub
    source_architecture: str | None  # as its config.json has it
    source_is_lsg: bool
    target: str
    architecture: str
    dtype: str
    source_max_length: int  # positions
    max_length: int
    parameters_before: int
    parameters_after: int
    lsg_parameters: dict[str, Any]
    global_tokens: str  # how their table was made
    bos_token_id: int
    mask_token_id: int | None
    seed: int
    has_tokenizer: bool
    dropped: dict[str, str] = field(default_factory=dict)  # tensor of the source: reason
    drawn: list[str] = field(default_factory=list)  # tensors of the target
    warnings: list[str] = field(default_factory=list)
    comparison: Comparison | None = None  # None: not verified
    versions: dict[str, str] = field(default_factory=dict)
    pushed_to: str | None = None

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, dataclasses.asdict(self))

    def text(self) -> str:
        """As lines to read."""
        added = self.parameters_after - self.parameters_before
        rows = {
            "source": self.source + (f" (commit {self.source_commit})" if self.source_commit else ""),
            "target": self.target,
            "architecture": f"{self.source_architecture or 'not named'} -> {self.architecture}, {self.dtype}",
            "positions": f"{self.source_max_length:,} -> {self.max_length:,}",
            "parameters": f"{self.parameters_before:,} -> {self.parameters_after:,} ({added:+,})",
            "global tokens": self.global_tokens,
            "dropped": "; ".join(f"{name}: {reason}" for name, reason in self.dropped.items()) or "nothing",
            "drawn": ", ".join(self.drawn) or "nothing",
            **self._comparison_rows(),
        }
        if self.pushed_to:
            rows["published"] = self.pushed_to
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())

    def _comparison_rows(self) -> dict[str, str]:
        if self.comparison is None:
            return {"verified": "no (`--no-verify`)"}
        seen = self.comparison
        text = "random ids" if seen.text is None else repr(seen.text)
        rows = {
            "short text": f"{text}, {seen.tokens} tokens",
            "lossless setting": f"largest difference {seen.lossless_difference:.1e} (below {LOSSLESS:.0e})"
            + ("" if seen.lossless_global_token == "stored" else ", with [CLS] put in global token 0 for the check"),
            "chosen setting": f"largest difference {seen.chosen_difference:.1e}",
        }
        for name, top5 in (("source's top 5", seen.source_top5), ("target's top 5", seen.target_top5)):
            if top5 is not None:
                rows[name] = ", ".join(f"{token} {probability:.3f}" for token, probability in top5)
        memory = "" if seen.peak_memory_mb is None else f", process at most {seen.peak_memory_mb:,.0f} MB"
        rows["full length"] = (
            f"{seen.full_length:,} tokens in {seen.full_length_seconds:.2f} s{memory} (encoder, float32)"
        )
        return rows


def model_card(report: Report, source_folder: Path) -> str:
    """The README.md of the target: what is known from the source, and what was done to it."""
    head = CardData(**card_head(report, source_folder)).to_yaml()
    parameters = "\n".join(f"| `{name}` | `{value!r}` |" for name, value in report.lsg_parameters.items())
    auto_class = report.architecture.replace("LSGAlbert", "Auto").replace("AutoFor", "AutoModelFor")
    loading = [
        f"from transformers import {auto_class}",
        f"model = {auto_class}.from_pretrained(repo, trust_remote_code=True)",
    ]
    if report.has_tokenizer:
        loading = [
            f"from transformers import {auto_class}, AutoTokenizer",
            "tokenizer = AutoTokenizer.from_pretrained(repo)",
            loading[1],
        ]
    loading.insert(1, 'repo = "."  # this directory, or its name on the Hub')
    return f"""---
{head}
---

# {card_title(report)}

An LSG-ALBERT: the ALBERT `{source_name(report)}` with local + sparse + global attention
([Condevaux and Harispe, 2022](https://arxiv.org/abs/2210.15497)), for texts of up to {report.max_length:,} tokens.
Made by `lsg-albert convert`, without training: what the source has learned, its vocabulary and its limits are unchanged.

```python
{chr(10).join(loading)}
```

## What was converted

{conversion_facts(report)}

Attention pattern (each can be replaced when loading, without training):

| parameter | value |
| --- | --- |
{parameters}
{comparison_section(report)}"""


def source_name(report: Report) -> str:
    """The source's name on the Hub, or its directory's name: the path to it is nobody's business."""
    return report.source if not Path(report.source).is_dir() else Path(report.source).resolve().name


def card_title(report: Report) -> str:
    """The heading of the card."""
    return f"LSG version of {source_name(report)}, {report.max_length:,} tokens"


def card_head(report: Report, source_folder: Path) -> dict[str, Any]:
    """The metadata of the card: of the source's own only what stays true."""
    head: dict[str, Any] = {}
    if (source_folder / "README.md").is_file():
        text = (source_folder / "README.md").read_text(encoding="utf-8", errors="replace")
        try:
            known = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        except ValueError:  # its metadata cannot be read
            known = {}
        head = {
            name: known[name]
            for name in ("license", "license_name", "license_link", "language", "datasets")
            if known.get(name)
        }
    head["library_name"] = "transformers"
    if report.architecture in PIPELINE_TAGS:
        head["pipeline_tag"] = PIPELINE_TAGS[report.architecture]
    head["tags"] = ["albert", "lsg", "long-context", "custom_code"]
    if not Path(report.source).is_dir():
        head["base_model"] = report.source
    return head


def conversion_facts(report: Report) -> str:
    """The facts of the conversion as a list."""
    commit = f", commit `{report.source_commit}`" if report.source_commit else ""
    facts = [
        f"Source: `{source_name(report)}`{commit}; architecture `{report.source_architecture or 'not named'}`",
        f"Architecture here: `{report.architecture}`, weights in {report.dtype}",
        f"Parameters: {report.parameters_before:,} before, {report.parameters_after:,} after",
        f"Positions: {report.source_max_length:,} before, {report.max_length:,} after "
        + ("(the source's, repeated in order)" if report.max_length > report.source_max_length else "(the source's)"),
        f"Global tokens: {report.global_tokens}",
    ]
    if not report.has_tokenizer:
        facts.append("The source had no tokenizer, so there is none here")
    if report.drawn:
        facts.append(f"Drawn at random and not trained: {', '.join(f'`{name}`' for name in report.drawn)}")
    if report.dropped:
        facts.append(f"Left out: {', '.join(f'`{name}` ({reason})' for name, reason in report.dropped.items())}")
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join(f"- {fact}" for fact in [*facts, f"Made with {versions}"])


def comparison_section(report: Report) -> str:
    """What was measured, if anything was."""
    seen = report.comparison
    if seen is None:
        return "\nThe conversion was not verified against the source.\n"
    short = "random tokens" if seen.text is None else "tokens of English"
    return f"""
## Compared with the source

On {seen.tokens} {short}, in float32, the largest difference to the outputs of the source is
{seen.lossless_difference:.1e} in the lossless setting (`mask_first_token=True`, one global token) and
{seen.chosen_difference:.1e} in the setting above.
"""
