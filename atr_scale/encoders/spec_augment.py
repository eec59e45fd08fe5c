"""Random draws in training that depend neither on the world size nor on the micro-batch size.

Draws for the whole global batch (patchout, band limits) follow from the seed of the step. Draws for a clip
(SpecAugment) follow from the seed of the step and the samples of the clip.

Shape suffixes: B batch, S samples, N draws, M mel bands, F frames.
"""

from __future__ import annotations

import zlib
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from atr_scale.batch import to_float
from atr_scale.sections import Count, Section

MASK = (1 << 64) - 1


class SpecAugmentSection(Section):
    """SpecAugment with the names and default values of PANNs and HTS-AT."""

    time_drop_width: Count = Field(64, description="Upper limit of the width of a stripe of time, in mel frames.")
    time_stripes_num: Annotated[int, Field(ge=0)] = Field(2, description="Number of stripes of time per clip.")
    freq_drop_width: Count = Field(8, description="Upper limit of the width of a stripe of frequency, in mel bands.")
    freq_stripes_num: Annotated[int, Field(ge=0)] = Field(2, description="Number of stripes of frequency per clip.")


def for_the_batch(seed: int, purpose: str) -> np.random.Generator:
    """A generator whose draws are the same for all clips of a step."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def for_each_clip(seed: int, waveform_BS: Tensor, count: int) -> Tensor:
    """Random numbers float64 [B, count] in [0, 1) that follow from the seed and the samples of each clip."""
    # A sum of integers does not depend on its order, so it is the same on any device and in any batch.
    content_B = to_float(waveform_BS).contiguous().view(torch.int32).sum(1, dtype=torch.int64)
    numbers_N = torch.arange(count, device=waveform_BS.device)
    state = _mix(content_B.unsqueeze(1) + _signed(seed)) + numbers_N * _signed(0x9E3779B97F4A7C15)
    return (_mix(state) >> 11 & ((1 << 53) - 1)).double() * 2.0**-53


def keep_outside_stripes(
    seed: int, waveform_BS: Tensor, num_mels: int, num_frames: int, widths: SpecAugmentSection
) -> Tensor:
    """Mask bool [B, M, F] that is False inside random stripes of time and of frequency.

    Source: SpecAugment (Park et al. 2019, arXiv 1904.08779), drawn as in `SpecAugmentation` of torchlibrosa: first a
    width below the limit, then a place for it.
    """
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
    """The 64 bits of `number` read as a signed number."""
    number &= MASK
    return number - (1 << 64) if number >> 63 else number


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64 with products that wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (MASK >> shift))) * _signed(factor)
    return x ^ (x >> 31 & (MASK >> 31))
