"""Writes what this rank trains on into AUDIT.RANK, a line for each batch. tests/faults/audit.py reads it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from typing import Any

import torch

from atr_scale.batch import Batch
from atr_scale.encoders.small_cnn import SAMPLE_RATE


def record(seconds: float = 0.0) -> None:
    """From now on. seconds: by which every step is longer. DeepSpeed is imported."""
    from atr_scale.training.engine import Engine

    update = Engine.update

    def recorded(self: Engine, batches: Iterable[Batch], rates: Any, seeds: Any, context: Any, **more: Any) -> Any:
        given = list(batches)
        with open(f"{os.environ['AUDIT']}.{self.world.rank}", "a", encoding="utf-8") as file:
            for batch in given:
                peaks = [
                    torch.fft.rfft(row[:n].float()).abs().argmax() * SAMPLE_RATE / n
                    for row, n in zip(batch.waveform, batch.lengths, strict=True)
                ]
                line = {"step": context.step + 1, "time": time.time(), "ranks": self.world.size, "keys": batch.keys}
                line |= {"hertz": [float(x) for x in peaks], "tokens": batch.input_ids.tolist()}
                file.write(json.dumps(line) + "\n")
        time.sleep(seconds)
        return update(self, given, rates, seeds, context, **more)

    Engine.update = recorded  # type: ignore
