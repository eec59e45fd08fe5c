"""The verb that serves the search page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atr_scale.cli.common import Plugins, app, expanded_path


@app.command("serve")
def serve_command(
    index: Annotated[str, typer.Argument(help="Folder that `atr-scale index` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="ATR_SCALE_TOKEN", help="Secret that browsers must bring; made up for other hosts."),
    ] = None,
    relevance: Annotated[
        Path | None, typer.Option(help="CSV file of the marks; by default relevance.csv in the index.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Run or checkpoint of the index, if it is no longer where it was.")
    ] = None,
    rerank: Annotated[
        str | None, typer.Option(help="Run with a pairwise scorer that scores the best results again.")
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Serve a page to search an index in a browser.

    Type a query or drop a sound, hear the results, and mark them right or wrong. The marks are a file that
    `atr-scale evaluate --relevance` reads. Ctrl-C ends the server.

    \b
    Examples:
      atr-scale serve clips.index
      atr-scale serve clips.index --port 0 --relevance marks.csv
      atr-scale serve clips.index --host 0.0.0.0
    """
    from atr_scale.search.serve.server import serve

    serve(
        expanded_path(index),
        Path(expanded_path(str(relevance))) if relevance else None,
        host=host,
        port=port,
        token=token,
        run=run,
        rerank=rerank,
        plugins=plugins or (),
    )
