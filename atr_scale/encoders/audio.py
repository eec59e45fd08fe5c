"""What all audio encoders share.

Shape suffixes: B batch, S samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from atr_scale.encoders.batch_norm import BatchNormMode, use_stored_statistics
from atr_scale.encoders.buckets import encode_in_buckets
from atr_scale.sequence import TokenSequence


class AudioEncoder(nn.Module, ABC):
    """Waveform -> TokenSequence; a clip's result never depends on its batch mates (batch_norm frozen).

    sample_rate: Hz of the waveform. dim: width of tokens and of pooled.
    batch_norm: frozen (stored statistics also in training mode) or local.
    equal_rounds: see `encode_in_buckets`; needed where parameters are sharded over ranks.
    """

    sample_rate: int
    dim: int
    batch_norm: BatchNormMode = "frozen"
    equal_rounds: Callable[[int], int] | None = None

    @abstractmethod
    def encode(self, waveform_BS: Tensor) -> TokenSequence:
        """Clips of one length."""

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor | None = None) -> TokenSequence:
        """waveform float32 [B, S]; lengths int64 [B] in samples, None where every clip fills the width."""
        return encode_in_buckets(self.encode, waveform_BS, lengths_B, self.equal_rounds)

    def train(self, mode: bool = True) -> AudioEncoder:
        super().train(mode)
        if self.batch_norm == "frozen":
            use_stored_statistics(self)
        return self
