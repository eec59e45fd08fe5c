"""What a step costs between the last gradient and the updated parameters: few kernels, and no number read."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from tools.bench.steps import configuration, noise, start, update
from tools.ranks import run_ranks

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach"}
MOST_LAUNCHES = 100
BF16 = {"gradient_dtype": "bf16", "precision": "bf16"}


class Operations(TorchDispatchMode):
    """Counts operations that are kernels on a GPU, numbers that the host reads, and bytes given to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.reads = 0
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name == "_local_scalar_dense":
            self.reads += 1
        elif func.namespace == "c10d":
            given = args[0] if name.startswith(("allreduce", "reduce_")) else args[1]
            self.sent[name.strip("_")] += sum(x.nbytes for x in tree_leaves(given) if isinstance(x, Tensor))
        elif func.namespace == "aten" and not (name in NO_KERNEL or func.is_view):
            self.launches[name] += 1
        return out


def steps(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """Of the second update with each configuration."""
    world, found = World.current(), []
    for config in configs:
        engine = start(config)
        batch = noise(4, 1.0, engine.model.sample_rate, world)
        update(engine, batch)
        with Operations() as passes, step_alone(engine) as step:
            update(engine, batch)
        learned = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
        found.append(
            {
                "tensors": len(learned),
                "values": sum(parameter.numel() for parameter in learned),
                "launches": step.launches,
                "reads": step.reads,
                "sent": dict(passes.sent),
            }
        )
    return found


@contextmanager
def step_alone(engine: Any) -> Any:
    """Operations from the end of the last backward pass on."""
    mode, agree = Operations(), engine._agree

    def counted(*args: Any) -> Any:
        mode.__enter__()
        return agree(*args)

    engine._agree = counted
    yield mode
    mode.__exit__(None, None, None)


@pytest.mark.slow
def test_a_step_is_few_kernels_and_reads_nothing(tmp_path: Path) -> None:
    """DeepSpeed's part included. The gradient crosses the network once, in fp32 or bf16, and only to its owner."""
    stages: list[dict[str, Any]] = [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2, **BF16}]
    # Built here: a rank other than 0 would read the text encoder while rank 0 writes it.
    configs = [configuration(tmp_path, "tiny_htsat", dim=256, layers=4, global_batch_size=4, **each) for each in stages]
    for rank in run_ranks(steps, 2, configs):
        for train, found in zip(stages, rank, strict=True):
            assert found["tensors"] == 227
            assert found["reads"] == 0, train
            assert found["launches"].total() <= MOST_LAUNCHES, (train, found["launches"])
            gradient = (2 if "gradient_dtype" in train else 4) * found["values"]
            small = 8 * (3 + 1 + 2)  # norms of three groups, stop, a flag of each rank
            sent = found["sent"]
            statistics = sent["allreduce"] - small
            if train["zero_stage"] == 0:
                assert 0 <= statistics - gradient < 2048, train
                assert "reduce" not in sent
            else:
                assert sent["reduce"] == gradient and 0 <= statistics < 2048, train
