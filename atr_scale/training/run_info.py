"""The environment of a run (`environment.json`), and the removal of secrets from everything that is written."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

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

REDACTED = "[redacted]"
SHORTEST_SECRET = 8  # shorter values are words ("true", "testing") and would blot out half of a page
_SECRET_NAME = (
    r"(?:\w*(?:secret|passwor?d|passwd|credential)\w*|\w*(?:api|access|private|signing)_?key\w*|(?:\w*_)?token)"
)
_SECRET_NAME_ONLY = re.compile(rf"{_SECRET_NAME}\Z", re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"""(\b{_SECRET_NAME}["']?\s*[:=]\s*)("[^"\n]+"|'[^'\n]+'|[^\s,;&}}\]"']+)""", re.IGNORECASE)
_RECOGNISABLE = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS access key ids
    r"|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"  # hub, OpenAI, GitHub tokens
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in an address
    r"|(?<=X-Amz-Signature=)\w+|(?<=X-Amz-Credential=)[^&\s]+|(?<=X-Amz-Security-Token=)[^&\s]+"  # pre-signed addresses
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name is expected to hold a secret."""
    return bool(_SECRET_NAME_ONLY.match(name)) and not name.upper().endswith(("_FILE", "_PATH", "_DIR"))


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text without secrets: values of variables and keys with a secret's name, and tokens of a known form."""
    values = {value for name, value in environ.items() if is_secret_name(name) and len(value) >= SHORTEST_SECRET}
    for value in sorted(values, key=len, reverse=True):  # a secret may contain another
        text = text.replace(value, REDACTED)
    return _RECOGNISABLE.sub(REDACTED, _ASSIGNMENT.sub(_redact_assignment, text))


def _redact_assignment(match: re.Match[str]) -> str:
    name = re.match(r"\w+", match[1])
    assert name is not None
    empty = match[2].strip("\"'").lower() in {"null", "none", "true", "false"}
    return match[0] if empty or not is_secret_name(name[0]) else match[1] + REDACTED


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
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
