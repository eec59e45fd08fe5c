"""Files that extend others, and overrides: they replace what they name, and what belonged to an old name goes."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atr_scale.config import RunConfig, load_config
from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS
from atr_scale.errors import UserError

ROOT = Path(__file__).parents[2]
LGMM = ROOT / "configs/papers/lgmm_cmsc.yaml"
BASE = """
run: {dir: runs/x}
data:
  train: [{shards: a}, {shards: b, weight: 2}]
  captions: {cleaning: wavcaps, max_tokens: 30}
model:
  audio: {name: passt_s16, checkpoint: passt.pt, s_patchout_t: 15, attention: sdpa, window_seconds: 10}
  text: {name: bert, pooling: mean}
  scorer: {name: lgmm, options: {lambda1: 7}}
train: {steps: 10, betas: [0.8, 0.9]}
plugins: []
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files, whose values are their text, and returns the path of the last one."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(textwrap.dedent(text))
        return tmp_path / f"{list(files)[-1]}.yaml"

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def at(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


def test_a_file_that_extends_another(write: Write) -> None:
    """Mappings merge, lists and scalars replace; the result is that of one file, and does not hold `extends`."""
    (write(middle="").parent / "shared").mkdir()
    write(
        **{"shared/base": BASE},
        middle="extends: shared/base.yaml\ntrain: {lr: 1}\nrun: {dir: '${data.train[0].shards}/run'}",
    )
    config = load_config(
        write(child="extends: middle.yaml\ndata: {train: [{shards: c}], captions: {max_tokens: 5}}\ntrain: {lr: 2}"),
        ["train.eps=3"],
    )
    assert [source.shards for source in config.data.train] == ["c"]
    assert (config.data.captions.cleaning, config.data.captions.max_tokens) == ("wavcaps", 5)
    assert (config.train.steps, config.train.lr, config.train.eps) == (10, 2, 3)
    assert config.run.dir == "c/run"
    assert "extends" not in config.to_yaml()
    assert load_config(write(resolved=config.to_yaml())) == config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run": "extends: nowhere.yaml"}, "run.yaml extends 'nowhere.yaml', but there is no file at "),
        ({"run": "extends: run.yaml"}, "run.yaml, which is a circle: remove extends"),
        ({"a": "extends: run.yaml", "run": "extends: a.yaml"}, "a.yaml extends "),
        ({"run": "extends: [a.yaml]"}, "run.yaml: extends is ['a.yaml']: give the path of one YAML file"),
        ({"a": "run: [1", "run": "extends: a.yaml"}, "a.yaml does not parse as YAML"),
        ({"a": "- 1", "run": "extends: a.yaml"}, "a.yaml holds no configuration"),
        ({"a": BASE, "run": "extends: a.yaml\ntrain: {lrr: 1}"}, "run.yaml: unknown key 'train.lrr'"),
    ],
)
def test_a_file_that_cannot_extend(write: Write, files: dict[str, str], message: str) -> None:
    assert message in refusal(write(**files))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.train+={shards: c}", "shards", ["a", "b", "c"]),
        ("data.train+=[{shards: c}, {shards: d}]", "shards", ["a", "b", "c", "d"]),
        ("~data.train[0]", "shards", ["b"]),
        ("~data.train.0", "shards", ["b"]),
        ("data.train[1]={shards: z}", "shards", ["a", "z"]),
        ("data.train[1].shards=z", "shards", ["a", "z"]),
        ("plugins+=json", "plugins", ["json"]),
        ("~train.betas", "train.betas", (0.9, 0.999)),
        ("train.betas=null", "train.betas", (0.9, 0.999)),
        ("~data.captions", "data.captions.cleaning", "none"),
        ("data.captions=null", "data.captions.cleaning", "none"),
        ("data.captions={max_tokens: 5}", "data.captions.cleaning", "none"),
        ("model.scorer=null", "model.scorer.name", "pooled"),
        ("model.scorer.options=null", "model.scorer.options.lambda1", 4.0),
        ("objective=null", "objective.nt_xent.weight", 1.0),
        ("objective.pmr.weight=null", "refused", "'objective.pmr.weight'"),
    ],
)
def test_what_an_override_names(write: Write, override: str, key: str, value: Any) -> None:
    if key == "refused":
        assert value in refusal(write(base=BASE), override)
        return
    config = load_config(write(base=BASE), [override])
    found = [source.shards for source in config.data.train] if key == "shards" else at(config, key)
    assert found == value


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("~data.train[2]", "data.train has 2 items, counted from 0; data.train+=VALUE appends one"),
        ("plugins[0]=c", "plugins has 0 items, counted from 0; plugins+=VALUE appends one"),
        ("data.train.shards=c", "data.train is a list: give the number of an item, for example data.train[0]"),
        ("model.text[0]=c", "model.text is no list"),
        ("train.steps.x=1", "train.steps is 10 and has no keys"),
        ("run.dir.x=1", "run.dir is 'runs/x' and has no keys: give all of it, run.dir={x: VALUE, ...}"),
        ("~train.lr", "train.lr is not set, so there is nothing to remove"),
        ("~objective.pmr.weight", "objective is not set"),
        ("train.steps+=1", "train.steps is 10 and no list"),
        ("run.dir=x\nseed: 5", "it holds more than one value"),
        ("train.steps=017", "YAML reads 017 as 15: write 15, or quotes around a text"),
        ("train.steps=1:30", "YAML reads 1:30 as 90: write 90, or quotes around a text"),
        ("data.train=[{shards: a, weight: 02}]", "YAML reads 02 as 2: write 2, or quotes around a text"),
    ],
)
def test_an_override_that_cannot_be_applied(write: Write, override: str, cause: str) -> None:
    assert refusal(write(base=BASE), override) == f"override {override!r} cannot be applied: {cause}"


