"""The GPUs that a run can be planned for: peaks from the makers' data sheets, and what a step is assumed to reach."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atr_scale.errors import UserError

# Assumed fractions of the peaks that a step reaches: of matrix products and convolutions, of memory, of links.
COMPUTE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.5, 0.8, 0.8
LAUNCH_S = 5e-6  # least time of an operation
COLLECTIVE_S = 10e-6  # latency of a collective, for every doubling of the ranks
USABLE_SHARE = 0.94  # of the memory; driver, buffers of the collectives and fragmentation take the rest


@dataclass(frozen=True)
class Rates:
    """What operations reach: FLOP/s of matrix products in bf16 or fp16 (`low`), TF32 and fp32 (`full`), bytes/s of the
    memory, and seconds of a launch, the least time of an operation.

    measured_on: the device on which `measured`, names of these rates, were measured; the others are assumed.
    """

    low: float
    tf32: float
    full: float
    memory: float
    launch: float = LAUNCH_S
    measured_on: str | None = None
    measured: tuple[str, ...] = ()


@dataclass(frozen=True)
class GPU:
    """Peaks without sparsity, in FLOP/s: `low` in bf16 (fp16 if the GPU has no bf16), `tf32`, and `full` in fp32.

    memory: bytes. bandwidth: of the memory, bytes/s. link: one way to the other GPUs of a node, bytes/s. network: one
    way between nodes, bytes/s per GPU. Network and price (USD an hour) are assumptions about the cluster.
    rates: what a step reaches of these peaks.
    """

    name: str
    memory: float
    low: float
    tf32: float
    full: float
    bandwidth: float
    link: float
    network: float
    price: float
    rates: Rates

    def with_price(self, price: float | None) -> GPU:
        return self if price is None else replace(self, price=price)

    def with_network(self, gbit: float | None) -> GPU:
        """The same GPU with `gbit` Gbit/s between nodes. Raises UserError if it is not above 0."""
        if gbit is None:
            return self
        if not gbit > 0:
            raise UserError(f"--network {gbit:g} lets no data through: give the Gbit/s between nodes, more than 0")
        return replace(self, network=gbit * 1e9 / 8)

    def with_measured(self, report: Path | None) -> GPU:
        """The same GPU with the ceilings in `report`, a gpu_check.json, as rates.

        Raises UserError if it has none, or if they are not those of a card at full size.
        """
        if report is None:
            return self
        return self.with_ceilings(*_read_report(report))

    def with_ceilings(self, rows: Iterable[Mapping[str, Any]], device: str) -> GPU:
        """The same GPU with the ceilings among `rows` of gpu_check, measured on `device`, as rates."""
        rates = _rates_of(rows)
        return replace(self, rates=replace(self.rates, **rates, measured_on=device, measured=tuple(rates)))


def _gpu(
    name: str,
    gib: float,
    low: float,
    tf32: float,
    full: float,
    bandwidth: float,
    link: float,
    network: float,
    price: float,
) -> GPU:
    """A GPU from the units of data sheets: GiB, TFLOP/s, GB/s and Gbit/s."""
    peaks = (low * 1e12, tf32 * 1e12, full * 1e12)
    low, tf32, full = (COMPUTE_SHARE * peak for peak in peaks)
    rates = Rates(low, tf32, full, MEMORY_SHARE * bandwidth * 1e9)
    return GPU(name, gib * 2**30, *peaks, bandwidth * 1e9, link * 1e9, network / 8 * 1e9, price, rates)


#                       GiB   bf16   TF32  fp32  memory  link  network, Gbit/s, and USD an hour: assumed
_ROWS = (
    _gpu("H200", 141, 989, 494, 67, 4800, 450, 400, 3.5),
    _gpu("H100", 80, 989, 494, 67, 3350, 450, 400, 2.5),
    _gpu("A100-80", 80, 312, 156, 19.5, 2039, 300, 200, 1.6),
    _gpu("A100-40", 40, 312, 156, 19.5, 1555, 300, 200, 1.2),
    _gpu("L40S", 48, 362, 183, 91.6, 864, 32, 100, 1.0),
    _gpu("A10", 24, 125, 62.5, 31.2, 600, 32, 50, 0.75),
    _gpu("L4", 24, 121, 60, 30.3, 300, 32, 50, 0.6),
    _gpu("V100", 32, 125, 15.7, 15.7, 900, 150, 100, 0.8),  # it has no TF32
    _gpu("RTX4090", 24, 165, 82.6, 82.6, 1008, 32, 25, 0.4),
)
GPUS = {gpu.name: gpu for gpu in _ROWS}


def find_gpu(name: str) -> GPU:
    """The GPU called `name`, in upper or lower case. UserError with the known names if there is none."""
    by_key = {_key(known): gpu for known, gpu in GPUS.items()}
    if _key(name) not in by_key:
        raise UserError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}")
    return by_key[_key(name)]


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


# Rate -> the row of part "ceilings" that holds it, its column, and the unit of that column.
_CEILINGS = {
    "low": ("gemm bf16", "tflops", 1e12),
    "tf32": ("gemm tf32", "tflops", 1e12),
    "full": ("gemm fp32", "tflops", 1e12),
    "memory": ("copy", "gb_per_s", 1e9),
    "launch": ("launch", "ms", 1e-3),
}


def _read_report(report: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows and device of a report of `tools.gpu_check`."""
    remedy = "write one with `python -m tools.gpu_check` on the card"
    try:
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        rows, device, quick = found["rows"], str(found["device"]), found["quick"]
        rates = _rates_of(rows)
    except OSError as error:
        raise UserError(f"cannot read {report} ({error.strerror}): {remedy}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{report} is no report of tools.gpu_check: {remedy}") from None
    if device == "cpu" or quick:
        of = "of a CPU" if device == "cpu" else "of small sizes (--quick)"
        raise UserError(f"{report} has figures {of}, which are not the rates of a card: {remedy}")
    if not rates:
        raise UserError(f"{report} has no ceilings ({', '.join(row for row, _, _ in _CEILINGS.values())}): {remedy}")
    return rows, device


def _rates_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The ceilings among the rows of a report, as rates; without those that have no figure."""
    ceilings = {row["name"]: row for row in rows if row["part"] == "ceilings"}
    figures = {name: ceilings.get(row, {}).get(column) for name, (row, column, _) in _CEILINGS.items()}
    return {name: float(value) * _CEILINGS[name][2] for name, value in figures.items() if value}
