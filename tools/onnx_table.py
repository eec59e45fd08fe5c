"""Exports every audio encoder, and small text encoders of several families, as ONNX graphs, and prints a table of them.

python -m tools.onnx_table                        all, one after another, each in a process of its own; minutes each
python -m tools.onnx_table mn04 bert              these alone

Weights are random, which changes neither size nor time; normalisation layers get random statistics. The table of
docs/encoders.md is made of its output.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import BertConfig, DistilBertConfig, ModernBertConfig, MPNetConfig, RobertaConfig

from atr_scale.config_model import ProjectionSection
from atr_scale.encoders import AUDIO_ENCODERS, build_audio_encoder
from atr_scale.encoders.text import TextEncoderOptions
from atr_scale.encoders.transformers_text import TransformersTextEncoder, untrained
from atr_scale.export.graphs import TextGraph
from atr_scale.export.onnx import ExportedGraph, Tower, audio_tower, export_tower
from atr_scale.model import Projection, Retriever
from atr_scale.scorers import build_scorer

DIM = 128
SIZE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TEXT_ENCODERS = {
    "bert": BertConfig(**SIZE),
    "roberta": RobertaConfig(**SIZE, max_position_embeddings=130),
    "mpnet": MPNetConfig(**SIZE),
    "distilbert": DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "modernbert": ModernBertConfig(
        **SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
}


def export_one(name: str) -> tuple[ExportedGraph, float]:
    """The graph of an encoder with a projection and a scorer, and the seconds that the export took."""
    torch.manual_seed(0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tower = _text_tower(name) if name in TEXT_ENCODERS else _audio_tower(name)
        return export_tower(tower, Path(folder) / ("text.onnx" if name in TEXT_ENCODERS else "audio.onnx")), (
            time.perf_counter() - start
        )


def _audio_tower(name: str) -> Tower:
    encoder = build_audio_encoder(name).eval()
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    model = SimpleNamespace(
        audio_encoder=encoder,
        audio_projection=Projection(encoder.dim, ProjectionSection(kind="mlp", dim=DIM)).eval(),
        scorer=build_scorer("meanmax", DIM).eval(),
        sample_rate=encoder.sample_rate,
    )
    return audio_tower(cast(Retriever, model), {})


@torch.no_grad()
def _text_tower(name: str) -> Tower:
    options = TextEncoderOptions(pooling="mean")
    encoder = TransformersTextEncoder(untrained(TEXT_ENCODERS[name], options).eval(), None, options).eval()
    model = SimpleNamespace(
        text_encoder=encoder,
        text_projection=Projection(encoder.dim, ProjectionSection(kind="mlp", dim=DIM)).eval(),
        scorer=build_scorer("pooled", DIM).eval(),
    )
    inputs: list[tuple[torch.Tensor, ...]] = []
    expected = []
    for texts, words in ((2, 5), (1, 1), (3, 20), (5, 64)):
        ids, mask = torch.randint(5, 100, (texts, words)), torch.ones(texts, words, dtype=torch.int64)
        for row in range(1, texts):
            mask[row, max(1, words - 3 * row) :] = 0
        inputs.append((ids, mask))
        encoded = model.text_projection(encoder(ids, mask), with_tokens=False)
        expected.append(model.scorer.embed_text(encoded).numpy())
    return Tower(lambda: TextGraph(cast(Retriever, model)), ("input_ids", "attention_mask"), inputs, expected, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"audio encoders, or {', '.join(TEXT_ENCODERS)}; by default all")
    names = parser.parse_args().names or [*AUDIO_ENCODERS, *TEXT_ENCODERS]
    print("| encoder | MB | export, s | largest difference |\n|-|-|-|-|", flush=True)
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            graph, seconds = process.submit(export_one, name).result()
        cells = (f"{graph.megabytes:.1f}", f"{seconds:.0f}", f"{graph.max_difference:.1e}")
        print(f"| `{name}` | {' | '.join(cells) if graph.file else f'not exported: {graph.reason} | |'} |", flush=True)


if __name__ == "__main__":
    main()
