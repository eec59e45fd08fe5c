from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from atr_scale.encoders import build_audio_encoder
from tools.esc50_tagging import TAGS, classes_of


def test_the_most_probable_tag_decides() -> None:
    names = sorted({tag for tags in TAGS.values() for tag in tags} | {"Speech"})
    logits = np.full((3, len(names)), -5.0)
    logits[0, names.index("Meow")] = 1.0
    logits[1, names.index("Rain on surface")] = -1.0
    logits[:, names.index("Speech")] = 9.0  # no class of the table
    logits[2, names.index("Oink")], logits[2, names.index("Drip")] = 2.0, 1.5
    assert classes_of(logits, names) == ["cat", "rain", "pig"]
    assert len(TAGS) == 50


@pytest.mark.real_data
@pytest.mark.slow
@torch.no_grad()
def test_original_weights_know_real_recordings(real_data: Path) -> None:
    encoder = build_audio_encoder("mn04", real_data / "weights" / "efficientat_mn04_as" / "mn04_as_mAP_432.pt")
    with (real_data / "metadata" / "audioset" / "class_labels_indices.csv").open(newline="") as file:
        names = [row["display_name"] for row in csv.DictReader(file)]
    corpus = real_data / "esc50_fold1_hq"
    files = {path.stem: path for path in (corpus / "audio").iterdir() if path.suffix != ".json"}
    with (corpus / "esc50_fold1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::4]
    logits = []
    for row in rows:
        samples, rate = soundfile.read(files[Path(row["filename"]).stem], dtype="float32")
        assert rate == encoder.sample_rate
        logits.append(encoder.tags(torch.from_numpy(samples)[None])[0].numpy())
    found = classes_of(np.stack(logits), names)
    assert np.mean([a == row["category"] for a, row in zip(found, rows, strict=True)]) > 0.65
