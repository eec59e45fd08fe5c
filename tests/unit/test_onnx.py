"""Exported graphs give the model's embeddings in a process that cannot import torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import atr_scale
from atr_scale.errors import UserError
from atr_scale.export import onnx as exporter
from atr_scale.export.onnx import ExportedGraph, export_onnx
from atr_scale.inference import TrainedModel
from tests.tiny_run import save_run, tiny_config

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
import numpy as np, onnxruntime
folder = sys.argv[1]
inputs = np.load(folder + "/inputs.npz")
text = onnxruntime.InferenceSession(folder + "/text.onnx")
audio = onnxruntime.InferenceSession(folder + "/audio.onnx")
assert audio.get_modelmeta().custom_metadata_map["sample_rate"] == "16000"
found = {}
for name in inputs.files:
    if name.startswith("ids"):
        feeds = {"input_ids": inputs[name], "attention_mask": inputs["mask" + name[3:]]}
        found[name] = text.run(["text_embedding"], feeds)[0]
    elif name.startswith("wave"):
        found[name] = audio.run(["audio_embedding"], {"waveform": inputs[name]})[0]
np.savez(folder + "/found.npz", **found)
"""


def trained(folder: Path, scorer: str = "meanmax") -> TrainedModel:
    return atr_scale.load(save_run(tiny_config(folder, folder / "run"), folder / "run", 1, scorer), device="cpu")


@pytest.mark.slow  # the exporter traces two models
def test_graphs_equal_the_model_without_torch(tmp_path: Path) -> None:
    model, folder = trained(tmp_path), tmp_path / "onnx"
    written = export_onnx(model, folder)
    assert {name: graph.file for name, graph in written.items()} == {
        "text": folder / "text.onnx",
        "audio": folder / "audio.onnx",
    }, written
    assert all(graph.max_difference < 1e-5 and graph.megabytes > 0.1 for graph in written.values()), written

    texts = [["a dog"], ["a dog barks in the rain", "wind", "two bells ring"], ["a bird"] * 4]
    noise, inputs, expected = np.random.default_rng(5), {}, {}
    for number, group in enumerate(texts):
        ids, mask = model.tokenizer(group)
        inputs[f"ids{number}"], inputs[f"mask{number}"] = ids.numpy(), mask.numpy()
        expected[f"ids{number}"] = model.embed_text(group)
    for clips, samples in ((1, 16_000), (1, 400), (4, 5_001), (2, 100_003)):
        waves = noise.normal(0, 0.1, (clips, samples)).astype(np.float32)
        inputs[f"wave{samples}"] = waves
        expected[f"wave{samples}"] = model.embed_audio(list(waves), sample_rate=16_000, seconds=10)
    np.savez(folder / "inputs.npz", allow_pickle=False, **inputs)
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, folder], check=True, cwd=tmp_path)
    found = np.load(folder / "found.npz")
    assert set(found.files) == set(expected)
    for name, embeddings in expected.items():
        np.testing.assert_allclose(found[name], embeddings, atol=1e-5, err_msg=name)


def test_a_pairwise_scorer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scorer tap of this model is pairwise"):
        export_onnx(trained(tmp_path, "tap"), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path)
    monkeypatch.setattr(exporter, "find_spec", lambda package: None if package == "onnxscript" else package)
    with pytest.raises(UserError, match=r'need onnxscript: pip install "atr-scale\[export\]"'):
        export_onnx(model, tmp_path / "onnx")


def test_a_tower_that_cannot_be_written_or_differs_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(tower: exporter.Tower, path: Path) -> None:
        if path.stem == "text":
            raise RuntimeError("wrapped") from ValueError("an operator\nwithout ONNX form")
        path.write_bytes(b"graph")

    monkeypatch.setattr(exporter, "_write_graph", write)
    monkeypatch.setattr(exporter, "_largest_difference", lambda *_: float("nan"))
    written = export_onnx(trained(tmp_path), tmp_path / "onnx")
    assert written["text"] == ExportedGraph(None, reason="ValueError: an operator without ONNX form")
    assert written["audio"].reason == "ArithmeticError: embeddings differ by nan from those of the model"
    assert not list((tmp_path / "onnx").iterdir())
