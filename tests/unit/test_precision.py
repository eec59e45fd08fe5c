"""Precision of the encoders: what a configuration means, and the switches of torch that it sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atr_scale.evaluation.retrieval_scores import DualEncoderScores
from atr_scale.precision import Precision, autocast, encoder_products
from atr_scale.products import fp32_products

BACKENDS: Any = torch.backends
FLAGS = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn.matmul)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def flags() -> list[str]:
    return [flag.fp32_precision for flag in FLAGS]


@pytest.mark.parametrize("tf32", [True, False])
def test_matmuls_and_convolutions_are_set_together_and_restored(tf32: bool) -> None:
    before, kind = flags(), "tf32" if tf32 else "ieee"
    with pytest.raises(ZeroDivisionError), encoder_products(tf32):
        assert flags() == [kind, kind, kind, before[3]], "that of a CPU stays"
        with fp32_products("ieee"):
            assert flags()[:2] == ["ieee", kind]
        # What torch.compile reads, which fails if the older and the newer switch disagree.
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        raise ZeroDivisionError
    assert flags() == before and torch.get_float32_matmul_precision() == "highest"


def test_a_process_that_has_used_the_newer_switches_gets_them_back() -> None:
    before = flags()
    try:
        FLAGS[0].fp32_precision, FLAGS[1].fp32_precision = "tf32", "ieee"
        chosen = flags()
        for tf32 in (True, False):
            with encoder_products(tf32):
                assert len(set(flags()[:3])) == 1
            assert flags() == chosen
    finally:
        torch.set_float32_matmul_precision("highest")
        for flag, precision in zip(FLAGS, before, strict=True):
            flag.fp32_precision = precision


def test_what_a_configuration_and_another_precision_mean() -> None:
    run = Precision("bf16", True)
    assert run.instead(None) == run and run.instead("fp16") == ("fp16", True)
    assert run.instead("fp32") == ("fp32", False) and run.instead("tf32") == ("fp32", True)
    assert [Precision("fp32", tf32).products(GPU) for tf32 in (True, False)] == ["tf32", "fp32"]
    assert [precision.products(CPU) for precision in (run, Precision("fp32", True))] == ["bf16", "fp32"]
    line = run.describe(GPU, "ieee")
    encoders = "encoders, co-attention: autocast to bf16, else matmuls and convolutions in TF32"
    assert line == f"{encoders}; other scores and losses: IEEE fp32"
    assert "TF32" not in run.describe(CPU, "ieee") and "autocast" not in Precision().describe(CPU, "ieee")
    assert run.describe(GPU, "bf16x3").endswith("losses: bf16x3") and "tf32" not in run.describe(CPU, "tf32")
    with autocast(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        with autocast(CPU, "fp32"):
            assert not torch.is_autocast_enabled("cpu")


def test_shown_scores_of_an_evaluation_are_exact_in_a_run_with_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, seen = DualEncoderScores(torch.eye(3), torch.eye(3)), []
    multiply = torch.Tensor.__matmul__

    def recorded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(flags()[0])
        return multiply(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", recorded)
    with encoder_products(True):
        scores.row(0), scores.column(1), scores.block(torch.arange(2), torch.arange(3))
    assert seen == ["ieee"] * 3
