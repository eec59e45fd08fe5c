"""Measurements of one function: time on fresh data, matrix products, launches, waits for the device, memory.

Without CUDA only time and memory are measured, the time as CPU time of the process.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tools.bench.measure import peak_mib
from tools.gpu_check.rows import Row
from tools.gpu_check.runner import Setting

Fresh = Callable[[int], tuple[Any, ...]]  # number of the call -> arguments that no call before has had
CEILINGS = {"ieee": "gemm fp32", "tf32": "gemm tf32", "bf16x3": "gemm bf16", "bf16": "gemm bf16"}
# Calls of the driver that put something on the device. Names of kernels would count annotated ranges as well.
STARTS = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")


def median_ms(step: Callable[..., object], fresh: Fresh, repeats: int = 5) -> float:
    """Median time of step(*fresh(n)), without that of `fresh`."""
    times: list[float] = []
    for number in range(repeats):
        arguments = fresh(number)
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            step(*arguments)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.process_time()
            step(*arguments)
            times.append(1000 * (time.process_time() - began))
        del arguments
    return median(times)


class _Product(NamedTuple):
    """A matrix product: shapes and dtypes, and whether a factor is stored transposed."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    left_transposed: bool
    right_transposed: bool
    dtype: torch.dtype
    out: torch.dtype

    @property
    def flops(self) -> float:
        batch = self.left[0] if len(self.left) == 3 else 1
        return 2.0 * batch * self.left[-2] * self.left[-1] * self.right[-1]


class MatrixProducts(TorchDispatchMode):
    """Records the matrix products that run inside the block, also those of its backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[_Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[:2] if name in ("mm", "bmm") else args[1:3]
            self.counts[_product(left, right, found)] += 1
        return found

    @property
    def flops(self) -> float:
        return sum(product.flops * count for product, count in self.counts.items())

    def alone(self) -> Callable[[], None]:
        """A function that computes the same products and nothing else, each kind on memory of its own."""
        calls = []
        for product, count in self.counts.items():
            left = _operand(product.left, product.left_transposed, product.dtype)
            right = _operand(product.right, product.right_transposed, product.dtype)
            calls.append((left, right, product, count))

        def run() -> None:
            for left, right, product, count in calls:
                multiply: Any = torch.bmm if len(product.left) == 3 else torch.mm
                wider = {} if product.out == product.dtype else {"out_dtype": product.out}
                for _ in range(count):
                    multiply(left, right, **wider)

        return run


def _product(left: Tensor, right: Tensor, out: Tensor) -> _Product:
    first, second = (x.stride(-1) != 1 and x.stride(-2) == 1 for x in (left, right))
    return _Product(tuple(left.shape), tuple(right.shape), first, second, left.dtype, out.dtype)


def _operand(shape: tuple[int, ...], transposed: bool, dtype: torch.dtype) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if transposed:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], device=device).to(dtype).mT
    return torch.randn(*shape, device=device).to(dtype)


@contextmanager
def waits_for_device() -> Iterator[list[str]]:
    """The places in this project or in DeepSpeed at which the host waits for the device inside the block.

    Stream and event waits that a program asks for by name are not among them. An empty list without CUDA.
    """
    places: list[str] = []

    def note(message: Warning | str, *rest: Any, **more: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places.append(_place())

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode(before)


def _place() -> str:
    """The innermost frame in this project or in DeepSpeed, as module:line."""
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in ("atr_scale", "deepspeed"):
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def launches(function: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that `function` puts on the device; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    names: list[str] = [event.name() for event in recorded.profiler.kineto_results.events()]
    return sum(name.startswith(STARTS) for name in names)


def measured(
    setting: Setting,
    step: Callable[..., object],
    fresh: Fresh,
    products: str = "ieee",
    repeats: int = 5,
    alone: bool = True,
) -> Row:
    """Everything about step(*fresh(n)). products: kind of its matrix products, whose ceiling its share is of.

    alone: whether its matrix products are counted and timed by themselves too; not for a compiled function, which
    must not run in a mode.
    """
    recorded = MatrixProducts()
    with recorded if alone else nullcontext():
        step(*fresh(0))
    with waits_for_device() as places:
        step(*fresh(0))
    count = launches(lambda: step(*fresh(0)))
    memory = peak_mib(partial(step, *fresh(0)))
    ms = median_ms(step, fresh, repeats)
    rate = recorded.flops / ms / 1e9 if recorded.counts else None
    ceiling = setting.ceilings.get(CEILINGS[products])
    reference = {}
    if recorded.counts:
        run = recorded.alone()
        run()
        reference["its matrix products alone"] = median_ms(run, lambda _: (), repeats)
    return Row(
        ms=ms,
        tflops=rate,
        share=rate / ceiling.tflops if rate and ceiling and ceiling.tflops else None,
        launches=count,
        syncs=len(places) if setting.cuda else None,
        peak_mib=memory,
        reference=reference,
        note=counted(places),
    )


def counted(places: list[str]) -> str:
    """Each place once with its number of waits."""
    return ", ".join(f"{number} x {place}" for place, number in Counter(places).most_common())