@pytest.mark.parametrize("override", ["train.steps", "~train.steps=1", "~", "+=1", "train..lr=1", "a[x]=1", "a]=1"])
def test_what_is_no_override(write: Write, override: str) -> None:
    assert f"override {override!r} is not of the form key.sub=value, key+=value or ~key" in refusal(
        write(base=BASE), override
    )


@pytest.mark.parametrize("override", ["model.scorer.name=mean", "model.scorer={name: mean}", "extends"])
def test_another_scorer_drops_the_options_of_the_old_one(
    write: Write, override: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if override == "extends":
        config = load_config(write(child=f"extends: {LGMM}\nmodel: {{scorer: {{name: mean}}}}"))
    else:
        config = load_config(LGMM, [override])
    assert config.model.scorer.model_dump() == {"name": "mean", "options": {}}
    if override != "model.scorer={name: mean}":  # which replaces the options in so many words
        (line,) = caplog.messages
        assert line.startswith("model.scorer.name is now mean: dropped model.scorer.options.lambda1, ")


@pytest.mark.parametrize("name_first", [True, False])
def test_what_is_given_with_a_new_name_is_kept(write: Write, name_first: bool) -> None:
    given = ["model.scorer.name=tap", "model.scorer.options.attention_dim=8", "model.audio.name=mn04"]
    given += ["model.audio.checkpoint=mn.pt", "model.audio.fmin_aug_range=10"]
    path = write(base=BASE)
    config = load_config(path, given if name_first else given[::-1])
    assert config.model.scorer.options["attention_dim"] == 8
    assert (config.model.audio.checkpoint, config.model.audio.fmin_aug_range) == ("mn.pt", 10)
    assert config.model.audio.s_patchout_t == 0, "an option of PaSST alone"

    child = "extends: base.yaml\nmodel: {scorer: {options: {attention_dim: 8}, name: tap}}"
    assert load_config(write(child=child)).model.scorer.options["attention_dim"] == 8


def test_another_encoder_drops_what_only_the_old_one_has(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = load_config(write(base=BASE), ["model.audio.name=htsat"])
    audio = config.model.audio
    assert (audio.checkpoint, audio.s_patchout_t) == (None, 0)
    assert (audio.attention, audio.window_seconds) == ("sdpa", 10), "both have these"
    assert caplog.messages == [
        "model.audio.name is now htsat: dropped model.audio.checkpoint, model.audio.s_patchout_t"
    ]


def test_the_same_name_drops_nothing(write: Write) -> None:
    path = write(base=BASE)
    same = ["model.scorer.name=lgmm", "model.audio.name=passt_s16", "model.text.name=bert"]
    assert load_config(path, same) == load_config(path)
    assert load_config(path, ["model.text.name=roberta"]).model.text.pooling == "mean", "every text encoder has it"


def test_an_encoder_of_a_plug_in_is_known_by_then(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    module = """
        from pydantic import Field
        from atr_scale.encoders.audio import AudioEncoderOptions
        from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS
        class Mine:
            special_options = frozenset({"s_patchout_t"})
            class Options(AudioEncoderOptions):
                size: int = Field(1, description="size")
        AUDIO_ENCODERS["mine"] = Mine
    """
    path = write(base=BASE)
    (path.parent / "my_encoder_of_files.py").write_text(textwrap.dedent(module))
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setitem(AUDIO_ENCODERS, "mine", None)  # is removed again afterwards
    mine = ["model.audio.size=3", "model.audio.name=mine", "plugins+=my_encoder_of_files"]
    config = load_config(path, mine)
    assert config.model.audio.model_dump()["size"] == 3
    assert (config.model.audio.s_patchout_t, config.model.audio.attention) == (15, "auto")
    saved = write(saved=config.to_yaml())
    assert "size" not in load_config(saved, ["model.audio.name=mn04"]).model.audio.model_dump()


def test_numbers_of_yaml_1_1_are_named_by_their_line(write: Write) -> None:
    path = write(base=BASE + "\nevaluation:\n  batch_size: 010\n")
    line = path.read_text().splitlines().index("  batch_size: 010") + 1
    assert refusal(path) == f"{path}, line {line}: YAML reads 010 as 8: write 8, or quotes around a text"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=true", "'train': steps is a number, but true is given: write the number"),
        ("train.lr=yes", "'train': lr is a number, but true is given: write the number"),
        ("train.betas=[off,0.9]", "'train': betas is a number, but [false, 0.9] is given: write the number"),
        ("train.betas=[0.9,1]", "'train.betas[1]': Input should be less than 1, got 1"),
        ("run.dir=$NOWHERE/x", "'run.dir': the variable $NOWHERE is not set: export it, or write the path out"),
        ("run.dir=???", "run.dir is ???, which stands for a missing value: give it"),
    ],
)
def test_values_that_are_refused_by_name(write: Write, override: str, message: str) -> None:
    assert message in refusal(write(base=BASE), override)


def test_home_and_variables_in_paths(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORPORA", "/corpora")
    overrides = [
        "run.dir=~/run",
        "data.train=[{shards: $CORPORA/a}]",
        "data.validation={b: '~/b', c: 's3://bucket/~c'}",
    ]
    config = load_config(write(base=BASE), [*overrides, "train.initial_checkpoint=~/other"])
    assert config.run.dir == "/home/me/run" and config.data.train[0].shards == "/corpora/a"
    assert config.data.validation_sets == {"b": "/home/me/b", "c": "s3://bucket/~c"}
    assert config.train.initial_checkpoint is not None and config.train.initial_checkpoint.from_ == "/home/me/other"
