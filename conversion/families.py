"""The families of encoders that can be converted. A family is data: how its checkpoints differ from ALBERT's."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Head:
    """What is special about one of a family's classes."""

    becomes: str | None = None  # the LSG class that replaces it, such as "Model", if its name is another
    tensors: Mapping[str, str] = field(default_factory=dict)  # rules like the family's, applied before them
    lost: str = "(?!)"  # matches the names, without prefix, of tensors that are left out
    reason: str = ""  # why they are left out
    is_new: bool = False  # whether no tensor of the head is copied
    difference: str | None = None  # what the head's user should know


@dataclass(frozen=True)
class Family:
    """The checkpoints of one `model_type`."""

    model_type: str
    title: str  # the model's usual name
    class_name: str  # the beginning of its classes' names, such as "Albert" in `AlbertForMaskedLM`
    prefix: str  # the prefix of the base model's tensor names in a model with a head
    cls_id: int  # the id of [CLS] in its vocabularies, for sources without a tokenizer
    mask_id: int
    vocabularies: Mapping[str, str]  # files, and the class that reads each if no other file names a class
    # Regular expressions and replacements, applied in order. They turn a tensor's name (without prefix) into ALBERT's.
    tensors: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)  # fields of config.json: ALBERT's name, if it differs
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of a config.json, under ALBERT's names
    # If False, there are as many groups as layers, and tensors that only ALBERT has are filled in.
    shares_layers: bool = True
    added: Collection[str] = ()  # tensors of ALBERT's base model that the family lacks: they are filled with zeros
    counts_from_padding: bool = False  # whether the first position is `pad_token_id + 1`
    head_activation: str | None = None  # of the head for masked words, if it is not `hidden_act`
    heads: Mapping[str, Head] = field(default_factory=dict)  # by the part of the class name after `class_name`
    default_head: str = "ForPreTraining"  # if the config.json names no class
    kin: Collection[str] = ()  # the beginnings of the names of classes with the same tensors
    differences: Collection[str] = ()  # between a source and its conversion

    def tensor_name(self, name: str, head: str | None = None) -> str:
        """ALBERT's name, without prefix, of a tensor of this family, without prefix, in a model with that head."""
        for pattern, replacement in {**self.heads.get(head, Head()).tensors, **self.tensors}.items():
            name = re.sub(pattern, replacement, name)
        return name

    def albert_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config.json under ALBERT's names, with ALBERT's meanings and the family's defaults."""
        fields = {**self.defaults, **{self.fields.get(name, name): value for name, value in config.items()}}
        if self.shares_layers:
            return fields
        fields = {name: value for name, value in fields.items() if name not in _OF_NO_USE}
        fields |= {"num_hidden_groups": fields["num_hidden_layers"], "inner_group_num": 1}
        fields.setdefault("embedding_size", fields["hidden_size"])
        if fields.get("classifier_dropout_prob") is None:
            fields["classifier_dropout_prob"] = fields["hidden_dropout_prob"]
        positions, unused = fields["max_position_embeddings"], self.unused_positions(config)
        if type(positions) is int:  # other types are refused with all fields
            fields["max_position_embeddings"] = positions - unused
        return fields

    def own_name(self, field: str, config: Mapping[str, Any]) -> str:
        """The name, in a config.json of this family, of a field of ALBERT."""
        if field == "embedding_size" and not self.shares_layers and field not in {*self.defaults, *config}:
            field = "hidden_size"  # `albert_fields` takes it from there
        names = {albert_name: name for name, albert_name in self.fields.items()}
        return field if field in config else names.get(field, field)

    def differences_of(self, head: str) -> list[str]:
        """The remaining differences for a class of the family with that head."""
        own = self.heads.get(head, Head()).difference
        return [*self.differences, *([own] if own else [])]

    def unused_positions(self, config: Mapping[str, Any]) -> int:
        """The number of rows in the position table that no text uses."""
        pad = config.get("pad_token_id", self.defaults.get("pad_token_id"))
        return pad + 1 if self.counts_from_padding and type(pad) is int else 0


# Fields of other families that mean nothing to ALBERT.
_OF_NO_USE = {
    "use_cache", "position_embedding_type", "is_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "gradient_checkpointing", "sinusoidal_pos_embds", "tie_weights_", "qa_dropout", "summary_activation",
    "summary_last_dropout", "summary_type", "summary_use_proj", "adapters", "is_encoder_decoder",
}  # fmt: skip
_GROUP = r"encoder.albert_layer_groups.\1.albert_layers.0."
_OLD_NAMES = {r"\bgamma$": "weight", r"\bbeta$": "bias"}  # of the first checkpoints, which came from TensorFlow
_BERT_LAYERS = {
    r"^encoder\.layer\.(\d+)\.": _GROUP,
    r"\.attention\.self\.": ".attention.",
    r"\.attention\.output\.": ".attention.",
    r"(albert_layers\.0\.)intermediate\.dense\.": r"\1ffn.",
    r"(albert_layers\.0\.)output\.dense\.": r"\1ffn_output.",
    r"(albert_layers\.0\.)output\.LayerNorm\.": r"\1full_layer_layer_norm.",
    r"^pooler\.dense\.": "pooler.",
    **_OLD_NAMES,
}
_SIZES = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512, "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
    "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102,
}  # fmt: skip
_DROPOUT = {"classifier_dropout": "classifier_dropout_prob"}


