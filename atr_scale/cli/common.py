"""The application that the verbs are added to, and the parts that several verbs share."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from atr_scale.console import ConsoleHandler
from atr_scale.errors import Failure, OneLineError, UserError, exit_with_line
from atr_scale.files import FULL
from atr_scale.redaction import redact
from atr_scale.sections import expanded
from atr_scale.version import __version__

# Without a markup mode a paragraph of help that begins with a backspace character (\b) keeps its line breaks.
app = typer.Typer(name="atr-scale", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key.sub=value",
        help="Changes of the file: key=value replaces, key+=value appends to a list, ~key removes.",
    ),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE",
        help="Module to import first, with losses, scorers, encoders or corpora of your own; repeatable.",
    ),
]


class TakesOverrides(TyperCommand):
    """A verb with overrides. It refuses an override written like an option, and shows the right form."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        for argument in args:
            key, _, value = argument.removeprefix("--").partition("=")
            if argument.startswith("--") and "." in key:
                raise UserError(
                    f"no option --{key}: an override has no dashes before it, write {key}={value or 'VALUE'}"
                )
        return super().parse_args(ctx, args)


def expanded_path(path: str) -> str:
    """A path with `~` and `$VARIABLE` replaced, which shells do not do in `--out=~/x` or between quotes."""
    try:
        return expanded(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def local_path(path: str | Path) -> str:
    """`expanded_path` of what a verb writes to a local disk. Of the slashes in s3:// a Path keeps one."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(f"{path} is not a local path, which is needed here: write it to a disk, and copy it afterwards")
    return expanded_path(str(path))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"atr-scale {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distributed large-scale pretraining for audio-text retrieval.

    \b
    Examples:
      atr-scale demo-data --out demo/corpora
      atr-scale train configs/quickstart/pretrain.yaml
      atr-scale evaluate runs/quickstart
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the console script. Exit codes: 0 done, 2 a mistake of the user, 1 a failure. A mistake and
    an `errors.Failure` are one line; any other exception is an error of ours and has a traceback.

    arguments: default, those of the command line.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", handlers=[ConsoleHandler()])
    run = _run
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(_run)  # the launcher's report ends with the traceback of the rank that failed first
    try:
        run(arguments)
    except Exception:
        _show_traceback()
        sys.exit(1)


def _show_traceback() -> None:
    """Print the traceback of the current exception without secrets, and remove them from what the launcher prints."""
    print(redact(traceback.format_exc()), file=sys.stderr, end="")
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            report = Path(file)
            report.write_text(redact(report.read_text(encoding="utf-8")), encoding="utf-8")


def _run(arguments: Sequence[str] | None) -> None:
    try:
        app(arguments, prog_name="atr-scale")
    except OneLineError as error:
        exit_with_line(error)
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = error.filename or "what the command writes"
        exit_with_line(Failure(f"no space is left on the disk for {place}: make space, and start it again"))
