"""The lock files of launch/: do they fit together, and which packages torch's CUDA build needs beside the others.

    python -m tools.lock            check both files, without a network
    python -m tools.lock --renew    write cuda.txt and cuda.json anew; pip downloads metadata alone

constraints.txt pins what an installation on a CPU has, cuda.txt what torch's CUDA build brings beside it on Linux on
x86-64. The requirements of those packages are in cuda.json, because they are not installed where this is checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
COMMON, CUDA, METADATA = (ROOT / "launch" / name for name in ("constraints.txt", "cuda.txt", "cuda.json"))
PYTHONS = ("3.11", "3.12")
GLIBC = range(5, 29)  # wheels for glibc up to 2.28, that of the oldest systems in use
LINUX = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "sys_platform": "linux",
}
HEAD = """\
# What torch's CUDA build needs beside launch/constraints.txt, on Linux on x86-64. Renew: python -m tools.lock --renew
"""


def pins(*files: Path) -> dict[str, str]:
    """The version of every package, by its normalised name."""
    lines = [
        line
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def conflicts(roots: Sequence[str], locked: Mapping[str, str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """What `roots` and all that they need require and `locked` does not have, one line each.

    needs: the requirements of packages by normalised name; those of others are taken from the installed packages.
    """
    found: dict[str, None] = {}
    for python in PYTHONS:
        place = {**LINUX, "python_version": python, "python_full_version": f"{python}.0"}
        seen: set[tuple[str, str]] = set()
        waiting = [("this project", text, "") for text in roots]
        while waiting:
            parent, text, extra = waiting.pop()
            need = _parsed(text)
            if need.marker and not need.marker.evaluate({**place, "extra": extra}):
                continue
            name = canonicalize_name(need.name)
            if name not in locked:
                found[f"{parent} needs {text}, which is not locked"] = None
            elif not need.specifier.contains(locked[name], prereleases=True):
                found[f"{parent} needs {text}, but {locked[name]} is locked"] = None
            for wanted in {(name, extra) for extra in ("", *need.extras)} - seen:
                seen.add(wanted)
                waiting += [(name, each, wanted[1]) for each in needs.get(name) or _of_installed(name)]
    return sorted(found)


_parsed = cache(Requirement)


@cache
def _of_installed(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def project() -> list[str]:
    """The requirements of this project, those of its extras included."""
    section = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*section["dependencies"], *(each for extra in section["optional-dependencies"].values() for each in extra)]


def resolve(python: str) -> list[dict[str, Any]]:
    """The metadata of torch's CUDA build and of all that it needs, within constraints.txt, from pip's index."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += [f"--platform={name}_x86_64" for name in ("manylinux1", "manylinux2010", "manylinux2014")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        command += ["--only-binary=:all:", *platforms, "--implementation=cp", f"--python-version={python}"]
        command += [f"--target={folder}/none", f"--report={report}", f"--constraint={COMMON}", "torch"]
        subprocess.run(command, check=True)
        return [each["metadata"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]


def renew() -> None:
    """Write cuda.txt and cuda.json."""
    common, packages = pins(COMMON), resolve(PYTHONS[-1])
    new = {each["name"]: each["version"] for each in packages if canonicalize_name(each["name"]) not in common}
    if not any(name.startswith("nvidia-") for name in new):
        sys.exit("error: pip's index has torch's CPU build: unset its extra index and find-links, and try again")
    CUDA.write_text(HEAD + "".join(f"{name}=={new[name]}\n" for name in sorted(new, key=str.lower)), encoding="utf-8")
    needs = {canonicalize_name(each["name"]): each.get("requires_dist", []) for each in packages}
    kept = {name: needs[name] for name in sorted(needs) if name not in common or name == "torch"}
    METADATA.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="resolve torch's CUDA build anew")
    if parser.parse_args().renew:
        renew()
    found = conflicts(project(), pins(COMMON, CUDA), json.loads(METADATA.read_text(encoding="utf-8")))
    print("\n".join(found) or f"{len(pins(COMMON, CUDA))} packages fit together")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