def _vocabularies(**classes: str) -> dict[str, str]:
    """The class that reads each form of vocabulary. Many models use another family's tokenizer."""
    files = {"word": "vocab.txt", "bytes": "vocab.json", "pieces": "sentencepiece.bpe.model"}
    usual = {"word": "BertTokenizer", "bytes": "RobertaTokenizer", "pieces": "XLMRobertaTokenizer"}
    own = {files[form]: name for form, name in classes.items()}
    others = {files[form]: name for form, name in usual.items()}
    return {**own, **others, **own, "spiece.model": "AlbertTokenizer", "tokenizer.json": next(iter(classes.values()))}


ALBERT = Family(
    model_type="albert",
    title="ALBERT",
    class_name="Albert",
    prefix="albert.",
    cls_id=2,
    mask_id=4,
    vocabularies={
        "spiece.model": "AlbertTokenizer",
        "tokenizer.json": "AlbertTokenizer",
        "vocab.txt": "BertTokenizer",
    },
)


def _like_bert(model_type: str, title: str, class_name: str, **fields: Any) -> Family:
    """A family with BERT's English vocabulary, sizes and fields, except for the given ones."""
    return Family(
        model_type=model_type,
        title=title,
        class_name=class_name,
        prefix=f"{model_type}.",
        cls_id=101,
        mask_id=103,
        vocabularies=_vocabularies(word=f"{class_name}Tokenizer"),
        defaults={**_SIZES, **fields.pop("defaults", {})},
        shares_layers=False,
        **{"fields": _DROPOUT, **fields},
    )


def _new_head(title: str, layer: str, tensors: str) -> Head:
    """A head that is not copied, because it has a layer that ALBERT's head lacks."""
    return Head(
        lost=tensors,
        is_new=True,
        reason=f"{title}'s {layer} has no counterpart in ALBERT's head",
        difference=f"The head is new, because ALBERT's has no counterpart of {title}'s {layer}. Train it before use.",
    )


BERT = _like_bert(
    "bert",
    "BERT",
    "Bert",
    tensors={
        **_BERT_LAYERS,
        r"^cls\.predictions\.transform\.": "predictions.",
        r"^cls\.predictions\.": "predictions.",
        r"^cls\.seq_relationship\.": "sop_classifier.classifier.",
    },
    heads={
        "ForPreTraining": Head(
            difference="`sop_classifier` holds BERT's next-sentence head: its class 0 means that the second part "
            "follows the first. ALBERT's own head is about their order."
        ),
        "ForNextSentencePrediction": Head(
            becomes="Model", lost=r"^cls\.", reason="no LSG class has the next-sentence head alone"
        ),
    },
)


def _roberta_like(model_type: str, title: str, class_name: str, tokenizer: dict[str, str], **fields: Any) -> Family:
    """RoBERTa or one of its kin: same tensors and classes, another vocabulary."""
    defaults = {**_SIZES, "vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return Family(
        model_type=model_type,
        title=title,
        class_name=class_name,
        prefix="roberta.",
        vocabularies=_vocabularies(**tokenizer),
        tensors={
            **_BERT_LAYERS,
            r"^lm_head\.layer_norm\.": "predictions.LayerNorm.",
            r"^lm_head\.": "predictions.",
        },
        fields=_DROPOUT,
        defaults={**defaults, **fields.pop("defaults", {})},
        shares_layers=False,
        counts_from_padding=True,
        head_activation="gelu",
        heads={
            "ForSequenceClassification": Head(
                tensors={r"^classifier\.dense\.": "pooler.", r"^classifier\.out_proj\.": "classifier."},
                lost=r"^pooler\.",
                reason="this class has its own dense layer in the pooler's place",
            )
        },
        default_head="ForMaskedLM",
        kin={"Roberta", "XLMRoberta", "Camembert"} - {class_name},
        differences=(
            f"{title} counts positions over real tokens only; this model counts them over all tokens. With padding on "
            "the left, their outputs differ. Pad on the right.",
        ),
        **fields,
    )


