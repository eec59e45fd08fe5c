"""How long a save keeps training waiting: the copy into main memory, against the whole save.

    python -m tools.bench.saving [--json FILE]

Both are of the same save, whose files a thread writes: until training may go on, and until `latest` leads to it.
Seconds of the wall clock on the disk of the temporary folder (TMPDIR), medians of the saves after the first one, whose
copies need new memory. The savers are those of a run. Needs 14 GB of main memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.training.monitor import Monitor
from atr_scale.training.saving import Saver
from tools.bench import steps
from tools.bench.table import Row, run
from tools.ranks import run_ranks

TARGET = 0.15
SAVES = 6  # behind the first one
# Options of the model; ranks and ZeRO stages. Two ranks of ZeRO 3 would need more memory at 300 M parameters.
SIZES: tuple[tuple[str, dict[str, Any], tuple[tuple[int, int], ...]], ...] = (
    (" (the demo's model)", {"dim": 192, "layers": 2}, ((1, 0), (2, 1), (2, 3))),
    ("", {"dim": 1024, "layers": 11}, ((2, 3),)),
    ("", {"dim": 1024, "layers": 23}, ((1, 0), (2, 1))),
)


def times(config: RunConfig) -> dict[str, Any]:
    """Seconds of each save: until training may go on, and until the checkpoint is there. The slowest rank's count."""
    world, folder = World.current(), Path(config.run.dir)
    engine = steps.start(config)
    batch = steps.noise(config.train.global_batch_size, 1.0, engine.model.sample_rate, world)
    monitor = Monitor(folder, world.is_main)
    saver = Saver(config, world, monitor, None)
    waited, whole = list[float](), list[float]()
    for step in range(1, SAVES + 2):
        steps.update(engine, batch)
        world.barrier()
        start = time.perf_counter()
        monitor.flush()
        saver.start(engine, {"step": step}, lambda: False)
        waited.append(time.perf_counter() - start)
        assert saver.finish(lambda: False)
        whole.append(time.perf_counter() - start)
    slowest = [
        [max(of_rank) for of_rank in zip(*world.gather_objects(found), strict=True)] for found in (waited, whole)
    ]
    numbers = (getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.model.parameters())
    return {"waited": slowest[0], "whole": slowest[1], "parameters": sum(numbers)}


def rows() -> Iterable[Row]:
    for name, size, shapes in SIZES:
        for ranks, stage in shapes:
            with tempfile.TemporaryDirectory() as folder:
                config = steps.configuration(
                    Path(folder), "small_cnn", **size, global_batch_size=2, zero_stage=stage, keep_checkpoints=1
                )
                found = run_ranks(times, ranks, config)[0]
            (first_wait, *waits), (first, *wholes) = found["waited"], found["whole"]
            millions, of = found["parameters"] / 1e6, f"{ranks} rank{'s' * (ranks > 1)}, ZeRO {stage}"
            shape = f"{millions:.0f} M parameters{name}, {of}"
            yield Row(f"{shape}: training waits", median(waits), median(wholes), "the whole save", "s", TARGET)
            yield Row(f"{shape}: at the first save", first_wait, first, "the whole save", "s")


if __name__ == "__main__":
    run(__doc__, rows)
