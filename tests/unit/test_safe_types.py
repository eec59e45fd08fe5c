from __future__ import annotations

import argparse
import builtins
import collections
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import _weights_only_unpickler

from atr_scale.encoders.pretrained.read import DICTS, INERT, Inert, read_checkpoint, safe_types
from atr_scale.errors import UserError

WEIGHT = {"weight": torch.arange(6.0).reshape(2, 3)}


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, *bases: type) -> type:
    """A class that pickle takes for `module.name`, importable while the test runs."""
    parent = ""
    for part in module.split("."):
        parent = f"{parent}.{part}" if parent else part
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    made = type(name, bases, {"__module__": module})
    monkeypatch.setattr(sys.modules[module], name, made, raising=False)
    return made


@pytest.fixture(params=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Saves in the format of today, or in that of torch before 1.6, and gives the path."""

    def save(contents: object) -> Path:
        torch.save(contents, tmp_path / "file.pt", _use_new_zipfile_serialization=request.param == "zip")
        return tmp_path / "file.pt"

    return save


def lightning_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Lightning before version 1.6 wrote, with a NumPy learning rate in the optimizer's state."""
    callback = stand_in(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    stopping = stand_in(monkeypatch, "pytorch_lightning.callbacks.early_stopping", "EarlyStopping")
    attributes = stand_in(monkeypatch, "pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    return {
        "epoch": 3,
        "pytorch-lightning_version": "1.2.7",
        "state_dict": collections.OrderedDict(WEIGHT),
        "callbacks": {callback: {"best_model_score": torch.tensor(0.4)}, stopping: {"wait_count": 0}},
        "optimizer_states": [{"param_groups": [{"lr": np.float64(1e-3), "betas": (0.9, 0.95), "params": [0]}]}],
        "lr_schedulers": [{"base_lrs": [np.float32(1e-3)], "lr_lambdas": [None], "last_epoch": np.int64(3)}],
        "hyper_parameters": attributes(arch="base", args=argparse.Namespace(lr=0.1, tags=["a"])),
    }


def sampler_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What scripts without Lightning write: the sampler's order as a NumPy array."""
    return {"iteration": 600_000, "model": dict(WEIGHT), "sampler": {"indexes": np.arange(9), "pointer": np.int64(4)}}


@pytest.mark.parametrize("contents", [lightning_file, sampler_file])
def test_what_training_scripts_save_beside_tensors(contents: Any, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(contents(monkeypatch))
    monkeypatch.undo()  # Lightning is not installed where the file is read
    read = read_checkpoint(path)
    assert torch.equal((read.get("model") or read["state_dict"])["weight"], WEIGHT["weight"])
    if "epoch" in read:
        assert read["epoch"] == 3 and type(read["hyper_parameters"]) is dict
        assert read["hyper_parameters"]["arch"] == "base"
        assert type(read["hyper_parameters"]["args"]) is Inert
        assert type(read["optimizer_states"][0]["param_groups"][0]["lr"]) is Inert


def test_scalars_of_numpy_1(tmp_path: Path) -> None:
    torch.save({**WEIGHT, "lr": np.float64(0.5)}, tmp_path / "new.pt", _use_new_zipfile_serialization=False)
    stored = (tmp_path / "new.pt").read_bytes()
    assert b"numpy._core.multiarray" in stored
    (tmp_path / "old.pt").write_bytes(stored.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert torch.equal(read_checkpoint(tmp_path / "old.pt")["weight"], WEIGHT["weight"])


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "mkdir"), (builtins.eval, "eval"), (builtins.exec, "exec"), (builtins.getattr, "getattr")],
)
def test_calls_are_refused_and_not_made(function: Any, name: str, save: Any, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    argument = str(marker) if function is os.mkdir else f"__import__('os').mkdir({str(marker)!r})"
    evil = Calls(function, argument)
    hidden_in = {
        "entry": {**WEIGHT, "evil": evil},
        "namespace": {**WEIGHT, "args": argparse.Namespace(evil=evil)},
        "objects": {**WEIGHT, "array": np.array([evil, None], dtype=object)},
        "key": {"state_dict": WEIGHT, "callbacks": {(evil, 1): 2}},
    }
    for contents in hidden_in.values():
        path = save(contents)
        with pytest.raises(UserError) as error:
            read_checkpoint(path)
        message = str(error.value)
        assert name in message and str(path) in message and "\n" not in message
        assert not marker.exists()


class AnyClass:
    def __setstate__(self, state: object) -> None:
        raise AssertionError("code of a stored class was run")


def test_other_classes_are_refused(save: Any) -> None:
    instance = AnyClass()
    instance.value = 1  # type: ignore[attr-defined]
    for stored in (instance, AnyClass, {"nested": [instance]}, torch.nn.Linear(2, 2), pickle.loads):
        with pytest.raises(UserError, match="no checkpoint of plain tensors"):
            read_checkpoint(save({**WEIGHT, "evil": stored}))


def test_others_have_no_say_and_keep_theirs() -> None:
    theirs = (AnyClass, "numpy.dtype")
    torch.serialization.add_safe_globals([theirs])
    try:
        with pytest.raises(RuntimeError), safe_types():
            inside = torch.serialization.get_safe_globals()
            assert theirs not in inside and (Inert, "numpy.dtype") in inside and (dict, DICTS[0]) in inside
            assert len(inside) == len(INERT) + len(DICTS)
            raise RuntimeError
        assert theirs in torch.serialization.get_safe_globals()
        assert (Inert, "numpy.dtype") not in torch.serialization.get_safe_globals()
    finally:
        _weights_only_unpickler._remove_safe_globals([theirs])


def test_a_stand_in_keeps_nothing() -> None:
    inert = Inert("f8", False, True)
    inert.__setstate__({"value": 1})
    assert not vars(inert)
