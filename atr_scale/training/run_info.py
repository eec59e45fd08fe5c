"""The environment of a run: `environment.json`."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from atr_scale.redaction import is_secret_name, redact
from atr_scale.version import __version__

PACKAGES = (
    "torch",
    "deepspeed",
    "accelerate",
    "transformers",
    "webdataset",
    "s3fs",
    "tensorboard",
    "numpy",
    "soundfile",
    "soxr",
    "pydantic",
    "omegaconf",
)
# Variables that change speed or results. Variables of launchers and schedulers are left out: they name hosts.
VARIABLES = ("OMP_", "MKL_", "CUDA_", "CUBLAS_", "NCCL_", "PYTORCH_", "DS_")


def describe_environment(world_size: int) -> dict[str, object]:
    """Versions, code revision, devices and the command. The host's name is left out: reports get published."""
    return {
        "command": redact(shlex.join(sys.argv)),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "atr_scale": __version__,
        "git": _git(Path(__file__).resolve()),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "world_size": world_size,
        "variables": {
            name: redact(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not is_secret_name(name)
        },
    }


def write_environment(run_dir: Path, world_size: int) -> Path:
    """Write run_dir/environment.json; call it on the main rank only."""
    path = run_dir / "environment.json"
    path.write_text(json.dumps(describe_environment(world_size), indent=2) + "\n", encoding="utf-8")
    return path


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(source: Path) -> dict[str, object] | None:
    """Revision of the checkout that this code is tracked in; None for an installed copy."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        # A copy that is installed below another project's checkout must not claim that checkout's revision.
        git("ls-files", "--error-unmatch", str(source))
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _devices() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{_processor()} ({os.cpu_count()} cores)"]


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
