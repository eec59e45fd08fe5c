"""Sentence embeddings of unit length, from a text encoder with mean pooling.

Shape suffixes: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atr_scale.encoders.text_encoders import build_text_encoder

MAX_TOKENS = 128


class SentenceEncoder:
    """`encoder(texts)` gives embeddings float32 [N, D] of unit length. It runs on a GPU if there is one.

    name: a transformers folder or the name of a model on a hub. Raises UserError like `build_text_encoder`.
    """

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder = build_text_encoder(name, pooling="mean").to(self.device)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        tokens = self._encoder.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        ids, mask = (tokens[key].to(self.device) for key in ("input_ids", "attention_mask"))
        pooled_ND = self._encoder(ids, mask).pooled
        return torch.nn.functional.normalize(pooled_ND.float(), dim=-1).cpu()
