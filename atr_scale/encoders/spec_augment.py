"""Random draws of training that do not depend on how many ranks or forwards share a global batch.

What is drawn for the whole batch (patchout, band limits) follows from the step's seed alone. What is drawn for each
clip (SpecAugment) follows from the seed and the clip's own samples.

Shape suffixes: B batch, S samples, N draws, M mel bands, F frames.
"""

from __future__ import annotations

import zlib
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from atr_scale.sections import Count, Section

MASK = (1 << 64) - 1


class SpecAugmentSection(Section):
    """Names and values of PANNs and HTS-AT; widths in mel frames and mel bands."""

    time_drop_width: Count = 64
    time_stripes_num: Annotated[int, Field(ge=0)] = 2
    freq_drop_width: Count = 8
    freq_stripes_num: Annotated[int, Field(ge=0)] = 2


def for_the_batch(seed: int, purpose: str) -> np.random.Generator:
    """Draws that are the same for all clips of a step."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def for_each_clip(seed: int, waveform_BS: Tensor, count: int) -> Tensor:
    """[B, count] float64 in [0, 1), from the seed and each clip's samples."""
    # A sum of integers is the same in any order, so on any device and in any batch.
    content_B = waveform_BS.float().contiguous().view(torch.int32).to(torch.int64).sum(1)
    numbers_N = torch.arange(count, device=waveform_BS.device)
    state = _mix(content_B.unsqueeze(1) + _signed(seed)) + numbers_N * _signed(0x9E3779B97F4A7C15)
    return (_mix(state) >> 11 & ((1 << 53) - 1)).double() * 2.0**-53


def keep_outside_stripes(
    seed: int, waveform_BS: Tensor, num_mels: int, num_frames: int, widths: SpecAugmentSection
) -> Tensor:
    """bool [B, M, F], False inside random stripes of time and of frequency: SpecAugment (Park et al. 2019,
    arXiv 1904.08779) as torchlibrosa's `SpecAugmentation` draws it: a width below the limit, then a place for it."""
    kinds = (
        (num_frames, widths.time_drop_width, widths.time_stripes_num),
        (num_mels, widths.freq_drop_width, widths.freq_stripes_num),
    )
    draws = for_each_clip(seed, waveform_BS, 2 * sum(stripes for _, _, stripes in kinds))
    kept, used = [], 0
    for size, limit, stripes in kinds:
        places = torch.arange(size, device=waveform_BS.device)
        keep = torch.ones(len(waveform_BS), size, dtype=torch.bool, device=waveform_BS.device)
        for _ in range(stripes):
            width = (draws[:, used] * min(limit, size)).floor()
            begin = (draws[:, used + 1] * (size - width)).floor().unsqueeze(1)
            keep &= (places < begin) | (places >= begin + width.unsqueeze(1))
            used += 2
        kept.append(keep)
    return kept[0].unsqueeze(1) & kept[1].unsqueeze(2)


def _signed(number: int) -> int:
    """The same 64 bits as a signed number."""
    number &= MASK
    return number - (1 << 64) if number >> 63 else number


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, whose products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (MASK >> shift))) * _signed(factor)
    return x ^ (x >> 31 & (MASK >> 31))
