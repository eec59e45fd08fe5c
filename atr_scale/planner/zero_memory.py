"""Memory and transfers of gradients, parameters and optimizer state at each ZeRO stage.

Everything is fp32: parameters P (trainable or not), gradients G, the optimizer's own copy and its two moments of G.

    stage   kept between steps                added during a step               sent in a step
    0       P + 2 G                           G + a bucket                      all-reduce G
    1       P + 3 G / W                       G + G / W + a bucket              reduce G to its owners, all-gather G
    2       P + 3 G / W                       some buckets + G / W              reduce G to its owners, all-gather G
    3       (P + 3 G) / W + small P + bucket  P whole from its first use on     all-gather P, reduce-scatter G,
                                                                                all-gather small P

Stages 0 to 2 are `training.gradient_reduction`, with small buckets that travel during the backward pass; stage 1 may
hold all of them if the network is slower than the pass. Stage 3 is DeepSpeed's: its bucket is allocated whole, however
small the model, and it releases a parameter only if 1e9 others are used before it is needed again: in models with less
than half as many, all of them stay from the forward to the end of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atr_scale.planner.transfer import Transfer
from atr_scale.training.gradient_reduction import BUCKET_BYTES
from atr_scale.training.passes import STAGE_2_BUCKETS

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

    def copies(self, stage: int, world_size: int) -> tuple[int, int]:
        """Bytes of main memory for the copies of a checkpoint: of rank 0, and of any other rank."""
        learned, frozen = sum(self.trainable), sum(self.frozen)
        moments = 2 * FP32 * -(-learned // world_size)
        shards = FP32 * sum(_shard(size, world_size) for size in (*self.trainable, *self.frozen)) if stage == 3 else 0
        return FP32 * (learned + frozen) + moments, shards + moments

    def gradients(self, stage: int, world_size: int, several_passes: bool) -> tuple[int, int]:
        """Bytes of gradients: the most that wait in a backward pass to be reduced, and the place for reduced ones.

        Earlier passes that share one reduction leave all of them waiting. Reduced gradients of stages 0 and 3 take the
        memory in which they waited.
        """
        learned = FP32 * sum(self.trainable)
        own = -(-learned // world_size)
        if stage == 0 or (stage == 3 and several_passes):
            return learned, 0
        if stage == 3:
            return own, 0
        if several_passes:
            return learned, own
        if world_size == 1:
            return 0, own
        return min(learned, STAGE_2_BUCKETS * BUCKET_BYTES) if stage == 2 else learned, own

    def gathered(self, stage: int) -> int:
        """Bytes of parameters that stage 3 holds whole from the forward to the backward pass."""
        large = sum(size for size in (*self.trainable, *self.frozen) if size > PERSISTENT)
        return FP32 * min(large, REUSE_DISTANCE) if stage == 3 else 0

    def buffers(self, stage: int, world_size: int) -> tuple[int, int]:
        """Bytes of buckets (during the backward pass, when the last gradients are reduced)."""
        learned, largest = sum(self.trainable), max(self.trainable, default=0)
        if stage == 3:
            bucket, flat = FP32 * BUCKET, FP32 * min(learned, BUCKET)
            return bucket, bucket + 2 * flat  # all along; at the end as input and in slices
        if stage == 0 and world_size == 1:
            return 0, 0
        filled = max(min(FP32 * learned, BUCKET_BYTES), FP32 * largest)  # before the gradients copied into it are freed
        return filled, filled

    def transfers(self, stage: int, world_size: int, passes: int = 1, sent_as: int = FP32) -> list[Transfer]:
        """The transfers of one optimizer step.

        passes: forward passes, for each of which stage 3 gathers parameters. sent_as: bytes of a gradient on the
        network, below stage 3.
        """
        learned = self.trainable
        buckets = -(-FP32 * sum(learned) // BUCKET_BYTES)
        if stage == 0:
            return [Transfer("gradients", "all_reduce", sent_as * sum(learned), buckets, "buckets")]
        if stage < 3:
            slices = [_padded(sum(group), world_size) // world_size for group in self.groups]
            return [
                Transfer("gradients", "reduce", sent_as * sum(learned), buckets, "buckets"),
                Transfer("parameters", "all_gather", FP32 * sum(slices), len(slices)),
            ]
        large = [_shard(size, world_size) for size in (*learned, *self.frozen) if size > PERSISTENT]
        small = [_shard(size, world_size) for size in learned if size <= PERSISTENT]
        again = _used_again(learned, world_size)
        return [
            Transfer("parameters", "all_gather", FP32 * (passes * sum(large) + again), passes),
            Transfer("gradients", "reduce_scatter", FP32 * sum(_shard(size, world_size) for size in learned)),
            Transfer("gradient norm", "all_reduce", 8 * len(self.groups), len(self.groups)),
            Transfer("small parameters", "all_gather", FP32 * sum(small), len(small)),
        ]


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
