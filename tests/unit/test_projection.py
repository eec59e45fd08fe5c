"""Layers between the encoders and the scorer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atr_scale.batch import TokenSequence
from atr_scale.config_model import ProjectionSection
from atr_scale.model import Projection


@pytest.mark.parametrize(
    ("section", "widths"),
    [
        ({"kind": "none"}, []),
        ({"kind": "linear", "dim": 4}, [(6, 4)]),
        ({"kind": "mlp", "dim": 4}, [(6, 4), (4, 4)]),
        ({"kind": "mlp", "dim": 4, "hidden_dim": 8}, [(6, 8), (8, 4)]),  # TAP: 2048 -> 2048 -> 1024
    ],
)
def test_widths(section: dict[str, object], widths: list[tuple[int, int]]) -> None:
    projection = Projection(6, ProjectionSection.model_validate(section))
    linear = [(m.in_features, m.out_features) for m in projection.modules() if isinstance(m, nn.Linear)]
    assert linear == widths
    found = projection(TokenSequence.unpadded(torch.randn(2, 3, 6), torch.randn(2, 6)), with_tokens=True)
    assert projection.dim == found.tokens.shape[2] == found.pooled.shape[1] == (widths[-1][1] if widths else 6)
