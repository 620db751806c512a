"""LSG-ALBERT: the ALBERT encoder and its heads with local + sparse + global attention.

All public classes are defined here, because a saved model carries the files that its own module imports. The parts of
these classes are in the `lsg_*.py` files. From transformers, only the public API is used.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

# Releases before 5.1 save with a model only the files that this file imports directly, so this file imports them all.
from .configuration_lsg_albert import LSGAlbertConfig, check_attn_implementation, checked_config
from .lsg_compat import cached
from .lsg_cpu import ChunkedAttention  # noqa: F401
from .lsg_decoder import LSGAlbertDecoder, shift_right
from .lsg_encoder import LSGAlbertEmbeddings, LSGAlbertEncoder
from .lsg_flex import flex_attention_of_blocks  # noqa: F401
from .lsg_functional import lsg_attention  # noqa: F401
from .lsg_gather import key_windows  # noqa: F401
from .lsg_inputs import (
    Inputs,
    check_encoder_inputs,
    find_texts,
    flatten_choices,
    one_row,
    refuse_marks_of_texts,
    without_rows,
)
from .lsg_mlm import LSGAlbertMLMHead, LSGAlbertSOPHead, WithMLMHead, classifier_dropout
from .lsg_outputs import (
    LSGAlbertForPreTrainingOutput,
    LSGAlbertModelOutput,
    order_loss,
    select_states,
    span_loss,
    text_loss,
    token_loss,
    wants_states,
)
from .lsg_padding import BlockList  # noqa: F401
from .lsg_pattern import LSGPattern  # noqa: F401
from .lsg_seq2seq import (
    as_model_output,
    check_decoder_inputs,
    chosen_cache,
    decoding_step,
    default_decoder_text,
    encoder_keys,
    fill_in_token_ids,
    returns_cache,
)
from .lsg_softmax import ATTENTION_FUNCTIONS  # noqa: F401
from .lsg_sparsity import select_sparse_tokens  # noqa: F401
from .lsg_tracing import is_traced


class LSGAlbertPreTrainedModel(PreTrainedModel):
    """What all LSG-ALBERT models share: the configuration, loading and saving, initialization."""

    config_class = LSGAlbertConfig
    base_model_prefix = "albert"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["LSGAlbertLayer"]  # for `device_map="auto"`
    _supports_param_buffer_assignment = False  # transformers 4.4x would untie the two names of the decoder's bias
    # A checkpoint may hold a pooler or a decoder that the model lacks. Old ones also hold the buffer of position ids.
    _keys_to_ignore_on_load_unexpected = [r"pooler\.", r"embeddings\.position_ids", r"decoder\.cross_attentions\."]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch.distributed."):
            # FSDP's `fully_shard` makes a subclass of the model's class. `save_pretrained` would write the
            # subclass's name into the config, and copy PyTorch's files as its code.
            model_class = cls.__bases__[-1]
            cls.__module__, cls.__name__ = model_class.__module__, model_class.__name__

    def __init__(self, config: LSGAlbertConfig, is_encoder_decoder: bool = False):
        super().__init__(checked_config(config, is_encoder_decoder))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Refused here, because a `forward` with `**kwargs` would have to use or refuse all other names too.
        refuse_marks_of_texts(kwargs)
        return super().__call__(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs: Any) -> None:
        """Switch between "sdpa", "eager" and "flex_attention" at run time.

        Raises:
            ValueError: LSG attention has no such implementation.
        """
        if isinstance(attn_implementation, dict):
            attn_implementation = attn_implementation.get("", self.config._attn_implementation)
        check_attn_implementation(attn_implementation)
        self.config._attn_implementation = attn_implementation

    @classmethod
    def _autoset_attn_implementation(
        cls, config: LSGAlbertConfig, use_flash_attention_2: bool = False, **kwargs: Any
    ) -> LSGAlbertConfig:
        # Of the tested releases, only 4.44 and 4.48 call this. Their error for flash attention points to the authors.
        check_attn_implementation("flash_attention_2" if use_flash_attention_2 else config._attn_implementation)
        if config._attn_implementation == "flex_attention":  # 4.44 does not know it
            return config
        return super()._autoset_attn_implementation(config, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        # Use only torch.nn.init: transformers 5 replaces its functions with ones that leave loaded parameters alone.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, LSGAlbertMLMHead):
            nn.init.zeros_(module.bias)
        if isinstance(module, LSGAlbertEncoder):
            module.reset_projections()


class LSGAlbertModel(LSGAlbertPreTrainedModel):
    """
    The bare encoder.

    Args:
        config ([`LSGAlbertConfig`]):
            Sizes and attention pattern.
        add_pooling_layer (`bool`, *optional*, defaults to `True`):
            Whether `pooler_output` is computed.
        is_encoder_decoder (`bool`, *optional*, defaults to `False`):
            Whether this is part of an encoder-decoder model. Both then share one configuration.
        takes_packed (`bool`, *optional*, defaults to `True`):
            Whether a row may hold several texts. False under a head that gives one answer for each row.
        reads_padding (`bool`, *optional*, defaults to `False`):
            Whether a head uses the outputs of padding. Blocks of padding are then not left out.
    """

    def __init__(
        self,
        config: LSGAlbertConfig,
        add_pooling_layer: bool = True,
        is_encoder_decoder: bool = False,
        takes_packed: bool = True,
        reads_padding: bool = False,
    ):
        super().__init__(config, is_encoder_decoder)
        self.takes_packed = takes_packed and not is_encoder_decoder
        self.embeddings = LSGAlbertEmbeddings(self.config)
        self.encoder = LSGAlbertEncoder(self.config, reads_padding)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | LSGAlbertModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids. Give exactly one of `input_ids` and `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 or `True` for real tokens, 0 or `False` for padding, which may be anywhere.
            token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token types, 0 by default.
            position_ids (`torch.LongTensor` of shape `(batch_size or 1, sequence_length)`, *optional*):
                Positions below `max_position_embeddings`, 0 to `sequence_length - 1` by default. If all of them count
                up by one, but begin again within a row, the row holds several texts. Each text then has its own global
                tokens and gets the same outputs as alone. `pooler_output` and `global_hidden_states` have a row for
                each text.
            head_mask:
                Not supported. The argument exists for callers that pass `None` by position.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, embedding_size)`, *optional*):
                Embeddings in place of `input_ids`.
            output_attentions (`bool`, *optional*):
                Whether to return the effective attention maps. Their size is quadratic in the length.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return the states before and after each layer. Indices select some of them; the others are
                then `None`.
            return_dict (`bool`, *optional*):
                Whether to return a [`LSGAlbertModelOutput`] or a plain tuple.

        Raises:
            ValueError: an input is missing, given twice, too long or not supported, or has a wrong shape; or a row
                holds several texts under a head that gives one answer for each row.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if head_mask is not None:
            raise ValueError("`head_mask` is not supported by LSG attention: leave it out.")
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        texts = find_texts(position_ids, input_ids if inputs_embeds is None else inputs_embeds, attention_mask)
        if texts is not None and (output_attentions or not self.takes_packed):
            raise ValueError(
                "`position_ids` begin again within a row, so the row holds several texts. There are no "
                f"{'attention maps' if output_attentions else 'outputs of the head of this model'} for such rows. "
                "Give each text its own row, with padding, and leave `position_ids` out."
            )
        if texts is not None:
            inputs = texts.unpack_inputs(inputs)
        batch_size, _ = check_encoder_inputs(self.config, inputs)
        if inputs["input_ids"] is not None:
            self.warn_if_padding_and_no_attention_mask(inputs["input_ids"], inputs["attention_mask"])
        if batch_size == 0 and not is_traced():
            output = without_rows(self._encode(one_row(inputs), **wanted))
        else:
            output = self._encode(inputs, **wanted)
        if texts is not None:
            output = texts.pack_output(output)
        return output if return_dict else output.to_tuple()

    def _encode(
        self, inputs: Inputs, output_attentions: bool, output_hidden_states: bool | int | list[int] | None
    ) -> LSGAlbertModelOutput:
        """The output for a batch of at least one row. Each row is one text; the inputs have been checked."""
        given = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        batch_size, length = given.shape[:2]
        # By name: tools that hook layers expect all positional arguments to be tensors.
        embeddings = self.embeddings(**{name: x for name, x in inputs.items() if name != "attention_mask"})
        attention_mask = inputs["attention_mask"]
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, length, dtype=torch.bool, device=embeddings.device)
        visible = attention_mask.to(embeddings.device, torch.bool)
        if self.config.mask_first_token:
            visible = visible & (torch.arange(length, device=visible.device) > 0)
        states, text_states, attention_maps = self.encoder(
            embeddings, visible, output_attentions, wants_states(output_hidden_states)
        )
        global_states, last_state = states.tensor_split([self.encoder.pattern.num_global_tokens], dim=1)
        if self.config.pool_with_global:
            is_first = torch.arange(length, device=last_state.device)[:, None] == 0
            last_state = torch.where(is_first, global_states[:, :1], last_state)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(last_state[:, 0]))
        return LSGAlbertModelOutput(
            last_hidden_state=last_state,
            pooler_output=pooled,
            hidden_states=select_states([*text_states, last_state], output_hidden_states),
            attentions=tuple(attention_maps) if output_attentions else None,
            global_hidden_states=global_states,
        )


class LSGAlbertForPreTraining(WithMLMHead, LSGAlbertPreTrainedModel):
    """Masked-language-model and sentence-order heads, as in ALBERT's pre-training."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.albert = LSGAlbertModel(self.config, takes_packed=False)
        self.predictions = LSGAlbertMLMHead(config)
        self.sop_classifier = LSGAlbertSOPHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        sentence_order_label: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple | LSGAlbertForPreTrainingOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids of the masked tokens, -100 elsewhere.
            sentence_order_label (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                0 for the original order, 1 for the switched one. The loss needs both labels.
            num_items_in_batch (`int`, `float` or `torch.Tensor`, *optional*):
                Divisor of the sum of the losses: the labels in all batches of a step, as `Trainer` counts them.
                `Trainer` does not count texts, so the order of a text is then weighted by the number of its masked
                tokens. Then the loss does not depend on how a step is cut into batches.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        prediction_logits = self.predictions(outputs.last_hidden_state)
        sop_logits = self.sop_classifier(outputs.pooler_output)
        loss = None
        if labels is not None and sentence_order_label is not None:
            loss = token_loss(prediction_logits, labels, num_items_in_batch)
            loss = loss + order_loss(sop_logits, sentence_order_label, labels, num_items_in_batch)
        output = LSGAlbertForPreTrainingOutput(
            loss, prediction_logits, sop_logits, outputs.hidden_states, outputs.attentions
        )
        return output if return_dict else output.to_tuple()


class LSGAlbertForMaskedLM(WithMLMHead, LSGAlbertPreTrainedModel):
    """Masked-language-model head."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.albert = LSGAlbertModel(self.config, add_pooling_layer=False)
        self.predictions = LSGAlbertMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple | MaskedLMOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids of the masked tokens, -100 elsewhere.
            num_items_in_batch (`int`, `float` or `torch.Tensor`, *optional*):
                Divisor of the sum of the losses: the labels in all batches of a step, as `Trainer` counts them.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.predictions(outputs.last_hidden_state)
        loss = None if labels is None else token_loss(logits, labels, num_items_in_batch)
        output = MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict else output.to_tuple()


class LSGAlbertForConditionalGeneration(WithMLMHead, LSGAlbertPreTrainedModel, GenerationMixin):
    """
    A sequence-to-sequence model. Its decoder uses the encoder's embeddings and layers again, with causal
    self-attention and a cross-attention in each layer, see [`LSGAlbertDecoder`]. Its head is that of the masked
    language model. Any checkpoint of an ALBERT or LSG-ALBERT holds all weights except those of the cross-attention,
    which starts as a copy of the self-attention, except for its normalization.
    """

    _supports_cache_class = True  # read by transformers 4.4x

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config, is_encoder_decoder=True)
        # The decoder comes first: otherwise `device_map="auto"` takes it for `predictions.decoder`, and does not find
        # the weights that `predictions.decoder` is tied to.
        self.decoder = LSGAlbertDecoder(self.config)
        self.albert = LSGAlbertModel(self.config, add_pooling_layer=False, is_encoder_decoder=True)
        self.predictions = LSGAlbertMLMHead(self.config)
        self.post_init()
        self.decoder.copy_self_attentions(self.albert.encoder.albert_layer_groups)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`, but this also fills in what an encoder's checkpoint lacks.

        Missing cross-attentions become copies of the self-attentions, with a normalization that hardly changes a state.
        `generation_config` gets missing ids from the config and, with an encoder's checkpoint, `use_cache`: the value in
        an encoder's files is ignored.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = {name.removeprefix("decoder.") for name in info["missing_keys"]}
        model.decoder.copy_self_attentions(model.albert.encoder.albert_layer_groups, missing)
        fill_in_token_ids(model.generation_config, model.config)
        is_encoders = any(name.startswith("cross_attentions.") for name in missing)
        if is_encoders and kwargs.get("generation_config") is None:
            model.generation_config.use_cache = model.config.use_cache
        return (model, info) if output_loading_info else model

    def get_encoder(self, *args: Any, **kwargs: Any) -> LSGAlbertModel:
        return self.albert

    def get_decoder(self) -> LSGAlbertDecoder:
        return self.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels (batch, length), with -100 for no label -> the decoder's inputs (batch, length)."""
        return shift_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The arguments of `forward` for one step of `generate`, see `decoding_step`."""
        return decoding_step(input_ids, kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        cache: Any = None,
    ) -> tuple | Seq2SeqLMOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds, token_type_ids, position_ids (*optional*):
                The encoder's inputs, as in [`LSGAlbertModel`].
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                The decoder's tokens, after those in `cache`. The default is `labels`, or else `input_ids`, moved one
                place to the right after `decoder_start_token_id`.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, past_length + target_length)`, *optional*):
                1 for real tokens of the decoder, 0 for padding, which may be on either side.
            encoder_outputs (`LSGAlbertModelOutput` or `tuple`, *optional*):
                The encoder's outputs, in place of its inputs. `attention_mask` still marks the padding.
            cache, past_key_values (`EncoderDecoderCache`, *optional*):
                Keys and values of the earlier tokens, as returned by the previous call; both names mean the same. If
                they include the encoder's keys and values, neither the encoder's inputs nor its outputs are needed.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, embedding_size)`, *optional*):
                Embeddings in place of `decoder_input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Ids that the decoder should predict, with -100 for no label.
            num_items_in_batch (`int`, `float` or `torch.Tensor`, *optional*):
                Divisor of the sum of the losses: the labels in all batches of a step, as `Trainer` counts them.
            use_cache (`bool`, *optional*):
                Whether to return the cache: as `cache` from transformers 5.24 on, and as `past_key_values` before. It
                is never returned with labels, or in training with gradient checkpointing.
            output_attentions, output_hidden_states, return_dict (*optional*):
                As in [`LSGAlbertModel`], for both encoder and decoder. With `pass_global_tokens_to_decoder`, the maps
                of cross-attention begin with a column for each global token.

        Raises:
            ValueError: an input is missing, given twice, too long or not supported, or has a wrong shape.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        use_cache = returns_cache(self, use_cache, labels)
        cache = chosen_cache(cache, past_key_values, use_cache)
        cached_states = None if cache is None else cached(cache.cross_attention_cache, 0)
        past_length = 0 if cache is None else cache.self_attention_cache.get_seq_length()

        if encoder_outputs is not None:
            encoder_outputs = as_model_output(encoder_outputs)
        elif cached_states is None:
            encoder_outputs = self.albert(
                input_ids, attention_mask, token_type_ids, position_ids, None, inputs_embeds,
                output_attentions, output_hidden_states, return_dict=True,
            )  # fmt: skip
        encoder_states, encoder_visible = encoder_keys(self.config, encoder_outputs, cached_states, attention_mask)

        if decoder_input_ids is None and decoder_inputs_embeds is None:
            text = default_decoder_text(input_ids, labels, past_length)
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(text)
        check_decoder_inputs(
            self.config, decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, labels,
            batch_size=len(encoder_visible), past_length=past_length,
        )  # fmt: skip
        visible = decoder_attention_mask
        if visible is not None:
            visible = visible.to(encoder_visible.device, torch.bool)
        states, all_states, self_maps, cross_maps = self.decoder(
            self.albert, decoder_input_ids, decoder_inputs_embeds, visible, encoder_states, encoder_visible,
            cache, output_attentions, wants_states(output_hidden_states),
        )  # fmt: skip
        logits = self.predictions(states)
        encoder_outputs = encoder_outputs or LSGAlbertModelOutput()
        output = Seq2SeqLMOutput(
            None if labels is None else token_loss(logits, labels, num_items_in_batch),
            logits,
            cache if use_cache else None,  # by position: its name differs between releases
            decoder_hidden_states=select_states([*all_states, states], output_hidden_states),
            decoder_attentions=tuple(self_maps) if output_attentions else None,
            cross_attentions=tuple(cross_maps) if output_attentions else None,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
        )
        return output if return_dict else output.to_tuple()


class LSGAlbertForSequenceClassification(LSGAlbertPreTrainedModel):
    """Classification or regression of whole documents."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = LSGAlbertModel(self.config, takes_packed=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | SequenceClassifierOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
                Class indices; or a float matrix of 0 and 1 for several classes at once; or, with one label, the values
                of a regression. If `config.problem_type` is set, it decides which of these the labels are.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else text_loss(logits, labels, self.config.problem_type)
        output = SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict else output.to_tuple()


class LSGAlbertForTokenClassification(LSGAlbertPreTrainedModel):
    """A classifier of every token."""

    accepts_loss_kwargs = True  # `Trainer` passes `num_items_in_batch`

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = LSGAlbertModel(self.config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple | TokenClassifierOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The tokens' classes, with -100 for no label.
            num_items_in_batch (`int`, `float` or `torch.Tensor`, *optional*):
                Divisor of the sum of the losses: the labels in all batches of a step, as `Trainer` counts them.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else token_loss(logits, labels, num_items_in_batch)
        output = TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict else output.to_tuple()


class LSGAlbertForQuestionAnswering(LSGAlbertPreTrainedModel):
    """Scores of every token as the start and as the end of an answer."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        # The loss is a softmax over all tokens, padding included.
        self.albert = LSGAlbertModel(self.config, add_pooling_layer=False, takes_packed=False, reads_padding=True)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | QuestionAnsweringModelOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], and:

        Args:
            start_positions, end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The answer's first and last token. Positions past the end of the input are left out of the loss.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start_logits, start_positions) + span_loss(end_logits, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss, start_logits.contiguous(), end_logits.contiguous(), outputs.hidden_states, outputs.attentions
        )
        return output if return_dict else output.to_tuple()


class LSGAlbertForMultipleChoice(LSGAlbertPreTrainedModel):
    """Scores of several texts, one of which is the right choice."""

    def __init__(self, config: LSGAlbertConfig):
        super().__init__(config)
        self.albert = LSGAlbertModel(self.config, takes_packed=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> tuple | MultipleChoiceModelOutput:
        r"""
        Inputs as in [`LSGAlbertModel`], but each of shape `(batch_size, num_choices, sequence_length)`, and
        `inputs_embeds` of shape `(batch_size, num_choices, sequence_length, embedding_size)`; and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The index of the right choice.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        num_choices, *inputs = flatten_choices(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = inputs
        outputs = self.albert(
            input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, num_choices)
        loss = None if labels is None else token_loss(logits, labels)
        output = MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict else output.to_tuple()


# A saved model carries its own code, and its config says where each Auto class finds its model.
LSGAlbertModel.register_for_auto_class("AutoModel")
LSGAlbertForPreTraining.register_for_auto_class("AutoModelForPreTraining")
LSGAlbertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
LSGAlbertForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
LSGAlbertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LSGAlbertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
LSGAlbertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
LSGAlbertForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")
