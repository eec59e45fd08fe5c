"""The verbs of `atr-scale`. Each imports what it needs when it is called, so that --help is instant."""

from __future__ import annotations

import logging
import sys

import typer

from atr_scale.errors import UserError

app = typer.Typer(
    name="atr-scale",
    help="Distributed large-scale pretraining for audio-text retrieval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
shards_app = typer.Typer(help="Build and check WebDataset shards.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(shards_app, name="shards")


def main() -> None:
    """Entry of the console script. Exit codes: 0 done, 2 the user's mistake (one line), 1 a failure of ours."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
