"""Text encoders of the BERT and RoBERTa families, through transformers.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.errors import UserError
from atr_scale.sections import Section, check_options

# Not the unknown token: it stands for a real word.
SPECIAL_TOKENS = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
# Settings of dropout inside the encoder, over the families.
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embedding_dropout",
    "mlp_dropout",
)  # fmt: skip


class TextEncoderOptions(Section):
    pooling: Literal["first", "mean"] = "first"
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="default: the model's own")
    attention: Literal["eager", "sdpa"] = "sdpa"
    activation_checkpointing: bool = Field(False, description="layers recomputed in the backward pass")
    compile: bool = Field(False, description="torch.compile of the layers")


class TextEncoder(nn.Module):
    """Token ids -> TokenSequence.

    tokens: the last hidden states of ALL tokens; mask: those of the caption, without special ones, so that scorers over
    tokens never see them. pooled: as options.pooling says, `first` (the first token) or `mean` (over all attended
    tokens, special ones included, as sentence encoders do).

    transformer: a transformers encoder model, dim: its width. special_ids: the tokenizer's special tokens.
    """

    special_ids: Tensor

    def __init__(self, transformer: Any, special_ids: set[int], options: TextEncoderOptions) -> None:
        super().__init__()
        self.transformer = transformer
        self.dim: int = transformer.config.hidden_size
        self.options = options
        self.register_buffer("special_ids", torch.tensor(sorted(special_ids)), persistent=False)

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """What `frozen_layers` and `layer_decay` count, lowest first, as prefixes of parameter names: the embeddings,
        then each layer. What lies outside of both goes to the embeddings (MPNet's shared position biases), a norm after
        the layers to the last of them. A model whose layers share their weights (ALBERT) counts as one."""
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

    def _stack(self) -> str | None:
        """The place of the list of layers in the transformer."""
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.transformer.config.num_hidden_layers:
                return name
        return None

    def compile_layers(self) -> None:
        """Each layer by itself: they share their code."""
        place = self._stack()
        for layer in self.transformer.get_submodule(place) if place else [self.transformer]:
            layer.compile()

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> TokenSequence:
        """input_ids int64 [B, T]; attention_mask [B, T], 1 or True if a token is real, special or not."""
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
    """No progress bar and no table of unused weights: the weights that matter are checked here."""
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


def load_transformer(place: str, options: TextEncoderOptions) -> tuple[Any, set[str]]:
    """The encoder without pooling layer, and the names of weights its files lack."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    for name in DROPOUTS:
        if options.dropout is not None and hasattr(config, name):
            setattr(config, name, options.dropout)
    settings: dict[str, Any] = {
        "config": config,
        # Fused attention is what transformers itself takes if a family has it.
        "attn_implementation": "eager" if options.attention == "eager" else None,
        "trust_remote_code": False,
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        model, report = AutoModel.from_pretrained(place, add_pooling_layer=False, **settings)
    except TypeError:
        # Families without a pooling layer (DistilBERT) do not know the argument.
        model, report = AutoModel.from_pretrained(place, **settings)
    return model, set(report["missing_keys"])


def build_text_encoder(name_or_path: str | Path, pooling: str = "first", **options: Any) -> TextEncoder:
    """The trained encoder in fp32 and evaluation mode: a folder with model and tokenizer, or a name on a model hub.

    pooling: first or mean. options: the other fields of TextEncoderOptions.
    Raises UserError, in one line, for an unknown option, and where the encoder cannot be loaded, is no text encoder,
    lacks some of its weights, or cannot do what an option asks.
    """
    # Seconds to import, and audio encoders do without it.
    from transformers import AutoTokenizer

    place = str(name_or_path)
    chosen = check_options(TextEncoderOptions, {"pooling": pooling, **options}, f"the text encoder {place}")
    if (place.startswith((".", "/", "~")) or place.count("/") > 1) and not Path(place).is_dir():
        raise UserError(f"no text encoder at '{place}': give a folder that exists, or a model's name on a hub")
    try:
        with quiet_transformers():
            transformer, missing = load_transformer(place, chosen)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"cannot load a text encoder from '{place}' ({reason}): give a folder with config.json, weights and"
            " tokenizer files, or a model's name where a hub can be reached"
        ) from None
    config = transformer.config
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise UserError(f"'{place}' is a {config.model_type} model: give an encoder such as BERT or RoBERTa")
    if missing:
        raise UserError(
            f"the weights in '{place}' lack '{min(missing)}' of a {config.model_type} model:"
            " give the folder the whole model was saved to"
        )
    special_ids = {getattr(tokenizer, name) for name in SPECIAL_TOKENS} - {None}
    encoder = TextEncoder(transformer, special_ids, chosen).eval()
    if chosen.activation_checkpointing:
        if not transformer.supports_gradient_checkpointing:
            raise UserError(f"a {config.model_type} model has no activation_checkpointing: leave it at false")
        transformer.activation_checkpointing_enable({"use_reentrant": False})
        # It would carry the backward pass through frozen layers too.
        transformer.disable_input_require_grads()
    if chosen.compile:
        encoder.compile_layers()
    return encoder
