"""Writes docs/config.md (every configuration key) and docs/api.md (the public functions) from the package itself.

python -m tools.write_docs            write both files
python -m tools.write_docs --check    write nothing; exit with 1 if a file differs from the package
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from atr_scale.errors import UserError
from tools.write_docs.api_page import api_page
from tools.write_docs.config_page import config_page

DOCS = Path(__file__).parents[2] / "docs"
PAGES: dict[str, Callable[[], str]] = {"config.md": config_page, "api.md": api_page}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the files with the package")
    check = parser.parse_args(arguments).check
    try:
        pages = {DOCS / name: page() for name, page in PAGES.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path} differs from the package: run python -m tools.write_docs")
        else:
            path.write_text(pages[path], encoding="utf-8")
            print(f"{path} written")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
