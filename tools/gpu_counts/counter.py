"""Counts what an update would ask of a GPU, from operations on CUDA tensors without values.

Tensors of the host keep their values and are computed as ever; tensors of the device have only shapes. What the host
reads from the device gets a stand-in: what `all` asks holds and any other condition does not, integers are 0, and other
numbers small.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from atr_scale.planner.ops import Collective, collective_of, flops_of, tensors, touched

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
FLOAT = 0.05  # a number that the host reads from the device; it serves as a temperature and as a bound
# The host waits to learn how long their results are. Kernels of each, as a profiler shows them.
KERNELS_OF_UNKNOWN_LENGTH = {
    aten.nonzero: 3,
    aten._unique: 8,
    aten._unique2: 8,
    aten.unique_consecutive: 8,
    aten.unique_dim: 8,
    aten.masked_select: 4,
    aten.bincount: 2,
}
ALLOCATIONS = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.detach,
    aten.lift_fresh,
    aten.record_stream,
}


@dataclass
class Phase:
    """What a part of an update did. flops: by the dtype of the factors. Bytes are read or written by kernels."""

    launches: int = 0
    bytes: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)


class Counts(TorchDispatchMode):
    """Counts inside a `with` block. Enter a FakeTensorMode first.

    phases: by name, in the order of their start. places: (phase, kind, place) of whatever makes the host wait, and of
    host tensors in operations of the device. collectives: (phase, collective, device).
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, Phase] = defaultdict(Phase)
        self.places: Counter[tuple[str, str, str]] = Counter()
        self.collectives: Counter[tuple[str, Collective, str]] = Counter()
        self.current = "other"

    def clear(self) -> None:
        """Forget what was counted so far."""
        self.phases.clear()
        self.places.clear()
        self.collectives.clear()

    def keep(self, name: str) -> None:
        """Forget all phases but one."""
        for phase in [phase for phase in self.phases if phase != name]:
            del self.phases[phase]
        self.places = Counter({key: times for key, times in self.places.items() if key[0] == name})
        self.collectives = Counter({key: times for key, times in self.collectives.items() if key[0] == name})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what follows as the phase `name`."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def wait(self, kind: str) -> None:
        """The host waits for the device here."""
        self.places[self.current, kind, place()] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._collect(func, args, kwargs)
        inputs = list(tensors((args, kwargs)))
        device = kwargs.get("device")
        if not any(x.is_cuda for x in inputs) and (device is None or torch.device(device).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in (aten._to_copy, aten.copy_):
            return self._copy(func, args, kwargs)
        if packet is aten.record_stream:
            return None
        waited = self._wait_for(packet, args, kwargs)
        if waited is not None:
            return waited
        if any(not x.is_cuda and x.ndim > 0 for x in inputs):
            self.places[self.current, f"CPU tensor in {func._schema.name}", place()] += 1
            args, kwargs = tree_map_only(Tensor, _moved, (args, kwargs))
        return self._launch(func, args, kwargs)

    def _launch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        inputs, outputs = list(tensors((args, kwargs))), list(tensors(out))
        mutable = func._schema.is_mutable
        storages = {id(x.untyped_storage()) for x in inputs}
        if outputs and not mutable and all(id(x.untyped_storage()) in storages for x in outputs):
            return out  # a view
        if func.overloadpacket in ALLOCATIONS:
            return out
        self._count(func._schema.name, sum(map(touched, inputs)) + (0 if mutable else sum(map(touched, outputs))))
        if func.overloadpacket is aten.all:
            out.holds = True
        if flops := flops_of(func, args, kwargs, out):
            self.phases[self.current].flops[_precision(func._schema.name, inputs)] += int(flops)
        return out

    def _count(self, name: str, nbytes: int, launches: int = 1) -> None:
        phase = self.phases[self.current]
        phase.launches += launches
        phase.bytes += nbytes
        phase.operations[name.removeprefix("aten::")] += launches

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copies between host and device, and copies on the device."""
        into = func.overloadpacket is aten.copy_
        source: Tensor = args[1] if into else args[0]
        to_device = args[0].is_cuda if into else torch.device(kwargs.get("device") or source.device).type == "cuda"
        non_blocking = bool(kwargs.get("non_blocking", args[2] if into and len(args) > 2 else False))
        if to_device and source.is_cuda:
            if into and _is_same(args[0], source):
                return args[0]  # what `x[i] += y` ends with
            return self._launch(func, args, kwargs)
        size = source.numel() * source.element_size()
        self._count(f"copy to {'device' if to_device else 'host'}", size)
        if to_device:
            if not non_blocking:
                self.wait("blocking copy to device")
            elif size and not _is_pinned(source):
                self.wait("copy to device from memory that is not pinned")
            return args[0] if into else _on_device(source, kwargs)
        if not non_blocking or (into and not _is_pinned(args[0])):
            self.wait("blocking copy to host")
        with unset_fake_temporarily():  # without values: zeros, or what `args[0]` holds
            return args[0] if into else torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _wait_for(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stand-in for a result that the host must wait for, None if it need not."""
        if packet is aten._local_scalar_dense:
            self.wait("item")
            dtype = args[0].dtype
            return False if dtype == torch.bool else FLOAT if dtype.is_floating_point else 0
        if packet is aten.equal:
            self.wait("equal")
            self._count("equal", 2 * touched(args[0]), 2)
            return False
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            repeats: Tensor = args[-1]
            self.wait("repeat_interleave without output_size")
            self._count("repeat_interleave", touched(repeats), 2)
            return torch.empty(repeats.numel(), dtype=torch.int64, device=CUDA)
        if packet in KERNELS_OF_UNKNOWN_LENGTH:
            name = packet.__name__
            self.wait(name.strip("_"))
            self._count(name, touched(args[0]), KERNELS_OF_UNKNOWN_LENGTH[packet])
            return _of_unknown_length(packet, args, kwargs)
        indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
        masks = [x for x in indices if x is not None and x.dtype in (torch.bool, torch.uint8)]
        if masks:
            self.wait("index by a mask")
            self._count("index by a mask", touched(args[0]) + touched(masks[0]), 4)
            if packet is not aten.index:
                return args[0]
            return args[0].new_empty(masks[0].numel(), *args[0].shape[masks[0].ndim :])
        return None

    def _collect(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        collective, given = collective_of(func, args)
        devices = {x.device.type for x in given}
        device = "cuda" if "cuda" in devices else "cpu"
        self.collectives[self.current, collective, device] += 1
        if device == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self._count(collective.name, collective.nbytes)
        return func(*args, **kwargs)


def _moved(x: Tensor) -> Tensor:
    return x if x.is_cuda or x.ndim == 0 else _on_device(x, {})


def _is_same(x: Tensor, y: Tensor) -> bool:
    def place(t: Tensor) -> tuple[Any, ...]:
        return id(t.untyped_storage()), t.storage_offset(), t.shape, t.stride(), t.dtype

    return place(x) == place(y)


def _is_pinned(x: Tensor) -> bool:
    with unset_fake_temporarily():
        return x.is_pinned()


def _on_device(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    kept = {name: kwargs[name] for name in ("dtype", "memory_format") if kwargs.get(name) is not None}
    with unset_fake_temporarily():
        like = torch.empty_like(source, device="meta", **kept)
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=CUDA)


def _of_unknown_length(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x: Tensor = args[0]
    if packet is aten.nonzero:
        return x.new_empty(x.shape[0] if x.ndim else 1, x.ndim, dtype=torch.int64)
    if packet is aten.bincount:
        return x.new_empty(kwargs.get("minlength", args[2] if len(args) > 2 else 1), dtype=torch.int64)
    if packet is aten.masked_select:
        return x.new_empty(x.numel())
    results = (x.new_empty(x.shape), *(x.new_empty(len(x), dtype=torch.int64) for _ in range(2)))
    return results[:2] if packet is aten._unique else results


def _precision(name: str, inputs: list[Tensor]) -> str:
    """The dtype of an operation's products, tf32 if fp32 ones may be rounded to it."""
    dtypes = {x.dtype for x in inputs if x.is_floating_point()}
    for dtype, short in ((torch.float64, "fp64"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        if dtype in dtypes:
            return short
    backends: Any = torch.backends  # whose types do not have all of them
    settings = backends.cudnn.conv if "convolution" in name else backends.cuda.matmul
    return "tf32" if settings.fp32_precision == "tf32" else "fp32"


_SITE = sysconfig.get_paths()["purelib"] + os.sep
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OWN = str(Path(__file__).parent) + os.sep
_ROOT = str(Path(__file__).parents[2]) + os.sep


def place() -> str:
    """file:line and function of the innermost frame outside of torch and the standard library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        standard = name.startswith(_STANDARD) and not name.startswith(_SITE)
        if not (standard or name.startswith(("<", _TORCH, _OWN))):
            return f"{name.removeprefix(_SITE).removeprefix(_ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"
