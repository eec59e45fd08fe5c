"""Run configuration: overrides, refusals, round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atr_scale.config import RunConfig, load_config, parse_config
from atr_scale.errors import UserError
from atr_scale.training.checks import differences

MINIMAL = """
run: {dir: runs/x}
data:
  train:
    - {shards: a}
    - {shards: b, weight: 2}
model: {audio: {name: small_cnn}, text: {name: bert}}
train: {steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message of the UserError; asserts that it is one line that names the file or the override."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-4", 1e-4),
        ("train.lr=2.5E-3", 2.5e-3),
        ("train.steps=7", 7),
        ("train.betas=[0.8,0.95]", (0.8, 0.95)),
        ("train.warmup_steps=null", None),
        ("run.dir=runs/a=b", "runs/a=b"),
        ("data.validation=s3://bucket/prefix", "s3://bucket/prefix"),
        ("data.train[1].weight=null", None),
        ("data.train[0].shards=elsewhere", "elsewhere"),
        ("objective.temperature.learnable=false", False),
        ("evaluation.class_prompt='this is {label}'", "this is {label}"),
    ],
)
def test_override(file: Path, override: str, value: Any) -> None:
    found: Any = load_config(file, [override])
    for part in override.split("=")[0].replace("[", ".").replace("]", "").split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value and type(found) is type(value)


def test_a_whole_list_can_be_given(file: Path) -> None:
    config = load_config(file, ["data.train=[{shards: c, weight: 3}]"])
    assert [(s.shards, s.weight) for s in config.data.train] == [("c", 3.0)]


def test_later_overrides_win_and_the_file_may_give_way(file: Path) -> None:
    assert load_config(file, ["train.lr=1", "train.lr=2"]).train.lr == 2
    config = load_config(file, ["train.steps=null", "train.epochs=1.5"])
    assert config.train.steps is None and config.train.epochs == 1.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("data.train[0].shard=x", "unknown key 'data.train[0].shard'; did you mean 'data.train[0].shards'?"),
        ("objective.temperature.init=1", "did you mean 'objective.temperature.initial'?"),
        ("model.zzz=1", "unknown key 'model.zzz'; known keys: audio, text, projection, scorer"),
        ("model.audio.name=small", "'model.audio.name': unknown audio encoder: known are cnn14, "),
        ("model.audio.windows=3", "unknown key 'model.audio.windows'; did you mean 'model.audio.window_seconds'?"),
        ("model.text.pool=mean", "unknown key 'model.text.pool'; did you mean 'model.text.pooling'?"),
        (
            "model.audio.spec_augment={time_drop: 3}",
            "'model.audio.spec_augment.time_drop'; did you mean 'model.audio.spec_augment.time_drop_width'",
        ),
        ("model.scorer.name=meen", "'model.scorer.name': unknown scorer: known are pooled, mean, max, meanmax"),
        ("model.scorer.options.dim=3", "unknown key 'model.scorer.options.dim'; did you mean 'model.projection.dim'?"),
        ("model.scorer={name: tap, options: {attention: 3}}", "did you mean 'model.scorer.options.attention_dim'?"),
        (
            "model.scorer={name: tap, options: {dropout: 0.3}}",
            "'model.scorer.options': dropout is part of the residual",
        ),
        ("model.scorer={name: lgmm, options: {lambda1: 0}}", "'model.scorer.options.lambda1': Input should be greater"),
        ("model.scorer={name: netrvlad, options: {num_clusters: few}}", "'model.scorer.options.num_clusters': Input"),
        ("model.scorer.options=3", "'model.scorer.options': Input should be a valid dictionary, got 3"),
        ("train.lr=fast", "'train.lr': Input should be a valid number"),
        ("train.lr=-1", "'train.lr': Input should be greater than 0, got -1"),
        ("run.dir=''", "'run.dir': String should have at least 1 character"),
        ("run.seed=-1", "'run.seed': Input should be greater than or equal to 0, got -1"),
        ("run.seed=9223372036854775808", "'run.seed': Input should be less than 9223372036854775808"),
        ("train.lr=.nan", "'train.lr'"),
        ("train.lr=.inf", "'train.lr'"),
        ("train.weight_decay=.nan", "'train.weight_decay'"),
        ("train.steps=2.5", "'train.steps'"),
        ("train.zero_stage=4", "'train.zero_stage'"),
        ("objective.name=pmr", "unknown key 'objective.name'; known keys: nt_xent, pmr, cmsc"),
        ("objective.nt_xent.weight=0", "'objective': no loss term has a positive weight: give one to nt_xent, pmr, "),
        ("objective.pmr.weight=-1", "'objective.pmr.weight': Input should be greater than or equal to 0, got -1"),
        ("objective.cmsc.beta=1.5", "'objective.cmsc.beta': Input should be less than or equal to 1, got 1.5"),
        ("objective.pmr.t2a_share=1.5", "'objective.pmr.t2a_share': Input should be less than or equal to 1, got 1.5"),
        ("objective.positives=text", "'objective.positives': Input should be 'clip' or 'clip_and_text', got 'text'"),
        ("model.projection.hidden_dim=8", "'model.projection': hidden_dim is of kind mlp, and kind is linear: set"),
        ("objective.cmsc.mode=dot", "'objective.cmsc.mode': Input should be 'each' or 'add', got 'dot'"),
        ("objective.distillation.weight=1", "'objective.distillation': distillation needs teachers: give tables"),
        ("train.epochs=2", "'train': give either steps or epochs"),
        ("train.steps=null", "'train': give either steps or epochs"),
        ("train={steps: 1, zero_stage: 3, gradient_dtype: bf16}", "'train': zero_stage 3 sends gradients in fp32"),
        ("objective.temperature.initial=5", "minimum <= initial <= maximum"),
        ("evaluation.class_prompt=sound", "class_prompt must contain {label}"),
        ("data.train=[]", "'data.train'"),
        ("data.train=5", "'data.train'"),
        ("data=5", "'data'"),
        ("train.lr", "override 'train.lr' is not of the form key.sub=value"),
        ("=3", "override '=3' is not of the form"),
        ("data.train[7].shards=x", "override 'data.train[7].shards=x' cannot be applied: data.train has 2 items"),
        ("train.lr=[1", "override 'train.lr=[1' cannot be applied"),
        ("train.lr=${nowhere}", "does not resolve with its overrides"),
        ("train.lr.x=1", "train.lr"),
        ("run.dir=null", "'run.dir'"),
        ("\n[0]=1", "cannot be applied: \\n is no list"),
        ("train.lr=>#", "cannot be applied"),  # one parser of YAML accepts it, the other does not
    ],
)
def test_refused_override(file: Path, override: str, message: str) -> None:
    assert message in refusal(file, override)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.text(st.sampled_from("abdtrain.lr[]01${}: \t\n'\"!&*"), max_size=14),
    value=st.text(st.sampled_from("a1.-[]{}:, \n'\"!&*#$|>%@"), max_size=10),
)
def test_no_override_ends_in_a_traceback(file: Path, key: str, value: str) -> None:
    for override in (f"{key}={value}", f"train.lr={value}", f"{key}=1"):
        try:
            load_config(file, [override])
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'run' is missing"),
        ("# nothing but a comment\n", "'run' is missing"),
        ("- a\n- b\n", "holds no configuration"),
        ("just words", "run.yaml"),
        ("42", "run.yaml"),
        ("run: [1\n", "does not parse as YAML"),
        ("a: 1\na: 2\n", "does not parse as YAML"),
        ("run: !!python/object:os.system {}\n", "does not parse as YAML"),
        ("run: !!python/object/apply:os.system ['touch pwned']\n", "does not parse as YAML"),
        ("run: {dir: x}\n", "'train' is missing"),
        ("1: 2\n", "run.yaml"),
        ("run:\n", "'run'"),
    ],
)
def test_refused_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in refusal(path)
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_no_text(tmp_path: Path) -> None:
    binary = tmp_path / "model.pt"
    binary.write_bytes(b"PK\x03\x04\xff\xfe\x00\x80" * 10)
    assert "model.pt" in refusal(binary)
    assert "no configuration file at" in refusal(tmp_path / "missing.yaml")
    assert "no configuration file at" in refusal(tmp_path)


