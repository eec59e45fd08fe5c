"""Collectives really through the network's library, on a group of this one process, in every dtype that is sent.

`World` does not communicate in a world of one, so torch.distributed is called here, and World with a size that does not
equal 1. One rank gets its own data back, whatever the collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from atr_scale.compat import all_gather_single, reduce_scatter_single
from atr_scale.distributed.start import distributed
from atr_scale.distributed.world import World
from tools.gpu_check.rows import Case, Row, compared
from tools.gpu_check.runner import Setting

# Embeddings and tokens, float64 in tests; ids; masks as bytes.
GATHERED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
REDUCED = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32)  # gradients, statistics, counts
SCATTERED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # gradients of gathered rows
Collective = Callable[[Tensor], Tensor]


class _One(int):
    """The number 1, which no short cut of a world of one recognises."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def cases(setting: Setting) -> Iterator[Case]:
    with distributed() as (current, device):
        for name, (collective, dtypes) in COLLECTIVES.items():
            for dtype in dtypes:
                yield f"{name}, {str(dtype).removeprefix('torch.')}", partial(unchanged, collective, dtype, device)
        world = World(0, _One(1), current.group, current.host)
        yield "World.gather and its gradient", partial(with_gradient, world.gather, device)
        yield "World.start_gather and its gradient", partial(with_gradient, lambda x: world.start_gather(x)(), device)
        yield "World.sum and max", partial(statistics, world, device)
        yield "numbers and objects over the host's group", partial(of_the_host, world)


def unchanged(collective: Collective, dtype: torch.dtype, device: torch.device) -> Row:
    """What comes back must be what was sent, bit for bit; 0 or infinity is the error."""
    sent = torch.arange(-60, 60, device=device).reshape(12, 10).to(dtype)
    return _same(torch.equal(collective(sent.clone()), sent))


def with_gradient(gather: Collective, device: torch.device) -> Row:
    local = torch.randn(6, 4, device=device, requires_grad=True)
    gathered = gather(local)
    weight = torch.randn_like(gathered)
    (gradient,) = torch.autograd.grad((gathered * weight).sum(), local)
    return _same(torch.equal(gathered, local) and torch.equal(gradient, weight))


def statistics(world: World, device: torch.device) -> Row:
    value = torch.randn(9, device=device, dtype=torch.float64)
    return _same(torch.equal(world.sum(value), value) and torch.equal(world.max(value), value))


def of_the_host(world: World) -> Row:
    world.barrier()
    return _same(world.gather_ints(7) == [7] and world.gather_objects({"rank": 0}) == [{"rank": 0}])


def _same(equal: bool) -> Row:
    return compared(0.0 if equal else float("inf"), 0.0)


def _gather(sent: Tensor) -> Tensor:
    out = torch.zeros_like(sent)
    all_gather_single(out, sent)
    return out


def _scatter(sent: Tensor) -> Tensor:
    out = torch.zeros_like(sent)
    reduce_scatter_single(out, sent)
    return out


def _gather_list(sent: Tensor) -> Tensor:
    out = [torch.zeros_like(sent)]
    dist.all_gather(out, sent)
    return out[0]


def _gather_later(sent: Tensor) -> Tensor:
    """On the library's own stream, while this one computes."""
    out = torch.zeros_like(sent)
    work = all_gather_single(out, sent, async_op=True)
    torch.ones(256, 256, device=sent.device).square().sum()
    work.wait()
    return out


def _reduce(sent: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    dist.all_reduce(sent, op=op)
    return sent


def _broadcast(sent: Tensor) -> Tensor:
    dist.broadcast(sent, 0)
    return sent


COLLECTIVES: dict[str, tuple[Collective, tuple[torch.dtype, ...]]] = {
    "all-gather": (_gather, GATHERED),
    "all-gather, started and waited for": (_gather_later, GATHERED),
    "all-gather of a list": (_gather_list, (torch.int64,)),
    "reduce-scatter": (_scatter, SCATTERED),
    "all-reduce, sum": (_reduce, REDUCED),
    "all-reduce, maximum": (partial(_reduce, op=dist.ReduceOp.MAX), REDUCED),
    "broadcast": (_broadcast, GATHERED),
}
