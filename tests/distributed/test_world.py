"""Numbers and objects travel over the group of the host, and never over that of the GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from atr_scale.config import RunConfig
from atr_scale.distributed import world as module
from atr_scale.distributed.world import World
from atr_scale.training.parts import new_model
from tools.bench import steps
from tools.ranks import run_ranks


def beside_nccl() -> dict[str, Any]:
    """What a rank gets if its default group calls itself NCCL, and the groups that carried it."""
    carried: list[Any] = []
    setattr(dist, "get_backend", lambda group=None: "nccl")  # noqa: B010
    world = World.current()
    for name in ("all_gather", "all_gather_object", "all_reduce", "barrier"):
        call = getattr(dist, name)

        def watched(*args: Any, call: Any = call, group: Any = None, **options: Any) -> Any:
            carried.append(group)
            return call(*args, group=group, **options)

        setattr(dist, name, watched)
    world.barrier()
    return {
        "ints": world.gather_ints(world.rank + 5),
        "max": world.max_int(-world.rank),
        "objects": world.gather_objects({"rank": world.rank}),
        "each": list(world.gather_each([f"{world.rank}{number}" for number in range(3 - world.rank)])),
        "none": list(world.gather_each([])),
        "here": world.ranks_here(),
        "beside": world.host is not world.group and all(group is world.host for group in carried),
        "once": World.current().host is world.host,
    }


@pytest.mark.slow
def test_the_host_has_its_own_group() -> None:
    for found in run_ranks(beside_nccl, 2):
        assert found == {
            "ints": [5, 6],
            "max": 0,
            "objects": [{"rank": 0}, {"rank": 1}],
            "each": ["00", "10", "01", "11", "02"],
            "none": [],
            "here": 2,
            "beside": True,
            "once": True,
        }


def groups() -> bool:
    world = World.current()
    return world.host is world.group


def test_gloo_serves_both() -> None:
    assert run_ranks(groups, 1) == [True]
    assert World().host is None and World().gather_objects(3) == [3] and list(World().gather_each([1, 2])) == [1, 2]


def halves() -> dict[str, Any]:
    """What a gather in two halves gives beside the whole one, and what the autograd engine does in which order."""
    world, events = World.current(), list[str]()
    torch.manual_seed(world.rank)
    own = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(world.size * 3, 4, dtype=torch.float64)

    def loud(name: str, collective: Any) -> Any:
        def called(*args: Any, **named: Any) -> Any:
            assert named["async_op"]
            events.append(name)
            return collective(*args, **named)

        return called

    (world.gather(own) * weights).sum().backward()
    expected, own.grad = own.grad, None
    for name, collective in (("gather", "all_gather_single"), ("sum", "reduce_scatter_single")):
        setattr(module, collective, loud(name, getattr(module, collective)))

    text = own * 1
    text.register_hook(lambda gradient: events.append("text encoder"))
    finish = world.start_gather(text)
    audio = torch.ones(2, requires_grad=True) * 2
    events.append("audio encoder")
    audio.register_hook(lambda gradient: events.append("audio encoder"))
    gathered = finish()
    ((gathered * weights).sum() + audio.sum()).backward()
    assert own.grad is not None and expected is not None
    return {"events": events, "equal": torch.equal(own.grad, expected), "rows": gathered.shape[0]}


@pytest.mark.slow
def test_a_gather_in_two_halves_runs_beside_what_is_between_them() -> None:
    """The texts travel while the clips are encoded, their gradients while the audio encoder is in its backward pass."""
    for found in run_ranks(halves, 2):
        assert found["equal"] and found["rows"] == 6
        assert found["events"] == ["gather", "audio encoder", "sum", "audio encoder", "text encoder"]


def texts_and_clips(config: RunConfig) -> list[str]:
    """What a forward pass does in which order, up to the first gather of the loss."""
    model, events = new_model(config, World.current())[0], list[str]()
    start, encode = World.start_gather, model.encode_audio

    def starts(world: World, local: torch.Tensor) -> Any:
        events.append("texts leave")
        finish = start(world, local)
        return lambda: (events.append("texts are awaited"), finish())[1]

    def encodes(*args: Any) -> Any:
        events.append("clips are encoded")
        return encode(*args)

    World.start_gather, model.encode_audio = starts, encodes  # type: ignore[method-assign, assignment]
    model(steps.noise(4, 1.0, model.sample_rate, World.current()))
    return events


@pytest.mark.slow
def test_texts_travel_while_clips_are_encoded(tmp_path: Path) -> None:
    # Here, because it writes a text encoder, which one rank must not read while the other one writes.
    config = steps.configuration(tmp_path, "small_cnn", dim=16, global_batch_size=4)
    for events in run_ranks(texts_and_clips, 2, config):
        assert events == ["texts leave", "clips are encoded", "texts are awaited"]
