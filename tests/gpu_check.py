"""A process that runs parts of tools.gpu_check on CUDA tensors without values, for tests/integration/test_gpu_check.py.

    python -m tests.gpu_check FILE

Writes to FILE, as JSON, the rows and where a tensor of the host meets one of the device, or why there are none. Values
are stand-ins, so errors say nothing; what counts is that every line that a GPU takes is taken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tools.gpu_counts import guard

# Part -> parts of names of the rows that are run: one of every kind.
CHOSEN = {
    "ceilings": ("copy", "gemm", "host to device", "launch"),
    "losses": ("nt_xent, embedding", "cmsc, stored", "pmr, embedding scores, temperature 0.001"),
    "scorers": ("attention, ieee", "tap, tf32", "lgmm, bf16x3"),
    "loss_speed": ("open_clip", "nt_xent, B = 256, rank of 8", "intra_modal, B = 256, bf16x3"),
    "head_speed": ("lgmm", "tap, 24 x 24, bf16x3", "coattention, 2 x 2, tf32"),
    "encoder_speed": ("tiny_passt",),
}


def main(file: Path) -> None:
    try:
        guard.load()
    except guard.Unavailable as reason:
        file.write_text(json.dumps({"skipped": str(reason)}))
        return
    mixed: list[str] = []
    file.write_text(json.dumps({"rows": list(rows(mixed)), "mixed": mixed}))


def rows(mixed: list[str]) -> Iterator[dict[str, object]]:
    import importlib

    import torch

    from tools.gpu_check import measure
    from tools.gpu_check.rows import Row, run_case
    from tools.gpu_check.runner import Setting
    from tools.gpu_counts.fake_cuda import counted

    names = ("copy", "gemm bf16", "gemm tf32", "gemm fp32", "host to device pinned", "launch")
    setting = Setting("cuda", True, {name: Row(ms=1.0, tflops=1.0, gb_per_s=1.0) for name in names})
    generator = torch.Generator
    with (
        counted(1) as (counts, _),
        mock.patch.object(torch, "Generator", lambda device=None: generator()),  # a CPU build has none for a GPU
        mock.patch.object(measure, "launches", lambda function: (function(), 1)[1]),
        mock.patch.multiple(torch.cuda, get_sync_debug_mode=lambda: 0, set_sync_debug_mode=lambda mode: None),
    ):
        for part, chosen in CHOSEN.items():
            module = importlib.import_module(f"tools.gpu_check.{part}")
            for case in module.cases(setting, *([1] if part == "losses" else [])):
                if any(name in case[0] for name in chosen):
                    yield run_case(part, case).as_json()
        kinds = (f"{kind} at {place}" for _, kind, place in counts.places if kind.startswith("CPU tensor"))
        mixed += [kind for kind in kinds if "empty_like" not in kind]  # which reads no values


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    guard.leave()
