"""Lengths of a run in steps and in epochs of clips or captions, and the learning rate at the bounds of its schedule."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atr_scale.config import RunConfig, parse_config
from atr_scale.data.folds import fold_of, without_fold
from atr_scale.data.shard_reader import ShardSet
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.losses.terms import CMSC
from atr_scale.planner.dry_run import dry_run
from atr_scale.training.parts import open_parts
from atr_scale.training.schedule import check_schedule, describe_length, learning_rate, run_length
from tests.tiny_run import tiny_config


def rates(steps: int, **schedule: Any) -> list[float]:
    return [learning_rate(step, peak=2.0, steps=steps, floor=0.1, **schedule) for step in range(steps)]


def test_a_cosine_rises_to_the_peak_and_ends_at_the_floor() -> None:
    found = rates(20, warmup_steps=4)
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]  # the first step, the end of the warm-up, the first of the cosine
    assert found[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(found[4:]))
    assert rates(9, warmup_steps=0)[4] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates(1, warmup_steps=0) == [2.0]


def test_a_cosine_that_ends_early_stays_at_the_floor() -> None:
    found = rates(20, warmup_steps=4, decay_steps=15)
    assert found[:15] == rates(15, warmup_steps=4)
    assert found[14:] == pytest.approx([0.2] * 6) and found[13] > 0.2
    assert rates(20, warmup_steps=4, decay_steps=20) == rates(20, warmup_steps=4)
    assert rates(6, warmup_steps=4, decay_steps=4) == [0.5, 1.0, 1.5, 2.0, *[pytest.approx(0.2)] * 2]


def test_a_constant_rate_with_and_without_a_cool_down() -> None:
    assert rates(8, warmup_steps=2, schedule="constant") == [1.0, *[2.0] * 7]
    found = rates(8, warmup_steps=2, schedule="constant", cooldown_steps=3)
    assert found[:5] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert found[5:] == pytest.approx([1.4, 0.8, 0.2])
    assert rates(4, warmup_steps=2, schedule="constant", cooldown_steps=2) == [
        1.0,
        2.0,
        *map(pytest.approx, (1.1, 0.2)),
    ]


@pytest.mark.parametrize("cooldown", [0, 3])
def test_beyond_the_run_a_constant_schedule_stays_at_its_last_rate(cooldown: int) -> None:
    """A prolonged run says the rate that its old schedule would have had from there on."""
    last, later = (
        learning_rate(step, peak=2, floor=0.1, warmup_steps=0, steps=8, schedule="constant", cooldown_steps=cooldown)
        for step in (7, 20)
    )
    assert later == last == pytest.approx(0.2 if cooldown else 2.0)


def settings(objective: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    sections = {
        "run": {"dir": "run"},
        "data": {"train": [{"shards": "shards"}]},
        "model": {"audio": {"name": "small_cnn"}, "text": {"name": "bert"}},
        "objective": objective or {},
        "train": train,
    }
    return parse_config(sections, "the test")


def shard_set(clips: int, captions: int = 1) -> ShardSet:
    none = np.zeros(clips, np.int64)
    return ShardSet(
        "", "", "", ["a"], none.astype(np.int32), none, none, [""] * clips, captions=np.full(clips, captions, np.int32)
    )


CLOTHO, AUDIOCAPS = shard_set(3_839, 5), shard_set(49_274)


@pytest.mark.parametrize(
    ("batch", "epochs", "of", "sources", "published", "steps", "warmup"),
    [
        (64, 20, "captions", [CLOTHO], 20 * 299, 5_999, 299),  # salsa
        (64, 20, "clips", [CLOTHO], None, 1_200, 59),
        (24, 50, "captions", [CLOTHO], 50 * 799, 39_990, 799),  # Mei et al.
        (24, 50, "clips", [CLOTHO], None, 7_998, 159),
        (128, 40, "captions", [CLOTHO], 40 * 149, 5_999, 149),  # WavCaps' code, on Clotho
        (32, 50, "captions", [AUDIOCAPS], 50 * 1_539, 76_991, 1_539),
        (64, 20, "captions", [CLOTHO, AUDIOCAPS], 20 * 1_069, 21_397, 1_069),
    ],
)
def test_an_epoch_of_captions_is_that_of_published_code(
    batch: int, epochs: int, of: str, sources: list[ShardSet], published: int | None, steps: int, warmup: int
) -> None:
    """Published code drops the last incomplete batch of an epoch, which is less than one step an epoch."""
    config = settings(global_batch_size=batch, epochs=epochs, epoch_of=of, warmup_epochs=1)
    length = run_length(config, sources)
    assert (length.steps, length.warmup_steps) == (steps, warmup)
    assert published is None or published <= steps <= published + epochs


def test_an_epoch_without_a_fold_has_the_captions_of_the_other_clips() -> None:
    keys = [f"{n:09d}" for n in range(10)]
    shards = replace(shard_set(10), keys=keys, captions=np.arange(10, dtype=np.int32))
    kept = [n for n, fold in enumerate(fold_of(keys, 3)) if fold != 1]
    config = settings(global_batch_size=4, epochs=8, epoch_of="captions")
    length = run_length(config, [without_fold(shards, 3, 1)])
    assert (length.clips, length.captions) == (len(kept), sum(kept)) and 0 < len(kept) < 10


def test_lengths_in_steps_and_epochs() -> None:
    """40 clips in batches of 12 are 10 batches in 3 epochs; two losses a step."""
    sources = [shard_set(40)]
    cases: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"epochs": 3, "warmup_steps": 2}, (10, 2, 10, 0)),
        ({"epochs": 3, "accum_steps": 2}, (5, 0, 5, 0)),
        ({"steps": 60}, (60, 3, 60, 0)),
        ({"epochs": 3, "warmup_epochs": 1, "decay_epochs": 2}, (10, 3, 6, 0)),
        ({"epochs": 3, "decay_epochs": 3, "accum_steps": 2}, (5, 0, 5, 0)),
        ({"steps": 10, "warmup_epochs": 0.3, "schedule": "constant", "cooldown_epochs": 2.7}, (10, 1, 10, 9)),
        ({"steps": 10, "warmup_steps": 4, "schedule": "constant", "cooldown_steps": 6}, (10, 4, 10, 6)),
    ]
    for train, expected in cases:
        length = run_length(settings(global_batch_size=12, **train), sources)
        assert (length.steps, length.warmup_steps, length.decay_steps, length.cooldown_steps) == expected, train
        assert length.epoch_steps == pytest.approx(40 / 12 / train.get("accum_steps", 1))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps": 9, "warmup_steps": 10}, "train.warmup_steps = 10 is longer than the run of 9 optimizer steps"),
        (
            {"epochs": 2, "warmup_epochs": 3},
            r"train.warmup_epochs = 3.0 \(30 optimizer steps\) is .* of 20 .*epochs = 2",
        ),
        ({"steps": 9, "decay_steps": 10}, "train.decay_steps = 10 is longer than the run of 9"),
        (
            {"steps": 9, "decay_epochs": 1},
            r"train.decay_epochs = 1.0 \(10 optimizer steps\) is longer than the run of 9",
        ),
        ({"steps": 9, "warmup_steps": 5, "decay_steps": 4}, "decay_steps = 4 ends before the warm-up, .*_steps = 5"),
        ({"steps": 99, "decay_steps": 4}, r"decay_steps = 4 ends before the warm-up, .*_steps = 5 \(the default\)"),
        ({"steps": 9, "schedule": "constant", "cooldown_steps": 10}, "train.cooldown_steps = 10 is longer"),
        (
            {"epochs": 1, "warmup_steps": 5, "schedule": "constant", "cooldown_epochs": 0.6},
            r"warmup_steps = 5 and train.cooldown_epochs = 0.6 \(6 optimizer steps\) are together longer than .* 10",
        ),
        ({"epochs": 2, "beta_warmup_epochs": 7.7}, r"cmsc.beta_warmup_epochs = 7.7 \(77 optimizer steps\) is .* of 20"),
        ({"steps": 9, "beta_warmup_steps": 10}, "objective.cmsc.beta_warmup_steps = 10 is longer than the run of 9"),
    ],
)
def test_a_schedule_that_cannot_be_met_names_both_numbers(train: dict[str, Any], message: str) -> None:
    cmsc = {key: train.pop(key) for key in list(train) if key.startswith("beta")}
    config = settings({"cmsc": {"weight": 1.0, **cmsc}}, global_batch_size=4, **train)
    length = run_length(config, [shard_set(40)])  # known also of a run of an older version, which can then be prolonged
    with pytest.raises(UserError, match=message):
        check_schedule(config, length)
    config.objective.cmsc.weight = 0.0
    if cmsc:  # a term that is left out has no schedule
        assert run_length(config, [shard_set(40)]).beta_warmup_steps == 0


@pytest.mark.parametrize(
    ("train", "objective", "message"),
    [
        ({"warmup_steps": 1, "warmup_epochs": 1}, {}, "give warmup_steps or warmup_epochs, and null for the other"),
        ({"decay_steps": 1, "decay_epochs": 1}, {}, "give decay_steps or decay_epochs"),
        ({"cooldown_steps": 1}, {}, "cooldown belongs to schedule constant, but schedule is cosine"),
        ({"schedule": "constant", "decay_epochs": 1}, {}, "decay belongs to schedule cosine, but schedule is constant"),
        ({}, {"cmsc": {"beta_warmup_steps": 1, "beta_warmup_epochs": 1}}, "beta_warmup_steps or beta_warmup_epochs"),
    ],
)
def test_keys_that_contradict_each_other(train: dict[str, Any], objective: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(objective, steps=9, **train)


def test_the_term_gets_the_steps_of_its_warm_up(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "run")
    config.objective.cmsc = config.objective.cmsc.model_copy(update={"weight": 1.0, "beta_warmup_epochs": 1.3})
    parts = open_parts(config, World())
    (term,) = (term for term in parts.model.objective.terms.values() if isinstance(term, CMSC))
    assert (parts.length.beta_warmup_steps, term.section.beta_warmup_steps) == (4, 4)  # 1.3 epochs of 40 / 12 steps
    assert config.objective.cmsc.beta_warmup_epochs == 1.3  # what the run folder keeps

    config.train.epoch_of, config.train.warmup_steps = "captions", 1
    said = dry_run(config, 1)
    name = config.model.scorer.name
    assert f"networks    {config.model.audio.name}, {config.model.text.name}, scorer {name}\n" in said
    assert "loss        1 nt_xent + 1 cmsc, temperature 0.07 at first\n" in said
    assert (
        "6 optimizer steps, 1 of them warm-up, then cosine to step 6, beta rises over 4; "
        "an epoch of captions is 3.3 steps\n" in said
    )
    visits = (
        "visits      72, on average 1.8 to each of 40 clips and 1.8 to each of 40 captions; "
        "an epoch of captions is 40 visits"
    )
    assert visits in said
    config.objective.cmsc.beta_warmup_epochs = 2
    config.train.steps = 5
    with pytest.raises(UserError, match="beta_warmup_epochs = 2"):
        dry_run(config, 1)


def test_what_is_said_of_a_run() -> None:
    config = settings(global_batch_size=64, epochs=20, epoch_of="captions", warmup_epochs=1, decay_epochs=15)
    steps, visits = describe_length(config, run_length(config, [CLOTHO]))
    assert steps.startswith("5999 optimizer steps, 299 of them warm-up, then cosine to step 4498, then flat for 1501;")
    assert visits == (
        "383,936, on average 100.0 to each of 3,839 clips and 20.0 to each of 19,195 captions; "
        "an epoch of captions is 19,195 visits"
    )
    config = settings(global_batch_size=64, steps=60, schedule="constant", cooldown_steps=6)
    steps, visits = describe_length(config, run_length(config, [CLOTHO, shard_set(161, 2)]))
    assert "then constant, 6 of cool-down at the end; an epoch of clips is 62.5 steps" in steps
    assert visits.endswith("captions; an epoch of clips is 4,000 visits")
