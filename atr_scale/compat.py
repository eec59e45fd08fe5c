"""Functions that have different names in the supported versions of other libraries."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

# torch has renamed both and warns about the old names. The first one gathers [b, ...] of every rank into
# [size * b, ...], the second one is its adjoint.
if hasattr(dist, "all_gather_single"):
    all_gather_single, reduce_scatter_single = dist.all_gather_single, dist.reduce_scatter_single
else:
    all_gather_single, reduce_scatter_single = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def enable_gradient_checkpointing(transformer: Any) -> None:
    """Recompute a transformers model's layers in the backward pass; newer versions call it activation checkpointing."""
    if hasattr(transformer, "activation_checkpointing_enable"):
        transformer.activation_checkpointing_enable({"use_reentrant": False})
    else:
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
