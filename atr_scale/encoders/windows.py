"""Clips longer than the native length of an encoder, cut into windows of that length.

Which windows exist follows from the lengths, which the host knows: nothing here waits for the device.

Shape suffixes: B clips, P pieces, N pieces of the clip with the most, S samples, W samples of a window, T tokens, D
width. A cell is the start and stop, in samples, of the audio that a token stands for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.batch import TokenSequence, on_device

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

    waveform: [P, W]. lengths: [P] on the host, samples to encode: W for a window, the length of the clip for a clip
    that fits into one. filled: [P] fraction of each window that holds audio. counts: [B] number of pieces of each clip.
    """

    waveform: Tensor
    lengths: Tensor
    filled: list[float]
    counts: list[int]


def cut_into_windows(waveform_BS: Tensor, lengths_B: Tensor | None, window: int, hop: int) -> Windows:
    """Cut clips [B, S] into windows of `window` samples that start `hop` samples apart.

    lengths: int64 [B] in samples, on the host; None if all clips have S samples. The last window of a clip is padded
    with zeros, whatever the waveform holds after the end of the clip.
    """
    samples = waveform_BS.shape[1]
    lengths = [samples] * len(waveform_BS) if lengths_B is None else lengths_B.tolist()
    starts = [window_starts(length, window, hop) for length in lengths]
    counts = [len(each) for each in starts]
    width = window + (max(counts) - 1) * hop
    pieces_BNW = nn.functional.pad(waveform_BS, (0, width - samples)).unfold(1, window, hop)
    if min(counts) == max(counts):
        pieces_PW = pieces_BNW.flatten(0, 1)
    else:
        places = [(clip, number) for clip, count in enumerate(counts) for number in range(count)]
        clip_P, number_P = on_device(np.array(places).T, waveform_BS.device)
        pieces_PW = pieces_BNW[clip_P, number_P]
    if min(lengths) < samples:
        ends = [length - start for length, each in zip(lengths, starts, strict=True) for start in each]
        place_W = torch.arange(window, device=pieces_PW.device)
        pieces_PW = pieces_PW.masked_fill(place_W >= on_device(ends, pieces_PW.device).unsqueeze(1), 0)
    encoded_B = [window if count > 1 else min(length, window) for length, count in zip(lengths, counts, strict=True)]
    filled = [
        share for length, each in zip(lengths, starts, strict=True) for share in shares_of_audio(length, window, each)
    ]
    return Windows(pieces_PW, torch.tensor(np.repeat(encoded_B, counts)), filled, counts)


def join_windows(encoded: TokenSequence, windows: Windows, pooled_is_mean: bool = False) -> TokenSequence:
    """Encoded pieces [P, T, D] -> clips. Tokens of the padded end are left out.

    The pooled embedding of a clip is the mean over its windows, each weighted by the audio that it holds.
    pooled_is_mean: the encoder pools by the mean of its tokens, so that of a clip is the mean of those that are left.
    The tokens of shorter clips are padded with masked zeros.
    """
    device, dtype = encoded.tokens.device, torch.promote_types(encoded.tokens.dtype, torch.float32)
    rows, real_BT = _rows_of_clips(windows, encoded.tokens.shape[1])
    rows_BT = on_device(rows, device)
    mask_BT = encoded.mask.flatten()[rows_BT] & on_device(real_BT, device)
    tokens_BTD = encoded.tokens.flatten(0, 1).index_select(0, rows_BT.flatten()).unflatten(0, rows_BT.shape)
    tokens_BTD = tokens_BTD.masked_fill(~mask_BT.unsqueeze(2), 0)

    pieces, weights_BN = _pieces_of_clips(windows)
    pieces_BND = encoded.pooled.index_select(0, on_device(pieces.ravel(), device)).unflatten(0, pieces.shape)
    if pooled_is_mean:
        # A clip in one piece may have no token; it keeps what its encoder gave.
        mean_BD = tokens_BTD.sum(1, dtype=dtype) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        cut_B1 = on_device(weights_BN[:, :1] < 1, device)
        pooled_BD = torch.where(cut_B1, mean_BD, pieces_BND[:, 0])
    else:
        pooled_BD = (on_device(weights_BN, device).to(dtype).unsqueeze(2) * pieces_BND).sum(1)
    return TokenSequence(tokens_BTD, mask_BT, pooled_BD.to(encoded.pooled.dtype))


