"""Configuration of LSG-ALBERT: ALBERT with local + sparse + global attention.

`LSGAlbertConfig` has ALBERT's fields and those of the attention pattern, and checks them all when it is created.
"""

import copy
import difflib
import inspect
import math
from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .lsg_compat import CACHE_NAMES
from .lsg_pattern import SPARSITY_TYPES, LSGPattern

logger = logging.get_logger(__name__)

ATTN_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
MAX_GLOBAL_TOKENS = 512  # rows of the global embedding table in every published checkpoint

# The fields that ALBERT does not have. A conversion has an option for each of them, and writes all of them.
LSG_FIELDS = (
    "block_size",
    "sparse_block_size",
    "sparsity_factor",
    "sparsity_type",
    "num_global_tokens",
    "mask_first_token",
    "pool_with_global",
    "adaptive",
    "pack_padding",
    "lsh_num_pre_rounds",
    "lsh_seed",
    "pass_global_tokens_to_decoder",
)

AUTO_MAP = {
    "AutoConfig": "configuration_lsg_albert.LSGAlbertConfig",
    "AutoModel": "modeling_lsg_albert.LSGAlbertModel",
    "AutoModelForPreTraining": "modeling_lsg_albert.LSGAlbertForPreTraining",
    "AutoModelForMaskedLM": "modeling_lsg_albert.LSGAlbertForMaskedLM",
    "AutoModelForSeq2SeqLM": "modeling_lsg_albert.LSGAlbertForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_lsg_albert.LSGAlbertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_lsg_albert.LSGAlbertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_lsg_albert.LSGAlbertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_lsg_albert.LSGAlbertForMultipleChoice",
}

