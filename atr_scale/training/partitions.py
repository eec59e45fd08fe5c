"""The partitions of DeepSpeed's ZeRO 1 and 2: a rank owns a slice of each optimizer group, laid end to end.

DeepSpeed keeps the sharded optimizer state, its checkpoints, and the step: it updates its own slices and gathers the
parameters. Its hooks, which would reduce gradients, are taken off; `GradientReduction` fills the partitions instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from atr_scale.training.gradient_reduction import Sharding, Slice


class Partitions:
    """The partitions of this rank. optimizer: DeepSpeed's, of stage 1 or 2."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        self._slices = self.slices(optimizer)

    @staticmethod
    def slices(optimizer: Any) -> dict[nn.Parameter, list[Slice]]:
        """Where the values of each parameter lie: the same on all ranks."""
        groups = zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.partition_size,
            strict=True,
        )
        return {
            parameter: _cut(first, parameter.numel(), int(size), number)
            for number, (parameters, offsets, size) in enumerate(groups)
            for parameter, first in zip(parameters, offsets, strict=True)
        }

    @property
    def sharding(self) -> Sharding:
        return Sharding(self._slices.__getitem__, self._allocate)

    def _allocate(self) -> list[Tensor]:
        """Zeros for the gradients of this rank's partitions, which DeepSpeed's next step takes as they are."""
        # DeepSpeed's norm waits for the device; the clipping may come from a checkpoint.
        self.optimizer.compute_grad_norm, self.optimizer.clip_grad = False, 0.0
        groups = range(len(self.optimizer.bit16_groups))
        buffers = {number: self.optimizer._build_compact_grad_partition_buffer(number) for number in groups}
        self.optimizer.averaged_gradients.update(buffers)
        return [buffer.flat_partition for buffer in buffers.values()]


def _cut(first: int, count: int, size: int, partition: int) -> list[Slice]:
    """Slices of a parameter with `count` values from `first` on in a group whose ranks own `size` values each."""
    found = []
    start = 0
    while start < count:
        owner, offset = divmod(first + start, size)
        stop = min(count, start + size - offset)
        found.append(Slice(start, stop, owner, partition, offset))
        start = stop
    return found
