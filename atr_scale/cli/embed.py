"""The verb that embeds a collection of sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atr_scale.cli.common import Plugins, app, expanded_path, local_path


@app.command("embed")
def embed_command(
    run: Annotated[str, typer.Argument(help="Run folder (its best checkpoint is used) or a checkpoints/step-N.")],
    source: Annotated[str, typer.Argument(help="Folder of audio, table of captions, or shards (a folder or s3://).")],
    out: Annotated[Path, typer.Option(help="Result: F.npy, with F.jsonl and F.json beside it, or F.parquet.")],
    windows: Annotated[
        float | None, typer.Option(help="Cut each recording into windows of so many seconds, with start and end.")
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Write the embeddings of a collection of sounds.

    A start that was interrupted goes on with the same command.

    \b
    Examples:
      atr-scale embed runs/quickstart sounds --out s.npy
      atr-scale embed runs/quickstart ~/recordings --windows 10 --out parts.npy
      atr-scale embed runs/quickstart s3://bucket/test --out test.parquet

    \b
    Two processes:
      torchrun --nproc-per-node 2 -m atr_scale.cli embed RUN sounds --out s.npy
    """
    from atr_scale.distributed.start import distributed
    from atr_scale.inference import load_trained
    from atr_scale.search.embed import embed_files

    place = local_path(out)
    with distributed() as (world, device):
        model = load_trained(expanded_path(run), device, plugins or ())
        embed_files(
            model,
            expanded_path(run),
            expanded_path(source),
            place,
            windows=windows,
            world=world,
        )
