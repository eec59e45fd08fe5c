"""What each rank of a training was given: the key, the tone and the caption of every row of every step.

Clip n of tests/tiny.py is a tone of 200 + 100 n Hz, and its caption ends with n, so that a wrong pair is seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

# Code for TinyRuns.start(hooks=...): writes AUDIT.RANK, a line for each batch.
HOOKS = """
import json, os
import torch
from atr_scale.encoders.small_cnn import SAMPLE_RATE
from atr_scale.training.engine import Engine
unaudited = Engine.update
def audited(self, batches, rates, seeds, context, **more):
    batches = list(batches)
    with open(f"{os.environ['AUDIT']}.{os.environ.get('RANK', '0')}", "a") as file:
        for batch in batches:
            peaks = [torch.fft.rfft(row[:n].float()).abs().argmax() * SAMPLE_RATE / n
                     for row, n in zip(batch.waveform, batch.lengths)]
            file.write(json.dumps({"step": context.step + 1, "keys": batch.keys, "hertz": [float(x) for x in peaks],
                                   "tokens": batch.input_ids.tolist()}) + "\\n")
    return unaudited(self, batches, rates, seeds, context, **more)
Engine.update = audited
"""


class Row(NamedTuple):
    """A row of a batch. tone and caption: the numbers of the clips that they are of; None if a caption has none."""

    step: int
    rank: int
    key: str
    tone: int
    caption: int | None


def read_audit(audit: Path, text_encoder: Path) -> list[Row]:
    """All rows, by step and rank. Of a step that a restart has repeated, the last one."""
    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    found: dict[tuple[int, int], list[Row]] = {}
    for path in audit.parent.glob(f"{audit.name}.*"):
        rank = int(path.suffix[1:])
        for line in map(json.loads, path.read_text().splitlines()):
            captions = tokenizer.batch_decode(line["tokens"], skip_special_tokens=True)
            last = [caption.split()[-1] if caption else "" for caption in captions]
            rows = zip(line["keys"], line["hertz"], last, strict=True)
            found[line["step"], rank] = [
                Row(line["step"], rank, key, round((hertz - 200) / 100), int(word) if word.isdigit() else None)
                for key, hertz, word in rows
            ]
    return [row for place in sorted(found) for row in found[place]]