def kept_tokens(per_piece: int, share: float) -> int:
    """How many of the `per_piece` tokens of a window are kept if audio fills this share of it."""
    return math.ceil(per_piece * share)


def regular_centres(count: int, first: float, distance: float) -> NDArray[np.float64]:
    """Centres of `count` tokens that are `distance` samples apart."""
    return first + distance * np.arange(count, dtype=np.float64)


def cells_around(centres_T: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """[T, 2]: the part of a clip of `length` samples that is nearest to each of its tokens, whose centres ascend."""
    borders = np.concatenate([[0.0], (centres_T[1:] + centres_T[:-1]) / 2, [float(length)]])[: len(centres_T) + 1]
    return np.stack([borders[:-1], borders[1:]], 1).clip(0, length)


def cells_of_windows(cells_T2: NDArray[np.float64], length: int, window: int, hop: int) -> NDArray[np.float64]:
    """The cells [T, 2] of one window -> those of the tokens that `join_windows` makes of a clip of `length` samples."""
    starts = window_starts(length, window, hop)
    shares = shares_of_audio(length, window, starts)
    cells = [cells_T2[: kept_tokens(len(cells_T2), share)] + start for start, share in zip(starts, shares, strict=True)]
    return np.concatenate(cells).clip(0, length)


def _rows_of_clips(windows: Windows, per_piece: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where the tokens of clips come from, if each piece has `per_piece`: rows [B, T] among all tokens of all pieces.

    The second array [B, T] is False after the end of a clip.
    """
    kept_P = np.array([kept_tokens(per_piece, share) for share in windows.filled])
    tokens_B = np.add.reduceat(kept_P, _first_pieces(windows))
    real_BT = np.arange(tokens_B.max()) < tokens_B[:, None]
    rows_BT = np.zeros(real_BT.shape, np.int64)
    kept_PT = np.arange(per_piece) < kept_P[:, None]
    rows_BT[real_BT] = np.arange(kept_PT.size).reshape(kept_PT.shape)[kept_PT]
    return rows_BT, real_BT


def _pieces_of_clips(windows: Windows) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The pieces of each clip [B, N] and their weights in a mean, which follow from the audio that they hold.

    A clip with fewer than N pieces repeats its first one with the weight 0.
    """
    first_B = _first_pieces(windows)
    number_N, counts_B = np.arange(max(windows.counts)), np.array(windows.counts)
    exists_BN = number_N < counts_B[:, None]
    pieces_BN = first_B[:, None] + np.where(exists_BN, number_N, 0)
    shares_BN = np.where(exists_BN, np.array(windows.filled)[pieces_BN], 0.0)
    return pieces_BN, shares_BN / shares_BN.sum(1, keepdims=True)


def _first_pieces(windows: Windows) -> NDArray[np.int64]:
    """[B]: the first piece of each clip."""
    return np.cumsum([0, *windows.counts[:-1]])


def weighted_mean(values: Tensor, weights: list[float]) -> Tensor:
    """The mean of `values` [P, ...] over the first dimension, with weights [P]."""
    dtype = torch.promote_types(values.dtype, torch.float32)  # in bf16 the shares would not sum to 1
    shares_P = on_device(torch.tensor(weights, dtype=dtype) / sum(weights), values.device)
    return (shares_P.view(-1, *[1] * (values.ndim - 1)) * values).sum(0).to(values.dtype)
