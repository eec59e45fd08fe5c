"""What original checkpoints hold beside tensors, and may be read without running their code.

Training scripts save learning rates as NumPy scalars, samplers as NumPy arrays, settings as namespaces, and Lightning
files its callbacks by their classes. Nothing of this is needed: each such name is read as an inert object, so that
neither NumPy nor Lightning is called, or has to be installed. Every other name in a file is refused by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

INERT = (
    # NumPy 1 and 2 write the same objects under different names.
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "argparse.Namespace",
    # Before version 1.6 Lightning kept a callback's state under its class.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
)
# A dict with dots for brackets; torch fills nothing but true dicts.
DICTS = ("pytorch_lightning.utilities.parsing.AttributeDict",)


class Inert:
    """Takes whatever is said of an object, and forgets it."""

    def __new__(cls, *args: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


@contextmanager
def safe_types() -> Iterator[None]:
    """Within it `torch.load(weights_only=True)` reads the names above, and nothing that others have declared safe."""
    others = torch.serialization.get_safe_globals()
    known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(Inert, name) for name in INERT]
    known += [(dict, name) for name in DICTS]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(known)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
