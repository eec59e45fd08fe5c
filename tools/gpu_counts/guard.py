"""Builds and loads guard.cpp. Must be called before torch is imported, so nothing here imports it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

SOURCE = Path(__file__).with_name("guard.cpp")
BUILD_S = 300


class Unavailable(Exception):
    """Fake CUDA tensors cannot run here; the reason, one line."""


def load() -> None:
    """Make "cuda" a device of this process, on which tensors without values run. Raises Unavailable with the reason."""
    assert "torch" not in sys.modules, "the guard must be loaded before torch is imported"
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch = Path(found.origin).parent
    if list((torch / "lib").glob("libtorch_cuda.*")):
        raise Unavailable("this torch is built for CUDA: counts need its CPU build")
    library = built(torch)
    try:
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(torch / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise Unavailable(f"the CUDA guard does not load into torch {version('torch')}: {error}") from None


def leave() -> NoReturn:
    """End this process with exit code 0, without Python's own clean-up.

    Once the guard is loaded, a backward pass runs on a thread of torch that outlives it. Such a process was seen to
    abort, once, with "terminate called without an active exception". The likely cause: a thread of torch that gives
    back a Python object while Python is taken down aborts so (github.com/pytorch/pytorch/issues/190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def built(torch: Path) -> Path:
    """The library, compiled on first use. Its name holds the version of torch and a hash of the source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = cache() / f"guard-{version('torch')}-{digest}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("no C++ compiler: install g++, or name one in CXX")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, torch, library)
    except OSError as error:
        raise Unavailable(f"cannot write {library} ({error.strerror}): set XDG_CACHE_HOME to another folder") from None
    return library


def _compile(compiler: str, torch: Path, library: Path) -> None:
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, "-shared", "-fPIC", "-O1", "-std=c++20", str(SOURCE), *includes, "-o", str(made)]
        links = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        try:
            done = subprocess.run([*command, *links], capture_output=True, text=True, timeout=BUILD_S)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the CUDA guard does not compile in {BUILD_S} s") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise Unavailable(f"the CUDA guard does not compile with torch {version('torch')}: {errors[0][:300]}")
        made.replace(library)  # whole or not at all, also if two processes build it


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atr_scale"
