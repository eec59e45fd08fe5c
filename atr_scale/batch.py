"""The types that pass between packages: a batch of clips and captions, and the token sequences of the encoders.

Shape suffixes: B batch, b rows of this rank, T tokens (of a caption, or frames of a clip), L tokens of a padded
caption, D width.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor


def stable_id(text: str) -> int:
    """A 63-bit id of a string that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def caption_id(caption: str) -> int:
    """Id of the text of a caption. Captions that differ only in letter case and spacing have the same id."""
    return stable_id(" ".join(unicodedata.normalize("NFC", caption).casefold().split()))


def on_device(values: ArrayLike | Tensor, device: torch.device | str) -> Tensor:
    """Numbers that the host knows as a tensor on `device`.

    A GPU copies them from pinned memory when its turn comes, so the host does not wait for it.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


FULL_SCALE = 1 / 32768  # of 16-bit samples, a power of two: scaling by it is exact


def to_float(waveform: Tensor) -> Tensor:
    """Samples as float32; those of int16 are divided by 32768."""
    if waveform.dtype == torch.int16:
        return torch.mul(waveform, FULL_SCALE, out=torch.empty_like(waveform, dtype=torch.float32))
    return waveform.float()


class DroppedSample(NamedTuple):
    """A sample that could not be read: its place "corpus/shard/key", a snake_case reason to count by, and details."""

    place: str
    reason: str
    detail: str


def count_reasons(dropped: Iterable[DroppedSample]) -> Counter[str]:
    """Number of dropped samples by reason."""
    return Counter(sample.reason for sample in dropped)


@dataclass(frozen=True)
class Batch:
    """The local batch: the rows of a global batch that belong to one rank.

    waveform:       [b, samples] float32 at the sample rate of the audio encoder, with zeros after the end of each clip.
                    It is int16 if all clips are stored in 16 bits, to halve the bytes that are read, moved and kept;
                    `to_float` makes it float32.
    lengths:        [b] int64, number of samples of each clip.
    input_ids, attention_mask: [b, L] int64.
    clip_ids, caption_ids: [b] int64 of the clip and of the cleaned text of the caption, equal over processes and runs.
                    Rows that agree in the first, or in either of them, are positives (`objective.positives`).
    caption_index:  [b] int64, number of the caption among the captions of the sample.
    stored_ids:     [b] int64, `stable_id` of the caption as the sample stores it, before cleaning and paraphrasing. It
                    names a caption of a clip; indices may repeat, because samples of two corpora may be one clip.
    keys:           source of each row, "corpus/shard/key", for audits and error reports.
    dropped:        unreadable samples; their rows hold copies of readable ones.
    """

    waveform: Tensor
    lengths: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    clip_ids: Tensor
    caption_ids: Tensor
    caption_index: Tensor
    stored_ids: Tensor
    keys: list[str] = field(default_factory=list)
    dropped: list[DroppedSample] = field(default_factory=list)

    @property
    def ids(self) -> Tensor:
        """[b, 2] int64: id of the clip and id of the caption text."""
        return torch.stack([self.clip_ids, self.caption_ids], 1)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`.

        Lengths and ids stay on the host, which cuts waveforms and finds positives by them and would otherwise wait for
        the device.
        """
        waveform, input_ids, attention_mask = (
            x.to(device, non_blocking=True) for x in (self.waveform, self.input_ids, self.attention_mask)
        )
        return replace(self, waveform=waveform, input_ids=input_ids, attention_mask=attention_mask)

    def take(self, rows: Tensor) -> Batch:
        """Copies of the rows `rows` (int64). Copies of pinned memory are pinned."""

        def chosen(x: Tensor) -> Tensor:
            out = torch.empty(len(rows), *x.shape[1:], dtype=x.dtype, device=x.device, pin_memory=x.is_pinned())
            return torch.index_select(x, 0, rows, out=out)

        return replace(self._map(chosen), keys=[self.keys[row] for row in rows.tolist()] if self.keys else [])

    def between(self, first: int, last: int) -> Batch:
        """Views of the rows `first` up to, not including, `last`."""
        return replace(self._map(lambda x: x[first:last]), keys=self.keys[first:last])

    def pin_memory(self) -> Batch:
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: change(value) for name, value in tensors.items()}
        return replace(self, **changed)


class TokenSequence(NamedTuple):
    """A batch of encoded clips or captions.

    tokens: [B, T, D] one embedding per frame of a clip or token of a caption.
    mask:   [B, T] bool, True for real tokens; padding and special tokens of a tokenizer are False.
    pooled: [B, D] one embedding per clip or caption, by the pooling of the encoder.

    It is a tuple so that DeepSpeed finds the tensors in it. A hook on the output of a module gathers the parameters
    that the module itself uses, for the backward pass.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    @staticmethod
    def unpadded(tokens: Tensor, pooled: Tensor) -> TokenSequence:
        """A sequence in which every token is real."""
        return TokenSequence(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), pooled)

    def map(self, tokens: Callable[[Tensor], Tensor], pooled: Callable[[Tensor], Tensor]) -> TokenSequence:
        """Apply one function to the tokens and one to the pooled embeddings; the mask stays."""
        return TokenSequence(tokens(self.tokens), self.mask, pooled(self.pooled))

    def take(self, rows: Tensor) -> TokenSequence:
        """Rows `rows` (int64) of the batch."""
        return TokenSequence(*(part.index_select(0, rows) for part in self))

    def to(self, device: torch.device | str) -> TokenSequence:
        return TokenSequence(self.tokens.to(device), self.mask.to(device), self.pooled.to(device))

    @staticmethod
    def cat(parts: list[TokenSequence]) -> TokenSequence:
        """Join batches along B. Shorter token axes are padded with masked zeros."""
        length = max(part.tokens.shape[1] for part in parts)
        tokens = [torch.nn.functional.pad(p.tokens, (0, 0, 0, length - p.tokens.shape[1])) for p in parts]
        masks = [torch.nn.functional.pad(p.mask, (0, length - p.mask.shape[1])) for p in parts]
        return TokenSequence(torch.cat(tokens), torch.cat(masks), torch.cat([p.pooled for p in parts]))
