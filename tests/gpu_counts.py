"""A process that counts on CUDA tensors without values, for tests/unit/test_gpu_counts.py.

    python -m tests.gpu_counts small|real FILE

Writes to FILE, as JSON, what the cases count, and with `small` also what single operations do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.gpu_counts import __main__ as command
from tools.gpu_counts import guard


def main(cases: str, file: Path) -> None:
    try:
        command.load()
    except guard.Unavailable as reason:
        file.write_text(json.dumps({"skipped": str(reason)}))
        return
    found = command.run(command.parse(["--cases", cases]))
    if cases == "small":
        found |= {"operations": operations(), "injected": injected(), "bad": bad_configuration(), "unfit": unfit()}
    file.write_text(json.dumps(found))


def operations() -> dict[str, Any]:
    """What one operation each counts, by its name."""
    import torch
    import torch.distributed as dist
    from torch.nn.functional import conv1d, scaled_dot_product_attention
    from torch.utils.checkpoint import checkpoint

    from tools.gpu_counts.fake_cuda import counted
    from tools.gpu_counts.report import as_json

    with counted(2) as (counts, _):
        x = torch.empty(4, 8, device="cuda", requires_grad=True)
        flat = x.detach().flatten()
        mask, ids = flat > 0, torch.zeros(32, dtype=torch.int64, device="cuda")
        pinned, unpinned = torch.zeros(8).pin_memory(), torch.zeros(8)
        heads = torch.empty(2, 4, 16, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        signal = torch.empty(2, 6, 10, device="cuda", requires_grad=True)
        kernel = torch.empty(6, 1, 3, device="cuda", requires_grad=True)
        summed = torch.empty(4, device="cuda")

        def add_slice() -> None:
            summed[1:3] += 1

        def attend() -> None:
            scaled_dot_product_attention(heads, heads, heads).sum().backward()

        def attend_again() -> None:
            checkpoint(scaled_dot_product_attention, heads, heads, heads, use_reentrant=False).sum().backward()

        run: dict[str, Callable[[], Any]] = {
            "item": lambda: flat[0].item(),
            "tolist": lambda: flat.tolist(),
            "bool": lambda: bool(mask.any()),
            "int": lambda: int(ids[0]),
            "nonzero": lambda: mask.nonzero(),
            "index by a mask": lambda: flat[mask],
            "unique": lambda: torch.unique(ids),
            "bincount": lambda: torch.bincount(ids, minlength=4),
            "repeat_interleave": lambda: torch.repeat_interleave(flat, ids),
            "repeat_interleave with output_size": lambda: torch.repeat_interleave(flat, ids, output_size=40),
            "torch.tensor": lambda: torch.tensor([1, 2], device="cuda"),
            "cpu": lambda: flat.cpu(),
            "copy to pinned": lambda: pinned.copy_(flat[:8], non_blocking=True),
            "copy from pinned": lambda: pinned.to("cuda", non_blocking=True),
            "copy from pinned, blocking": lambda: pinned.to("cuda"),
            "copy from unpinned": lambda: unpinned.to("cuda", non_blocking=True),
            "synchronize": lambda: torch.cuda.synchronize(),
            "event": lambda: torch.cuda.Event().synchronize(),
            "stream": lambda: torch.cuda.Stream().wait_stream(torch.cuda.current_stream()),
            "record_stream": lambda: flat.record_stream(torch.cuda.Stream()),
            "CPU tensor": lambda: torch.where(mask[:8], flat[:8], unpinned),
            "views": lambda: flat.view(4, 8).T[1:].unsqueeze(0),
            "add to a slice": add_slice,
            "product": lambda: (x @ x.T).sum().backward(),
            "grouped convolution": lambda: conv1d(signal, kernel, groups=6).sum().backward(),
            "attention": attend,
            "attention computed again": attend_again,
            "all_reduce": lambda: dist.all_reduce(flat),
            "all_reduce on the host": lambda: dist.all_reduce(unpinned),
        }
        found = {}
        for name, operation in run.items():
            counts.clear()
            operation()
            found[name] = as_json(counts)
    return found


def injected() -> dict[str, Any]:
    """The case "scorer pooled", whose scorer reads a number of the device."""
    from unittest import mock

    from torch import Tensor

    from atr_scale import score_block
    from tools.gpu_counts.cases import small_cases
    from tools.gpu_counts.report import as_json

    bound = score_block.at_least_fp32

    def reading(value: Tensor) -> Tensor:
        value.flatten()[:1].item() if value.numel() else None  # the line that the report must name
        return bound(value)

    with mock.patch.object(score_block, "at_least_fp32", reading):
        return as_json(small_cases()["scorer pooled"].count())


def bad_configuration() -> str:
    """What ends the command if a configuration is not there."""
    try:
        command.run(command.parse(["configs/none.yaml"]))
    except SystemExit as end:
        return str(end.code)
    return ""


def unfit() -> str:
    """What is said of a torch in which the tensors do not run."""
    from unittest import mock

    from tools.gpu_counts import fake_cuda

    with mock.patch.object(fake_cuda, "counted", side_effect=NotImplementedError("no kernel\nfor CUDA")):
        try:
            fake_cuda.check()
        except guard.Unavailable as reason:
            return str(reason)
    return ""


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    guard.leave()
