"""A loss outside the package: the sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343, algorithm 1)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from atr_scale.losses import LOSS_TERMS, LossTerm, TermSection
from atr_scale.sections import Positive


class SigmoidSection(TermSection):
    """Keys of `objective.sigmoid`, beside `weight`."""

    initial_scale: Positive = Field(10.0, description="Initial scale of the scores; its logarithm is learned.")
    initial_bias: float = Field(
        -10.0, description="Initial bias of the logits; far below 0, because most pairs are negatives."
    )


class SigmoidLoss(LossTerm):
    """Binary classification of every pair as match or no match, without softmax and without the temperature."""

    Section = SigmoidSection

    def __init__(self, section: SigmoidSection) -> None:
        super().__init__(section)
        self.log_scale = nn.Parameter(torch.tensor([math.log(section.initial_scale)]))
        self.bias = nn.Parameter(torch.tensor([section.initial_bias]))

    def dense(self, scores: Tensor, positives: Tensor) -> Tensor:
        logits = self.log_scale.exp() * scores + self.bias
        sign = torch.where(positives, 1.0, -1.0)
        return -logsigmoid(sign * logits).sum() / len(scores)


LOSS_TERMS["sigmoid"] = SigmoidLoss
