"""Clips longer than the native length of an encoder, cut into windows of that length.

Shape suffixes: B clips, P pieces, S samples, W samples of a window, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from atr_scale.batch import TokenSequence

# A tail shorter than this fraction of the window is dropped: files cut to ten seconds are often some milliseconds
# longer, and a window of almost only padding costs as much as a full one.
SHORTEST_TAIL = 0.01


def window_starts(length: int, window: int, hop: int) -> list[int]:
    """First samples of the windows of a clip of `length` samples."""
    beyond = length - window - int(SHORTEST_TAIL * window)
    return [0, *range(hop, beyond + hop, hop)] if beyond > 0 else [0]


def shares_of_audio(length: int, window: int, starts: list[int]) -> list[float]:
    """Fraction of each window of a clip of `length` samples that holds audio; 1 for a clip that fits into one."""
    return [min(window, length - start) / window for start in starts] if len(starts) > 1 else [1.0]


@dataclass(frozen=True)
class Windows:
    """Pieces of clips; the pieces of one clip follow one another.

    waveform: [P, W]. lengths: [P] samples to encode: W for a window, the length of the clip for a clip that fits into
    one. filled: [P] fraction of each window that holds audio. counts: [B] number of pieces of each clip.
    """

    waveform: Tensor
    lengths: Tensor
    filled: list[float]
    counts: list[int]


def cut_into_windows(waveform_BS: Tensor, lengths_B: Tensor | None, window: int, hop: int) -> Windows:
    """Cut clips [B, S] into windows of `window` samples that start `hop` samples apart.

    lengths: int64 [B] in samples, None if all clips have S samples. The last window of a clip is padded with zeros.
    """
    lengths = [waveform_BS.shape[1]] * len(waveform_BS) if lengths_B is None else lengths_B.tolist()
    pieces, piece_lengths, counts = [], [], []
    filled: list[float] = []
    for clip, length in zip(waveform_BS, lengths, strict=True):
        starts = window_starts(length, window, hop)
        counts.append(len(starts))
        for start in starts:
            audio = clip[start : min(start + window, length)]
            pieces.append(nn.functional.pad(audio, (0, window - len(audio))))
            piece_lengths.append(window if len(starts) > 1 else min(length, window))
        filled += shares_of_audio(length, window, starts)
    return Windows(torch.stack(pieces), torch.tensor(piece_lengths), filled, counts)


def join_windows(encoded: TokenSequence, windows: Windows, pooled_is_mean: bool = False) -> TokenSequence:
    """Encoded pieces [P, T, D] -> clips. Tokens of the padded end are left out.

    The pooled embedding of a clip is the mean over its windows, each weighted by the audio that it holds.
    pooled_is_mean: the encoder pools by the mean of its tokens, so that of a clip is the mean of those that are left.
    The tokens of shorter clips are padded with masked zeros.
    """
    tokens, pooled, first = [], [], 0
    for count in windows.counts:
        rows = range(first, first + count)
        first += count
        parts = []
        for row in rows:
            full = encoded.tokens[row][encoded.mask[row]]
            parts.append(full[: math.ceil(len(full) * windows.filled[row])])
        tokens.append(torch.cat(parts))
        if count == 1:
            pooled.append(encoded.pooled[rows[0]])
        elif pooled_is_mean:
            pooled.append(tokens[-1].mean(0))
        else:
            pooled.append(weighted_mean(encoded.pooled[rows[0] : rows[-1] + 1], [windows.filled[row] for row in rows]))
    counts = torch.tensor([len(t) for t in tokens], device=encoded.mask.device)
    mask_BT = torch.arange(int(counts.max()), device=counts.device) < counts.unsqueeze(1)
    return TokenSequence(pad_sequence(tokens, batch_first=True), mask_BT, torch.stack(pooled))


def weighted_mean(values: Tensor, weights: list[float]) -> Tensor:
    """The mean of `values` [P, ...] over the first dimension, with weights [P]."""
    dtype = torch.promote_types(values.dtype, torch.float32)  # in bf16 the shares would not sum to 1
    shares_P = torch.tensor(weights, dtype=dtype, device=values.device) / sum(weights)
    return (shares_P.view(-1, *[1] * (values.ndim - 1)) * values).sum(0).to(values.dtype)
