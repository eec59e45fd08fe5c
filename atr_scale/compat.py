"""Names of newer releases than the lowest that pyproject.toml allows, each with what older ones call the same."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

# torch renamed both and warns of the old names: [size * b, ...] of all ranks from [b, ...] of each, and its adjoint.
if hasattr(dist, "all_gather_single"):
    all_gather_single, reduce_scatter_single = dist.all_gather_single, dist.reduce_scatter_single
else:
    all_gather_single, reduce_scatter_single = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def enable_gradient_checkpointing(transformer: Any) -> None:
    """Layers of a transformers model keep no more than their inputs for the backward pass, which runs them again."""
    options = {"use_reentrant": False}
    if hasattr(transformer, "activation_checkpointing_enable"):
        transformer.activation_checkpointing_enable(options)
    else:
        transformer.gradient_checkpointing_enable(options)
