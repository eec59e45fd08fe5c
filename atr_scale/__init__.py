"""Distributed large-scale pretraining for audio-text retrieval.

model = atr_scale.load("runs/quickstart")
model.similarity(["a dog barks"], ["dog.wav"])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atr_scale.version import __version__

if TYPE_CHECKING:
    import torch

    from atr_scale.inference import TrainedModel

__all__ = ["__version__", "load"]

if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
    # DeepSpeed (which transformers imports too) would search for an accelerator and warn that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load(
    run_or_checkpoint: str | Path, device: str | torch.device | None = None, plugins: Sequence[str] = ()
) -> TrainedModel:
    """A trained model, ready to embed and to score: its best checkpoint (else the latest) or the checkpoint given.

    device: default a GPU if there is one, else the CPU. plugins: modules that define what the model was trained with
    beyond this package; a checkpoint names them but never imports them by itself.
    Raises UserError (a ValueError), in one line, if there is no checkpoint, or it is damaged, or a plug-in is missing.
    """
    from atr_scale.inference import load_trained  # torch is imported when something is loaded

    return load_trained(run_or_checkpoint, device, plugins)
