"""The verb that writes a trained model as a folder to hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atr_scale.cli.common import Plugins, app, expanded_path, local_path


@app.command("export")
def export_command(
    run: Annotated[str, typer.Argument(help="Run folder (its best checkpoint is used) or a checkpoints/step-N.")],
    out: Annotated[Path, typer.Option(help="New folder for the model; its name is the name of the model.")],
    formats: Annotated[
        str | None,
        typer.Option(
            help="Formats beside the model, with commas: model (none), onnx, sentence-transformers; default: all."
        ),
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Write a trained model as a folder to hand on.

    `atr_scale.load` and all verbs take the folder as they take a run. It holds no path of this machine. Its README.md
    is a model card: data, licences, results, limits, how to train it again, examples. Formats that the model cannot
    have are named with the reason, and are an error if --formats asks for them.

    \b
    Examples:
      atr-scale export runs/quickstart --out models/quickstart
      atr-scale export runs/quickstart/checkpoints/step-136 --out models/early
      atr-scale export runs/tap --out models/tap --formats model
    """
    from atr_scale.export.folder import export_run

    chosen = None if formats is None else [name.strip() for name in formats.split(",")]
    exported = export_run(expanded_path(run), local_path(out), formats=chosen, plugins=plugins or ())
    for part in exported.parts:
        print(f"{part.name:<22} {f'not exported: {part.reason}' if part.reason else f'{part.megabytes:.1f} MB'}")
    print(f"{exported.folder}: read README.md in it before you hand it on")
