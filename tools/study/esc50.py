"""Tokens of ESC-50: every recording encoded by mn04, the fifty class captions by a sentence encoder."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from atr_scale.data.decode import decode
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.encoders import build_audio_encoder, build_text_encoder
from tools.esc50_corpus import CAPTION
from tools.study.encoders import encode_captions, encode_clips, save_tokens

TEST_FOLD = 5


def write_tokens(esc50: Path, weights: Path, sentences: Path, out: Path) -> None:
    """Write the tokens "train/audio", "train/text" and "test/audio" to `out`, and the labels to a file beside it."""
    audio = build_audio_encoder("mn04", weights).eval()
    text = build_text_encoder(sentences, pooling="mean")
    tokenizer = CaptionTokenizer(text.tokenizer)
    files = {path.stem: path for path in (esc50 / "audio").iterdir()}
    rows = list(csv.DictReader((esc50 / "esc50.csv").open(newline="", encoding="utf-8")))
    names = sorted({row["category"] for row in rows})
    parts = {
        "train": [row for row in rows if int(row["fold"]) != TEST_FOLD],
        "test": [row for row in rows if int(row["fold"]) == TEST_FOLD],
    }

    def waveform(row: dict[str, str]) -> torch.Tensor:
        path = files[Path(row["filename"]).stem]
        return torch.from_numpy(decode(path.read_bytes(), path.suffix[1:], audio.sample_rate))

    tokens = {f"{name}/audio": encode_clips(audio, map(waveform, part)) for name, part in parts.items()}
    tokens["train/text"] = encode_captions(text, tokenizer, [CAPTION.format(name.replace("_", " ")) for name in names])
    labels = {name: torch.tensor([names.index(row["category"]) for row in part]) for name, part in parts.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(labels, out.with_suffix(".labels.pt"))
    save_tokens(tokens, out)
