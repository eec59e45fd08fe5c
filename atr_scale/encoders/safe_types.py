"""What original checkpoints hold beside tensors, and may be read without running their code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def safe_types() -> Iterator[None]:
    yield
