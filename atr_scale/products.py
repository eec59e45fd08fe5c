"""Matrix products of scores, heads and losses at a stated precision, whatever that of the encoders.

| kind | what it is | gradient of a loss, relative error | rate against bf16 on tensor cores |
|-|-|-|-|
| ieee | fp32 | 1e-7 | 1/15, on other units |
| bf16x3 | three bf16 products, fp32 sums | 5e-6 to 2.2e-5 | 1/3 |
| tf32 | factors rounded to 10 bits | 3e-4 to 2e-3 | 1/2 |

bf16x3: x = a + b with a and b in bf16 keeps 16 bits of x, and x x' = a a' + a b' + b a' up to the product of the two
remainders. That is one product of width 3 k, [a, a, b] with [a', b', a'], whose terms are exact in fp32.
bf16 alone is not offered: the gradient of NT-Xent is then 3e-3 (temperature 0.05) to 2.4e-2 (0.01) off, because the
rounding of a score, 2^-9, is multiplied by 1 / temperature. float64 is always exact. On a CPU tf32 is fp32, and bf16x3
adds up the same terms in fp32.

Shapes: m rows, k summed, n columns, "..." batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

HeadProducts = Literal["ieee", "tf32", "bf16x3"]


@contextmanager
def fp32_products(kind: Literal["ieee", "tf32"]) -> Iterator[None]:
    """fp32 matrix products on CUDA have this precision inside the block; nothing else changes."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = kind
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product(left: Tensor, right: Tensor, kind: HeadProducts = "ieee") -> Tensor:
    """left [..., m, k] @ right [..., k, n], with a gradient whose products have the same precision; batches broadcast.

    Both have one dtype, fp32 or float64, which is the result's, under autocast too.
    """
    if right.ndim == 2:
        joined: Tensor = _Product.apply(left.flatten(0, -2), right, kind)
        return joined.reshape(*left.shape[:-1], right.shape[-1])
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    lefts, rights = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (left, right))
    joined = _Product.apply(lefts, rights, kind)
    return joined.reshape(*batch, *joined.shape[-2:])


def add_product(
    out: Tensor, left: Tensor, right: Tensor, kind: HeadProducts = "ieee", beta: float = 1, alpha: float = 1
) -> Tensor:
    """out = beta * out + alpha * left [m, k] @ right [k, n] in place, without a graph; beta 0 ignores what `out` holds.

    All have one dtype, fp32 or float64.
    """
    with torch.no_grad(), _at(out, kind):
        left, right = _factors(left, right, kind)
        if left.dtype == out.dtype:
            out.addmm_(left, right, beta=beta, alpha=alpha)
        else:
            torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    return out


class _Product(torch.autograd.Function):
    """Of two matrices, or of two batches of matrices of the same size."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, kind: HeadProducts) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.kind = kind
        with _at(left, kind):
            return _multiply(*_factors(left, right, kind), left.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        left, right = ctx.saved_tensors
        by_left, by_right, _ = ctx.needs_input_grad
        return (
            product(grads[0], right.mT, ctx.kind) if by_left else None,
            product(left.mT, grads[0], ctx.kind) if by_right else None,
            None,
        )


@contextmanager
def _at(like: Tensor, kind: HeadProducts) -> Iterator[None]:
    """Products on the device of `like` are fp32 or, for tf32, TF32; autocast would round them to bf16."""
    with fp32_products("tf32" if kind == "tf32" else "ieee"), torch.autocast(like.device.type, enabled=False):
        yield


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    return multiply(left, right) if left.dtype == dtype else multiply(left, right, out_dtype=dtype)


def _factors(left: Tensor, right: Tensor, kind: HeadProducts) -> tuple[Tensor, Tensor]:
    """Factors whose product, summed in the dtype of `left`, is left @ right at the precision `kind`."""
    if kind != "bf16x3" or left.dtype == torch.float64:
        return left, right
    factors = _parts(left, -1, low=2), _parts(right, -2, low=1)
    # A CPU multiplies bf16 with bf16 results alone. Widened factors give the same products and the same fp32 sums.
    return factors if left.is_cuda else (factors[0].float(), factors[1].float())


def _parts(value: Tensor, dim: int, low: int) -> Tensor:
    """`value` in two bf16 parts whose sum has 16 bits of its mantissa, three of them side by side along `dim`.

    low: place of the lower part; the higher one is in the two others. One pass writes each place.
    """
    if value.stride(-1) != 1 and value.stride(-2) == 1:  # a transposed matrix stays one
        return _parts(value.mT, -3 - dim, low).mT
    places = [*value.shape[:dim], 3 * value.shape[dim], *value.shape[dim:][1:]]
    wide = torch.empty(places, dtype=torch.bfloat16, device=value.device)
    parts = wide.chunk(3, dim)
    high = parts[0].copy_(value)
    torch.sub(value, high, out=parts[low])
    parts[3 - low].copy_(high)
    return wide
