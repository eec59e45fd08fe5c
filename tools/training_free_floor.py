"""A baseline for retrieval without training: the tags of a pretrained tagger, embedded as text.

    python -m tools.training_free_floor --shards DIR --checkpoint mn04_as_mAP_432.pt --labels class_labels_indices.csv \
        --text sentence-transformers/all-MiniLM-L6-v2

The embedding of a clip is the mean of the sentence embeddings of its most probable tags, weighted by probability. A
trained model should be better than this.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from atr_scale.data.decode import decode
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.encoders import build_audio_encoder, build_text_encoder
from atr_scale.evaluation.metrics import retrieval_metrics


@torch.no_grad()
def floor(shards: str, checkpoint: str, labels: Path, text: str, audio_name: str, tags: int) -> dict[str, float]:
    """Retrieval metrics of the tagger on a set of shards."""
    names = [row["display_name"].lower() for row in csv.DictReader(labels.open(newline="", encoding="utf-8"))]
    tagger = build_audio_encoder(audio_name, checkpoint)
    encoder = build_text_encoder(text, pooling="mean")
    tokenizer = CaptionTokenizer(encoder.tokenizer)

    def embed(texts: list[str]) -> torch.Tensor:
        return normalize(encoder(*tokenizer(texts)).pooled, dim=-1)

    tag_embeddings = embed([f"the sound of {name}" for name in names])
    clips, captions, owner = [], [], []
    data = open_shards(shards)
    for number in range(len(data)):
        sample = data.read(number)
        waveform = decode(sample.audio, sample.extension, tagger.sample_rate, pcm_rate=sample.sample_rate)
        weight, index = tagger.tags(torch.from_numpy(waveform)[None]).sigmoid()[0].topk(tags)
        clips.append(normalize((weight[:, None] * tag_embeddings[index]).sum(0), dim=-1))
        captions += sample.captions
        owner += [number] * len(sample.captions)
    return retrieval_metrics(embed(captions) @ torch.stack(clips).T, np.array(owner), np.arange(len(clips)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Training-free retrieval by a tagger's labels.")
    parser.add_argument("--shards", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--labels", type=Path, required=True, help="AudioSet's class_labels_indices.csv")
    parser.add_argument("--text", required=True)
    parser.add_argument("--audio", default="mn04")
    parser.add_argument("--tags", type=int, default=5)
    given = parser.parse_args()
    found = floor(given.shards, given.checkpoint, given.labels, given.text, given.audio, given.tags)
    for name, value in found.items():
        print(f"{name:<16} {value:.3f}")


if __name__ == "__main__":
    main()
