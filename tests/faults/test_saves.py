"""Saves that are killed, evaluations that fail, damaged manifests, and files of another user."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atr_scale import checkpoint, run_checkpoints
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.run_checkpoints import Score
from tests.faults.runs import TinyRuns, steps_of

METRIC = "t2a/R@1"
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "open"}


def save(run: Path, step: int, value: float | None, keep: int = 1) -> None:
    """What training does at a step: save, prune, then record the score and link the best."""
    trained: Any = SimpleNamespace(
        model=SimpleNamespace(text_encoder=SimpleNamespace(save_files=lambda folder: None)),
        state=dict,
        files=lambda copies: {},
        copy_weights=lambda copies: lambda: {"weight": torch.tensor([float(step)])},
    )
    folder = checkpoint.save(run, trained, World(), "", {"step": step})
    run_checkpoints.prune(run, keep)
    if value is not None:
        run_checkpoints.write_score(folder, Score(METRIC, value))
        if run_checkpoints.best_scored(run, METRIC) == folder:
            run_checkpoints.link(run, "best", folder)


def killed_after(operations: int, work: Callable[[], None]) -> bool:
    """Do `work` in a process that is killed after so many operations on files. False if there are not so many."""
    child = os.fork()
    if child == 0:
        left = operations

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in WRITES:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 at every operation on files of a save",
    expected="the newest checkpoint is sound, the best one is what the scores say, links are mended at the next start",
)
@pytest.mark.parametrize("value", [0.9, 0.1], ids=["a better step", "a worse step"])
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_a_kill_anywhere_in_a_save_loses_nothing(
    value: float, again: bool, tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    step, operations = 2 if again else 3, 0
    while True:
        run = tmp_path / str(operations)
        save(run, 1, 0.5)
        save(run, 2, 0.2)
        if not killed_after(operations, lambda run=run: save(run, step, value)):  # type: ignore[misc]
            break
        run_checkpoints.mend(run, METRIC)
        newest = run_checkpoints.newest_sound(run)
        assert newest is not None and newest.name in ("step-2", f"step-{step}")
        scored = run_checkpoints.read_score(newest)
        best = "step-1" if scored is None or scored.value < 0.5 else newest.name
        assert [(run / name).resolve().name for name in ("latest", "best")] == [newest.name, best]
        assert run_checkpoints.verify(run / "best") == []
        assert checkpoint.find_checkpoint(run).name == best
        assert not [path for path in run.rglob("*") if path.name.endswith(".partial")]
        operations += 1
    assert operations > 20
    assert checkpoint.find_checkpoint(run).name == (f"step-{step}" if value > 0.5 else "step-1")
    outcome(f"so after a kill at each of {operations} operations")


NO_MANIFEST = """
import sys, time
from atr_scale import checkpoint_writer
write = checkpoint_writer.write_manifest
def waits(folder, files):
    if folder.name == ".step-4.partial":
        print("the files of step 4 are written", file=sys.stderr, flush=True)
        time.sleep(600)
    write(folder, files)
