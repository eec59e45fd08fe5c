"""Older releases' names stand in for those they lack."""

from __future__ import annotations

import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from atr_scale import compat


@pytest.mark.parametrize("newer", [False, True])
def test_collectives_of_one_tensor(newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
    for new, old in names.items():
        monkeypatch.setattr(dist, old, f"old {new}")
        if newer:
            monkeypatch.setattr(dist, new, f"new {new}", raising=False)
        else:
            monkeypatch.delattr(dist, new, raising=False)
    found = runpy.run_path(compat.__file__)
    assert [found[name] for name in names] == [f"{'new' if newer else 'old'} {name}" for name in names]


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_gradient_checkpointing(name: str) -> None:
    calls: list[list[Any]] = []
    enable = {name: lambda *given, **named: calls.append([*given, *named.values()])}
    compat.enable_gradient_checkpointing(SimpleNamespace(**enable))
    assert calls == [[{"use_reentrant": False}]]
