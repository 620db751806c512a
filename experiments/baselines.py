"""The baselines of a study: predictions for the test rows of an example, by name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import LabelEncoder, MultiLabelBinarizer
from sklearn.svm import LinearSVC
from transformers import PreTrainedTokenizerBase

from experiments.chunks import cut_texts


def classify(
    train: Sequence[dict], test: Sequence[dict], tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]
) -> dict[str, list]:
    """The most frequent label (with several labels per row, those of more than half of the rows), and linear support
    vector machines on TF-IDF (logarithmic counts) of the tokens that the models read and of the whole texts."""
    several = isinstance(train[0]["label"], list)
    encoder = MultiLabelBinarizer() if several else LabelEncoder()
    encoded = encoder.fit_transform([row["label"] for row in train])
    texts = [[row["text"] for row in rows] for rows in (train, test)]

    def decode(made) -> list:
        return [list(each) if several else str(each) for each in encoder.inverse_transform(made)]

    dummy = DummyClassifier(strategy="most_frequent").fit(texts[0], encoded)
    found = {"most frequent label": decode(dummy.predict(texts[1]))}
    for length in [*lengths, None]:
        if length is None:
            read = texts
        else:
            read = [[chunks[0] for chunks in cut_texts(each, tokenizer, length)] for each in texts]
        machine = OneVsRestClassifier(LinearSVC(random_state=0)) if several else LinearSVC(random_state=0)
        pipeline = make_pipeline(TfidfVectorizer(sublinear_tf=True), machine)
        name = "whole text" if length is None else f"{length:,} tokens"
        found[f"TF-IDF + linear SVM, {name}"] = decode(pipeline.fit(read[0], encoded).predict(read[1]))
    return found


def tag_tokens(train: Sequence[dict], test: Sequence[dict], *_: object) -> dict[str, list]:
    """Each word's most frequent tag, without context."""
    seen = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            seen[word][tag] += 1
    tags = {word: found.most_common(1)[0][0] for word, found in seen.items()}
    return {"each word's most frequent tag": [[tags.get(word, "O") for word in row["words"]] for row in test]}


def summarize(train: Sequence[dict], test: Sequence[dict], *_: object) -> dict[str, list]:
    """The first words of a document, as many as a summary has on average."""
    words = round(sum(len(row["summary"].split()) for row in train) / len(train))
    return {f"lead-{words} words": [" ".join(row["document"].split()[:words]) for row in test]}


BASELINES = {"classify": classify, "tag_tokens": tag_tokens, "answer_questions": lambda *_: {}, "summarize": summarize}
