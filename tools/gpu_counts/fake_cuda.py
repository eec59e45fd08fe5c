"""torch.cuda without a device, and a process group whose collectives move nothing.

What the functions of torch.cuda would do to the count, they do: `synchronize` waits, the others do nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tools.gpu_counts.counter import CUDA, FLOAT, Counts
from tools.gpu_counts.guard import Unavailable

MEMORY = 80 * 2**30  # bytes of the device


class _NoDevice(FakeTensorMode):
    avoid_device_init = True  # although torch.cuda is "available": there is none to initialise


@contextmanager
def counted(ranks: int) -> Iterator[tuple[Counts, FakeTensorMode]]:
    """Count what is done inside on the device "cuda", as rank 0 of `ranks`."""
    mode, counts = _NoDevice(allow_non_fake_inputs=True), Counts()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # DeepSpeed looks at the alignment of its buffers. These have no memory, and any answer will do.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for target, changes in _patches(counts):
            stack.enter_context(mock.patch.multiple(target, create=True, **changes))
        if ranks > 1:
            stack.enter_context(_group(ranks))
        stack.enter_context(mode)
        stack.enter_context(counts)
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        # torch's choice between kernels needs a device. A function mode would not see what backward computes again.
        library.impl("scaled_dot_product_attention", _attention, "AutogradCUDA")
        yield counts, mode


def check() -> None:
    """Raises guard.Unavailable if forward and backward pass do not run in this version of torch."""
    try:
        with counted(1):
            x = torch.empty(4, 4, device=CUDA, requires_grad=True)
            (x @ x).sum().backward()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(f"torch {torch.__version__} does not run CUDA tensors without values: {reason}") from error


@contextmanager
def _group(ranks: int) -> Iterator[None]:
    """Rank 0 of `ranks`: a group that says it is NCCL's, and side groups of any backend."""
    # torch has no public process group that needs no other processes.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    names: dict[Any, str] = {}
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **{**kwargs, "backend": "fake"})
        names[group] = kwargs.get("backend") or "nccl"
        return group

    def same_object(gathered: list[Any], value: Any, group: Any = None) -> None:
        gathered[:] = [value] * len(gathered)

    changes: dict[str, Any] = {
        "new_group": fake_group,
        "get_backend": lambda group=None: names.get(group, "nccl"),
        "all_gather_object": same_object,
    }
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with mock.patch.multiple(dist, **changes):
            yield
    finally:
        # DeepSpeed keeps groups of its own in the module, which are of no use in the next group.
        (deepspeed.comm if deepspeed.comm.is_initialized() else dist).destroy_process_group()


def _patches(counts: Counts) -> Iterator[tuple[Any, dict[str, Any]]]:
    def tolist(self: FakeTensor) -> Any:
        counts.wait("tolist")
        return _filled(self.shape, FLOAT if self.is_floating_point() else self.dtype != torch.bool and 0)

    def is_true(self: FakeTensor) -> bool:
        counts.wait("bool")
        return getattr(self, "holds", False)

    yield FakeTensor, {"tolist": tolist, "__bool__": is_true}
    # torch runs its kernels over lists of tensors only on these types.
    kinds = [torch.Tensor, nn.Parameter, FakeTensor]
    yield sys.modules["torch.optim.optimizer"], {"_foreach_supported_types": kinds}
    yield sys.modules["torch.utils._foreach_utils"], {"_foreach_supported_types": kinds}

    class Event:
        """Of torch.cuda: it has always happened."""

        def __init__(self, **options: Any) -> None: ...
        def record(self, stream: Any = None) -> None: ...
        def wait(self, stream: Any = None) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            counts.wait("Event.synchronize")

        def elapsed_time(self, end: Any) -> float:
            return FLOAT

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **options: Any) -> Stream:
            return super().__new__(cls, CUDA)

        def wait_event(self, event: Any) -> None: ...
        def wait_stream(self, stream: Any) -> None: ...
        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def synchronize(self) -> None:
            counts.wait("Stream.synchronize")

    default = Stream()
    properties = SimpleNamespace(
        name="no device", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20
    )
    numbers = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    nothing = ("set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all", "init")
    changes: dict[str, Callable[..., Any]] = {
        **dict.fromkeys(numbers, lambda *args: 0),
        **dict.fromkeys(nothing, lambda *args: None),
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **options: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *args: counts.wait("torch.cuda.synchronize"),
        "current_stream": lambda *args: default,
        "default_stream": lambda *args: default,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "mem_get_info": lambda *args: (MEMORY, MEMORY),
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_name": lambda *args: properties.name,
        "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *args: None,
        "is_current_stream_capturing": lambda: False,
        "Event": Event,
        "Stream": Stream,
    }
    yield torch.cuda, changes
    yield torch.cuda.nvtx, dict.fromkeys(("range_push", "range_pop", "mark"), lambda *args: None)
    yield torch, {"compile": lambda function=None, **options: function or (lambda given: given)}


def _filled(shape: torch.Size, value: Any) -> Any:
    return [_filled(shape[1:], value) for _ in range(shape[0])] if shape else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The fused attention of a GPU: flash without a mask in 16 bits, else the memory-efficient kernel."""
    out: Tensor
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )
        return out
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, float("-inf"))
        bias = bias.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    needs_gradient = any(x.requires_grad for x in (query, key, value))
    out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
    )
    return out
