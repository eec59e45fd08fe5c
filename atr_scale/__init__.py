"""Distributed large-scale pretraining for audio-text retrieval."""

import os

__version__ = "0.1.0"

if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
    # DeepSpeed (which transformers imports too) would search for an accelerator and warn that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
