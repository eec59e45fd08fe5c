"""Decoded clips as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from atr_scale.batch import Batch, DroppedSample, caption_id, stable_id
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
    waveform: np.ndarray, clips: Sequence[DecodedClip], tokenizer: CaptionTokenizer, dropped: list[DroppedSample]
) -> Batch:
    """Clips as one batch. Row k of `waveform` [b, width] begins with clip k; the rows are joined in place."""
    longest = close_rows(waveform, [clip.length for clip in clips])
    input_ids, attention_mask = tokenizer([clip.caption for clip in clips]) if clips else 2 * (_ints([]).view(0, 0),)
    return Batch(
        waveform=torch.from_numpy(waveform.reshape(-1)[: len(clips) * longest].reshape(-1, longest)),
        lengths=_ints([clip.length for clip in clips]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        clip_ids=_ints([stable_id(clip.clip_id) for clip in clips]),
        caption_ids=_ints([caption_id(tokenizer.clean(clip.caption)) for clip in clips]),
        caption_index=_ints([clip.caption_index for clip in clips]),
        stored_ids=_ints([stable_id(clip.stored_caption) for clip in clips]),
        keys=[clip.place for clip in clips],
        dropped=dropped,
    )


def close_rows(waveform: np.ndarray, lengths: Sequence[int]) -> int:
    """Cut the rows of `waveform` [b, width] to the longest of `lengths`, in place; returns it.

    They then lie one after the other at the beginning of the memory, with zeros after the end of each clip.
    """
    width, longest = waveform.shape[1], max(lengths, default=1)
    for row, length in zip(waveform, lengths, strict=True):
        if length < longest:
            row[length:longest] = 0
    if longest < width:
        narrow = waveform.reshape(-1)[: len(waveform) * longest].reshape(-1, longest)
        for number in range(1, len(waveform)):  # in this order no row is overwritten before it has moved
            narrow[number] = waveform[number, :longest]
    return longest


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def pad(waveforms: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms [samples] of any lengths as ([b, longest] float32 with zeros at the ends, lengths [b] int64)."""
    lengths = torch.tensor([len(w) for w in waveforms])
    out = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(out, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return out, lengths
