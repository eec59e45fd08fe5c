"""Counts as JSON and as a table."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tools.gpu_counts.budgets import WAITS
from tools.gpu_counts.counter import Counts

MISMATCH = "CPU tensor in"
PHASES = ("to device", "encode text", "encode audio", "score and loss", "backward", "optimizer")


def as_json(counts: Counts) -> dict[str, Any]:
    """Sums over the phases, and each phase. Host syncs are this project's and its libraries', but not DeepSpeed's."""
    seen = {*counts.phases, *(phase for phase, _, _ in counts.places)}
    names = [*(name for name in PHASES if name in seen), *sorted(seen.difference(PHASES))]
    phases = {name: {**_volume(counts, name), **_waits(counts, name)} for name in names}
    total = {key: sum(phase[key] for phase in phases.values()) for key in WAITS}
    flops: Counter[str] = Counter()
    for phase in counts.phases.values():
        flops.update(phase.flops)
    return {
        "launches": sum(phase.launches for phase in counts.phases.values()),
        "bytes": sum(phase.bytes for phase in counts.phases.values()),
        **total,
        "flops": dict(flops),
        "phases": phases,
        "places": [
            {"phase": phase, "kind": kind, "place": place, "times": times}
            for (phase, kind, place), times in sorted(counts.places.items())
        ],
        "collectives": _collectives(counts),
    }


def _volume(counts: Counts, name: str) -> dict[str, Any]:
    phase = counts.phases[name]
    return {"launches": phase.launches, "bytes": phase.bytes, "flops": dict(phase.flops)}


def _waits(counts: Counts, name: str) -> dict[str, int]:
    found = dict.fromkeys(WAITS, 0)
    for (phase, kind, place), times in counts.places.items():
        if phase != name:
            continue
        if kind.startswith(MISMATCH):
            found["device_mismatches"] += times
            continue
        found["deepspeed_syncs" if place.startswith("deepspeed/") else "host_syncs"] += times
        found["blocking_copies"] += times * ("copy" in kind)
    return found


def _collectives(counts: Counts) -> list[dict[str, Any]]:
    """By phase, kind, dtype and device: the number of calls, and the bytes that this rank gives to all of them."""
    times: Counter[tuple[str, str, str, str]] = Counter()
    nbytes: Counter[tuple[str, str, str, str]] = Counter()
    for (phase, each, device), calls in counts.collectives.items():
        kind = phase, each.name, str(each.dtype).removeprefix("torch."), device
        times[kind] += calls
        nbytes[kind] += calls * each.nbytes
    return [
        {"phase": phase, "name": name, "dtype": dtype, "device": device, "times": calls, "bytes": total}
        for ((phase, name, dtype, device), calls), total in zip(times.items(), nbytes.values(), strict=True)
    ]


def table(name: str, found: dict[str, Any]) -> str:
    """What a terminal shows of one configuration."""
    lines = [
        f"{name}",
        f"  {'phase':<15}{'launches':>9}{'GB':>10}  {'TFLOP':<34}{'syncs':>6}{'DeepSpeed':>10}{'copies':>7}",
    ]
    for phase, values in (*found["phases"].items(), ("sum", found)):
        flops = ", ".join(f"{dtype} {number / 1e12:.3g}" for dtype, number in sorted(values["flops"].items()))
        lines.append(
            f"  {phase:<15}{values['launches']:>9,}{values['bytes'] / 1e9:>10.2f}  {flops:<34}{values['host_syncs']:>6}"
            f"{values['deepspeed_syncs']:>10}{values['blocking_copies']:>7}"
        )
    if found["places"]:
        lines.append("  the host waits, or a tensor is on the wrong device:")
        lines += [f"    {p['times']:>5} x {p['kind']}, {p['place']} ({p['phase']})" for p in found["places"]]
    if found["collectives"]:
        lines.append("  collectives, bytes that this rank gives:")
        for each in found["collectives"]:
            what = f"{each['name']} {each['dtype']} on {each['device']}"
            lines.append(f"    {each['times']:>5} x {what}, {each['bytes']:,} bytes ({each['phase']})")
    return "\n".join(lines)
