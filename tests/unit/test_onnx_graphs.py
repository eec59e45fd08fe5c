"""What the exported audio graphs compute, in torch: any length, windows and front ends as the encoders have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atr_scale.encoders import build_audio_encoder
from atr_scale.export.graphs import GraphFrontEnd, encode_any_length
from tests.encoders import noise

CASES = [
    ("small_cnn", {}),
    ("small_cnn", {"window_seconds": 1.0, "window_hop_seconds": 0.4}),
    ("mn04", {"window_seconds": 0.5}),  # the mean of the tokens of all windows
    ("tiny_resnet38", {}),
    ("tiny_passt", {"window_seconds": 0.7}),
    ("tiny_atst", {"window_seconds": 0.6, "window_hop_seconds": 0.5}),
    ("tiny_htsat", {"long_clips": "resize"}),
    ("tiny_clap", {"window_seconds": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{n}" for n, (name, _) in enumerate(CASES)])
@pytest.mark.slow
def test_any_length_as_the_encoder(name: str, options: dict[str, Any]) -> None:
    encoder = build_audio_encoder(name, **options)
    window = encoder.window or encoder.sample_rate
    lengths = {1, 300, window - 1, window, int(1.009 * window), int(1.02 * window), int(2.5 * window), 2 * window}
    clips = {samples: 0.3 * noise(2, samples, seed=samples) for samples in sorted(lengths)}
    with torch.no_grad():
        expected = {samples: encoder(clip) for samples, clip in clips.items()}
        encoder.front_end = GraphFrontEnd(encoder.front_end)  # type: ignore[assignment]
        for samples, clip in clips.items():
            found = encode_any_length(encoder, clip)
            torch.testing.assert_close(found.pooled, expected[samples].pooled, atol=3e-4, rtol=1e-3)
            for row in range(2):
                torch.testing.assert_close(
                    found.tokens[row][found.mask[row]],
                    expected[samples].tokens[row][expected[samples].mask[row]],
                    atol=3e-4,
                    rtol=1e-3,
                )
