"""The lock files: everything that the project needs is pinned, at versions that fit together, with CUDA or without."""

from __future__ import annotations

import json

import pytest

from tools.lock import COMMON, CUDA, METADATA, conflicts, pins, project

NEEDS = {
    "torch": ["numpy>=2", "toolkit[blas]==13.*; platform_system == 'Linux'", "winlib; sys_platform == 'win32'"],
    "toolkit": [
        "nvidia-blas==13.1.*; extra == 'blas'",
        "nvidia-fft==12; extra == 'fft'",
        "old; python_version < '3.11'",
    ],
    "numpy": [],
    "nvidia-blas": [],
}
LOCKED = {"torch": "2.13.0", "numpy": "2.4.6", "toolkit": "13.0.3", "nvidia-blas": "13.1.1"}


def test_both_lock_files_fit_together() -> None:
    needs = json.loads(METADATA.read_text())
    assert conflicts(project(), pins(COMMON, CUDA), needs) == []
    assert set(needs) - {"torch"} == set(pins(CUDA)), "the requirements are those of these packages"
    assert not set(pins(CUDA)) & set(pins(COMMON)), "one version of a package"
    assert any("nvidia-nccl-cu13" in line for line in conflicts(project(), pins(COMMON), needs))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"numpy": "1.26.4"}, ["torch needs numpy>=2, but 1.26.4 is locked"]),
        ({"nvidia-blas": "12.9"}, ["toolkit needs nvidia-blas==13.1.*; extra == 'blas', but 12.9 is locked"]),
        ({"nvidia-blas": None}, ["toolkit needs nvidia-blas==13.1.*; extra == 'blas', which is not locked"]),
        ({"torch": None}, ["this project needs torch>=2.10, which is not locked"]),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, str | None], expected: list[str]) -> None:
    locked = {name: version for name, version in {**LOCKED, **change}.items() if version is not None}
    assert conflicts(["torch>=2.10"], locked, NEEDS) == expected