# Inclusive (lowest, highest) value of every integer field; None means no limit.
_INTEGER_FIELDS = {
    "vocab_size": (1, None),
    "embedding_size": (1, None),
    "hidden_size": (1, None),
    "num_hidden_layers": (1, None),
    "num_hidden_groups": (1, None),
    "num_attention_heads": (1, None),
    "intermediate_size": (1, None),
    "inner_group_num": (1, None),
    "max_position_embeddings": (1, None),
    "type_vocab_size": (1, None),
    "block_size": (1, None),
    "sparse_block_size": (0, None),
    "sparsity_factor": (None, None),  # zero and below switch the sparse part off
    "num_global_tokens": (1, MAX_GLOBAL_TOKENS),
    "lsh_num_pre_rounds": (0, None),
    "lsh_seed": (0, 2**63 - 1),
    "pad_token_id": (0, None),
    "bos_token_id": (0, None),
    "eos_token_id": (0, None),
    "decoder_start_token_id": (0, None),
}
_NONE_ALLOWED = (
    "sparse_block_size",
    "lsh_seed",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
_FLOATS = (*_PROBABILITIES, "initializer_range", "layer_norm_eps")
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_BOOLEANS = (
    "use_cache",
    "tie_word_embeddings",
    "mask_first_token",
    "pool_with_global",
    "adaptive",
    "pack_padding",
    "pass_global_tokens_to_decoder",
)
_POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")


class LSGAlbertConfig(PretrainedConfig):
    r"""
    Configuration of an LSG-ALBERT model. ALBERT's fields keep ALBERT's names and meaning; the defaults are those of
    ALBERT-base with 4,096 positions. Sizes of the attention pattern count tokens. A model reads its pattern from the
    configuration when it is created; fields that are set later do not change the model's pattern.

    Args:
        vocab_size (`int`, *optional*, defaults to 30000):
            Number of entries in the vocabulary.
        embedding_size (`int`, *optional*, defaults to 128):
            Width of the word, position, token-type and global embeddings.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the encoder; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of layers. Each of them applies one layer group.
        num_hidden_groups (`int`, *optional*, defaults to 1):
            Number of layer groups; the layers of one group share their parameters.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads per layer.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the feed-forward part.
        inner_group_num (`int`, *optional*, defaults to 1):
            Layers inside one group.
        hidden_act (`str`, *optional*, defaults to `"gelu_new"`):
            Activation of the feed-forward part and of the masked-language-model head.
        hidden_dropout_prob (`float`, *optional*, defaults to 0):
            Dropout of embeddings and attention outputs.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0):
            Dropout of attention weights.
        max_position_embeddings (`int`, *optional*, defaults to 4096):
            Longest input in tokens; global tokens and adaptive padding do not count.
        type_vocab_size (`int`, *optional*, defaults to 2):
            Number of token types.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of randomly initialized weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of the layer normalizations.
        classifier_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout before a classifier; `None` means the value of `hidden_dropout_prob`, which is then saved.
        position_embedding_type (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"` adds position embeddings. ALBERT's other values give a warning and add no embeddings.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*, default to 0, 2, 3):
            Ids of the padding, beginning and end tokens.
        decoder_start_token_id (`int`, *optional*):
            Id that a decoder starts with; `None` means `bos_token_id`.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether a decoder returns the keys and values that the next token needs. A saved value is read only from
            the config of a sequence-to-sequence model; the value in an encoder's config is ignored.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the masked-language-model decoder shares the word embeddings.
        block_size (`int`, *optional*, defaults to 128):
            Tokens per block. A token attends to its own block and to the neighbouring ones, see [`LSGPattern`].
        sparse_block_size (`int`, *optional*, defaults to 128):
            Sparse tokens on each side of the local window; 0 or `None` switches the sparse part off.
        sparsity_factor (`int`, *optional*, defaults to 2):
            Tokens that one sparse token stands for; must divide `block_size`. 0 or less switches the sparse part off.
        sparsity_type (`str`, *optional*, defaults to `"norm"`):
            Selection of the sparse tokens: `"norm"`, `"pooling"`, `"lsh"`, `"stride"`, `"block_stride"`,
            `"bos_pooling"`, or `"none"`/`None` for no sparse part.
        num_global_tokens (`int`, *optional*, defaults to 1):
            Global tokens before the text, 1 to 512. They attend to all tokens, and all tokens attend to them.
        mask_first_token (`bool`, *optional*, defaults to `False`):
            Hides the first text token ([CLS]) from all queries. A global token made from [CLS] then takes its place.
        pool_with_global (`bool`, *optional*, defaults to `True`):
            Returns the first global token's output in place of the first text token's. `mask_first_token` needs this.
        adaptive (`bool`, *optional*, defaults to `True`):
            Pads inputs to a multiple of `block_size` automatically, and removes that padding from the outputs.
        pack_padding (`bool`, *optional*, defaults to `True`):
            Leaves out whole blocks of padding at the end of a text, so that only real blocks cost time. The outputs of
            blocks that are left out are zeros. A compiled or exported model still computes these blocks.
        lsh_num_pre_rounds (`int`, *optional*, defaults to 1):
            Hashing rounds of `"lsh"` before the last one. Also accepted as `lsg_num_pre_rounds`.
        lsh_seed (`int`, *optional*, defaults to 0):
            Seed of the random projections of `"lsh"`. With `None`, torch's global generator draws new ones in each
            forward pass.
        pass_global_tokens_to_decoder (`bool`, *optional*, defaults to `True`):
            Whether a decoder also attends to the global tokens' last states, which come before the text's states.

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and a remedy.
    """

    model_type = "albert"
    keys_to_ignore_at_inference = [*CACHE_NAMES]  # `Trainer` collects all other outputs
    attribute_map = {"lsg_num_pre_rounds": "lsh_num_pre_rounds"}

    def __init__(
        self,
        vocab_size: int = 30000,
        embedding_size: int = 128,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_hidden_groups: int = 1,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        inner_group_num: int = 1,
        hidden_act: str = "gelu_new",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        max_position_embeddings: int = 4096,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        classifier_dropout_prob: float | None = 0.1,
        position_embedding_type: str = "absolute",
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 2,
        eos_token_id: int | None = 3,
        decoder_start_token_id: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        block_size: int = 128,
        sparse_block_size: int | None = 128,
        sparsity_factor: int = 2,
        sparsity_type: str | None = "norm",
        num_global_tokens: int = 1,
        mask_first_token: bool = False,
        pool_with_global: bool = True,
        adaptive: bool = True,
        pack_padding: bool = True,
        lsh_num_pre_rounds: int = 1,
        lsh_seed: int | None = 0,
        pass_global_tokens_to_decoder: bool = True,
        base_model_prefix: str = "lsg",
        auto_map: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_hidden_groups = num_hidden_groups
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.inner_group_num = inner_group_num
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.classifier_dropout_prob = classifier_dropout_prob
        self.position_embedding_type = position_embedding_type
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.decoder_start_token_id = decoder_start_token_id
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings

        self.block_size = block_size
        self.sparse_block_size = sparse_block_size
        self.sparsity_factor = sparsity_factor
        self.sparsity_type = sparsity_type
        self.num_global_tokens = num_global_tokens
        self.mask_first_token = mask_first_token
        self.pool_with_global = pool_with_global
        self.adaptive = adaptive
        self.pack_padding = pack_padding
        self.lsh_num_pre_rounds = kwargs.pop("lsg_num_pre_rounds", lsh_num_pre_rounds)
        self.lsh_seed = lsh_seed
        self.pass_global_tokens_to_decoder = pass_global_tokens_to_decoder

        # Published checkpoints have this value. A converter recognizes them by it.
        self.base_model_prefix = base_model_prefix
        self.auto_map = {**AUTO_MAP, **(auto_map or {})}

        # Without this field, `pipeline` of transformers 4.4x does not look for a tokenizer.
        kwargs["tokenizer_class"] = kwargs.get("tokenizer_class") or "AlbertTokenizer"
        self.check_fields()  # first, because the errors of transformers 5 name neither the field nor a remedy
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            decoder_start_token_id=decoder_start_token_id,
            use_cache=use_cache,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        check_attn_implementation(self._attn_implementation)
        check_problem_type(self.problem_type)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in `PretrainedConfig`, but overrides are checked and an encoder's `use_cache` is ignored.

        Keyword overrides pass the same checks as the values of the dictionary. A `Trainer` leaves `use_cache=False` in
        an encoder's config, which would slow down a decoder that is made from it.
        """
        fields = {*inspect.signature(cls.__init__).parameters, *cls.attribute_map} - {"self", "kwargs"}
        overrides = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
        merged = {}
        for values in (config_dict, overrides):
            merged.update({cls.attribute_map.get(name, name): value for name, value in values.items()})
        if not config_dict.get("is_encoder_decoder") and "use_cache" not in overrides:
            merged.pop("use_cache", None)
        return super().from_dict(merged, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in `PretrainedConfig`, but with the types that transformers' own ALBERT requires.

        Integers in float fields become floats. A `classifier_dropout_prob` of None becomes `hidden_dropout_prob`.
        """
        fields = super().to_dict()
        if fields["classifier_dropout_prob"] is None:
            fields["classifier_dropout_prob"] = fields["hidden_dropout_prob"]
        return fields | {name: float(fields[name]) for name in _FLOATS if isinstance(fields[name], int)}

    @property
    def is_sparse(self) -> bool:
        """Whether the pattern has a sparse part. Type, size and factor must all allow it."""
        return self.sparsity_type not in (None, "none") and bool(self.sparse_block_size) and self.sparsity_factor > 0

    def check_fields(self) -> None:
        """Check every field by itself and together with the others.

        Raises:
            ValueError: a value is impossible; the message names the field, the value and a remedy.
        """
        self._check_single_fields()
        self._check_sizes()
        self._check_sparsity()
        if getattr(self, "is_decoder", False):
            raise ValueError(
                "`is_decoder=True` is not supported: leave it out. LSGAlbertForConditionalGeneration has a decoder."
            )
        if self.mask_first_token and not self.pool_with_global:
            logger.warning_once("`mask_first_token=True` needs `pool_with_global=True`. It is set to `True`.")
            self.pool_with_global = True

    def _check_single_fields(self) -> None:
        for field, (lowest, highest) in _INTEGER_FIELDS.items():
            value = getattr(self, field)
            if value is None and field in _NONE_ALLOWED:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"`{field}` must be an integer, got {value!r}.")
            if (lowest is not None and value < lowest) or (highest is not None and value > highest):
                wanted = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
                raise ValueError(f"`{field}` must be {wanted}, got {value}.")
        for field in _PROBABILITIES:
            value = getattr(self, field)
            if value is None and field == "classifier_dropout_prob":
                continue
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"`{field}` must be a number from 0 to 1, got {value!r}.")
        for field in _BOOLEANS:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"`{field}` must be True or False, got {getattr(self, field)!r}.")
        if not _is_number(self.initializer_range) or self.initializer_range < 0:
            raise ValueError(f"`initializer_range` must be a number of at least 0, got {self.initializer_range!r}.")
        if not _is_number(self.layer_norm_eps) or self.layer_norm_eps <= 0:
            raise ValueError(f"`layer_norm_eps` must be a number above 0, got {self.layer_norm_eps!r}.")
        _check_name("hidden_act", self.hidden_act, tuple(ACT2FN))
        _check_name("position_embedding_type", self.position_embedding_type, _POSITION_EMBEDDING_TYPES)
        if self.position_embedding_type != "absolute":
            logger.warning_once(
                f'`position_embedding_type="{self.position_embedding_type}"`: no position embedding is added, so '
                'the model does not know the order of its tokens. Use "absolute" to add position embeddings.'
            )

    def _check_sizes(self) -> None:
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` ({self.pad_token_id}) must be None or an id of the vocabulary, from 0 to "
                f"{self.vocab_size - 1} (`vocab_size` is {self.vocab_size})."
            )

    def _check_sparsity(self) -> None:
        if self.sparsity_type is not None:
            _check_name("sparsity_type", self.sparsity_type, SPARSITY_TYPES)
        LSGPattern.from_config(self)  # checks the sizes against each other
        is_strided = self.is_sparse and self.sparsity_type in ("stride", "block_stride")
        if is_strided and self.sparsity_factor > self.num_attention_heads:
            logger.warning_once(
                f"`sparsity_factor` ({self.sparsity_factor}) is above `num_attention_heads` ({self.num_attention_heads}): with "
                f'`sparsity_type="{self.sparsity_type}"` no head selects some of the tokens then.'
            )


def checked_config(config: LSGAlbertConfig, is_encoder_decoder: bool) -> LSGAlbertConfig:
    """The configuration itself if it fits an encoder-decoder model (or an encoder), or else a copy that fits.

    So every class can load every checkpoint, no matter which class saved it. All fields are checked again, because
    they may have been set since the configuration was created.

    Raises:
        ValueError: a field has an impossible value, or the configuration belongs to another model.
    """
    if not hasattr(config, "check_fields"):
        raise ValueError(
            f"`config` must be an `LSGAlbertConfig`, got {type(config).__name__}: use "
            "`AutoConfig.from_pretrained(..., trust_remote_code=True)`, or `LSGAlbertConfig.from_dict(config.to_dict())` "
            "for a new model of ALBERT's sizes. `lsg-albert convert` makes an LSG-ALBERT from a trained ALBERT."
        )
    config.check_fields()
    check_attn_implementation(config._attn_implementation)
    start_token_id = config.decoder_start_token_id
    if is_encoder_decoder and start_token_id is None:
        start_token_id = config.bos_token_id
    if (config.is_encoder_decoder, config.decoder_start_token_id) == (is_encoder_decoder, start_token_id):
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder, config.decoder_start_token_id = is_encoder_decoder, start_token_id
    return config


def check_attn_implementation(name: str | None) -> None:
    """Refuse an attention implementation that LSG attention does not have; None leaves the choice to transformers.

    Raises:
        ValueError: `name` is neither None nor one of `ATTN_IMPLEMENTATIONS`.
    """
    if name is not None and name not in ATTN_IMPLEMENTATIONS:
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported by LSG attention. Use "sdpa" (the default, '
            'torch.nn.functional.scaled_dot_product_attention), "eager", or "flex_attention" (compiled).'
        )


def check_problem_type(name: str | None) -> None:
    """Refuse an unknown kind of loss; with None, the labels decide.

    Raises:
        ValueError: `name` is neither None nor one of `_PROBLEM_TYPES`.
    """
    if name is not None:
        _check_name("problem_type", name, _PROBLEM_TYPES)


def _check_name(field: str, value: Any, known: tuple[str, ...]) -> None:
    if value in known:
        return
    nearest = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.0)[0]
    raise ValueError(f"`{field}` {value!r} is unknown: did you mean {nearest!r}? Choose from {', '.join(known)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


LSGAlbertConfig.register_for_auto_class()
