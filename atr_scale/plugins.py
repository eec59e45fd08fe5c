"""Plug-ins: modules outside the package that add to its dicts of losses, scorers, encoders and corpora."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from atr_scale.errors import UserError


def import_plugins(names: Sequence[str]) -> None:
    """Import the modules `names`. Raises UserError naming one that cannot be imported, and why."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the plug-in {name} cannot be imported ({type(error).__name__}: {reason}): give the name of a module "
                "on Python's path, for example with PYTHONPATH"
            ) from error
