"""Gradients cross ranks in buckets during the last backward pass: exact sums, early, once, whatever a step uses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.training.gradient_reduction import GradientReduction, Sharding, Slice
from tools.bench import steps
from tools.ranks import run_ranks

WIDTH, LAYERS = 6, 4
LAYER_BYTES = 8 * (WIDTH * WIDTH + WIDTH)
CUTS = (0, 60, 150)  # where the shares of the ranks begin among the values of all parameters


class Net(nn.Module):
    """Layers in a row, a head behind them, one that only some inputs use, one that nothing uses, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, 2)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.double().frozen.requires_grad_(False)

    def forward(self, rows: Tensor, more: bool) -> Tensor:
        out = self.layers(self.frozen(rows)).tanh()
        return (self.sometimes(out) if more else out).square().sum()


def learned(net: Net) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def rows(step: int, number: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * number + rank)
    return torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)


def uses_more(step: int, rank: int) -> bool:
    return (step + rank) % 2 == 1


def expected(net: Net, step: int, size: int) -> list[Tensor]:
    """The sums over ranks and both batches, of one process."""
    total = torch.stack(
        [net(rows(step, number, rank), uses_more(step, rank)) for rank in range(size) for number in (0, 1)]
    ).sum()
    found = torch.autograd.grad(total, learned(net), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(learned(net), found, strict=True)]


def sharding(parameters: list[nn.Parameter], world: World) -> Sharding:
    """Unequal shares of all values end to end, as one partition a rank."""
    shares = list(pairwise((*CUTS[: world.size], sum(parameter.numel() for parameter in parameters))))
    places = {}
    first = 0
    for parameter in parameters:
        last = first + parameter.numel()
        places[parameter] = [
            Slice(max(start, first) - first, min(stop, last) - first, owner, 0, max(start, first) - start)
            for owner, (start, stop) in enumerate(shares)
            if max(start, first) < min(stop, last)
        ]
        first = last
    start, stop = shares[world.rank]
    return Sharding(places.__getitem__, lambda: [torch.zeros(stop - start, dtype=torch.float64)])


def whole(owned: list[Tensor], world: World) -> Tensor:
    """All values end to end, from the partitions of all ranks."""
    return torch.cat(world.gather_objects(owned[0]))


def sums(sharded: bool, dtype: torch.dtype | None) -> list[float]:
    """Largest errors of three steps, relative to the largest gradient. A step has two batches, the last one is sent."""
    world, net = World.current(), Net()
    parameters = learned(net)
    reduction = GradientReduction(
        parameters,
        world,
        dtype=dtype,
        sharding=sharding(parameters, world) if sharded else None,
        most_in_flight=1,
        bucket_bytes=2 * LAYER_BYTES,
    )
    errors = []
    for step in range(3):
        more = uses_more(step, world.rank)
        net(rows(step, 0, world.rank), more).backward()
        last = net(rows(step, 1, world.rank), more)
        reduction.begin([[last]])
        last.backward()
        owned = reduction.finish()
        found = whole(owned, world) if sharded else torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        wanted = torch.cat([gradient.flatten() for gradient in expected(net, step, world.size)])
        errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
        assert reduction.local_sum().isfinite()
        net.zero_grad()
    return errors


def all_sums() -> dict[str, list[float]]:
    return {
        f"{'sharded' if sharded else 'replicated'} {dtype}": sums(sharded, dtype)
        for sharded in (False, True)
        for dtype in (None, torch.bfloat16)
    }


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_sums_are_exact_whatever_a_step_uses(size: int) -> None:
    """Also with parameters that no rank uses, or one rank alone, and in steps that use others than the first one."""
    for rank in run_ranks(all_sums, size):
        for case, errors in rank.items():
            # bf16 has 8 bits: of each term, and once more of each sum.
            limit = 1e-12 if case.endswith("None") or (size == 1 and case.startswith("replicated")) else 1e-2
            assert max(errors) < limit, (case, errors)
            assert limit < 1e-3 or max(errors) > 1e-5, "bf16 was asked for"


