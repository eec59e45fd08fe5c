"""What crosses ranks in a training step, counted number by number: captions and statistics, and nothing of audio."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.losses import tiled
from tests.distributed.test_scorers import CASES, DIM, OBJECTIVES, SCORERS, B, Model, data, rows_of
from tools.ranks import run_ranks

# Statistics are a few numbers a caption, all-reduced; how many is the objective's business.
MOST_STATISTICS = 8 * B


class Traffic(TorchDispatchMode):
    """Counts the numbers that this rank hands to collectives, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").strip("_")
            # A gather and a scatter name what comes out first; a reduction works in place.
            handed = args[0] if name.startswith("allreduce") else args[1]
            self.sent[name] += sum(x.numel() for x in tree_leaves(handed) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def step(scorer: str, objective: str, frames: int, leak: bool = False) -> dict[str, int]:
    """Numbers sent in forward and backward of one training step; a leak gathers the frames as well."""
    world, model = World.current(), Model(*SCORERS[scorer])
    text, audio, ids = data([frames] * B)
    mine = rows_of(world)
    with Traffic() as traffic:
        encoded_text, encoded_audio = model.encode(text.take(mine), audio.take(mine))
        if leak:
            everywhere = world.gather(encoded_audio.tokens)[mine]
            encoded_audio = TokenSequence(everywhere, encoded_audio.mask, encoded_audio.pooled)
        block = model.scorer.block(encoded_text, encoded_audio, world)
        pairs = (world.gather(ids[mine]), ids[mine])
        loss = getattr(tiled, objective)(block, 0.2, positives=pairs, **OBJECTIVES[objective])
        loss.backward()
    return dict(traffic.sent)


def on_rank() -> dict[str, Any]:
    return {
        "steps": {case: [step(*case, frames) for frames in (4, 40)] for case in CASES},
        "leak": step("tap", "nt_xent", 4, leak=True),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_rank, 2)


def expected(frames: int = 0) -> dict[str, int]:
    """All but the statistics; `frames` of every clip leak."""
    share = B // 2
    return {
        "allgather_base": share * (DIM + 1 + frames * DIM),  # captions' vectors and ids
        "reduce_scatter_base": B * (DIM + frames * DIM),  # the gradient of all captions' vectors
    }


def test_captions_and_statistics_are_all_that_travels(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for case, (short, long) in rank["steps"].items():
            assert short == long, case
            statistics = long.pop("allreduce")
            assert long == expected() and 0 < statistics <= MOST_STATISTICS, case


def test_gathered_frames_would_be_counted(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        leaked = dict(rank["leak"])
        del leaked["allreduce"]
        assert leaked == expected(frames=4)
