"""Decoded clips as one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from atr_scale.batch import Batch, caption_id, stable_id
from atr_scale.data.tokenizer import CaptionTokenizer


class DecodedClip(NamedTuple):
    """One decoded sample whose waveform lies in a row of the batch.

    length: samples of the waveform. stored_caption and caption_index: the caption drawn on this visit, and its index
    among the sample's captions. caption: the same or a paraphrase of it. place: "corpus/shard/key".
    """

    length: int
    caption: str
    stored_caption: str
    caption_index: int
    clip_id: str
    place: str


def collate(
    waveform: np.ndarray, clips: Sequence[DecodedClip], tokenizer: CaptionTokenizer, dropped: Counter[str]
) -> Batch:
    """Clips as one batch. Row k of `waveform` [b, width] begins with clip k; the rows are joined in place."""
    longest = max(clip.length for clip in clips)
    for row, clip in zip(waveform, clips, strict=True):
        if clip.length < longest:
            row[clip.length : longest] = 0
    input_ids, attention_mask = tokenizer([clip.caption for clip in clips])
    return Batch(
        waveform=torch.from_numpy(_narrow(waveform, longest)),
        lengths=torch.tensor([clip.length for clip in clips]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        clip_ids=torch.tensor([stable_id(clip.clip_id) for clip in clips]),
        caption_ids=torch.tensor([caption_id(tokenizer.clean(clip.caption)) for clip in clips]),
        caption_index=torch.tensor([clip.caption_index for clip in clips]),
        stored_ids=torch.tensor([stable_id(clip.stored_caption) for clip in clips]),
        keys=[clip.place for clip in clips],
        dropped=dropped,
    )


def _narrow(waveform: np.ndarray, width: int) -> np.ndarray:
    """The first `width` columns, contiguous in the same memory."""
    if width == waveform.shape[1]:
        return waveform
    narrow = waveform.reshape(-1)[: len(waveform) * width].reshape(-1, width)
    for row in range(1, len(waveform)):  # in this order no row is overwritten before it has moved
        narrow[row] = waveform[row, :width]
    return narrow


def pad(waveforms: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms [samples] of any lengths as ([b, longest] float32 with zeros at the ends, lengths [b] int64)."""
    lengths = torch.tensor([len(w) for w in waveforms])
    out = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(out, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return out, lengths
