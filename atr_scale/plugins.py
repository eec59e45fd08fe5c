"""Plug-ins: modules outside the package that add entries to its dicts (`CORPORA`, `SCORERS`, ...) when imported."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from traceback import walk_tb

from atr_scale.errors import UserError


def import_plugins(names: Sequence[str]) -> None:
    """Imports the modules `names` in order. A module that is imported already is not imported again.

    Raises UserError with the module, the cause and the remedy if a module is missing or fails during its import.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"plugins = {names!r}: give a list of modules' names, for example ['my_losses']")
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise UserError(_explain(name, error)) from None


def _explain(name: str, error: BaseException) -> str:
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
    place = None if missing else _place(name, error)
    if place is None:
        return (
            f"the plug-in {name!r} cannot be imported ({cause}): "
            "check its name, and that it is installed or on PYTHONPATH"
        )
    return f"the plug-in {name!r} cannot be imported ({cause}, {place}): correct it there"


def _place(name: str, error: BaseException) -> str | None:
    """File and line of an error in a plug-in: the innermost frame of the plug-in's own package.

    None if no code of that package was run.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    package = name.partition(".")[0]
    lines = [
        f"{frame.f_code.co_filename}, line {line}"
        for frame, line in walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package
    ]
    return lines[-1] if lines else None
