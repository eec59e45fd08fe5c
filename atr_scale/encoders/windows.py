"""Clips beyond an encoder's native length, as windows of that length.

Shape suffixes: B clips, P pieces, S samples, W samples of a window, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from atr_scale.batch import TokenSequence

# A tail shorter than this share of the window gets no window of its own: files cut to ten seconds are often some
# milliseconds longer, and the mean over windows would give that silence half of the weight.
SHORTEST_TAIL = 0.01


def window_starts(length: int, window: int, hop: int) -> list[int]:
    """First samples of the windows of a clip of `length` samples."""
    beyond = length - window - int(SHORTEST_TAIL * window)
    return [0, *range(hop, beyond + hop, hop)] if beyond > 0 else [0]


@dataclass(frozen=True)
class Windows:
    """waveform [P, W]; lengths [P], what `encode` shall see: W for windows, its own for a clip that fits into one.
    heard [P]: the share of a window that is audio; counts: pieces of each clip, which follow one another."""

    waveform: Tensor
    lengths: Tensor
    heard: list[float]
    counts: list[int]


def cut_into_windows(waveform_BS: Tensor, lengths_B: Tensor | None, window: int, hop: int) -> Windows:
    """The last window of a clip is filled up with zeros."""
    lengths = [waveform_BS.shape[1]] * len(waveform_BS) if lengths_B is None else lengths_B.tolist()
    pieces, piece_lengths, heard, counts = [], [], [], []
    for clip, length in zip(waveform_BS, lengths, strict=True):
        starts = window_starts(length, window, hop)
        counts.append(len(starts))
        for start in starts:
            audio = clip[start : min(start + window, length)]
            pieces.append(nn.functional.pad(audio, (0, window - len(audio))))
            piece_lengths.append(window if len(starts) > 1 else min(length, window))
            heard.append(len(audio) / window if len(starts) > 1 else 1.0)
    return Windows(torch.stack(pieces), torch.tensor(piece_lengths), heard, counts)


def join_windows(encoded: TokenSequence, windows: Windows) -> TokenSequence:
    """Pieces [P, T, D] -> clips: tokens one after another, those of the filled-up end masked zeros, pooled averaged."""
    tokens, pooled, first = [], [], 0
    for count in windows.counts:
        rows = range(first, first + count)
        first += count
        parts = []
        for row in rows:
            full = encoded.tokens[row][encoded.mask[row]]
            parts.append(full[: math.ceil(len(full) * windows.heard[row])])
        tokens.append(torch.cat(parts))
        pooled.append(encoded.pooled[rows[0] : rows[-1] + 1].mean(0))
    counts = torch.tensor([len(t) for t in tokens], device=encoded.mask.device)
    mask_BT = torch.arange(int(counts.max()), device=counts.device) < counts.unsqueeze(1)
    return TokenSequence(pad_sequence(tokens, batch_first=True), mask_BT, torch.stack(pooled))
