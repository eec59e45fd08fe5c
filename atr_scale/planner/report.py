"""A plan as text, as JSON and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atr_scale.data.storage import make_folder
from atr_scale.planner import gpus
from atr_scale.planner.estimate import StepEstimate
from atr_scale.planner.planner import Row, RunPlan

GIB, MIB = 2**30, 2**20


def describe_plan(plan: RunPlan) -> str:
    """The plan for the given cluster, part by part, then the table of all cluster sizes."""
    return "\n".join([*_head(plan), "", *_step(plan), "", *_table(plan)])


def write_plan(plan: RunPlan, folder: Path) -> list[Path]:
    """Write plan.json and plan.png into `folder`. Returns their paths."""
    make_folder(str(folder))
    numbers, picture = folder / "plan.json", folder / "plan.png"
    numbers.write_text(json.dumps(plan_as_json(plan), indent=1) + "\n")
    plot_plan(plan).savefig(picture)
    return [numbers, picture]


def plan_as_json(plan: RunPlan) -> dict[str, Any]:
    return {
        "gpu": asdict(plan.gpu),
        "nodes": plan.nodes,
        "gpus_per_node": plan.gpus_per_node,
        "clips": plan.clips,
        "clip_seconds": plan.seconds,
        "tokens": plan.tokens,
        "epochs": plan.epochs,
        "parameters": plan.model,
        "assumed": {
            "compute_share": gpus.COMPUTE_SHARE,
            "memory_share": gpus.MEMORY_SHARE,
            "link_share": gpus.LINK_SHARE,
            "usable_memory_share": gpus.USABLE_SHARE,
        },
        "chosen": _row_json(plan, plan.chosen),
        "sizes": [_row_json(plan, row) for row in plan.rows],
    }


def _row_json(plan: RunPlan, row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gpus": row.world_size,
        "fits_in_one_forward": row.fits_whole,
        "largest_batch": row.largest,
        "largest_batch_grad_cache": row.largest_cached,
    }
    if row.planned is None:
        return found
    e = row.planned
    return found | {
        "global_batch": e.split.global_batch,
        "micro_batch": e.split.micro_batch,
        "memory_bytes": {**e.memory, "peak": e.peak},
        "sent_bytes": {t.kind: t.sent(e.split.world_size) for t in e.transfers},
        "seconds": {**e.seconds, "step": e.step},
        "clips_per_second": e.rate,
        "hours": plan.hours(e),
        "cost_usd": plan.cost(e),
        "bound": e.bound,
    }


def _head(plan: RunPlan) -> list[str]:
    train, model, e = plan.config.train, plan.model, plan.chosen.planned
    assert e is not None
    split = e.split
    forwards = "" if split.chunks == 1 else f" in {split.chunks} micro-batches of {split.micro_batch} (GradCache)"
    sizes = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in model.items())
    low, full = (f"{x / 1e12:.0f}" for x in (plan.gpu.low, plan.gpu.full))
    notes = []
    if plan.gpu.name == "V100" and train.precision == "bf16":
        notes.append("note       a V100 has no bf16 units: set train.precision=fp16, whose rate is planned here")
    if not plan.chosen.fits_whole and not train.micro_batch_size:
        notes.append(
            "note       the local batch does not fit in one forward pass: set "
            f"train.micro_batch_size={split.micro_batch}"
        )
    return [
        f"model      {sum(model.values()) / 1e6:.1f} M parameters ({sizes})",
        f"batch      {split.global_batch} pairs a loss, {split.local_batch} a GPU{forwards}; clips of "
        f"{plan.seconds:g} s, captions of {plan.tokens} tokens; {train.accum_steps} losses a step",
        f"cluster    {plan.nodes} x {plan.gpus_per_node} {plan.gpu.name} ({plan.gpu.memory / GIB:.0f} GiB), "
        f"ZeRO {train.zero_stage}, {train.precision}",
        f"assumed    {gpus.COMPUTE_SHARE:.0%} of {low} TFLOP/s (bf16) and {full} (fp32), {gpus.MEMORY_SHARE:.0%} of "
        f"{plan.gpu.bandwidth / 1e9:.0f} GB/s, {gpus.LINK_SHARE:.0%} of {plan.gpu.link / 1e9:.0f} GB/s in a node and "
        f"{plan.gpu.network * 8 / 1e9:.0f} Gbit/s a GPU between nodes, USD {plan.gpu.price:g} a GPU hour",
        "certainty  sizes and bytes are measured on this model; times follow from these rates, which are assumptions "
        "until a run has measured them: expect a factor of 1.5 either way",
        *notes,
    ]


def _step(plan: RunPlan) -> list[str]:
    e = plan.chosen.planned
    assert e is not None
    lines = [f"memory     {e.peak / GIB:.1f} GiB a GPU at the peak, of {plan.gpu.memory / GIB:.0f}"]
    lines += [f"           {size / GIB:8.2f}  {name}" for name, size in e.memory.items() if size >= MIB]
    total = sum(t.sent(e.split.world_size) for t in e.transfers)
    lines.append(f"network    {total / MIB:.1f} MiB sent by a GPU in a step")
    for t in sorted(e.transfers, key=lambda t: -t.sent(e.split.world_size)):
        lines.append(f"           {t.sent(e.split.world_size) / MIB:8.2f}  {t.kind} ({t.collective}, {t.calls} calls)")
    lines.append(f"time       {1e3 * e.step:.0f} ms a step, bound by {e.bound}")
    lines += [f"           {1e3 * value:8.1f}  {name}" for name, value in e.seconds.items()]
    lines.append(
        f"run        {e.rate:.0f} clips/s; {plan.epochs:g} epochs of {plan.clips} {plan.config.train.epoch_of}: "
        f"{_duration(plan.hours(e))}, USD {plan.cost(e):,.0f}"
    )
    lines.append(
        f"largest    {plan.chosen.largest} pairs in a loss in one forward, {plan.chosen.largest_cached} with GradCache"
    )
    return lines


def _table(plan: RunPlan) -> list[str]:
    names = ("GPUs", "a GPU", "forward", "GiB", "step ms", "clips/s", "effic.", "time", "USD", "bound", "largest")
    lines: list[tuple[str, ...]] = [(*names, "GradCache")]
    one = next((row.planned for row in plan.rows if row.planned), None)
    for row in plan.rows:
        e = row.planned
        ends = (str(row.largest), str(row.largest_cached))
        if e is None:
            divides = plan.config.train.global_batch_size % row.world_size == 0
            why = "does not fit" if divides else "no divisor"
            lines.append((str(row.world_size), *["-"] * 8, why, *ends))
            continue
        assert one is not None
        efficiency = e.rate / e.split.world_size / (one.rate / one.split.world_size)
        lines.append((
            str(row.world_size), str(e.split.local_batch), str(e.split.micro_batch), f"{e.peak / GIB:.1f}",
            f"{1e3 * e.step:.0f}", f"{e.rate:.0f}", f"{efficiency:.2f}", _duration(plan.hours(e)),
            f"{plan.cost(e):,.0f}", e.bound, *ends,
        ))  # fmt: skip
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    batch = plan.config.train.global_batch_size
    title = f"{batch} pairs a loss on other numbers of {plan.gpu.name}; largest: pairs in a loss that fit"
    return [title, *("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)]


def _duration(hours: float) -> str:
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h"


def plot_plan(plan: RunPlan) -> Figure:
    """Speed, time by bound, and memory over the number of GPUs."""
    from atr_scale import plots

    planned = [row.planned for row in plan.rows if row.planned]
    return plots.scaling(
        [e.split.world_size for e in planned],
        rates=[e.rate for e in planned],
        seconds={name: [e.seconds[name] for e in planned] for name in planned[0].seconds},
        memory=[_grouped(e) for e in planned],
        capacity=plan.gpu.memory / GIB,
        title=f"{plan.gpu.name}, {plan.config.train.global_batch_size} pairs a loss",
    )


def _grouped(e: StepEstimate) -> dict[str, float]:
    """Memory in GiB in five groups."""
    groups = {
        "states": ("parameters", "optimizer", "parameters gathered"),
        "gradients": ("gradients",),
        "activations": ("activations of text", "activations of audio", "cached outputs"),
        "texts and scores": ("texts gathered", "scores and tiles"),
        "buckets": ("buckets",),
    }
    return {name: sum(e.memory.get(part, 0.0) for part in parts) / GIB for name, parts in groups.items()}
