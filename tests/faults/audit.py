"""What each rank of a training was given: the key, the tone and the caption of every row of every step.

Clip n of tests/tiny.py is a tone of 200 + 100 n Hz, and its caption ends with n, so that a wrong pair is seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from atr_scale.run_files import read_json_lines

# Code for TinyRuns.start(hooks=...): writes AUDIT.RANK, a line for each batch.
HOOKS = "\nfrom tests.faults.recorder import record\nrecord()\n"


class Row(NamedTuple):
    """A row of a batch. tone and caption: the numbers of the clips that they are of; None if a caption has none."""

    step: int
    rank: int
    key: str
    tone: int
    caption: int | None


def read_audit(audit: Path, text_encoder: Path) -> list[Row]:
    """All rows, by step and rank. Of a step that a restart has repeated, those of the ranks that made it last."""
    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for path in audit.parent.glob(f"{audit.name}.*"):
        for line in read_json_lines(path):
            found[line["step"], int(path.suffix[1:])] = line
    last: dict[int, dict[str, Any]] = {}
    for (step, _), line in found.items():
        last[step] = max(last.get(step, line), line, key=lambda each: each["time"])
    rows = []
    for step, rank in sorted(found):
        if rank < last[step]["ranks"]:
            line = found[step, rank]
            captions = tokenizer.batch_decode(line["tokens"], skip_special_tokens=True)
            words = [caption.split()[-1] if caption else "" for caption in captions]
            for key, hertz, word in zip(line["keys"], line["hertz"], words, strict=True):
                clip = int(word) if word.isdigit() else None
                rows.append(Row(step, rank, key, round((hertz - 200) / 100), clip))
    return rows
