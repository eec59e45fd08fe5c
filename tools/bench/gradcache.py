"""GradCache: time and memory of chunks, and 32,768 pairs in one loss on one process and on two.

    python -m tools.bench.gradcache [--json FILE]

If no graph is kept, every chunk is encoded twice. The row "a second whole forward" is the cost of this if chunks are as
fast as the whole batch: 4/3 if a backward pass takes as long as two forward passes. On a processor small chunks stay in
the cache and are faster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from tools.bench import steps
from tools.bench.measure import peak_mib, seconds
from tools.bench.table import Row, run
from tools.parity import trainable, with_train
from tools.ranks import run_ranks

SIZE, CHUNK, SECONDS = 32, 8, 10.0
# Kept chunks -> the largest ratio of times.
KEPT = {0: 1.25, SIZE // CHUNK // 2: 1.12, SIZE // CHUNK: 1.03}
LARGE, LARGE_CHUNK, SHORT = 32_768, 256, 1.0


def costs(configs: list[RunConfig]) -> dict[str, Any]:
    """Seconds and peak MiB of an optimizer step of each configuration, seconds of a forward without a graph."""
    engines = [steps.start(config) for config in configs]
    whole = engines[0].model
    batch = steps.noise(SIZE, SECONDS, whole.sample_rate, World.current())

    @torch.no_grad()
    def forward() -> None:
        whole(batch.to(steps.device()))

    timed = [lambda engine=engine: steps.update(engine, batch) for engine in engines]
    *times, alone = seconds(*timed, forward)
    return {"times": times, "forward": alone, "memory": [peak_mib(step) for step in timed]}


def first_gradients(config: RunConfig) -> dict[str, np.ndarray]:
    """The gradients of one update, as the optimizer gets them."""
    engine = steps.start(config)
    found: dict[str, np.ndarray] = {}
    step = engine.deepspeed.step  # called when gradients are complete and not yet clipped

    def keep_and_step() -> None:
        found.update({n: p.grad.cpu().numpy().copy() for n, p in trainable(engine) if p.grad is not None})
        step()

    engine.deepspeed.step = keep_and_step
    world = World.current()
    result = steps.update(engine, steps.noise(LARGE, SHORT, engine.model.sample_rate, world))
    assert result.applied and found
    return found


def rows() -> Iterable[Row]:
    for audio in ("tiny_htsat", "mn04"):
        with tempfile.TemporaryDirectory() as folder:
            whole = steps.configuration(Path(folder), audio, dim=64, global_batch_size=SIZE)
            chunked = [with_train(whole, micro_batch_size=CHUNK, kept_chunks=kept) for kept in KEPT]
            (found,) = run_ranks(costs, 1, [whole, *chunked])
        (one_time, *times), (one_memory, *memory) = found["times"], found["memory"]
        yield Row(f"{audio}: a second whole forward", one_time + found["forward"], one_time, "one forward", "s")
        for kept, time, peak in zip(KEPT, times, memory, strict=True):
            name = f"{audio}: {SIZE} pairs in chunks of {CHUNK}, {kept} kept"
            yield Row(f"{name}: time", time, one_time, "one forward", "s", KEPT[kept])
            yield Row(f"{name}: memory", peak, one_memory, "one forward", "MiB")
    with tempfile.TemporaryDirectory() as folder:
        large = steps.configuration(
            Path(folder), "small_cnn", dim=32, layers=1, global_batch_size=LARGE, micro_batch_size=LARGE_CHUNK
        )
        one, two = (run_ranks(first_gradients, size, large)[0] for size in (1, 2))
    difference = max(float(np.abs(two[name] - gradient).max()) for name, gradient in one.items())
    largest = max(float(np.abs(gradient).max()) for gradient in one.values())
    yield Row(f"{LARGE:,} pairs: gradient, 1 - 2 processes", difference, largest, "largest gradient", "", 1e-4)


if __name__ == "__main__":
    run(__doc__, rows)
