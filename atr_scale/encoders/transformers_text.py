"""Text encoders of the BERT and RoBERTa families, through transformers.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.compat import enable_gradient_checkpointing
from atr_scale.encoders.hub import must_use_cache
from atr_scale.encoders.text import TextEncoder, TextEncoderOptions
from atr_scale.errors import UserError, one_line

# The unknown token is not among them: it stands for a real word.
SPECIAL_TOKEN_IDS = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
FUSED = "sdpa_without_waiting"  # our name for fused attention among those of transformers
# Names of the dropout settings inside the encoder, over all families.
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embedding_dropout",
    "mlp_dropout",
)  # fmt: skip


class TransformersTextEncoder(TextEncoder):
    """An encoder model of transformers with its tokenizer.

    tokens: the last hidden states of all tokens. mask: True for the tokens of the caption, without special tokens.
    pooled: the first token, or the mean over all tokens that are not padding. Like in sentence encoders the mean
    includes special tokens.

    transformer: the model without a pooling layer. tokenizer: None for a model that is only measured; then no token is
    special.
    """

    tokenizer: Any
    special_ids: Tensor
    common_options = frozenset(TextEncoderOptions.model_fields)

    def __init__(self, transformer: Any, tokenizer: Any, options: TextEncoderOptions) -> None:
        super().__init__()
        _let_the_host_go_on(transformer)
        if tokenizer is not None and tokenizer.pad_token is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no padding token: add pad_token to its "
                "tokenizer_config.json"
            )
        self.transformer, self.tokenizer = transformer, tokenizer
        self.dim = transformer.config.hidden_size
        self.options = options
        if tokenizer is not None:  # files of a tokenizer may state no limit, or a larger one than the model's
            tokenizer.split_special_tokens = True  # "[SEP]" in a caption is text
            tokenizer.model_max_length = min(tokenizer.model_max_length, self._positions())
        special_ids = {getattr(tokenizer, name, None) for name in SPECIAL_TOKEN_IDS} - {None}
        self.register_buffer("special_ids", torch.tensor(sorted(special_ids)), persistent=False)

    @classmethod
    def build(cls, name: str, options: TextEncoderOptions) -> TransformersTextEncoder:
        """Load the pretrained encoder in fp32 from a folder with model and tokenizer, or by its name on a model hub."""
        # The import takes seconds, and most audio encoders do not need it.
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
            raise UserError(f"no text encoder at '{name}': give a folder that exists, or a model's name on a hub")
        source: dict[str, Any] = {"trust_remote_code": False, "local_files_only": must_use_cache(name)}
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(name, **source)
                transformer, report = _without_pooling(
                    AutoModel.from_pretrained,
                    name,
                    config=_with_dropout(config, options),
                    output_loading_info=True,
                    **_settings(options),
                    **source,
                )
                tokenizer = AutoTokenizer.from_pretrained(name, **source)
        except Exception as error:
            raise UserError(
                f"cannot load a text encoder from '{name}' ({one_line(error)}): give a folder with config.json, weights"
                " and tokenizer files, or the name of a model on a hub that can be reached"
            ) from None
        _check_is_encoder(transformer.config, name)
        _check_encodes_text(transformer, name)
        if report["missing_keys"]:
            raise UserError(
                f"the weights in '{name}' lack '{min(report['missing_keys'])}' of a {transformer.config.model_type}"
                " model: give the folder the whole model was saved to"
            )
        return cls(transformer, tokenizer, options)

    def save_files(self, folder: Path) -> None:
        """Write config.json and the files of the tokenizer."""
        self.transformer.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, options: TextEncoderOptions) -> TransformersTextEncoder:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.initialization import no_init_weights

        source: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(folder, **source)
                with no_init_weights():  # the caller overwrites them
                    transformer = untrained(config, options)
                tokenizer = AutoTokenizer.from_pretrained(folder, **source)
        except Exception as error:
            raise UserError(
                f"{folder} does not hold a text encoder's config.json and tokenizer files ({one_line(error)}): "
                "copy it again whole, or give another checkpoint"
            ) from None
        _check_is_encoder(config, str(folder))
        return cls(transformer, tokenizer, options)

    def configure(self, options: TextEncoderOptions, name: str) -> None:
        super().configure(options, name)
        if options.activation_checkpointing:
            if not self.transformer.supports_gradient_checkpointing:
                family = self.transformer.config.model_type
                raise UserError(f"a {family} model has no activation_checkpointing: leave it at false")
            enable_gradient_checkpointing(self.transformer)
            # Otherwise the backward pass would run through frozen layers too.
            self.transformer.disable_input_require_grads()
        if options.compile:
            # Layers that are compiled one by one share their code.
            place = self._stack()
            for layer in self.transformer.get_submodule(place) if place else [self.transformer]:
                layer.compile()

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """The embeddings, then each layer.

        Parameters outside of both (the shared position biases of MPNet) belong to the embeddings, and a norm after the
        layers belongs to the last layer. A model whose layers share their weights (ALBERT) counts as one layer.
        """
        place = self._stack()
        if place is None:
            return [("transformer.",)]
        start = f"transformer.{place}."
        layers = [[f"{start}{i}."] for i in range(len(self.transformer.get_submodule(place)))]
        embeddings, passed = [], False
        for name, _ in self.named_parameters():
            if name.startswith(start):
                passed = True
            elif passed and "norm" in name.lower():
                layers[-1].append(name)
            else:
                embeddings.append(name)
        return [tuple(embeddings), *map(tuple, layers)]

    def _positions(self) -> float:
        """Number of tokens that the model has positions for; infinity if it states none."""
        for name, module in self.transformer.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                # In the RoBERTa family positions start behind that of padding.
                unused = 0 if module.padding_idx is None else module.padding_idx + 1
                return module.num_embeddings - unused
        limit: float = getattr(self.transformer.config, "max_position_embeddings", math.inf)
        return limit

    def _stack(self) -> str | None:
        """Name of the module list of the layers in the transformer, None if the layers share their weights."""
        name: str
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.transformer.config.num_hidden_layers:
                return name
        return None

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> TokenSequence:
        hidden_BTD = self.transformer(input_ids=input_ids_BT, attention_mask=attention_mask_BT).last_hidden_state
        attended_BT = attention_mask_BT.bool()
        if self.options.pooling == "first":
            pooled_BD = hidden_BTD[:, 0]
        else:
            weights_BT1 = attended_BT.unsqueeze(-1).to(hidden_BTD.dtype)
            pooled_BD = (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
        return TokenSequence(hidden_BTD, attended_BT & ~torch.isin(input_ids_BT, self.special_ids), pooled_BD)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Show no progress bar and no table of unused weights. Missing weights are checked in this module."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def untrained(config: Any, options: TextEncoderOptions) -> Any:
    """Build the model of a transformers configuration without pooling layer, with random weights in fp32."""
    from transformers import AutoModel

    settings = _settings(options)
    return _without_pooling(AutoModel.from_config, _with_dropout(config, options), trust_remote_code=False, **settings)


def _mask_without_waiting(*given: Any, **named: Any) -> Tensor | None:
    """The mask of fused attention, also where no token is padding: on a GPU the host would wait to know that."""
    from transformers.masking_utils import sdpa_mask

    padding = named.get("attention_mask")
    if padding is not None and padding.is_cuda:
        named["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*given, **named)


def _let_the_host_go_on(transformer: Any) -> None:
    """Replace fused attention by one that is the same, except that the host does not wait for the values of a mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if transformer.config._attn_implementation == "sdpa":
        AttentionInterface.register(FUSED, AttentionInterface()["sdpa"])
        AttentionMaskInterface.register(FUSED, _mask_without_waiting)
        transformer.set_attn_implementation(FUSED)