checkpoint_writer.write_manifest = waits
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.fault(
    "kill -9 of both ranks while a checkpoint is written behind training",
    expected="the checkpoint before it is whole, and the same command goes on from it",
)
def test_a_kill_while_training_goes_on(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    run, partial = runs.folder(), runs.folder() / "checkpoints" / ".step-4.partial"
    schedule: dict[str, Any] = {"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 1, "log_every": 1}
    runs.start(ranks=2, hooks=NO_MANIFEST, **schedule)
    runs.until_said("the files of step 4 are written")
    runs.until(lambda: 5 in steps_of(run), "training has gone on")
    runs.kill_all()
    assert (partial / "model.safetensors").is_file() and (partial / "optimizer" / "rank-1.safetensors").is_file()
    before = run_checkpoints.newest_sound(run)
    assert before is not None and before.name == "step-2" == (run / "latest").resolve().name
    runs.ends_with(0, runs.start(ranks=2, **schedule))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-6"]
    assert run_checkpoints.verify(run / "latest") == []
    outcome("killed with the files of step 4 written and not yet linked; went on from step 2 to the end")


def test_the_best_follows_from_the_scores(tmp_path: Path) -> None:
    for step, value in ((1, 0.5), (2, 0.7), (3, 0.7), (4, math.nan)):
        save(tmp_path, step, value, keep=9)
    assert run_checkpoints.best_scored(tmp_path, METRIC) == tmp_path / "checkpoints" / "step-2", (
        "the oldest of equal ones"
    )
    assert run_checkpoints.best_scored(tmp_path, "t2a/R@5") is None
    (tmp_path / "best").unlink()
    run_checkpoints.prune(tmp_path, keep=1)
    assert [path.name for path in run_checkpoints.newest_first(tmp_path)] == ["step-4", "step-2"]
    for damage in ("", "[]", '{"metric": "t2a/R@1"}', '{"metric": "t2a/R@1", "value": "x"}'):
        (tmp_path / "checkpoints" / "step-2" / "score.json").write_text(damage)
        assert run_checkpoints.read_score(tmp_path / "checkpoints" / "step-2") is None


@pytest.mark.slow
@pytest.mark.fault("a flipped bit in a checkpoint's manifest", expected="one line; the checkpoint before it is taken")
def test_a_flipped_bit_in_a_manifest_takes_the_checkpoint_before(
    tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    save(tmp_path, 1, None, keep=9)
    save(tmp_path, 2, None, keep=9)
    manifest = tmp_path / "checkpoints" / "step-2" / "manifest.json"
    content = manifest.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(damaged)
        found = run_checkpoints.newest_sound(tmp_path)
        if found is None or found.name != "step-1":  # only white space, or the case of a digit, may have changed
            assert json.loads(damaged.lower()) == json.loads(content), bytes(damaged)
    outcome(f"so for all {8 * len(content)} bits, but for those that change only white space")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["files", "bytes", "a", ".."]), inner),
)


@settings(max_examples=100, deadline=None)
@given(content=JSON)
def test_a_manifest_of_another_shape_is_a_fault(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "manifest.json").write_text(json.dumps(content))
    faults = run_checkpoints.verify(folder)
    assert len(faults) == 1 and "manifest.json" in faults[0]


@pytest.mark.fault(
    "a checkpoint that another user has saved cannot be read",
    expected="one line that says so; no older checkpoint is taken, and no new run begun",
)
@pytest.mark.skipif(os.geteuid() != 0, reason="root changes to a user without permission")
@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-2", "checkpoints/step-2/model.safetensors"])
def test_what_cannot_be_read_is_not_called_broken(place: str, tmp_path: Path, outcome: Callable[[str], None]) -> None:
    run = tmp_path / "run"
    save(run, 1, None, keep=9)
    save(run, 2, None, keep=9)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (run / place).chmod(0)
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.setuid(65534)
            message = str(run_checkpoints.newest_sound(run))
        except UserError as error:
            message = str(error)
        except BaseException as error:
            message = repr(error)
        os.write(writer, message.encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    with os.fdopen(reader) as said:
        message = said.read()
    assert "cannot be read (Permission denied): give this user access to it" in message and place in message
    outcome("refused: cannot be read (Permission denied)")


FAILING_EVALUATION = """
from atr_scale.training.validation import Validator
def evaluate(self, model, step):
    raise RuntimeError("no memory for scores")
Validator.evaluate = evaluate
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.fault("an evaluation fails", expected="the checkpoint of its step is there; the next start evaluates it")
def test_an_evaluation_that_fails(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    failing = runs.start(steps=4, evaluate_every=2, checkpoint_every=4, hooks=FAILING_EVALUATION)
    runs.ends_with(1, failing)
    newest = run_checkpoints.newest_sound(runs.folder())
    assert newest is not None and newest.name == "step-2"
    runs.ends_with(0, runs.start(steps=4, evaluate_every=2, checkpoint_every=4))
    assert run_checkpoints.best_of(runs.folder()) is not None
    outcome("step 2 was saved before its evaluation failed; the next start evaluated it and went on")
