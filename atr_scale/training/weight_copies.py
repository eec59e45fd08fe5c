"""Copies of the model's weights for checkpoints.

Below ZeRO 3 the main rank copies its own. Under ZeRO 3 every rank copies its shards, and the main rank receives those
of the others behind training, over a group of their own: no transfer of a step waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from atr_scale.checkpoint_writer import HostCopies
from atr_scale.distributed.world import World


class WeightCopies:
    """Of the state of a model on all ranks, whose sharded tensors have DeepSpeed's attributes."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._model, self._world = model, world
        self._group: Any = None

    def take(self, copies: HostCopies) -> Callable[[], dict[str, Tensor]]:
        """Copy this rank's part. The function that is returned may be called in another thread, on all ranks.

        It returns the whole state on the main rank, {} on the others.
        """
        out, sizes = dict[str, Tensor](), dict[str, int]()
        state: dict[str, Any] = self._model.state_dict(keep_vars=True)
        for name, value in state.items():
            if hasattr(value, "ds_tensor"):
                sizes[name] = size = value.ds_tensor.ds_numel  # the same on all ranks: the last shards are padded
                first = self._world.rank * size
                shard = value.ds_tensor[: max(0, min(size, value.ds_numel - first))]
                if self._world.is_main:
                    out[name] = copies.room(name, value.ds_shape, shard.dtype)
                    out[name].view(-1)[: len(shard)].copy_(shard)
                else:
                    out[name] = copies.copy(name, shard)
            elif self._world.is_main:
                out[name] = copies.copy(name, value)
        if sizes and self._group is None:
            self._group = self._world.new_host_group()
        return lambda: self._collect(out, sizes)

    def _collect(self, out: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        """out: whole tensors with the shards of the main rank there, shards on the other ranks. sizes: of shards."""
        for name, size in sizes.items():
            if self._world.is_main:
                shards = out[name].view(-1).split(size)  # by rank; the last ranks may have none
                arriving = [self._group.recv([shard], rank, 0) for rank, shard in enumerate(shards) if rank > 0]
                for transfer in arriving:
                    transfer.wait()
            elif len(out[name]):
                self._group.send([out[name]], 0, 0).wait()
        return out if self._world.is_main else {}
