"""An unknown key is answered with the one that was meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from atr_scale.config import RunConfig, parse_config
from atr_scale.errors import UserError
from atr_scale.sections import all_keys
from atr_scale.suggestions import SYNONYMS

VALUES: dict[str, Any] = yaml.safe_load("""
run: {dir: runs/x}
data: {train: [{shards: a}]}
model: {audio: {name: passt_s16}, text: {name: bert}, scorer: {name: tap}}
train: {steps: 10}
""")


def hint(key: str, value: Any = 1) -> str:
    """What is said about an unknown key."""
    values = section = copy.deepcopy(VALUES)
    *place, last = key.split(".")
    for part in place:
        section = section.setdefault(part, {})
    section[last] = value
    with pytest.raises(UserError) as caught:
        parse_config(values, "run.yaml")
    first, _, said = str(caught.value).partition("; ")
    assert first == f"run.yaml: unknown key {key!r}"
    return said


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        # the same words
        ("train.learning_rate", "train.lr"),
        ("learning_rate", "train.lr"),
        ("train.learning_rate_audio", "train.lr_audio"),
        ("train.text_lr", "train.lr_text"),
        ("train.num_epochs", "train.epochs"),
        ("train.max_steps", "train.steps"),
        ("train.num_warmup_steps", "train.warmup_steps"),
        ("train.num_workers", "data.workers"),
        ("objective.distillation.tau", "objective.distillation.temperature"),
        ("objective.cmsc.warmup_epochs", "objective.cmsc.beta_warmup_epochs"),
        # another section
        ("lr", "train.lr"),
        ("seed", "run.seed"),
        ("train.seed", "run.seed"),
        ("beta", "objective.cmsc.beta"),
        ("data.global_batch_size", "train.global_batch_size"),
        ("model.shards", "data.train[0].shards"),
        ("data.s_patchout_t", "model.audio.s_patchout_t"),
        ("train.attention_dim", "model.scorer.options.attention_dim"),
        ("weight_decay", "train.weight_decay"),
        # other systems
        ("train.batch_size", "train.global_batch_size"),
        ("batch_size", "train.global_batch_size"),
        ("train.warmup", "train.warmup_steps"),
        ("train.grad_clip", "train.gradient_clipping"),
        ("train.gradient_accumulation_steps", "train.accum_steps"),
        ("tau", "objective.temperature.initial"),
        ("objective.nt_xent.tau", "objective.temperature.initial"),
        # misspelt
        ("train.epoch", "train.epochs"),
        ("model.scorer.options.attention", "model.scorer.options.attention_dim"),
        ("warmupsteps", "train.warmup_steps"),
    ],
)
def test_what_was_meant(key: str, meant: str) -> None:
    assert hint(key) == f"did you mean {meant!r}?"


def test_a_section_that_does_not_exist() -> None:
    assert hint("optimizer", {"momentum": 0.9, "lr": 1}) == "did you mean 'train.lr'?"
    assert hint("trian", {"lr": 1}) == "did you mean 'train'?"


@pytest.mark.parametrize("key", ["model.zzz", "objective.name", "train.colour"])
def test_nothing_is_made_up(key: str) -> None:
    assert hint(key).startswith("known keys: ")


def test_synonyms_are_of_keys_that_exist_and_no_keys_themselves() -> None:
    keys = set(all_keys(RunConfig, VALUES, ""))
    assert set(SYNONYMS.values()) <= keys
    assert not SYNONYMS.keys() & {key for key in keys if "." not in key}
