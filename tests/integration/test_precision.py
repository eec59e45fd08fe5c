"""Every use of a trained model multiplies as its run did, unless another precision is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import atr_scale
from atr_scale.distributed.start import distributed
from atr_scale.encoders import front_ends
from atr_scale.encoders.front_ends import FrontEnd
from atr_scale.encoders.small_cnn import SmallCNN
from atr_scale.errors import UserError
from atr_scale.evaluation.evaluate import evaluate_run
from atr_scale.precision import Products
from atr_scale.teachers.estimate import write_teacher_tables
from atr_scale.teachers.tables import TeacherTable
from atr_scale.training.loop import train
from tests.tiny_run import save_run, tiny_config

pytestmark = pytest.mark.slow


def gpu_products() -> list[str]:
    """Of matrix products and of convolutions."""
    backends: Any = torch.backends
    return [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision]


def results(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "results.json").read_text())["results"])


def measured(run: Path, out: Path, precision: Products | None = None) -> dict[str, Any]:
    with distributed() as (world, device):
        evaluate_run(str(run / "latest"), split="validation", out=out, precision=precision, world=world, device=device)
    return results(out)[0]


def test_validation_evaluation_and_search_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, before = tmp_path / "run", gpu_products()
    seen: list[tuple[Any, ...]] = []
    encode, mel, power = SmallCNN.encode, FrontEnd.forward, front_ends.power_spectrogram

    def recorded_encode(self: SmallCNN, *given: Any, **named: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append(("encoder", dtype, *gpu_products()))
        return encode(self, *given, **named)

    def recorded_mel(self: FrontEnd, *given: Any) -> Tensor:
        seen.append(("before the front end", *gpu_products()))
        return mel(self, *given)

    def recorded_bank(*given: Any) -> Tensor:
        seen.append(("inside it", gpu_products()[0], torch.is_autocast_enabled("cpu")))
        return power(*given)

    monkeypatch.setattr(SmallCNN, "encode", recorded_encode)
    monkeypatch.setattr(FrontEnd, "forward", recorded_mel)
    monkeypatch.setattr(front_ends, "power_spectrogram", recorded_bank)
    config = tiny_config(tmp_path / "inputs", run, precision="bf16", steps=2, evaluate_every=2)
    with caplog.at_level("INFO"):
        train(config)
    in_bf16 = {
        ("encoder", torch.bfloat16, "tf32", "tf32"),
        ("before the front end", "tf32", "tf32"),
        ("inside it", "ieee", False),
    }
    assert set(seen) == in_bf16 and gpu_products() == before
    line = "encoders, co-attention: autocast to bf16, else matmuls and convolutions in IEEE fp32; other scores"
    assert caplog.text.count(line) == 1

    seen.clear()
    validated, evaluated = results(run)[-1], measured(run, tmp_path / "same")
    assert set(seen) == in_bf16 and gpu_products() == before
    assert validated["precision"] == evaluated["precision"] == "bf16"
    assert evaluated["metrics"] == validated["metrics"]
    ranks = [np.load(folder / "ranks-validation.npz") for folder in (run, tmp_path / "same")]
    assert all(np.array_equal(ranks[0][key], ranks[1][key]) for key in ("t2a", "a2t", "excerpt"))

    seen.clear()
    other = measured(run, tmp_path / "other", "fp32")
    assert set(seen) == {
        ("encoder", None, "ieee", "ieee"),
        ("before the front end", "ieee", "ieee"),
        ("inside it", "ieee", False),
    }
    assert other["precision"] == "fp32"
    excerpt = np.load(tmp_path / "other" / "ranks-validation.npz")["excerpt"]
    assert not np.array_equal(excerpt, ranks[0]["excerpt"])

    seen.clear()
    waveform = np.sin(np.arange(8000, dtype=np.float32))
    embedded = [atr_scale.load(run, precision=kind).embed_audio([waveform], 16_000) for kind in (None, "bf16", "fp32")]
    assert np.array_equal(embedded[0], embedded[1]) and not np.array_equal(embedded[0], embedded[2])
    with pytest.raises(UserError, match="precision = 'int8': give one of fp32, tf32, bf16, fp16"):
        atr_scale.load(run, precision="int8")  # type: ignore[arg-type]


def test_a_teacher_table_of_another_precision_is_written_anew(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "inputs", tmp_path / "run", precision="bf16")
    run, shards = save_run(config, tmp_path / "run", 0), [str(tmp_path / "inputs" / "validation" / "shards")]
    found = []
    precisions: list[Products | None] = [None, "bf16", "fp32", None]
    for precision in precisions:
        with distributed() as (world, device):
            write_teacher_tables(
                [str(run)], shards=shards, out=tmp_path / "out", precision=precision, world=world, device=device
            )
        table = TeacherTable.read(tmp_path / "out" / "run.safetensors")
        found.append((table.metadata["precision"], (tmp_path / "out" / "run.safetensors").stat().st_mtime_ns))
    assert [name for name, _ in found] == ["bf16", "bf16", "fp32", "bf16"]
    times = [time for _, time in found]
    assert times[0] == times[1] and len(set(times)) == 3
