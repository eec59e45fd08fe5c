from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atr_scale.encoders.spec_augment import SpecAugmentSection, for_each_clip, for_the_batch, keep_outside_stripes

CLIPS, MELS, FRAMES = 3000, 64, 300


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_draws_follow_seed_and_purpose() -> None:
    def first(seed: int, purpose: str) -> float:
        return float(for_the_batch(seed, purpose).random())

    assert first(1, "mel bands") == first(1, "mel bands")
    assert len({first(1, "mel bands"), first(2, "mel bands"), first(1, "patchout")}) == 3


def test_a_clip_draws_alike_in_any_batch() -> None:
    clips = noise(6, 400)
    draws = for_each_clip(5, clips, 8)
    order = torch.tensor([4, 0, 5, 1])
    assert torch.equal(for_each_clip(5, clips[order], 8), draws[order])
    for row in range(6):
        assert torch.equal(for_each_clip(5, clips[row : row + 1], 8)[0], draws[row])
    assert torch.equal(for_each_clip(5, clips, 3), draws[:, :3])
    strided = torch.cat([clips, clips], 1)[:, 400:]
    assert not strided.is_contiguous() and torch.equal(for_each_clip(5, strided, 8), draws)


def test_draws_are_those_of_splitmix() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    clip = noise(1, 400)
    start = mix((int(clip.numpy().view("int32").sum(dtype="int64")) + 7) % 2**64)
    expected = [(mix((start + n * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53 for n in range(20)]
    assert for_each_clip(7, clip, 20)[0].tolist() == expected


def test_draws_do_not_depend_on_the_type_of_samples() -> None:
    clips = noise(4, 400)
    assert torch.equal(for_each_clip(5, clips.double(), 8), for_each_clip(5, clips, 8))
    rounded = clips.bfloat16()
    assert torch.equal(for_each_clip(5, rounded, 8), for_each_clip(5, rounded.float(), 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_do_not_depend_on_the_device() -> None:
    clips = noise(4, 320_000)
    assert torch.equal(for_each_clip(5, clips.cuda(), 8).cpu(), for_each_clip(5, clips, 8))


def test_draws_differ_between_clips_seeds_and_places() -> None:
    clips = noise(50, 400)
    changed = clips.clone()
    changed[:, 7] += 1e-6  # one sample, by its last bits
    seeds = [for_each_clip(seed, clips, 8) for seed in (0, 1, 2, 2**40, 2**63, 2**64 - 1)]
    everything = torch.cat([*seeds, for_each_clip(0, changed, 8)])
    assert everything.numel() == everything.unique().numel()
    assert not torch.equal(for_each_clip(0, torch.zeros(1, 400), 8), for_each_clip(1, torch.zeros(1, 400), 8))


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = for_each_clip(9, noise(20_000, 50), 6)
    assert draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        counts = torch.histc(column, 20, 0, 1)
        assert ((counts - 1000).square() / 1000).sum() < 50  # chi-squared with 19 degrees: passes 9999 in 10 000
    correlations = torch.corrcoef(draws.T) - torch.eye(6)
    assert correlations.abs().max() < 5 / math.sqrt(20_000)
    # Seeds that follow one another, as those of steps do, on the same clips.
    steps = torch.stack([for_each_clip(seed, noise(2000, 50), 1)[:, 0] for seed in range(6)])
    assert (torch.corrcoef(steps) - torch.eye(6)).abs().max() < 5 / math.sqrt(2000)


def counts_and_lengths(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, the number of stretches of False and how many values are False."""
    begins = (~keep).float().diff(dim=1, prepend=torch.zeros(len(keep), 1)) == 1
    return begins.sum(1), (~keep).sum(1)


def stripes(widths: SpecAugmentSection, clips: int = CLIPS, seed: int = 3) -> tuple[Tensor, Tensor]:
    """What is kept of time [clips, FRAMES] and of frequency [clips, MELS]."""
    keep = keep_outside_stripes(seed, noise(clips, 20), MELS, FRAMES, widths)
    assert keep.shape == (clips, MELS, FRAMES) and keep.dtype == torch.bool
    time, mels = keep.any(1), keep.any(2)
    assert torch.equal(keep, time.unsqueeze(1) & mels.unsqueeze(2))
    return time, mels


def test_one_stripe_has_a_uniform_width_at_a_uniform_place() -> None:
    for which in (0, 1):
        size, limit = (FRAMES, 40) if which == 0 else (MELS, 10)
        time_only = which == 0
        widths = SpecAugmentSection(
            time_drop_width=limit,
            time_stripes_num=int(time_only),
            freq_drop_width=limit,
            freq_stripes_num=int(not time_only),
        )
        both = stripes(widths)
        assert both[1 - which].all()
        numbers, lengths = counts_and_lengths(both[which])
        assert numbers.max() == 1
        counts = torch.bincount(lengths, minlength=limit)
        assert len(counts) == limit  # 0 up to limit - 1
        expected = CLIPS / limit
        assert ((counts - expected).square() / expected).sum() < limit + 5 * math.sqrt(2 * limit)
        hit = ~both[which][lengths > 0]
        begins, after = hit.int().argmax(1), hit.int().argmax(1) + hit.sum(1)
        # torchlibrosa's upper bound is exclusive: the last place is always kept.
        assert begins.min() == 0 and after.max() == size - 1
        assert abs((begins + after).float().mean() / 2 - size / 2) < 4 * size / math.sqrt(12 * CLIPS)


def test_number_and_share_of_stripes() -> None:
    time, mels = stripes(SpecAugmentSection())
    assert counts_and_lengths(time)[0].max() == counts_and_lengths(mels)[0].max() == 2
    for kept, size, limit in ((time, FRAMES, 64), (mels, MELS, 8)):
        share = (limit - 1) / 2 / size
        assert abs((~kept).float().mean() - (2 * share - share**2)) < 0.01
    three, _ = stripes(SpecAugmentSection(time_drop_width=10, time_stripes_num=3))
    assert counts_and_lengths(three)[0].max() == 3
    all_time, all_mels = stripes(SpecAugmentSection(time_stripes_num=0, freq_stripes_num=0))
    assert all_time.all() and all_mels.all()


def test_stripes_wider_than_the_clip_leave_something() -> None:
    widths = SpecAugmentSection(time_drop_width=64, time_stripes_num=1, freq_stripes_num=0)
    keep = keep_outside_stripes(0, noise(500, 20), MELS, 5, widths)
    assert keep.any(2).all() and not keep.all()


def test_seeds_change_stripes() -> None:
    first, again, other = (stripes(SpecAugmentSection(), 20, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
