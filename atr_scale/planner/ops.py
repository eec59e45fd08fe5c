"""The operations of a part of the real model: FLOPs, bytes read and written, live bytes, and collectives.

A Recorder sees every operation below autograd, in the forward and backward pass, except views. Tensors may be real ones
or have no values.
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
    """One call of a collective: its name, the dtype, and the bytes that one rank gives to it."""

    name: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class OpTable:
    """One entry for each operation, in the order of execution; float64 except the names.

    flops: all FLOPs. low: those of them in bf16 or fp16. nbytes: bytes read and written. live: bytes alive after the
    operation, of tensors made since the recording began; finished gradients of parameters count as `gradients` instead.
    """

    names: list[str]
    flops: NDArray[np.float64]
    low: NDArray[np.float64]
    nbytes: NDArray[np.float64]
    live: NDArray[np.float64]
    gradients: NDArray[np.float64]


class Recorder(TorchDispatchMode):
    """Records operations inside a `with` block.

    known: tensors that exist before, such as parameters; they never count as live. live, gradients: bytes now, as in
    OpTable.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.rows: list[tuple[str, float, float, float, float, float]] = []
        self.collectives: list[Collective] = []
        self._sizes: dict[int, int] = {id(x.untyped_storage()): 0 for x in known}
        self._known = [x.untyped_storage() for x in known]  # keeps their ids their own
        self.live = self.gradients = 0

    def watch_gradients(self, module: nn.Module) -> list[RemovableHandle]:
        """Count finished gradients of parameters as `gradients` instead of `live`, until the handles are removed."""
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
            self.collectives.append(collective_of(func, args)[0])
            return out
        inputs, outputs = list(tensors((args, kwargs))), list(tensors(out))
        storages = {id(x.untyped_storage()) for x in inputs}
        if outputs and not func._schema.is_mutable and all(id(x.untyped_storage()) in storages for x in outputs):
            return out  # a view
        for x in outputs:
            self._add(x)
        flops = flops_of(func, args, kwargs, out)
        low = flops if any(x.dtype in LOW_PRECISION for x in inputs) else 0.0
        nbytes = sum(map(touched, inputs)) + sum(map(touched, outputs))
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


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def collective_of(func: Any, args: tuple[Any, ...]) -> tuple[Collective, list[Tensor]]:
    """The collective that an operation of c10d is, and the tensors that this rank gives to it."""
    # (outputs, inputs, ...) of gathers and reduce-scatters, (tensors, ...) of the others.
    name = func._schema.name.removeprefix("c10d::").strip("_")
    two_sided = name in ("allgather_base", "reduce_scatter_base", "allgather", "allgather_into_tensor_coalesced")
    given = list(tensors(args[1] if two_sided else args[0]))
    return Collective(name, given[0].dtype, sum(x.numel() * x.element_size() for x in given)), given


def touched(x: Tensor) -> int:
    """Bytes read or written. An expanded tensor is no larger than its storage."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of one operation; two for a multiplication with an addition."""
    count = _OWN_COUNTS.get(func.overloadpacket)
    if count is not None:
        return float(count(args, out))
    count = flop_registry.get(func.overloadpacket)
    operands = [x for x in args if not isinstance(x, torch.dtype)]  # torch's counts know no products of another dtype
    return 0.0 if count is None else float(count(*operands, **kwargs, out_val=out))


def _convolution_backward(args: tuple[Any, ...], out: Any) -> int:
    """As much as the forward pass for each of the two gradients; torch's own count ignores the groups."""
    grad, x, weight, transposed = args[0], args[1], args[2], args[7]
    wanted: list[bool] = args[10]
    forward: int = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed)
    return forward * (bool(wanted[0]) + bool(wanted[1]))


def _attention(args: tuple[Any, ...], out: Any) -> int:
    query, key, value = (x.shape for x in args[:3])
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _attention_backward(args: tuple[Any, ...], out: Any) -> int:
    """Five matrix products, two in the forward pass: the scores are computed again."""
    shapes: list[torch.Size] = [x.shape for x in args[1:4]]
    query, key, value = shapes
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _add_product(args: tuple[Any, ...], out: Any) -> int:
    """A product added in place, as in the losses; torch's table does not know it."""
    left: Tensor = args[1]
    right: Tensor = args[2]
    return 2 * prod(left.shape) * right.shape[1]


_OWN_COUNTS: dict[Any, Callable[[tuple[Any, ...], Any], int]] = {
    aten.addmm_: _add_product,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
