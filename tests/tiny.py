"""Shards and a text encoder small enough that a training run takes seconds; shared by tests of whole runs."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from atr_scale.data.shard_builder import build_shards
from atr_scale.demo.text_encoder import build_demo_text_encoder

RATE = 16_000
WORDS = ("low", "high", "soft", "loud", "short", "long", "dull", "bright")


@dataclass(frozen=True)
class TinyInputs:
    """Folders: one corpus split as shards, and a BERT without dropout, so that runs can be compared."""

    shards: Path
    text_encoder: Path


def make_tiny_inputs(folder: Path, clips: int = 12, captions: int = 1) -> TinyInputs:
    """`clips` tones of one second with `captions` captions each, in shards; a BERT of two layers."""
    corpus = folder / "corpus"
    (corpus / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(clips):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 100 * number) * np.arange(RATE) / RATE) + 0.01 * rng.normal(size=RATE)
        soundfile.write(corpus / "audio" / f"tone-{number}.wav", tone, RATE)
        text = f"a {WORDS[number % 8]} and {WORDS[(number // 2) % 8]} tone {number}"
        rows.append((f"tone-{number}.wav", text, *(f"{text} again {k}" for k in range(1, captions))))
    with open(corpus / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", *(f"caption_{k + 1}" for k in range(captions))), *rows])
    shards = folder / "shards"
    build_shards("folder", corpus, shards, shard_size=5, sample_rate=RATE, workers=1)
    text_encoder = folder / "text_encoder"
    build_demo_text_encoder(
        [caption for _, *texts in rows for caption in texts], text_encoder, layers=2, dim=32, heads=2
    )
    settings = text_encoder / "config.json"
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **without_dropout}))
    return TinyInputs(shards, text_encoder)


def write_tiny_config(path: Path, inputs: TinyInputs, run_dir: Path, **train: object) -> Path:
    """A run of a few steps of four pairs in fp32 that logs each step; `train` sets further keys of its section."""
    config = {
        "run": {"dir": str(run_dir)},
        "data": {"train": [{"shards": str(inputs.shards)}], "crop_seconds": 1.0, "workers": 0},
        "model": {"audio": {"name": "small_cnn"}, "text": {"name": str(inputs.text_encoder), "pooling": "mean"}},
        "train": {"steps": 4, "global_batch_size": 4, "precision": "fp32", "lr": 1e-3, "log_every": 1, **train},
    }
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def read_training(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl about training."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]
