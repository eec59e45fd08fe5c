"""Train a linear probe: multinomial logistic regression on pooled embeddings of a frozen audio encoder.

    python -m tools.linear_probe --train shards/esc50/train --test shards/esc50/test --checkpoint mn04_as_mAP_432.pt

It is the baseline for fine-tuned models on a labelled corpus.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from atr_scale.data.decode import decode
from atr_scale.data.shard_reader import open_shards
from atr_scale.encoders import AudioEncoder, build_audio_encoder
from atr_scale.errors import UserError


@torch.no_grad()
def features(location: str, encoder: AudioEncoder) -> tuple[Tensor, list[str]]:
    """Pooled embeddings [clips, D] and the label of every clip. Raises UserError if a clip has no label."""
    shards = open_shards(location)
    found, labels = [], []
    for number in range(len(shards)):
        sample = shards.read(number)
        if sample.label is None:
            raise UserError(f"{location}: clip {sample.clip_id} has no label: build shards with a label column")
        waveform = decode(sample.audio, sample.extension, encoder.sample_rate, pcm_rate=sample.sample_rate)
        found.append(encoder(torch.from_numpy(waveform)[None]).pooled[0])
        labels.append(sample.label)
    return torch.stack(found), labels


def probe(train: tuple[Tensor, list[str]], test: tuple[Tensor, list[str]], decay: float) -> float:
    """Test accuracy. Features are standardised with the training set; decay is the factor of the L2 penalty."""
    classes = sorted(set(train[1]))
    target, wanted = (torch.tensor([classes.index(label) for label in part[1]]) for part in (train, test))
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-6
    x, y = ((part[0] - mean) / deviation for part in (train, test))
    layer = torch.nn.Linear(x.shape[1], len(classes))
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(layer(x), target) + decay * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float(np.mean((layer(y).argmax(1) == wanted).numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Logistic regression on frozen audio features.")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--audio", default="mn04")
    parser.add_argument("--decay", type=float, default=1e-3)
    given = parser.parse_args()
    torch.manual_seed(0)
    encoder = build_audio_encoder(given.audio, given.checkpoint)
    accuracy = probe(features(given.train, encoder), features(given.test, encoder), given.decay)
    print(f"accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
