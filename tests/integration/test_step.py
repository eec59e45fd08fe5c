"""What a run does at each step: the step that loss terms are told, the learning rate, the epoch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atr_scale import checkpoint
from atr_scale.batch import Batch
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.model import Retriever, StepContext
from atr_scale.training.loop import Training
from tests.tiny_run import tiny_config
from tools.ranks import run_ranks


def steps_seen(config: RunConfig) -> list[int]:
    """The step in the context of each forward of a training."""
    seen: list[int] = []
    forward: Any = Retriever.forward

    def spy(self: Retriever, batch: Batch, context: StepContext, **rest: Any) -> Any:
        seen.append(context.step)
        return forward(self, batch, context, **rest)

    Retriever.forward = spy  # type: ignore[method-assign, assignment]
    Training(config, World.current(), torch.device("cpu")).run()
    return seen


@pytest.mark.slow
def test_the_model_knows_the_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", steps=3, accum_steps=2, zero_stage=0)
    config.data.validation = None
    # A process of its own: DeepSpeed starts only once in each.
    assert run_ranks(steps_seen, 1, config) == [[0, 0, 1, 1, 2, 2]]


def trained(config: RunConfig, stop_at: int) -> list[dict[str, Any]]:
    """The lines of a training that stops at a step: it is told so before the one in front of it, and reads it then."""
    training = Training(config, World.current(), torch.device("cpu"))
    update = training.engine.update

    def told(*given: Any, **named: Any) -> Any:
        return update(*given, **{**named, "stop": training.progress.step == stop_at - 2})

    training.engine.update = told  # type: ignore[method-assign]
    training.run()
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_in_epochs_of_captions_is_resumed_in_its_cool_down(tmp_path: Path) -> None:
    """Each of the 40 clips has two captions: an epoch is 80 / 12 steps, the warm-up 2, the cool-down 3."""
    schedule = {"warmup_steps": None, "warmup_epochs": 0.31, "schedule": "constant", "cooldown_epochs": 0.5}
    epochs = {"steps": None, "epochs": 1, "epoch_of": "captions", "evaluate_every": None}
    config = tiny_config(tmp_path, tmp_path / "whole", zero_stage=0, lr_floor=0.1, **epochs, **schedule)
    path = tmp_path / "train" / "shards" / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        shard["captions"] = [2 for _ in shard["captions"]]
    path.write_text(json.dumps(manifest))

    (whole,) = run_ranks(trained, 1, config, 100)
    lines = [line for line in whole if line["kind"] == "train"]
    rates = [line["lr/audio"] / config.train.lr for line in lines]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1])
    assert [line["epoch"] for line in lines] == pytest.approx([12 * step / 80 for step in range(1, 8)])
    assert [line["step"] for line in whole if line["kind"] == "evaluation"] == [7]  # after an epoch of captions

    config.run.dir = str(tmp_path / "resumed")
    run_ranks(trained, 1, config, 5)
    (resumed,) = run_ranks(trained, 1, config, 100)
    exact = ("step", "loss", "grad_norm", "lr/audio", "lr/heads", "epoch", "t2a/mAP@10")
    assert [[x.get(k) for k in exact] for x in resumed] == [[x.get(k) for k in exact] for x in whole]


def with_slow_steps(config: RunConfig) -> list[dict[str, Any]]:
    """The training lines of a run that waits 0.2 s for each batch and computes for 0.2 s more."""
    training = Training(config, World.current(), torch.device("cpu"))
    update, batches = training.engine.update, training._batches

    def slow_update(taken: Iterable[Batch], *given: Any, **named: Any) -> Any:
        time.sleep(0.2)
        return update(taken, *given, **named)

    def slow_batches() -> Iterator[Batch]:
        for batch in batches():
            time.sleep(0.2)
            yield batch

    training.engine.update = slow_update  # type: ignore[method-assign,assignment]
    training._batches = slow_batches  # type: ignore[method-assign]
    training.run()
    lines = map(json.loads, (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_speed_is_that_of_the_logged_steps(tmp_path: Path) -> None:
    """Also of the last step, whose result is read at once, as before a save; all others are read one step later."""
    config = tiny_config(tmp_path, tmp_path / "run", steps=5, checkpoint_every=3, log_every=1)
    config.data.validation = None
    (lines,) = run_ranks(with_slow_steps, 1, config)
    for line in lines:
        seconds = 12 / line["samples_per_s"]
        assert seconds > 0.4 and seconds * line["data_wait"] > 0.199, line


def with_a_bad_step(config: RunConfig) -> None:
    """A training whose second step has clips that are not finite."""
    training = Training(config, World.current(), torch.device("cpu"))
    update = training.engine.update

    def poisoned(batches: Iterable[Batch], *given: Any, **named: Any) -> Any:
        if training.progress.step == 1:
            batches = [replace(batch, waveform=batch.waveform * torch.nan) for batch in batches]
        return update(batches, *given, **named)

    training.engine.update = poisoned  # type: ignore[method-assign]
    training.run()


@pytest.mark.slow
def test_results_that_are_read_late_name_their_own_step(tmp_path: Path) -> None:
    """A save holds the count of the step in front of it, and the record of samples has the right step."""
    config = tiny_config(tmp_path, tmp_path / "run", steps=4, checkpoint_every=2, keep_checkpoints=9, log_every=1)
    run_ranks(with_a_bad_step, 1, config)
    run = tmp_path / "run"
    (record,) = run.glob("nonfinite-step-*")
    assert record.name == "nonfinite-step-2-rank-0.json" and len(json.loads(record.read_text())) == 12
    for step in (2, 4):
        assert checkpoint.read_state(run / "checkpoints" / f"step-{step}")["skipped_steps"] == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(x["step"], x["skipped_steps"], x["loss"] is None) for x in lines if x["kind"] == "train"]
    assert found == [(1, 0, False), (2, 1, True), (3, 1, False), (4, 1, False)]
