"""Memory and transfers of DeepSpeed's ZeRO, as this project configures it (`deepspeed_config`).

Everything is fp32: parameters P (trainable or not), gradients G, the optimizer's own copy and its two moments of G.

    stage   kept between steps                added during a step               sent in a step
    0       P + 2 G                           G + a flat copy (one bucket)      all-reduce G
    1       P + 3 G / W                       G + (after the backward) bucket   all-reduce G, all-gather G
    2       P + 3 G / W                       bucket + flat copy or G / W       all-reduce G, all-gather G
    3       (P + 3 G) / W + small P + bucket  P whole from its first use on     all-gather P, reduce-scatter G,
                                                                                all-gather small P

A bucket is allocated whole, however small the model. Stages 1 and 2 of DeepSpeed reduce with all-reduce and keep their
slice. Stage 3 releases a parameter only if 1e9 others are used before it is needed again: in models with less than half
as many, all of them stay from the forward to the end of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FP32 = 4  # bytes
# DeepSpeed's defaults, in numbers, not bytes.
BUCKET = 500_000_000
PERSISTENT = 100_000  # stage 3 keeps parameters up to this size on every rank
REUSE_DISTANCE = 1_000_000_000
ALIGNMENT = 2  # a group is padded to a multiple of this times the ranks


@dataclass(frozen=True)
class Parameters:
    """Numbers of values of each trainable parameter, by optimizer group, and of each frozen one."""

    groups: Sequence[Sequence[int]]
    frozen: Sequence[int] = ()

    @property
    def trainable(self) -> list[int]:
        return [size for group in self.groups for size in group]

    def states(self, stage: int, world_size: int) -> dict[str, int]:
        """Bytes of a rank between two steps, without gradients and buffers."""
        learned, frozen = sum(self.trainable), sum(self.frozen)
        if stage == 3:
            shard = sum(_shard(size, world_size) for size in self.trainable)
            whole = sum(size for size in (*self.trainable, *self.frozen) if size <= PERSISTENT)
            parameters = shard + sum(_shard(size, world_size) for size in self.frozen) + whole
            return {"parameters": FP32 * parameters, "optimizer": FP32 * 3 * shard}
        if stage == 0:
            return {"parameters": FP32 * (learned + frozen), "optimizer": FP32 * 2 * learned}
        partition = sum(_padded(sum(group), world_size) // world_size for group in self.groups)
        return {"parameters": FP32 * (learned + frozen), "optimizer": FP32 * 3 * partition}

    def gradients(self, stage: int, world_size: int, several_passes: bool) -> int:
        """Bytes of gradients at the end of a backward pass. They stay whole if several passes share one reduction."""
        learned = sum(self.trainable)
        return FP32 * (learned if stage < 2 or several_passes else -(-learned // world_size))

    def gathered(self, stage: int) -> int:
        """Bytes of parameters that stage 3 holds whole from the forward to the backward pass."""
        large = sum(size for size in (*self.trainable, *self.frozen) if size > PERSISTENT)
        return FP32 * min(large, REUSE_DISTANCE) if stage == 3 else 0

    def buffers(self, stage: int, several_passes: bool) -> tuple[int, int]:
        """Bytes of buckets (during the backward pass, when the last gradients are reduced).

        Stages 2 and 3 reduce during a single backward pass; everything else is reduced after the last pass.
        """
        bucket, flat = FP32 * BUCKET, FP32 * min(sum(self.trainable), BUCKET)
        if stage == 3:
            return bucket, bucket + 2 * flat  # all along; at the end as input and in slices
        if stage == 2 and not several_passes:
            return bucket, bucket + flat
        return 0, bucket if stage else flat

    def transfers(self, stage: int, world_size: int, passes: int = 1) -> list[Transfer]:
        """The transfers of one optimizer step. passes: forward passes, for each of which stage 3 gathers parameters."""
        learned = self.trainable
        norm = Transfer("gradient norm", "all_reduce", (8 if stage == 3 else FP32) * len(self.groups), len(self.groups))
        if stage == 0:
            return [Transfer("gradients", "all_reduce", FP32 * sum(learned))]
        if stage < 3:
            slices = [_padded(sum(group), world_size) // world_size for group in self.groups]
            return [
                Transfer("gradients", "all_reduce", FP32 * sum(learned)),
                norm,
                Transfer("parameters", "all_gather", FP32 * sum(slices), len(slices)),
            ]
        large = [_shard(size, world_size) for size in (*learned, *self.frozen) if size > PERSISTENT]
        small = [_shard(size, world_size) for size in learned if size <= PERSISTENT]
        again = _used_again(learned, world_size)
        return [
            Transfer("parameters", "all_gather", FP32 * (passes * sum(large) + again), passes),
            Transfer("gradients", "reduce_scatter", FP32 * sum(_shard(size, world_size) for size in learned)),
            norm,
            Transfer("small parameters", "all_gather", FP32 * sum(small), len(small)),
        ]


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind.

    nbytes: bytes that one rank gives to an all-gather, gets from a reduce-scatter, or has all-reduced.
    """

    kind: str
    collective: str
    nbytes: int
    calls: int = 1

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends (and receives) in a ring, the least that any algorithm needs."""
        if self.collective == "all_reduce":
            return 2 * (world_size - 1) / world_size * self.nbytes
        return (world_size - 1) * float(self.nbytes)


def _shard(size: int, world_size: int) -> int:
    return -(-size // world_size)


def _padded(size: int, world_size: int) -> int:
    unit = ALIGNMENT * world_size
    return -(-size // unit) * unit


def _used_again(sizes: Sequence[int], world_size: int) -> int:
    """Values of a shard that stage 3 has released before the backward pass, and must gather again."""
    after, again = sum(sizes), 0
    for size in sizes:
        after -= size
        if 2 * after > REUSE_DISTANCE and size > PERSISTENT:
            again += _shard(size, world_size)
    return again
