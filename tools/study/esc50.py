"""ESC-50 as frozen tokens: mn04's of every recording, a sentence encoder's of the fifty class captions."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from atr_scale.data.decode import decode
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.encoders import build_audio_encoder, build_text_encoder
from tools.esc50_corpus import CAPTION
from tools.study.encoders import hear, read, save_tokens

TEST_FOLD = 5


def write_tokens(esc50: Path, weights: Path, sentences: Path, out: Path) -> None:
    """Tokens "train/audio", "train/text", "test/audio" to `out`, and beside it the labels of both parts."""
    audio = build_audio_encoder("mn04", weights).eval()
    text = build_text_encoder(sentences, pooling="mean")
    tokenizer = CaptionTokenizer(text.tokenizer)
    files = {path.stem: path for path in (esc50 / "audio").iterdir()}
    rows = list(csv.DictReader((esc50 / "esc50.csv").open(newline="")))
    names = sorted({row["category"] for row in rows})
    parts = {
        "train": [row for row in rows if int(row["fold"]) != TEST_FOLD],
        "test": [row for row in rows if int(row["fold"]) == TEST_FOLD],
    }

    def waveform(row: dict[str, str]) -> torch.Tensor:
        path = files[Path(row["filename"]).stem]
        return torch.from_numpy(decode(path.read_bytes(), path.suffix[1:], audio.sample_rate))

    tokens = {f"{name}/audio": hear(audio, map(waveform, part)) for name, part in parts.items()}
    tokens["train/text"] = read(text, tokenizer, [CAPTION.format(name.replace("_", " ")) for name in names])
    labels = {name: torch.tensor([names.index(row["category"]) for row in part]) for name, part in parts.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(labels, out.with_suffix(".labels.pt"))
    save_tokens(tokens, out)