def recorded(run: Callable[[GradientReduction, Net], None]) -> list[str]:
    """What happens in a step, in order: gradients that become complete, and collectives with their number of values."""
    world, net = World.current(), Net()
    reduction = GradientReduction(learned(net), world, bucket_bytes=LAYER_BYTES)
    events: list[str] = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and name.endswith("weight"):
            parameter.register_hook(lambda gradient, name=name: events.append(name))
    all_reduce: Any = dist.all_reduce

    def spy(values: Tensor, **named: Any) -> Any:
        assert named["async_op"]
        events.append(f"sent {values.numel()}")
        return all_reduce(values, **named)

    dist.all_reduce = spy  # type: ignore[assignment]
    run(reduction, net)
    dist.all_reduce = all_reduce
    return events


def one_pass(reduction: GradientReduction, net: Net) -> None:
    loss = net(rows(0, 0, 0), more=False)
    reduction.begin([[loss]])
    loss.backward()
    reduction.finish()


def two_passes(reduction: GradientReduction, net: Net) -> None:
    net(rows(0, 0, 0), more=True).backward()
    one_pass(reduction, net)


def orders() -> list[list[str]]:
    return [recorded(one_pass), recorded(two_passes)]


@pytest.mark.slow
def test_a_bucket_is_sent_as_soon_as_it_is_full() -> None:
    """And once, in the last backward pass; what that pass does not reach is sent at the end."""
    layers = [f"layers.{number}.weight" for number in reversed(range(LAYERS))]
    size = WIDTH * WIDTH + WIDTH
    for one, two in run_ranks(orders, 2):
        assert [event for event in one if event in layers] == layers
        for earlier, later in pairwise(layers):
            between = one[one.index(earlier) : one.index(later)]
            assert between == [earlier, f"sent {size}"], one
        assert one[one.index(layers[-1]) :] == [layers[-1], f"sent {size}", f"sent {size}", f"sent {2 * WIDTH + 2}"]
        before = ["sometimes.weight", *layers]
        assert two == before + one


def completed(configs: list[RunConfig]) -> list[list[tuple[str, int]]]:
    return [completed_in_order(config) for config in configs]


def completed_in_order(config: RunConfig) -> list[tuple[str, int]]:
    """Encoders whose gradients become complete in an update, in order, and how many buckets were sent before each."""
    engine = steps.start(config)
    reduction = engine._passes._reduction  # type: ignore[attr-defined]
    reduction.bucket_bytes = 1
    batch = steps.noise(4, 1.0, engine.model.sample_rate, engine.world)
    steps.update(engine, batch)
    events: list[tuple[str, int]] = []
    for side in ("text_encoder", "audio_encoder"):
        for parameter in getattr(engine.model, side).parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, side=side: events.append((side, reduction._next)) if reduction._active else None
            )
    steps.update(engine, batch)
    return events


@pytest.mark.slow
def test_the_larger_gradients_are_sent_beside_the_other_backward_pass(tmp_path: Path) -> None:
    """Each gradient is sent when it is complete, and the larger encoder's come first; also in GradCache's last pass."""
    sizes: list[dict[str, Any]] = [{"dim": 256}, {"dim": 16}, {"dim": 256, "micro_batch_size": 1, "zero_stage": 1}]
    # Here, because it writes a text encoder, which one rank must not read while the other one writes.
    configs = [
        steps.configuration(tmp_path / str(number), "small_cnn", global_batch_size=4, **size)
        for number, size in enumerate(sizes)
    ]
    for rank in run_ranks(completed, 2, configs):
        for size, events in zip(sizes, rank, strict=True):
            sides = [side for side, _ in events]
            order = ["text_encoder", "audio_encoder"] if size["dim"] == 256 else ["audio_encoder", "text_encoder"]
            assert sides == sorted(sides, key=order.index), size
            assert all(before < after for (_, before), (_, after) in pairwise(events)), (size, events)