def test_several_mistakes_are_told_at_once(file: Path) -> None:
    message = refusal(file, "train.lrr=1", "data.workers=-1")
    assert "train.lrr" in message and "data.workers" in message


@pytest.mark.parametrize("missing", ["run", "data", "model", "train"])
def test_missing_section(tmp_path: Path, missing: str) -> None:
    values = yaml.safe_load(MINIMAL)
    del values[missing]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert f"'{missing}' is missing" in refusal(path)


def test_round_trip(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["train.eps=1e-12", "train.betas=[0.5,0.6]", "data.train[0].weight=1e5"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml())
    assert load_config(saved) == config
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_options_of_a_scorer_are_stored_whole(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["model.scorer={name: tap, options: {residual: true}}"])
    assert config.model.scorer.options == {"attention_dim": 512, "residual": True, "dropout": 0.0}
    assert yaml.safe_load(config.to_yaml())["model"]["scorer"]["options"]["attention_dim"] == 512

    for options, expected in (({"residual": True}, config), ({}, load_config(file, ["model.scorer.name=tap"]))):
        saved = yaml.safe_load(config.to_yaml())  # as it was saved when defaults were not
        saved["model"]["scorer"]["options"] = options
        assert parse_config(saved, "saved") == expected
        assert differences(parse_config(saved, "saved").model_dump(), expected.model_dump()) == []


def test_a_mapping_as_an_override_replaces_the_section(file: Path) -> None:
    tap = ["model.scorer.name=tap", "model.scorer.options.residual=true"]
    config = load_config(file, [*tap, "model.scorer={name: meanmax}"])
    assert config.model.scorer.model_dump() == {"name": "meanmax", "options": {}}


def test_every_configuration_here_parses() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path)


def test_parse_config_needs_sections() -> None:
    with pytest.raises(UserError, match="there holds no configuration: expected the sections run, data"):
        parse_config([1], "there")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_of_version_0_1_is_ignored(file: Path, precision: str) -> None:
    assert load_config(file, [f"evaluation.precision={precision}"]) == load_config(file)


def test_another_precision_of_evaluation_is_a_mistake(file: Path) -> None:
    assert "evaluation.precision" in refusal(file, "evaluation.precision=rubbish")
