"""Matrix products at a stated precision."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atr_scale.products import HeadProducts, add_product, fp32_products, product

# Relative errors of a product of random fp32 factors; tf32 is fp32 on a CPU.
BOUNDS = {"ieee": 3e-7, "tf32": 3e-7, "bf16x3": 1e-5}
SHAPES = [
    ((50, 70), (70, 30)),
    ((2, 50, 70), (70, 30)),
    ((2, 50, 70), (2, 70, 30)),
    ((4, 1, 5, 70), (2, 70, 3)),
    ((5, 70), (2, 70, 3)),
    ((0, 5, 7), (0, 7, 3)),
    ((5, 0), (0, 3)),
]


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("kind", get_args(HeadProducts))
@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_product_and_its_gradients(left: tuple[int, ...], right: tuple[int, ...], kind: HeadProducts) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(shape).double().requires_grad_() for shape in (left, right)]  # numbers that fp32 has
    expected = exact[0] @ exact[1]
    upstream = torch.randn(expected.shape)
    expected.backward(upstream.double())
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, BOUNDS[kind])):
        factors = [x.detach().to(dtype).requires_grad_() for x in exact]
        result = product(factors[0], factors[1], kind)
        result.backward(upstream.to(dtype))
        assert result.dtype == dtype
        assert relative(result, expected) < bound
        for factor, reference in zip(factors, exact, strict=True):
            assert factor.grad is not None and reference.grad is not None
            assert factor.grad.shape == factor.shape
            assert relative(factor.grad, reference.grad) < bound


def test_bf16x3_is_much_closer_than_bf16_and_float64_is_exact() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 512, dtype=torch.float64), torch.randn(512, 64, dtype=torch.float64)
    assert torch.equal(product(left, right, "bf16x3"), left @ right)
    left, right = left.float(), right.float()
    exact = left.double() @ right.double()
    plain = left.bfloat16().float() @ right.bfloat16().float()
    three = product(left, right, "bf16x3")
    assert relative(three, exact) < 1e-5 < 1e-3 < relative(plain, exact)
    assert relative(three, exact) > 10 * relative(left @ right, exact)  # it is not fp32 under another name


@pytest.mark.parametrize("kind", get_args(HeadProducts))
def test_add_product(kind: HeadProducts) -> None:
    torch.manual_seed(0)
    out, left, right = torch.randn(9, 7), torch.randn(9, 33, requires_grad=True), torch.randn(33, 7)
    whole = left.double() @ right.double()
    for beta, alpha in ((1.0, 1.0), (1.0, -0.5), (2.0, 3.0)):
        result = out.clone()
        assert add_product(result, left, right, kind, beta, alpha) is result
        assert relative(result, beta * out.double() + alpha * whole) < BOUNDS[kind]
    unset = torch.full((9, 7), torch.nan)
    assert relative(add_product(unset, left, right, kind, beta=0, alpha=2), 2 * whole) < BOUNDS[kind]


def test_fp32_products_sets_and_restores_the_precision() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with fp32_products("tf32"):
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(ZeroDivisionError), fp32_products("ieee"):
            assert matmul.fp32_precision == "ieee"
            raise ZeroDivisionError
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before


class _Precisions(TorchDispatchMode):
    """The fp32 precision at every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.name():
            self.seen.append((torch.backends.cuda.matmul.fp32_precision, args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "expected"), [("ieee", "ieee"), ("tf32", "tf32"), ("bf16x3", "ieee")])
def test_precision_holds_forward_and_backward_whatever_that_of_the_encoders(kind: HeadProducts, expected: str) -> None:
    left, right = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    # Encoders run with TF32, under autocast: neither reaches a product of scores.
    with fp32_products("tf32" if expected == "ieee" else "ieee"), _Precisions() as products:
        with torch.autocast("cpu", torch.bfloat16):
            result = product(left, right, kind)
            result.sum().backward()
        add_product(torch.zeros(3, 5), left, right, kind)
    assert products.seen == [(expected, torch.float32)] * 4