ROBERTA = _roberta_like("roberta", "RoBERTa", "Roberta", {"bytes": "RobertaTokenizer"}, cls_id=0, mask_id=50264)
XLM_ROBERTA = _roberta_like(
    "xlm-roberta", "XLM-RoBERTa", "XLMRoberta", {"pieces": "XLMRobertaTokenizer"}, cls_id=0, mask_id=250001,
    defaults={"vocab_size": 30522},
)  # fmt: skip
CAMEMBERT = _roberta_like(
    "camembert", "CamemBERT", "Camembert", {"pieces": "CamembertTokenizer"}, cls_id=5, mask_id=32004,
    defaults={"vocab_size": 30522, "bos_token_id": 5, "eos_token_id": 6},
)  # fmt: skip
DISTILBERT = _like_bert(
    "distilbert",
    "DistilBERT",
    "DistilBert",
    tensors={
        r"^transformer\.layer\.(\d+)\.": _GROUP,
        r"\.attention\.q_lin\.": ".attention.query.",
        r"\.attention\.k_lin\.": ".attention.key.",
        r"\.attention\.v_lin\.": ".attention.value.",
        r"\.attention\.out_lin\.": ".attention.dense.",
        r"\.sa_layer_norm\.": ".attention.LayerNorm.",
        r"\.ffn\.lin1\.": ".ffn.",
        r"\.ffn\.lin2\.": ".ffn_output.",
        r"\.output_layer_norm\.": ".full_layer_layer_norm.",
        r"^vocab_transform\.": "predictions.dense.",
        r"^vocab_layer_norm\.": "predictions.LayerNorm.",
        r"^vocab_projector\.": "predictions.decoder.",
        **_OLD_NAMES,
    },
    fields={
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "seq_classif_dropout": "classifier_dropout_prob",
    },
    defaults={"num_hidden_layers": 6, "classifier_dropout_prob": 0.2},
    added=("embeddings.token_type_embeddings.weight",),
    heads=dict.fromkeys(
        ("ForSequenceClassification", "ForMultipleChoice"),
        _new_head("DistilBERT", "dense layer with ReLU", r"^(pre_classifier|classifier)\."),
    ),
    default_head="ForMaskedLM",
)
ELECTRA = _like_bert(
    "electra",
    "ELECTRA",
    "Electra",
    tensors={
        **_BERT_LAYERS,
        r"^embeddings_project\.": "encoder.embedding_hidden_mapping_in.",
        r"^generator_predictions\.": "predictions.",
        r"^generator_lm_head\.": "predictions.decoder.",
    },
    defaults={"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    head_activation="gelu",
    heads={
        **dict.fromkeys(
            ("ForSequenceClassification", "ForMultipleChoice"),
            _new_head("ELECTRA", "dense layer with GELU", r"^(classifier|sequence_summary)\."),
        ),
        "ForPreTraining": Head(
            becomes="Model",
            lost=r"^discriminator_predictions\.",
            reason="no LSG class has ELECTRA's discriminator",
            difference="ELECTRA's discriminator has no counterpart and is left out: this is the encoder alone.",
        ),
    },
    default_head="ForMaskedLM",
)
FAMILIES = {
    family.model_type: family for family in (ALBERT, BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA)
}
CONVERTIBLE = "ALBERT, BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and ELECTRA"

# Why models of other types cannot be converted: `model_type` as in config.json.
_REASONS = {
    "its attention has relative positions": "deberta deberta-v2 mpnet xlnet roformer nezha funnel",
    "its layers have rotary positions and gated feed-forward parts": "modernbert nomic_bert new eurobert neobert",
    "its layers normalize before attention, not after": "esm roberta-prelayernorm xlm-roberta-xl megatron-bert",
    "its attention is not full attention": "longformer big_bird reformer nystromformer yoso mra convbert",
    "it is an encoder with a decoder": "t5 mt5 umt5 longt5 bart mbart pegasus marian led blenderbot prophetnet "
    "encoder-decoder",
    "it is a decoder": "gpt2 gpt_neo gpt_neox llama mistral opt bloom qwen2 qwen3 gemma modernbert-decoder "
    "bert-generation",
    "its layers are convolutions": "squeezebert",
    "its layers have bottlenecks": "mobilebert",
    "it has no attention": "fnet",
    "it has embeddings that ALBERT does not have": "ernie xlm flaubert layoutlm",
}
OTHERS = {model_type: reason for reason, types in _REASONS.items() for model_type in types.split()}
ZEROS, IDENTITY = "zeros", "the identity"


def added_tensors(family: Family, embedding_size: int, hidden_size: int) -> dict[str, str]:
    """Tensors that such a checkpoint lacks, by ALBERT's names without prefix, and what they are filled with."""
    filled = dict.fromkeys(family.added, ZEROS)
    if not family.shares_layers and embedding_size == hidden_size:
        mapping = "encoder.embedding_hidden_mapping_in."
        filled |= {mapping + "weight": IDENTITY, mapping + "bias": ZEROS}
    return filled
