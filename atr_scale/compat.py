"""What the supported versions of other libraries call by different names: one function each."""

from __future__ import annotations

from typing import Any


def enable_gradient_checkpointing(transformer: Any) -> None:
    """Has layers of a transformers model recomputed in the backward pass (newer versions: activation checkpointing)."""
    if hasattr(transformer, "activation_checkpointing_enable"):
        transformer.activation_checkpointing_enable({"use_reentrant": False})
    else:
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
