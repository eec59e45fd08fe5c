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
    from atr_scale.precision import Products

__all__ = ["__version__", "load"]

if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
    # DeepSpeed (which transformers imports too) would search for an accelerator and warn that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load(
    run_or_checkpoint: str | Path,
    device: str | torch.device | None = None,
    plugins: Sequence[str] | None = None,
    precision: Products | None = None,
) -> TrainedModel:
    """Load a trained model that embeds and scores texts and audio.

    run_or_checkpoint: a run folder (its best checkpoint is loaded, else the latest) or the folder of a checkpoint.
    One on S3 (s3://bucket/run) is downloaded, without the state of its optimizer.
    device: default a GPU if there is one, else the CPU.
    plugins: names of the modules outside this package that define parts of the model. A checkpoint names them, but they
    are imported only if they are given here.
    precision: of the encoders: fp32, tf32 (on a GPU), bf16 or fp16; default that of the run, as in its validation.
    Raises UserError (a ValueError) with one line if there is no checkpoint, if it is damaged, or if a plug-in is
    missing.
    """
    from atr_scale.inference import load_trained  # importing torch takes seconds: only when a model is loaded

    return load_trained(run_or_checkpoint, device, plugins or (), precision)
