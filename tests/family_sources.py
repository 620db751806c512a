"""Checkpoints of other families with random weights and small vocabularies, saved by transformers itself."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
import transformers
from transformers import PreTrainedModel

TOKENS = "Model", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"
TEXTS = "ForSequenceClassification", "ForMultipleChoice"
LOSSLESS = {  # heads with a counterpart
    "bert": (*TOKENS, *TEXTS, "ForPreTraining"),
    "roberta": (*TOKENS, *TEXTS),
    "xlm-roberta": (*TOKENS, *TEXTS),
    "camembert": (*TOKENS, *TEXTS),
    "distilbert": TOKENS,
    "electra": TOKENS,
}
NEW_HEADS = {"distilbert": TEXTS, "electra": TEXTS}  # without one
STARTS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
}
LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the river flows from mountains into sea ships go up".split()]
WORDS += ["##s", ".", ",", "and", "down", "on", "it", "towns", "lie", "both", "sides", *map(str, range(60))]


def make_model(model_type: str, head: str = "ForMaskedLM", **fields) -> PreTrainedModel:
    """A random model; its biases and normalizations are random too, so that none can get lost unseen."""
    torch.manual_seed(0)
    if model_type == "distilbert":
        sizes = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
    else:
        sizes = {
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        }  # fmt: skip
    if model_type == "electra":
        sizes["embedding_size"] = 16
    sizes |= {"vocab_size": len(WORDS), "max_position_embeddings": 512, "initializer_range": 0.2}
    if model_type in LIKE_ROBERTA:
        sizes |= {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0}
    cls = getattr(transformers, STARTS[model_type] + head)
    model = cls(cls.config_class(**{**sizes, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_words(folder: Path, **settings) -> None:
    """A WordPiece vocabulary, the file of BERT, DistilBERT and ELECTRA."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_bytes(folder: Path, **settings) -> None:
    """Bytes and two merges, the files of RoBERTa."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *characters, "Ġt", "Ġth", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\nĠt h\n")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


BYTES = 102  # size of that vocabulary


def save_pieces(folder: Path, **settings) -> None:
    """A SentencePiece model, the file of XLM-RoBERTa and CamemBERT; less than `PIECES` ids in either's numbering."""
    model = io.BytesIO()
    sentences = iter(["the river flows from the mountains into the sea.", "ships go up and down on it."] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


PIECES = 80


def make_embedder(folder: Path, *behind: str, **settings) -> Path:
    """A BERT with the mean of its states and other modules behind it, as sentence-transformers saved them for years."""
    save(make_model("bert", "Model"), folder)
    save_words(folder, tokenizer_class="BertTokenizer", model_max_length=512)
    names = ["Transformer", "Pooling", *behind]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def use_first_layout(folder: Path) -> Path:
    """Move an embedder's encoder into a folder of its own, where sentence-transformers had it first."""
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    encoder = folder / "0_Transformer"
    encoder.mkdir()
    stay = ("modules.json", "config_sentence_transformers.json", "README.md")
    for path in [path for path in folder.iterdir() if path.is_file() and path.name not in stay]:
        path.rename(encoder / path.name)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config.json").write_text('{"__version__": "0.4.1"}')  # which says nothing about the encoder
    return folder


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Save it with transformers."""
    model.save_pretrained(folder)
    return folder
