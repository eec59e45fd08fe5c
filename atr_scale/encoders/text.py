"""Text encoders of the BERT and RoBERTa families, through transformers.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from atr_scale.errors import UserError
from atr_scale.sequence import TokenSequence

Pooling = Literal["first", "mean"]
# Not the unknown token: it stands for a real word.
SPECIAL_TOKENS = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")


class TextEncoder(nn.Module):
    """Token ids -> TokenSequence.

    transformer: a transformers encoder model, dim: its width.
    special_ids: the tokenizer's special tokens, which scorers never see.
    pooling: first (the first token) or mean (over all attended tokens, special ones included, as sentence encoders do).
    """

    special_ids: Tensor

    def __init__(self, transformer: nn.Module, dim: int, special_ids: set[int], pooling: Pooling) -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.dim = dim
        self.register_buffer("special_ids", torch.tensor(sorted(special_ids)), persistent=False)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> TokenSequence:
        """input_ids int64 [B, T]; attention_mask [B, T], 1 or True where a token is real, special or not."""
        hidden_BTD = self.transformer(input_ids=input_ids_BT, attention_mask=attention_mask_BT).last_hidden_state
        attended_BT = attention_mask_BT.bool()
        if self.pooling == "first":
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


def load_transformer(place: str) -> tuple[Any, set[str]]:
    """The encoder without pooling layer, and the names of weights its files lack."""
    from transformers import AutoModel

    options: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = AutoModel.from_pretrained(place, add_pooling_layer=False, **options)
    except TypeError:
        # Families without a pooling layer (DistilBERT) do not know the argument.
        model, report = AutoModel.from_pretrained(place, **options)
    return model, set(report["missing_keys"])


def build_text_encoder(name_or_path: str | Path, pooling: Pooling = "first") -> TextEncoder:
    """The trained encoder in fp32 and evaluation mode: a folder with model and tokenizer, or a name on a model hub.

    Raises UserError, in one line, where it cannot be loaded, is no text encoder, or lacks some of its weights.
    """
    # Seconds to import, and audio encoders do without it.
    from transformers import AutoTokenizer

    if pooling not in get_args(Pooling):
        raise UserError(f"unknown text pooling '{pooling}'; choose first or mean")
    place = str(name_or_path)
    if (place.startswith((".", "/", "~")) or place.count("/") > 1) and not Path(place).is_dir():
        raise UserError(f"no text encoder at '{place}': give a folder that exists, or a model's name on a hub")
    try:
        with quiet_transformers():
            transformer, missing = load_transformer(place)
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
    return TextEncoder(transformer, config.hidden_size, special_ids, pooling).eval()
