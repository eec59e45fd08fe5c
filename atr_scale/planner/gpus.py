"""The GPUs that a run can be planned for: peaks from the makers' data sheets, and assumptions about their use."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atr_scale.errors import UserError

# Assumed fractions of the peaks that a step reaches: of matrix products and convolutions, of memory, of links.
COMPUTE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.5, 0.8, 0.8
LAUNCH_S = 5e-6  # least time of an operation
COLLECTIVE_S = 10e-6  # latency of a collective, for every doubling of the ranks
USABLE_SHARE = 0.94  # of the memory; driver, buffers of the collectives and fragmentation take the rest


@dataclass(frozen=True)
class GPU:
    """Peaks without sparsity, in FLOP/s: `low` in bf16 (fp16 if the GPU has no bf16), `full` in fp32 (TF32 is off).

    memory: bytes. bandwidth: of the memory, bytes/s. link: one way to the other GPUs of a node, bytes/s. network: one
    way between nodes, bytes/s per GPU. Network and price (USD an hour) are assumptions about the cluster.
    """

    name: str
    memory: float
    low: float
    full: float
    bandwidth: float
    link: float
    network: float
    price: float

    def with_price(self, price: float | None) -> GPU:
        return self if price is None else replace(self, price=price)


def _gpu(
    name: str, gib: float, low: float, full: float, bandwidth: float, link: float, network: float, price: float
) -> GPU:
    """A GPU from the units of data sheets: GiB, TFLOP/s, GB/s and Gbit/s."""
    return GPU(name, gib * 2**30, low * 1e12, full * 1e12, bandwidth * 1e9, link * 1e9, network / 8 * 1e9, price)


#                       GiB   bf16   fp32  memory  link  network, Gbit/s, and USD an hour: assumed
_ROWS = (
    _gpu("H200", 141, 989, 67, 4800, 450, 400, 3.5),
    _gpu("H100", 80, 989, 67, 3350, 450, 400, 2.5),
    _gpu("A100-80", 80, 312, 19.5, 2039, 300, 200, 1.6),
    _gpu("A100-40", 40, 312, 19.5, 1555, 300, 200, 1.2),
    _gpu("L40S", 48, 362, 91.6, 864, 32, 100, 1.0),
    _gpu("A10", 24, 125, 31.2, 600, 32, 50, 0.75),
    _gpu("L4", 24, 121, 30.3, 300, 32, 50, 0.6),
    _gpu("V100", 32, 125, 15.7, 900, 150, 100, 0.8),
    _gpu("RTX4090", 24, 165, 82.6, 1008, 32, 25, 0.4),
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
