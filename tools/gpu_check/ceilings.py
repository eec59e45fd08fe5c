"""What the device can do at most, each in its simplest form: every share in the report is of these.

The planner reads these rows by their names (`atr-scale plan --measured`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from atr_scale.distributed.start import distributed
from atr_scale.products import fp32_products
from tools.gpu_check.measure import median_ms
from tools.gpu_check.rows import Case, Row, Skip
from tools.gpu_check.runner import Setting

PRODUCTS = {
    "gemm bf16": torch.bfloat16,
    "gemm tf32": torch.float32,
    "gemm fp32": torch.float32,
    "gemm fp64": torch.float64,
}
CALLS = 1000  # of a launch or of a collective between two events


def cases(setting: Setting) -> Iterator[Case]:
    yield "copy", partial(copy, setting)
    for name in PRODUCTS:
        yield name, partial(gemm, setting, name)
    yield "host to device pinned", partial(to_device, setting, True)
    yield "host to device pageable", partial(to_device, setting, False)
    yield "launch", partial(launch, setting)
    yield "nccl start", partial(collective, setting)


def copy(setting: Setting) -> Row:
    """Read and write of one large tensor."""
    size = 1 << (22 if setting.quick else 28)
    source = torch.empty(size, device=setting.device).normal_()
    out = torch.empty_like(source)
    return _moved(2 * 4 * size, lambda: out.copy_(source))


def gemm(setting: Setting, name: str) -> Row:
    """A square product."""
    if name == "gemm tf32" and not setting.cuda:
        raise Skip("needs CUDA")
    size = 256 if setting.quick else 4096 if name == "gemm fp64" else 8192
    dtype = PRODUCTS[name]
    left, right = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
    with fp32_products("tf32" if name == "gemm tf32" else "ieee"):
        ms = _warm_ms(lambda: left @ right)
    return Row(ms=ms, tflops=2 * size**3 / ms / 1e9)


def to_device(setting: Setting, pinned: bool) -> Row:
    if not setting.cuda:
        raise Skip("needs CUDA")
    source = torch.ones(1 << (20 if setting.quick else 26), pin_memory=pinned)
    out = torch.empty_like(source, device="cuda")
    return _moved(4 * source.numel(), lambda: out.copy_(source, non_blocking=True))


def launch(setting: Setting) -> Row:
    """One operation on one number, in a row of them: the host's time for a launch."""
    value = torch.zeros(1, device=setting.device)

    def many() -> None:
        for _ in range(CALLS):
            value.add_(1)

    return Row(ms=_warm_ms(many) / CALLS)


def collective(setting: Setting) -> Row:
    """One all-reduce of one number by the network's library, in a row of them."""
    if not setting.cuda:
        raise Skip("needs CUDA")
    with distributed() as (_, device):
        value = torch.zeros(1, device=device)

        def many() -> None:
            for _ in range(CALLS):
                dist.all_reduce(value)

        return Row(ms=_warm_ms(many) / CALLS)


def _moved(nbytes: int, move: Callable[[], Tensor]) -> Row:
    ms = _warm_ms(move)
    return Row(ms=ms, gb_per_s=nbytes / ms / 1e6)


def _warm_ms(function: Callable[[], object]) -> float:
    function()
    return median_ms(function, lambda _: (), repeats=7)
