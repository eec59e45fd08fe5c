"""The verb that makes a folder to work in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atr_scale.cli.common import app, local_path
from atr_scale.errors import UserError


@app.command("init")
def init_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder for the files; made if it does not exist.")],
) -> None:
    """Copy the shipped configurations and scripts to a folder.

    It gets configs/, docs/, examples/, launch/ and slurm/. Files that are there already and differ are never
    overwritten: then nothing is copied. All other commands are called from inside this folder.

    \b
    Examples:
      atr-scale init sounds
      atr-scale init .
    """
    import shutil

    from atr_scale.shipped import FOLDERS, shipped_files

    target = Path(local_path(folder))
    files = [(path, target / name) for path, name in shipped_files()]
    changed = [copy for path, copy in files if copy.exists() and not _same(path, copy)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{changed[0]}{more} would be overwritten, and differ from the shipped files: nothing was copied; "
            "give another folder, or move them away"
        )
    try:
        for path, copy in files:
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copy(path, copy)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; give another folder") from None
    enter = "" if target.resolve() == Path.cwd() else f"  cd {folder}\n"
    print(
        f"{target} has {', '.join(f'{name}/' for name in FOLDERS)}. Next, for example:\n{enter}"
        "  launch/quickstart.sh                     # a small model on demo corpora, in minutes\n"
        "docs/tutorial.md leads from your own recordings to a search page."
    )


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
