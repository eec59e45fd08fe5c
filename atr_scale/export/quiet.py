"""The libraries that write exports tell their own developers much, and users nothing."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

LIBRARIES = ("torch.onnx", "onnxscript", "onnx_ir", "sentence_transformers")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, warnings are not shown, and only errors of these libraries are logged."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
