"""The command line, `atr-scale`: one module per group of verbs.

A verb imports what it needs when it is called, so that --help answers at once. Its function is called after it, or
`<verb>_command` if the plain name belongs to the function that does the work.
"""

from __future__ import annotations

from atr_scale.cli import (
    corpora,
    embed,
    experiments,
    export,
    init,
    runs,
    search,
    serve,
    trained_models,
    weights,
)  # each adds its verbs to `app`
from atr_scale.cli.common import app, main

__all__ = [
    "app",
    "corpora",
    "embed",
    "experiments",
    "export",
    "init",
    "main",
    "runs",
    "search",
    "serve",
    "trained_models",
    "weights",
]
