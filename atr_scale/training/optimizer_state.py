"""The optimizer's moments in a checkpoint, by parameter name: for any number of ranks and any ZeRO stage.

    checkpoints/step-N/optimizer/rank-R.safetensors     what rank R wrote: fp32 vectors, named KIND/START/PARAMETER

A vector holds the values of one moment (KIND is exp_avg or exp_avg_sq, as in torch's AdamW) for the values of a
parameter from START on, in row-major order. The files of all ranks together hold every value of every learned parameter
once. Which rank wrote which piece follows from DeepSpeed's partitions and is of no importance to a reader: a rank that
resumes reads the ranges that it needs, from whatever files hold them. The weights are those of model.safetensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from atr_scale.checkpoint_writer import HostCopies
from atr_scale.errors import UserError
from atr_scale.training.partitions import Partitions

FOLDER = "optimizer"
OLD_FOLDER = "deepspeed"  # with what DeepSpeed wrote, in checkpoints of version 0.5 and older
MOMENTS = ("exp_avg", "exp_avg_sq")


class HeldPiece(NamedTuple):
    """The values `start` up to, not including, `stop` of a parameter, as the optimizer of a rank has them.

    holder: the tensor that the optimizer steps, whose values from `offset` on are these.
    """

    name: str
    start: int
    stop: int
    holder: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The values of the piece in a tensor of the shape of `holder`: a view [stop - start]."""
        return tensor.view(-1)[self.offset : self.offset + self.stop - self.start]


def pieces(model: nn.Module, optimizer: Any, zero_stage: int, rank: int) -> list[HeldPiece]:
    """The pieces that rank `rank` steps. optimizer: DeepSpeed's; at stage 0, where every rank steps all, not read."""
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if zero_stage == 0:
        return [HeldPiece(name, 0, parameter.numel(), parameter, 0) for name, parameter in learned]
    if zero_stage == 3:
        return [_of_stage_3(name, parameter, optimizer, rank) for name, parameter in learned]
    slices = Partitions.slices(optimizer)
    holders = optimizer.single_partition_of_fp32_groups
    return [
        HeldPiece(name, each.start, each.stop, holders[each.partition], each.offset)
        for name, parameter in learned
        for each in slices[parameter]
        if each.owner == rank
    ]


def _of_stage_3(name: str, parameter: Any, optimizer: Any, rank: int) -> HeldPiece:
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    size, count = parameter.ds_tensor.ds_numel, parameter.ds_numel  # shards of equal size, the last ones padded
    start = min(rank * size, count)
    return HeldPiece(name, start, min(start + size, count), optimizer.fp32_partitioned_groups_flat[group], offset)


def share(whole: list[HeldPiece], rank: int, ranks: int) -> list[HeldPiece]:
    """The part that rank `rank` writes of pieces that all ranks have alike: of each an equal range."""

    def cut(piece: HeldPiece) -> HeldPiece:
        first, last = (piece.start + (piece.stop - piece.start) * each // ranks for each in (rank, rank + 1))
        return piece._replace(start=first, stop=last, offset=piece.offset + first - piece.start)

    return [cut(piece) for piece in whole]


def moments(
    own: list[HeldPiece], state: Mapping[Tensor, Mapping[str, Tensor]], copies: HostCopies
) -> dict[str, Tensor]:
    """Copies of the moments of the pieces, by the names of the file. state: that of torch's optimizer."""
    held = {
        f"{kind}/{piece.start}/{piece.name}": piece.of(state[piece.holder][kind])
        for piece in own
        if piece.stop > piece.start and piece.holder in state
        for kind in MOMENTS
    }
    return {name: copies.copy(name, moment) for name, moment in held.items()}


def updates_made(state: Mapping[Tensor, Mapping[str, Tensor]]) -> int:
    """How many steps the optimizer has made: those that were skipped do not count."""
    return max((int(each["step"]) for each in state.values() if "step" in each), default=0)


def file_of(rank: int) -> str:
    """Name of a rank's file in a checkpoint."""
    return f"{FOLDER}/rank-{rank}.safetensors"


class StoredMoments:
    """The moments of a checkpoint. UserError if a file is damaged."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._ranges: dict[tuple[str, str], list[tuple[int, int, Any]]] = defaultdict(list)
        for path in sorted((checkpoint / FOLDER).glob("rank-*.safetensors")):
            try:
                file = safe_open(path, "pt")
                for key in file.keys():  # noqa: SIM118
                    kind, start, name = key.split("/", 2)
                    found = file.get_slice(key)
                    self._ranges[kind, name].append((int(start), int(start) + found.get_shape()[0], found))
            except (SafetensorError, ValueError) as error:
                raise UserError(f"{path} is damaged ({error}): give another checkpoint") from None

    def read_into(self, optimizer: torch.optim.Optimizer, own: list[HeldPiece], updates: int) -> None:
        """Fill the state of torch's optimizer. updates: steps that it has made.

        UserError if the checkpoint has no moments of a piece.
        """
        for piece in own:
            state = optimizer.state[piece.holder]
            if not state:
                state["step"] = torch.tensor(float(updates), device=piece.holder.device)
                state.update({kind: torch.zeros_like(piece.holder) for kind in MOMENTS})
            for kind in MOMENTS:
                self._read(kind, piece, piece.of(state[kind]))

    def _read(self, kind: str, piece: HeldPiece, out: Tensor) -> None:
        missing = piece.stop - piece.start
        for start, stop, stored in self._ranges[kind, piece.name]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                out[first - piece.start : last - piece.start].copy_(stored[first - start : last - start])
                missing -= last - first
        if missing:
            raise UserError(
                f"{self.checkpoint} has no state of the optimizer for {piece.name}: this version trains a parameter "
                "that the run did not have; go on with the older version, or start a new run from its weights with "
                "train.initial_checkpoint"
            )
