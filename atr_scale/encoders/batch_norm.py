"""Batch normalisation that does not look at the batch.

With statistics of the local batch, results depend on how many ranks and chunks share the work; with the stored ones
they do not. The affine weights are trained either way.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from atr_scale.errors import UserError

BatchNormMode = Literal["frozen", "local"]


def check_mode(mode: str) -> None:
    """Raises UserError unless `mode` is one of BatchNormMode."""
    if mode not in get_args(BatchNormMode):
        raise UserError(f"unknown batch_norm '{mode}'; choose frozen (stored statistics) or local (the batch's own)")


def use_stored_statistics(module: nn.Module) -> None:
    """Puts every batch norm inside `module` into evaluation mode, whatever the mode of the rest."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
