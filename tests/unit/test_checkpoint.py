"""Finding, verifying, linking and pruning checkpoints; what they hold is tested with whole runs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atr_scale import checkpoint, run_checkpoints
from atr_scale.distributed.world import World
from atr_scale.errors import UserError


def save(run: Path, value: float) -> Path:
    """Checkpoint step-3 of a model with one weight."""
    trained: Any = SimpleNamespace(
        model=SimpleNamespace(text_encoder=SimpleNamespace(save_files=lambda folder: None)),
        state=dict,
        files=lambda copies: {},
        copy_weights=lambda copies: lambda: {"weight": torch.tensor([value])},
    )
    return checkpoint.save(run, trained, World(), "", {"step": 3})


def weight(folder: Path) -> float:
    assert run_checkpoints.verify(folder) == []
    return checkpoint.read_weights(folder)["weight"].item()


def write(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step}"
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(200)))
    for name in ("state.json", "config.resolved.yaml"):
        (folder / name).write_text("{}")
    (folder / "deepspeed" / "rank_0.pt").write_bytes(b"moments" * step)
    run_checkpoints.seal(folder)
    return folder


def test_the_newest_good_one_is_found(tmp_path: Path) -> None:
    assert run_checkpoints.newest_sound(tmp_path) is None
    for step in (3, 20, 100):  # by number, not by name
        write(tmp_path, step)
    assert run_checkpoints.newest_sound(tmp_path).name == "step-100"  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no manifest", "manifest cut"])
def test_a_damaged_one_is_passed_over_by_name(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    weights, manifest = bad / "model.safetensors", bad / run_checkpoints.MANIFEST
    if damage == "flip":
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        (bad / "deepspeed" / "rank_0.pt").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:30])
    assert run_checkpoints.newest_sound(tmp_path) == good
    assert "step-2 is broken" in caplog.text
    shutil.rmtree(good)
    with pytest.raises(UserError, match=r"all 1 checkpoints .* are broken"):
        run_checkpoints.newest_sound(tmp_path)


@pytest.mark.parametrize("state", [None, "", "[]", "{}", '{"step": "x"}', "3"])
def test_a_damaged_state_is_one_line(tmp_path: Path, state: str | None) -> None:
    if state is not None:
        (tmp_path / run_checkpoints.STATE).write_text(state)
    with pytest.raises(UserError, match=r"no readable state.json in .*: copy it anew"):
        checkpoint.read_state(tmp_path)


def test_unfinished_folders_are_not_seen(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "checkpoints" / ".step-8.partial").mkdir()
    (tmp_path / "checkpoints" / "step-9-copy").mkdir()
    assert [p.name for p in run_checkpoints.newest_first(tmp_path)] == ["step-4"]


def test_a_step_that_is_saved_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        folder = save(tmp_path, value)
        assert weight(folder) == value and (tmp_path / "latest").resolve() == folder
        assert [p.name for p in folder.parent.iterdir()] == ["step-3"]


def test_no_weights_are_lost_if_saving_a_step_again_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = save(tmp_path, 1.0), os.replace

    def killed(source: Path, target: Path) -> None:
        if target == folder:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2.0)
    assert sorted(weight(place) for place in folder.parent.iterdir()) == [1.0, 2.0]
    monkeypatch.undo()
    assert weight(save(tmp_path, 3.0)) == 3.0
    run_checkpoints.prune(tmp_path, keep=1)
    assert [p.name for p in folder.parent.iterdir()] == ["step-3"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    folders = {step: write(tmp_path, step) for step in (1, 2, 3, 4)}
    run_checkpoints.link(tmp_path, "best", folders[1])
    run_checkpoints.link(tmp_path, "best", folders[2])  # a link is replaced, not followed
    (tmp_path / "checkpoints" / ".step-9.partial").mkdir()  # of a run that was killed while it saved
    run_checkpoints.prune(tmp_path, keep=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert (tmp_path / "best").resolve() == folders[2].resolve()


def test_pruning_what_another_process_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS its folder cannot be removed then. The save that prunes has not failed."""
    for step in (1, 2):
        write(tmp_path, step)

    def busy(path: str, **_: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        run_checkpoints.prune(tmp_path, keep=1)
    assert [path.name for path in run_checkpoints.newest_first(tmp_path)] == ["step-2"]
    run_checkpoints.prune(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_broken_newest_one_does_not_take_the_place_of_sound_ones(tmp_path: Path) -> None:
    folders = {step: write(tmp_path, step) for step in (1, 2, 4, 5)}
    for step in (4, 5):
        (folders[step] / "model.safetensors").write_bytes(b"")
    sound = run_checkpoints.newest_sound(tmp_path)
    assert sound == folders[2]
    run_checkpoints.set_aside(tmp_path, sound)
    run_checkpoints.mend(tmp_path, None)
    assert (tmp_path / "latest").resolve() == folders[2].resolve()
    write(tmp_path, 3)
    run_checkpoints.prune(tmp_path, keep=2)
    names = [p.name for p in run_checkpoints.newest_first(tmp_path)]
    assert names == ["step-3", "step-2"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.broken")) == ["step-4.broken", "step-5.broken"]
    write(tmp_path, 4)
    run_checkpoints.prune(tmp_path, keep=2)
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.broken")] == ["step-5.broken"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda files: files.pop("deepspeed/rank_0.pt"),
        lambda files: files.update({"x" * 300: {"bytes": 1, "sha256": ""}}),
        lambda files: files.update({"../step-1/model.safetensors": {"bytes": 200, "sha256": ""}}),
        lambda files: files["state.json"].update(bytes=float("inf")),
        lambda files: files.pop("state.json"),
        lambda files: files.clear(),
    ],
)
def test_a_manifest_that_does_not_describe_its_folder(tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    manifest = bad / run_checkpoints.MANIFEST
    content = json.loads(manifest.read_text())
    damage(content["files"])
    manifest.write_text(json.dumps(content))
    assert len(run_checkpoints.verify(bad)) == 1
    assert run_checkpoints.newest_sound(tmp_path) == good


def test_a_manifest_that_is_too_deep(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / run_checkpoints.MANIFEST).write_text("[" * 100_000)
    assert "no readable manifest.json" in run_checkpoints.verify(folder)[0]


def test_pruning_leaves_the_checkpoint_that_the_run_needs(tmp_path: Path) -> None:
    """Newer ones may be broken: the one just saved, or resumed from, stays."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    run_checkpoints.prune(tmp_path, 1, tmp_path / "checkpoints" / "step-1")
    assert [path.name for path in run_checkpoints.newest_first(tmp_path)] == ["step-3", "step-1"]


def test_a_checkpoint_on_another_disk_is_unlinked_and_stays_there(tmp_path: Path) -> None:
    there = write(tmp_path / "disk", 1)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-1").symlink_to(there)
    write(tmp_path / "run", 2)
    run_checkpoints.prune(tmp_path / "run", keep=1)
    assert [path.name for path in run_checkpoints.newest_first(tmp_path / "run")] == ["step-2"]
    assert run_checkpoints.verify(there) == []


def test_links_that_a_copy_has_turned_into_folders_are_links_again(tmp_path: Path) -> None:
    """cp -L, rsync -L and object stores follow links."""
    newest = write(tmp_path, 1)
    shutil.copytree(newest, tmp_path / "latest")
    run_checkpoints.mend(tmp_path, None)
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "latest").resolve() == newest


@pytest.mark.parametrize("value", ["1" * 400, "NaN", "true", '"inf"', "[" * 20_000, "Infinity"])
def test_a_damaged_score_is_none(value: str, tmp_path: Path) -> None:
    (tmp_path / "score.json").write_text(f'{{"metric": "t2a/R@1", "value": {value}')
    assert run_checkpoints.read_score(tmp_path) is None
    (tmp_path / "score.json").write_text(f'{{"metric": "t2a/R@1", "value": {value}}}')
    assert run_checkpoints.read_score(tmp_path) is None


def test_scores_on_other_validation_sets_are_not_compared(tmp_path: Path) -> None:
    """The sets of the newest score count: a run may go on with others."""
    for step, value, data in ((1, 0.9, "before"), (2, 0.8, "before"), (3, 0.3, "now"), (4, 0.2, "now")):
        run_checkpoints.write_score(write(tmp_path, step), run_checkpoints.Score("t2a/R@1", value, data))
    found = run_checkpoints.best_scored(tmp_path, "t2a/R@1")
    assert found is not None and found.name == "step-3"
