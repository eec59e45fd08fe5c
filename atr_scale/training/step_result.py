"""What an optimizer step has found. Its numbers leave the device while the next step runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class StepResult:
    """The numbers of one optimizer step, copied to the host in the background. Reading one waits for this step.

    All ranks read the same, except for loss terms that depend on the rank.
    """

    def __init__(
        self,
        names: Sequence[str],
        values: Tensor,
        groups: Sequence[str],
        norms: Tensor,
        overflow: Tensor,
        agreed: Tensor,
    ) -> None:
        """names, values: loss terms, means over the losses of the step, and "temperature". groups, norms: of the whole
        gradient, then of each group of parameters, before clipping. overflow: 1 if the loss scale of fp16 was too
        large. agreed: float64, equal on all ranks, 1 or 0 each: whether a rank is to stop, then for each rank whether
        it saw a non-finite loss or gradient.
        """
        self._names, self._groups, self._ranks = names, groups, len(agreed) - 1
        self._numbers, self._copied = _to_host(torch.cat((norms, values, overflow[None], agreed)))

    @cached_property
    def _read(self) -> list[float]:
        if self._copied:
            self._copied.synchronize()
        return self._numbers.tolist()

    @cached_property
    def _values(self) -> dict[str, float]:
        return dict(zip(self._names, self._read[1 + len(self._groups) :], strict=False))

    @property
    def terms(self) -> dict[str, float]:
        return {name: value for name, value in self._values.items() if name != "temperature"}

    @property
    def temperature(self) -> float:
        return self._values["temperature"]

    @property
    def gradient_norm(self) -> float:
        return self._read[0]

    @property
    def gradient_norms(self) -> dict[str, float]:
        """By group of parameters; the root of the sum of their squares is `gradient_norm`."""
        return dict(zip(self._groups, self._read[1:], strict=False))

    @property
    def overflow(self) -> bool:
        """Whether the loss scale of fp16 was too large."""
        return bool(self._read[-self._ranks - 2])

    @property
    def stop(self) -> bool:
        """Whether any rank was told to stop before this step."""
        return bool(self._read[-self._ranks - 1])

    @property
    def bad_ranks(self) -> tuple[int, ...]:
        """Ranks that saw a non-finite value."""
        return tuple(rank for rank, bad in enumerate(self._read[-self._ranks :]) if bad)

    @property
    def applied(self) -> bool:
        return not self.bad_ranks


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is complete (None: at once)."""
    if numbers.device.type != "cuda":
        return numbers, None
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    pinned.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return pinned, copied
