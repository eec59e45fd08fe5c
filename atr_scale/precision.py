"""The precision in which encoders multiply.

They run under autocast (train.precision). Products of fp32 that remain in them, all of them without autocast, are TF32
on a GPU if train.tf32 says so: matrix products and convolutions alike, whose defaults in torch differ. Co-attention, a
network over pairs, does as they do. Front ends, other scorers, losses and the ranks of an evaluation choose their own
precision, see `atr_scale.products`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from atr_scale.products import HeadProducts

Autocast = Literal["fp32", "bf16", "fp16"]
Products = Literal["fp32", "tf32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """Of encoders. autocast: train.precision. tf32: train.tf32, for what stays fp32 under autocast."""

    autocast: Autocast = "fp32"
    tf32: bool = False

    def instead(self, products: Products | None) -> Precision:
        """This precision, or the one in which most products are `products`; fp32 and tf32 are without autocast."""
        if products is None:
            return self
        if products == "fp32" or products == "tf32":
            return Precision("fp32", products == "tf32")
        return self._replace(autocast=products)

    def products(self, device: torch.device) -> Products:
        """What most products are on `device`. Only a GPU has TF32."""
        return "tf32" if self.autocast == "fp32" and self.tf32 and device.type == "cuda" else self.autocast

    def describe(self, device: torch.device, heads: HeadProducts) -> str:
        """One line for the log. heads: train.head_products."""
        rest = "TF32" if self.tf32 and device.type == "cuda" else "IEEE fp32"
        first = "" if self.autocast == "fp32" else f"autocast to {self.autocast}, else "
        others = "IEEE fp32" if heads == "ieee" or (heads == "tf32" and device.type == "cpu") else heads
        return f"encoders, co-attention: {first}matmuls and convolutions in {rest}; other scores and losses: {others}"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bf16 or fp16 on `device`; for fp32 a context without effect."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def encoder_products(tf32: bool) -> Iterator[None]:
    """fp32 matrix products and convolutions on GPUs are TF32 inside the block, or IEEE; afterwards what they were.

    Both switches of matrix products are set, of which the older one also sets the newer: torch.compile reads the older
    one and fails, in some versions, if it says less than the newer one.
    """
    backends: Any = torch.backends
    matmul, of_the_cpu, cudnn = backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn
    flags = (matmul, of_the_cpu, cudnn.conv, cudnn.rnn)
    before = [flag.fp32_precision for flag in flags]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the process has used the newer one alone
        older = "high" if matmul.fp32_precision == "tf32" else "highest"
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        of_the_cpu.fp32_precision = before[1]
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for flag, precision in zip(flags, before, strict=True):
            flag.fp32_precision = precision
