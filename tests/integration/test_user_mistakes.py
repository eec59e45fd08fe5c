"""The mistakes made first: each is one line on stderr and exit code 2, without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import save_file

from atr_scale import cli
from atr_scale.config import load_config, parse_config
from atr_scale.model import Retriever
from tests.coded import write_corpus
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml and its inputs, corpora that lack something, and checkpoints that do not fit."""
    place = tmp_path_factory.mktemp("mistakes")
    config = tiny_config(place / "inputs", place / "run")
    (place / "run.yaml").write_text(config.to_yaml())
    write_corpus(place / "corpus", range(3))
    text = (place / "corpus" / "captions.csv").read_text().splitlines()
    (place / "corpus" / "captions.csv").write_text(
        "\n".join([f"{text[0]},split", *(f"{line},train" for line in text[1:])])
    )
    for name, audio in (("silent", None), ("broken", b"RIFF no audio")):
        (place / name / "audio").mkdir(parents=True)
        (place / name / "captions.csv").write_text("file_name,caption\na.wav,a sound\n")
        if audio:
            (place / name / "audio" / "a.wav").write_bytes(audio)
        else:
            soundfile.write(place / name / "audio" / "a.wav", torch.zeros(8000).numpy(), 8000)
    (place / "no_audio" / "audio").mkdir(parents=True)
    (place / "no_audio" / "captions.csv").write_text("file_name,caption\na.wav,a sound\n")
    (place / "empty").mkdir()
    (place / "a_file").write_text("words")
    checkpoint(place / "other" / "checkpoints" / "step-3", place / "run.yaml", "model.audio.name=tiny_resnet38")
    checkpoint(place / "good" / "checkpoints" / "step-3", place / "run.yaml")
    (place / "good" / "best").symlink_to(place / "good" / "checkpoints" / "step-3")
    checkpoint(place / "cut" / "checkpoints" / "step-3", place / "run.yaml")
    weights = place / "cut" / "checkpoints" / "step-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return place


def checkpoint(folder: Path, config: Path, *overrides: str) -> None:
    folder.mkdir(parents=True)
    resolved = load_config(config, overrides)
    save_file(Retriever(resolved.model, resolved.objective).state_dict(), folder / "model.safetensors")
    (folder / "config.resolved.yaml").write_text(resolved.to_yaml())


def refusal(line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """stderr of `atr-scale LINE`, run in `place`; asserts code 2 and no traceback."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["atr-scale", *line.split()])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the verb sets
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as left:
        cli.main()
    error = capfd.readouterr().err
    assert left.value.code == 2, error
    assert "Traceback" not in error
    return error


ONE_LINE = {
    # train
    "train missing.yaml": "no configuration file at missing.yaml",
    "train run.yaml train.lrr=1": "did you mean 'train.lr'?",
    "train run.yaml train.epochs=2": "give either steps or epochs, and null for the other one",
    "train run.yaml run.dir=a_file": "the run folder a_file cannot be made",
    "train run.yaml model.audio.name=mn05": "'model.audio.name': unknown audio encoder: known are cnn14",
    "train run.yaml model.text.name=./nowhere": "./nowhere",
    "train run.yaml model.text.name=empty": "'empty'",
    "train run.yaml model.scorer.name=sum": "'model.scorer.name': unknown scorer: known are pooled",
    "train run.yaml model.projection.kind=none": "differ in width",
    "train run.yaml model.audio.name=mn04 model.audio.checkpoint=missing.pt": "no checkpoint at missing.pt",
    "train run.yaml model.audio.name=mn04 model.audio.checkpoint=a_file": "a_file is no checkpoint of plain tensors",
    "train run.yaml data.train[0].shards=nowhere": "no shards in nowhere",
    "train run.yaml data.train[0].shards=empty": "no shards in empty",
    "train run.yaml data.train[0].shards=inputs/train": "did you mean inputs/train/shards?",
    "train run.yaml data.validation=nowhere": "no shards in nowhere",
    "train run.yaml train.initial_checkpoint=nowhere": "no checkpoint at nowhere",
    "train run.yaml train.initial_checkpoint=other/checkpoints/step-3": "leaves it out",
    "train run.yaml train.initial_checkpoint=cut/checkpoints/step-3": "cut/checkpoints/step-3/model.safetensors",
    "train run.yaml --dry-run --world-size 5": "train.global_batch_size = 12 does not divide among 5 ranks",
    "train run.yaml --dry-run --world-size 0": "--world-size",
    # shards
    "shards build speech --root corpus --out out": "unknown corpus 'speech'",
    "shards build folder --root nowhere --out out": "nowhere",
    "shards build folder --root corpus --out out --split night": "no split 'night': choose one of train",
    "shards build folder --root corpus --out out --encoding aac": "unknown encoding 'aac'",
    "shards build folder --root corpus --out out --sample-rate -5": "sample rate -5 Hz",
    "shards build folder --root corpus --out out --sample-rate 7": "sample rate 7 Hz",
    "shards build folder --root corpus --out out --shard-size 0": "shard size 0",
    "shards build folder --root corpus --out a_file": "a_file",
    "shards build folder --root corpus --out out --exclude missing.csv": "missing.csv",
    "shards build folder --root no_audio --out out1": "no audio for any of the 1 clips",
    "shards build folder --root silent --out out2": "silent_audio",
    "shards build folder --root broken --out out3": "undecodable_audio",
    "shards build clotho --root corpus --out out4 --split development": "corpus",
    "shards check nowhere": "nowhere",
    "shards check empty": "empty",
    # evaluate
    "evaluate nowhere": "no checkpoint at nowhere",
    "evaluate empty": "no checkpoint at empty",
    "evaluate a_file": "no checkpoint at a_file",
    "evaluate good": "names no shards for the split 'test' (it names validation): give --shards DIR",
    "evaluate good --split night": "names no shards for the split 'night'",
    "evaluate good --shards empty": "no shards in empty",
    "evaluate good --split validation --class-prompt sound": "class_prompt must contain {label}",
    "evaluate good --split validation --shards nowhere": "no shards in nowhere",
    "evaluate cut/checkpoints/step-3 --split validation": "model.safetensors",
    "demo-data --out a_file": "a_file",
}


@pytest.mark.parametrize("line", ONE_LINE)
def test_one_line(line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    error = refusal(line, place, monkeypatch, capfd)
    lines = [text for text in error.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1 and ONE_LINE[line] in lines[0], error
    assert error.rstrip().endswith(lines[0]), "the reason is the last thing said"


@pytest.mark.parametrize(
    "line",
    [
        "evaluate good --nonsense",
        "train run.yaml --nonsense",
        "train",
        "fly",
        "shards build folder --root corpus",
        "shards build folder --root corpus --out x --sample-rate fast",
    ],
)
def test_usage(line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert "usage" in refusal(line, place, monkeypatch, capfd).lower()


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "atr_scale.train", "missing.yaml"],
        ["-m", "atr_scale.cli", "train", "run.yaml", "data.train[0].shards=empty"],
        ["-c", "from atr_scale.cli import main; main()", "shards", "check", "nowhere"],
    ],
)
def test_in_a_process_of_its_own(command: list[str], place: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_config_of_the_tests_is_sound(place: Path) -> None:
    """Without a mistake the configuration is accepted."""
    assert parse_config(load_config(place / "run.yaml").model_dump(), "x").train.steps == 6
