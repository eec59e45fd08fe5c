"""A plan as text, as JSON and as a picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atr_scale.data.loader_memory import SHARED
from atr_scale.data.storage import make_folder
from atr_scale.memory import free_memory
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
    numbers.write_text(json.dumps(plan_as_json(plan), indent=1) + "\n", encoding="utf-8")
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
            "link_share": gpus.LINK_SHARE,
            "collective_seconds": gpus.COLLECTIVE_S,
            "usable_memory_share": gpus.USABLE_SHARE,
        },
        "chosen": _row_json(plan, plan.chosen),
        "loader_bytes": {
            "shared_memory": plan.loader.shared * plan.gpus_per_node,
            "main_memory": plan.loader.total * plan.gpus_per_node,
        },
        "checkpoint_copy_bytes": dict(zip(("first_node", "other_nodes"), _copies(plan), strict=True)),
        "advice": [{"setting": one.setting, "gain": one.gain, "step_s": one.planned.step} for one in plan.advice],
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
        "phase_seconds": e.phases,
        "network_seconds": {"all": e.network.busy, "hidden": e.network.hidden, "exposed": e.network.exposed},
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
        *_rates(plan),
        *notes,
    ]


def _rates(plan: RunPlan) -> list[str]:
    """What the times follow from, and which of it was measured."""
    gpu, rates = plan.gpu, plan.gpu.rates
    figures = {
        "low": f"{rates.low / 1e12:.0f} TFLOP/s in bf16",
        "tf32": f"{rates.tf32 / 1e12:.0f} in TF32",
        "full": f"{rates.full / 1e12:.0f} in fp32",
        "memory": f"{rates.memory / 1e9:.0f} GB/s of memory",
        "launch": f"{1e6 * rates.launch:.1f} us a launch",
    }
    measured = ", ".join(figures[name] for name in rates.measured)
    assumed = [text for name, text in figures.items() if name not in rates.measured]
    assumed += [
        f"{gpus.LINK_SHARE:.0%} of {gpu.link / 1e9:.0f} GB/s in a node and of {gpu.network * 8 / 1e9:.0f} Gbit/s "
        "between nodes for one ring over all GPUs",
        f"all clips {plan.seconds:g} s and all captions {plan.tokens} tokens long",
        f"USD {gpu.price:g} a GPU hour",
    ]
    return [
        *([f"measured   on {rates.measured_on}: {measured}"] if measured else []),
        f"assumed    {', '.join(assumed)}",
        "certainty  sizes and bytes are counted on this model; times follow from these rates: expect a factor of 1.5 "
        "either way" + ("" if measured else "; `--measured gpu_check.json` takes the rates of your card"),
    ]


def _step(plan: RunPlan) -> list[str]:
    e = plan.chosen.planned
    assert e is not None
    lines = [f"memory     {e.peak / GIB:.1f} GiB a GPU at the peak, of {plan.gpu.memory / GIB:.0f}"]
    lines += [f"           {size / GIB:8.2f}  {name}" for name, size in e.memory.items() if size >= MIB]
    lines += _node(plan)
    total = sum(t.sent(e.split.world_size) for t in e.transfers)
    lines.append(f"network    {total / MIB:.1f} MiB sent by a GPU in a step")
    for t in sorted(e.transfers, key=lambda t: -t.sent(e.split.world_size)):
        lines.append(f"           {t.sent(e.split.world_size) / MIB:8.2f}  {t.kind} ({t.collective}, {t.calls} calls)")
    net = e.network
    lines.append(
        f"           {1e3 * net.busy:.1f} ms, of which {1e3 * net.hidden:.1f} beside the GPU's work; the GPU waits for "
        f"{1e3 * net.exposed:.1f} ms, {e.exposed:.0%} of the step"
    )
    lines.append(f"time       {1e3 * e.step:.0f} ms a step, bound by {e.bound}")
    names = {"network": "network, exposed", "loader": "loader, in parallel"}
    lines += [f"           {1e3 * value:8.1f}  {names.get(name, name)}" for name, value in e.seconds.items() if value]
    lines.append(f"phases     {', '.join(f'{name} {1e3 * value:.1f}' for name, value in e.phases.items())} ms")
    lines += _advice(plan)
    lines.append(
        f"run        {e.rate:.0f} clips/s; {plan.epochs:g} epochs of {plan.clips} {plan.config.train.epoch_of}: "
        f"{_duration(plan.hours(e))}, USD {plan.cost(e):,.0f}"
    )
    lines.append(
        f"largest    {plan.chosen.largest} pairs in a loss in one forward, {plan.chosen.largest_cached} with GradCache"
    )
    return lines


def _node(plan: RunPlan) -> list[str]:
    """Main memory of a node, beside that of the machine on which the plan is made."""
    memory, ranks, data = plan.loader, plan.gpus_per_node, plan.config.data
    given = "" if data.buffer_gb is None else f", within data.buffer_gb = {data.buffer_gb:g} a rank"
    here = [f"{free_memory() / GIB:.0f} GiB of main memory free"]
    if SHARED.is_dir():
        here.append(f"{shutil.disk_usage(SHARED).free / GIB:.0f} of /dev/shm")
    return [
        f"node       {ranks * memory.total / GIB:.1f} GiB of main memory for the loaders of {ranks} GPUs, "
        f"{ranks * memory.shared / GIB:.1f} of them in /dev/shm{given}; this machine has {' and '.join(here)}",
        f"           {memory.describe()}",
        f"           {_copies(plan)[0] / GIB:.2f} GiB on the first node for the copies of a checkpoint, "
        f"{_copies(plan)[1] / GIB:.2f} on the others",
    ]


def _copies(plan: RunPlan) -> tuple[int, int]:
    """Bytes of main memory for the copies of a checkpoint: on the first node, and on any other."""
    first, other = plan.costs.parameters.copies(plan.costs.config.train.zero_stage, plan.nodes * plan.gpus_per_node)
    return first + (plan.gpus_per_node - 1) * other, plan.gpus_per_node * other


def _advice(plan: RunPlan) -> list[str]:
    """What would make the step faster, and a smaller cluster that does the run for less."""
    e = plan.chosen.planned
    assert e is not None
    changes = [f"{one.setting} (+{one.gain:.0%}, {1e3 * one.planned.step:.0f} ms)" for one in plan.advice]
    lines = [f"faster     {'; then '.join(changes) if changes else 'no other setting gains 1 %'}"]
    fewer = [row.planned for row in plan.rows if row.planned and row.world_size < e.split.world_size]
    one = min(fewer, key=plan.cost, default=None)
    if one and plan.cost(one) < 0.95 * plan.cost(e):
        lines.append(
            f"cheaper    {one.split.world_size} GPUs: USD {plan.cost(one):,.0f} instead of {plan.cost(e):,.0f}, "
            f"{_duration(plan.hours(one))} instead of {_duration(plan.hours(e))}"
        )
    return lines


def _table(plan: RunPlan) -> list[str]:
    names = (
        "GPUs",
        "a GPU",
        "forward",
        "GiB",
        "step ms",
        "clips/s",
        "effic.",
        "exposed",
        "time",
        "USD",
        "bound",
        "largest",
    )
    lines: list[tuple[str, ...]] = [(*names, "GradCache")]
    one = next((row.planned for row in plan.rows if row.planned), None)
    for row in plan.rows:
        e = row.planned
        ends = (str(row.largest), str(row.largest_cached))
        if e is None:
            divides = plan.config.train.global_batch_size % row.world_size == 0
            why = "does not fit" if divides else "no divisor"
            lines.append((str(row.world_size), *["-"] * 9, why, *ends))
            continue
        assert one is not None
        efficiency = e.rate / e.split.world_size / (one.rate / one.split.world_size)
        lines.append((
            str(row.world_size), str(e.split.local_batch), str(e.split.micro_batch), f"{e.peak / GIB:.1f}",
            f"{1e3 * e.step:.0f}", f"{e.rate:.0f}", f"{efficiency:.2f}", f"{e.exposed:.0%}", _duration(plan.hours(e)),
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
