"""The learned temperature: its bounds, and the gradient at them."""

from __future__ import annotations

import math

import pytest
import torch

from atr_scale.losses.temperature import Temperature


def at(tau: float) -> Temperature:
    """A temperature whose parameter stands at `tau`, inside or outside of [0.01, 1]."""
    temperature = Temperature(0.1, 0.01, 1.0, True)
    with torch.no_grad():
        temperature.log_temperature.fill_(math.log(tau))
    return temperature


def gradient(temperature: Temperature, sign: float) -> float:
    (sign * temperature()).sum().backward()
    assert temperature.log_temperature.grad is not None
    return temperature.log_temperature.grad.item()


def test_shape_and_value() -> None:
    temperature = Temperature(0.07, 0.01, 1.0, True)
    assert temperature().shape == temperature.log_temperature.shape == (1,)
    assert temperature().item() == pytest.approx(0.07) and temperature().dtype == torch.float32


@pytest.mark.parametrize(("tau", "held"), [(0.5, 0.5), (0.001, 0.01), (7.0, 1.0), (0.01, 0.01), (1.0, 1.0)])
def test_the_value_stays_inside(tau: float, held: float) -> None:
    assert at(tau)().item() == pytest.approx(held, rel=1e-6)


def test_inside_the_gradient_is_the_exponential_s() -> None:
    for sign in (1.0, -1.0):
        assert gradient(at(0.3), sign) == pytest.approx(sign * 0.3)


@pytest.mark.parametrize("tau", [0.001, 0.0099])
def test_below_only_upward_steps_pass(tau: float) -> None:
    assert gradient(at(tau), 1.0) == 0, "descent would lower it further"
    assert gradient(at(tau), -1.0) < 0, "descent raises it again"


@pytest.mark.parametrize("tau", [1.01, 50.0])
def test_above_only_downward_steps_pass(tau: float) -> None:
    assert gradient(at(tau), -1.0) == 0
    assert gradient(at(tau), 1.0) > 0


def test_a_parameter_that_left_comes_back() -> None:
    temperature = at(0.0001)
    optimizer = torch.optim.Adam(temperature.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (temperature() - 0.5).square().sum().backward()
        optimizer.step()
    assert temperature().item() == pytest.approx(0.5, abs=0.05)


def test_fixed_temperature_has_no_gradient() -> None:
    temperature = Temperature(0.05, 0.01, 1.0, False)
    assert not temperature.log_temperature.requires_grad and not temperature().requires_grad


@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2]
)
def test_at_least_fp32(dtype: torch.dtype, result: torch.dtype) -> None:
    assert Temperature(0.1, 0.01, 1.0, True).to(dtype)().dtype == result