def _without_pooling(build: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    try:
        return build(*arguments, add_pooling_layer=False, **settings)
    except TypeError:
        # Families without a pooling layer (DistilBERT) do not take the argument.
        return build(*arguments, **settings)


def _with_dropout(config: Any, options: TextEncoderOptions) -> Any:
    for name in DROPOUTS:
        if options.dropout is not None and hasattr(config, name):
            setattr(config, name, options.dropout)
    return config


def _settings(options: TextEncoderOptions) -> dict[str, Any]:
    # By default transformers uses fused attention for every family that supports it.
    attention = {"attn_implementation": "eager"} if options.attention == "eager" else {}
    return {"dtype": torch.float32, **attention}


def _check_encodes_text(transformer: Any, place: str) -> None:
    """Raises UserError for a model that needs more than tokens, such as one of audio and text, or a decoder's input."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    try:
        with torch.no_grad():
            transformer(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state  # noqa: B018
    except Exception as error:  # each family has its own
        raise UserError(
            f"'{place}' is a {transformer.config.model_type} model, which does not encode text by itself "
            f"({one_line(error, 80)}): give an encoder such as BERT or RoBERTa"
        ) from None


def _check_is_encoder(config: Any, place: str) -> None:
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise UserError(f"'{place}' is a {config.model_type} model: give an encoder such as BERT or RoBERTa")
