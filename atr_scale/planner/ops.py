"""What a piece of the real model does, operation by operation: FLOPs, bytes of device memory, live bytes, collectives.

A Recorder sees every operation below autograd, so forward and backward, views apart, on real tensors as on fake ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

aten = torch.ops.aten
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Collective:
    """One call: what is called, its type of numbers, and the bytes that one rank gives to it."""

    name: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class OpTable:
    """One entry an operation, in the order of execution, all float64 but for the names.

    live: bytes after it of tensors made since the recording began, without finished gradients of parameters, which are
    `gradients`. low: FLOPs in bf16 or fp16 instead of fp32.
    """

    names: list[str]
    flops: NDArray[np.float64]
    low: NDArray[np.float64]
    nbytes: NDArray[np.float64]
    live: NDArray[np.float64]
    gradients: NDArray[np.float64]


class Recorder(TorchDispatchMode):
    """Use as a context. `known`: tensors there before, such as parameters, which are never counted as live.

    live, gradients: bytes now, as in OpTable.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.rows: list[tuple[str, float, float, float, float, float]] = []
        self.collectives: list[Collective] = []
        self._sizes: dict[int, int] = {id(x.untyped_storage()): 0 for x in known}
        self._known = [x.untyped_storage() for x in known]  # keeps their ids their own
        self.live = self.gradients = 0

    def watch_gradients(self, module: nn.Module) -> list[RemovableHandle]:
        """Finished gradients of the module's parameters leave `live` for `gradients`, until the handles are removed."""
        return [
            parameter.register_post_accumulate_grad_hook(self._gradient_done)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def table(self) -> OpTable:
        names, *columns = zip(*self.rows, strict=True)
        return OpTable(list(names), *(np.array(column, dtype=np.float64) for column in columns))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # asks for a fake tensor's device
            return out
        if func.namespace == "c10d":
            self._collect(func, args)
            return out
        inputs, outputs = list(tensors((args, kwargs))), list(tensors(out))
        storages = {id(x.untyped_storage()) for x in inputs}
        if outputs and not func._schema.is_mutable and all(id(x.untyped_storage()) in storages for x in outputs):
            return out  # a view
        for x in outputs:
            self._add(x)
        flops = _flops(func, args, kwargs, out)
        low = flops if any(x.dtype in LOW_PRECISION for x in inputs) else 0.0
        nbytes = sum(map(_touched, inputs)) + sum(map(_touched, outputs))
        self.rows.append((str(func), flops, low, nbytes, self.live, self.gradients))
        return out

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += self._sizes[key]
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _gradient_done(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        size = self._sizes.get(key, 0)
        self.live -= size
        self.gradients += size
        if size:
            self._sizes[key] = 0

    def _collect(self, func: Any, args: tuple[Any, ...]) -> None:
        # (outputs, inputs, ...) of gathers and reduce-scatters, (tensors, ...) of the others.
        name = func._schema.name.removeprefix("c10d::").strip("_")
        two_sided = name in ("allgather_base", "reduce_scatter_base", "allgather", "allgather_into_tensor_coalesced")
        given = list(tensors(args[1] if two_sided else args[0]))
        self.collectives.append(Collective(name, given[0].dtype, sum(x.numel() * x.element_size() for x in given)))


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def _touched(x: Tensor) -> int:
    """Bytes read or written; a broadcast tensor is no larger than what it stands on."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    count = _OWN_COUNTS.get(func.overloadpacket)
    if count is not None:
        return float(count(args, out))
    count = flop_registry.get(func.overloadpacket)
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=out))


def _convolution_backward(args: tuple[Any, ...], out: Any) -> float:
    """As much as the forward for each of the two gradients; torch's own count forgets the groups."""
    grad, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed)
    return forward * (bool(wanted[0]) + bool(wanted[1]))


def _attention(args: tuple[Any, ...], out: Any) -> float:
    query, key, value = (x.shape for x in args[:3])
    return sdpa_flop_count(query, key, value)


def _attention_backward(args: tuple[Any, ...], out: Any) -> float:
    """Five matrix products to the forward's two: the scores are computed again."""
    _, query, key, value = args[:4]
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _add_product(args: tuple[Any, ...], out: Any) -> float:
    """The losses add products in place, which torch's table does not know."""
    left, right = args[1], args[2]
    return 2 * prod(left.shape) * right.shape[1]


_OWN_COUNTS: dict[Any, Callable[[tuple[Any, ...], Any], float]] = {
    aten.addmm_: _add_product,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
