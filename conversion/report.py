"""The report of a conversion: as text, as JSON, and as the model card of its result."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .files import MODULE_SETTINGS, read_json, write_json
from .verify import LOSSLESS, Comparison

TEMPLATE = Path(__file__).with_name("model_card.md")
PIPELINE_TAGS = {
    "LSGAlbertModel": "feature-extraction",
    "LSGAlbertForMaskedLM": "fill-mask",
    "LSGAlbertForSequenceClassification": "text-classification",
    "LSGAlbertForTokenClassification": "token-classification",
    "LSGAlbertForQuestionAnswering": "question-answering",
    "LSGAlbertForMultipleChoice": "multiple-choice",
}
STAYS_TRUE = ("license", "license_name", "license_link", "language", "datasets")  # metadata of a source


@dataclass
class Report:
    """Facts of one conversion."""

    source: str
    source_commit: str | None  # on the Hub
    family: str  # of the source, such as "RoBERTa"
    source_architecture: str | None  # as its config.json has it
    source_is_lsg: bool
    target: str
    architecture: str
    dtype: str
    source_max_length: int  # in tokens
    max_length: int
    parameters_before: int
    parameters_after: int
    lsg_parameters: dict[str, Any]
    global_tokens: str  # how their table was made
    bos_token_id: int
    mask_token_id: int | None
    seed: int
    has_tokenizer: bool
    modules: list[str] = field(default_factory=list)  # folders of sentence-transformers modules after the encoder
    dropped: dict[str, str] = field(default_factory=dict)  # tensor of the source: reason
    drawn: list[str] = field(default_factory=list)  # tensors of the target
    differences: list[str] = field(default_factory=list)  # between the source's family and ALBERT
    warnings: list[str] = field(default_factory=list)
    comparison: Comparison | None = None  # None: not verified
    versions: dict[str, str] = field(default_factory=dict)
    pushed_to: str | None = None

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        write_json(path, dataclasses.asdict(self))

    def text(self) -> str:
        """The report as lines of text."""
        added = self.parameters_after - self.parameters_before
        rows = {
            "source": self.source + (f" (commit {self.source_commit})" if self.source_commit else ""),
            "target": self.target,
            "family": self.family,
            "architecture": f"{self.source_architecture or 'not named'} -> {self.architecture}, {self.dtype}",
            "positions": f"{self.source_max_length:,} -> {self.max_length:,}",
            "parameters": f"{self.parameters_before:,} -> {self.parameters_after:,} ({added:+,})",
            "global tokens": self.global_tokens,
            "dropped": "; ".join(f"{name}: {reason}" for name, reason in self.dropped.items()) or "nothing",
            "random": ", ".join(self.drawn) or "nothing",
            **({"modules": ", ".join(self.modules)} if self.modules else {}),
            **({"differences": " ".join(self.differences)} if self.differences else {}),
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
            + ("" if seen.lossless_global_token == "stored" else ", with [CLS] as global token 0 for this check"),
            "chosen setting": f"largest difference {seen.chosen_difference:.1e}, cosine similarity of the last hidden "
            f"states {seen.chosen_cosine:.4f} (mean; 1 is equal)",
        }
        for name, top5 in (("source's top 5", seen.source_top5), ("target's top 5", seen.target_top5)):
            if top5 is not None:
                rows[name] = ", ".join(f"{token} {probability:.3f}" for token, probability in top5)
        memory = "" if seen.peak_memory_mb is None else f", peak memory of the process {seen.peak_memory_mb:,.0f} MB"
        rows["full length"] = (
            f"{seen.full_length:,} tokens in {seen.full_length_seconds:.2f} s{memory} (encoder, float32)"
        )
        return rows


def model_card(report: Report, source_folder: Path) -> str:
    """The README.md of the target: facts from the source's card, and what the conversion did."""
    path = Path(report.source)  # a local path does not go into the card
    data = ModelCardData(
        **known_metadata(source_folder / "README.md"),
        library_name="sentence-transformers" if report.modules else "transformers",
        pipeline_tag="sentence-similarity" if report.modules else PIPELINE_TAGS.get(report.architecture),
        tags=["albert", "lsg", "long-context", "custom_code"],
        base_model=None if path.is_dir() else report.source,
    )
    facts = {
        "name": path.resolve().name if path.is_dir() else report.source,
        "auto_class": report.architecture.replace("LSGAlbert", "Auto").replace("AutoFor", "AutoModelFor"),
    }
    settings = source_folder / MODULE_SETTINGS[0]
    facts["loader"] = (read_json(settings) if settings.is_file() else {}).get("model_type", "SentenceTransformer")
    return str(ModelCard.from_template(data, template_path=str(TEMPLATE), **facts, **dataclasses.asdict(report)))


def known_metadata(card: Path) -> dict[str, Any]:
    """The metadata of a source's card that also holds for the target."""
    try:
        known = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, or it cannot be read as text, as YAML, or as metadata
        return {}
    return {name: known[name] for name in STAYS_TRUE if known.get(name)}
