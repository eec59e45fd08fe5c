"""The verb that downloads the weights of the original projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atr_scale.cli.common import app
from atr_scale.errors import UserError


@app.command("fetch-weights")
def fetch_weights(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Names of the weights table, as --list shows it.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the weights table and fetch nothing.")] = False,
    to: Annotated[
        Path, typer.Option(help="Folder for the files; a configuration finds names in checkpoints alone.")
    ] = Path("checkpoints"),
    mirror: Annotated[
        str | None,
        typer.Option("--from", help="Address of a folder with the files, instead of the projects' own addresses."),
    ] = None,
) -> None:
    """Fetch original weights of audio encoders by name.

    A file is checked by size and checksum. An interrupted download continues with the next call. Configurations name
    the weights: model.audio.checkpoint=mn40.

    \b
    Examples:
      atr-scale fetch-weights --list
      atr-scale fetch-weights mn40 passt_s16 atst_frame
      atr-scale fetch-weights clap --from https://mirror.example/weights
    """
    from atr_scale.encoders.pretrained.weights import WEIGHTS, weights_by_name

    if show:
        for name, weights in WEIGHTS.items():
            size = "unknown" if weights.size is None else f"{weights.size / 1e6:,.0f} MB"
            here = "here" if (to / weights.file).exists() else ""
            checksum = (weights.checksum or "no checksum").partition(":")[0]
            row = f"{name:<15} {weights.encoder:<10} {weights.file:<44} {size:>9}  {checksum:<11} {here:<4}"
            print(f"{row}  {weights.project.licence}")
        return
    if not names:
        raise UserError("no name given: `atr-scale fetch-weights --list` shows the weights table")
    from atr_scale.encoders.pretrained.fetch import fetch

    for weights in [weights_by_name(name) for name in names]:
        print(fetch(weights, to, mirror))
