"""The types that pass between rooms: a batch of clips and captions, and what encoders make of either.

Shape suffixes: B batch, b rows of this rank, T tokens (audio frames or words), L word pieces, D width.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


def stable_id(text: str) -> int:
    """A 63-bit id of a string: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def caption_id(caption: str) -> int:
    """Id of a caption's text: captions that read the same (letter case and spacing aside) share it."""
    return stable_id(" ".join(unicodedata.normalize("NFC", caption).casefold().split()))


FULL_SCALE = 1 / 32768  # of 16-bit samples, a power of two: scaling by it is exact


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one global batch.

    waveform:       [b, samples] float32 at the audio encoder's rate, zeros after each clip's end. On its way to a GPU
                    int16 where every clip is stored so: half of the bytes to read and move, and `to` scales them.
    lengths:        [b] int64, samples of each clip.
    input_ids, attention_mask: [b, L] int64.
    clip_ids, caption_ids: [b] int64, stable over processes and runs; rows that agree in either are positives.
    caption_index:  [b] int64, which of the sample's captions it is.
    keys:           where each row came from, "corpus/shard/key", for audits and error reports.
    dropped:        unreadable samples by reason; each row they left holds a copy of a good one.
    """

    waveform: Tensor
    lengths: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    clip_ids: Tensor
    caption_ids: Tensor
    caption_index: Tensor
    keys: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def ids(self) -> Tensor:
        """[b, 2] int64 (clip, caption text): the columns that decide which pairs are positives."""
        return torch.stack([self.clip_ids, self.caption_ids], 1)

    def to(self, device: torch.device) -> Batch:
        """On `device`, the waveform as float32, but for `lengths`: the host cuts waveforms by them and would wait for
        the device."""
        moved = self._map(lambda x: x.to(device, non_blocking=True))
        waveform = moved.waveform
        if waveform.dtype == torch.int16:
            waveform = torch.mul(waveform, FULL_SCALE, out=torch.empty_like(waveform, dtype=torch.float32))
        return replace(moved, waveform=waveform, lengths=self.lengths)

    def take(self, rows: Tensor) -> Batch:
        """Copies of the rows `rows` (int64); pinned memory stays pinned."""

        def chosen(x: Tensor) -> Tensor:
            out = torch.empty(len(rows), *x.shape[1:], dtype=x.dtype, device=x.device, pin_memory=x.is_pinned())
            return torch.index_select(x, 0, rows, out=out)

        return replace(self._map(chosen), keys=[self.keys[row] for row in rows.tolist()] if self.keys else [])

    def pin_memory(self) -> Batch:
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: change(value) for name, value in tensors.items()}
        return replace(self, **changed)


class TokenSequence(NamedTuple):
    """A batch of encoded clips or captions.

    A tuple, so that DeepSpeed finds the tensors in it: parameters that a module uses itself, rather than in a
    submodule, are gathered for the backward pass by a hook on what it returns.

    tokens: [B, T, D] one vector a frame or word.
    mask:   [B, T] bool, True where the token is real; special tokens of a tokenizer are masked out.
    pooled: [B, D] the encoder's own summary of the whole clip or caption.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    @staticmethod
    def unpadded(tokens: Tensor, pooled: Tensor) -> TokenSequence:
        """A batch in which every token is real."""
        return TokenSequence(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), pooled)

    def map(self, tokens: Callable[[Tensor], Tensor], pooled: Callable[[Tensor], Tensor]) -> TokenSequence:
        """The sequence with `tokens` and `pooled` passed through the given functions; the mask stays."""
        return TokenSequence(tokens(self.tokens), self.mask, pooled(self.pooled))

    def take(self, rows: Tensor) -> TokenSequence:
        """Rows `rows` (int64) of the batch."""
        return TokenSequence(self.tokens[rows], self.mask[rows], self.pooled[rows])

    def to(self, device: torch.device | str) -> TokenSequence:
        return TokenSequence(self.tokens.to(device), self.mask.to(device), self.pooled.to(device))

    @staticmethod
    def cat(parts: list[TokenSequence]) -> TokenSequence:
        """Batches joined along B; shorter token axes are padded with masked zeros."""
        length = max(part.tokens.shape[1] for part in parts)
        tokens = [torch.nn.functional.pad(p.tokens, (0, 0, 0, length - p.tokens.shape[1])) for p in parts]
        masks = [torch.nn.functional.pad(p.mask, (0, length - p.mask.shape[1])) for p in parts]
        return TokenSequence(torch.cat(tokens), torch.cat(masks), torch.cat([p.pooled for p in parts]))
