"""The front door: a trained run as a library."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import atr_scale
from atr_scale import run_checkpoints
from atr_scale.data.shard_reader import open_shards
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import embed
from atr_scale.evaluation.parallel import Parallel
from atr_scale.inference import TrainedModel
from tests.tiny_run import save_run, tiny_config

TEXTS = ["a low and soft tone", "a high and loud tone 3", "short"]
RATE = 16_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train/ and validation/ with inputs, runs/ with a run of each scorer."""
    return tmp_path_factory.mktemp("front_door")


@pytest.fixture(scope="module")
def run(place: Path) -> Callable[[str], Path]:
    def make(scorer: str) -> Path:
        folder = place / "runs" / scorer
        return folder if folder.exists() else save_run(tiny_config(place, folder), folder, 1, scorer)

    return make


@pytest.fixture(scope="module")
def model(run: Callable[[str], Path]) -> TrainedModel:
    return atr_scale.load(run("meanmax"))


@pytest.fixture(scope="module")
def clips(place: Path, model: TrainedModel) -> list[Path]:
    return sorted((place / "train" / "corpus" / "audio").glob("*.wav"))[:5]


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, atr_scale; print(atr_scale.__version__, 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [atr_scale.__version__, "False", "False"]


def test_vectors_are_unit_float32_whatever_the_batch(model: TrainedModel, clips: list[Path]) -> None:
    for vectors in (model.embed_text(TEXTS), model.embed_audio(clips)):
        assert vectors.dtype == np.float32 and vectors.shape[1] == 16
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(model.embed_text(TEXTS, batch_size=1), model.embed_text(TEXTS), atol=1e-6)
    assert np.allclose(model.embed_audio(clips, batch_size=2), model.embed_audio(clips), atol=1e-6)


def test_vectors_are_those_that_evaluation_uses(model: TrainedModel, place: Path) -> None:
    shards = open_shards(str(place / "train" / "shards"))
    found = embed(model.module, shards, model.config, Parallel())
    files = [place / "train" / "corpus" / "audio" / Path(clip).name for clip in found.clip_ids]
    files = [file if file.suffix else file.with_suffix(".wav") for file in files]
    assert np.allclose(model.embed_audio(files), found.audio.pooled.numpy(), atol=1e-6)
    assert np.allclose(model.embed_text(found.captions), found.text.pooled.numpy(), atol=1e-6)


def test_waveforms_are_what_files_are(model: TrainedModel, clips: list[Path]) -> None:
    expected = model.embed_audio(clips[:1])
    whole, _ = soundfile.read(clips[0], dtype="float32")
    sixteen, _ = soundfile.read(clips[0], dtype="int16")
    whole.flags.writeable = False
    for waveform in (whole, whole.astype(np.float64), torch.tensor(whole), sixteen, torch.tensor(sixteen)):
        assert np.allclose(model.embed_audio([waveform], sample_rate=RATE), expected, atol=1e-6)
    assert not np.allclose(model.embed_audio([whole], sample_rate=2 * RATE), expected, atol=1e-3)  # resampled


@pytest.mark.parametrize("scorer", ["meanmax", "tap", "lgmm", "coattention"])
def test_every_scorer_gives_similarities(run: Callable[[str], Path], scorer: str, clips: list[Path]) -> None:
    model = atr_scale.load(run(scorer), device="cpu")
    scores = model.similarity(TEXTS, clips)
    assert scores.shape == (3, 5) and scores.dtype == np.float32 and np.isfinite(scores).all()
    assert np.allclose(model.similarity(TEXTS, clips, batch_size=2), scores, atol=1e-5)
    if scorer == "meanmax":
        assert np.allclose(model.embed_text(TEXTS) @ model.embed_audio(clips).T, scores, atol=1e-6)
    else:
        with pytest.raises(UserError, match=f"the scorer {scorer} .* so it has no embeddings: use similarity"):
            model.embed_audio(clips)


def test_only_the_start_of_a_long_clip_is_read_and_that_is_said(
    model: TrainedModel, clips: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = soundfile.read(clips[0], dtype="float32")
    with caplog.at_level(logging.WARNING):
        assert np.allclose(
            model.embed_audio([clips[0], whole[: RATE // 2]], RATE, seconds=0.5),
            model.embed_audio([whole[: RATE // 2]] * 2, RATE),
            atol=1e-6,
        )
    assert "only the first 0.5 s of 1 longer clips were read" in caplog.text and str(clips[0]) in caplog.text


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("embed_text", ("a dog",), "texts is one item, 'a dog': give a list"),
        ("embed_text", ([],), "texts is empty"),
        ("embed_text", (7,), "texts is int, not a list"),
        ("embed_text", (["fine", None],), r"texts\[1\] is None: give a text"),
        ("embed_text", (["fine"], 0), "batch_size = 0: give a whole number"),
        ("embed_text", (["fine"], 1.5), "batch_size = 1.5: give a whole number"),
        ("embed_text", (["fine", "a \ud800 dog"],), r"texts\[1\] is .*, not valid Unicode"),
        ("embed_audio", ("dog.wav",), "audio is one item, 'dog.wav'"),
        ("embed_audio", (["nowhere.wav"],), r"audio\[0\], nowhere.wav, cannot be read: No such file"),
        ("embed_audio", (["no\0where.wav"],), r"cannot be read: embedded null byte"),
        ("embed_audio", ([[[1.0, 2.0], [1.0]]], RATE), r"audio\[0\] is list: give a path, or a mono waveform"),
        ("embed_audio", ([__file__],), r"audio\[0\], .*test_inference.py, cannot be used: undecodable_audio"),
        ("embed_audio", ([np.ones(9, np.float32)],), r"audio\[0\] is a waveform: give its sample_rate in Hz"),
        ("embed_audio", ([np.ones((2, 9))], RATE), r"audio\[0\] has the shape \[2, 9\]"),
        ("embed_audio", (np.ones(9), RATE), r"audio\[0\] has the shape \[\]: give a list of paths"),
        ("embed_audio", ([np.full(900, 3e4)], RATE), r"audio\[0\] holds values up to 30000: give floats in \[-1, 1\]"),
        ("embed_audio", ([torch.ones(9, device="meta")], RATE), r"audio\[0\] is a tensor that cannot be read"),
        ("embed_audio", ([torch.eye(9).to_sparse()[0]], RATE), r"audio\[0\] is a tensor that cannot be read"),
        ("embed_audio", ([np.ones(900)], "16000"), "sample_rate = '16000': give a number above 0"),
        ("embed_audio", ([np.ones(900)], 16), r"sample_rate = 16: give Hz, from 1000 to 768000"),
        ("embed_audio", ([np.ones(900)], float("nan")), "sample_rate = nan: give a number above 0"),
        ("embed_audio", ([np.ones(9, np.int64)], RATE), r"audio\[0\] holds int64: give floats"),
        ("embed_audio", ([np.zeros(900)], RATE), r"audio\[0\] cannot be used: silent_audio"),
        ("embed_audio", ([np.full(900, np.nan)], RATE), r"audio\[0\] cannot be used: nonfinite_audio"),
        ("embed_audio", ([np.ones(0)], RATE), r"audio\[0\] cannot be used: empty_audio"),
        ("embed_audio", ([np.ones(900)], RATE, 1, -1.0), "seconds = -1.0: give a number above 0"),
        ("similarity", (["a"], [None]), r"audio\[0\] "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_item(
    model: TrainedModel, method: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        getattr(model, method)(*arguments)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_one_line(run: Callable[[str], Path], tmp_path: Path) -> None:
    good = run("meanmax")
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere: give a run folder"):
        atr_scale.load(tmp_path / "nowhere")
    for device in ("tpu", 3.5):
        with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
            atr_scale.load(good, device=device)  # type: ignore[arg-type]
    damaged = shutil.copytree(good, tmp_path / "damaged", symlinks=True)
    (damaged / "best" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        atr_scale.load(damaged)
    settings = damaged / "best" / "config.resolved.yaml"
    settings.write_text(settings.read_text().replace("plugins: []", "plugins: [unheard_of]"))
    with pytest.raises(UserError, match="needs the plug-ins unheard_of: if you trust them, give plugins="):
        atr_scale.load(damaged)
    with pytest.raises(UserError, match="unheard_of"):
        atr_scale.load(damaged, plugins=["unheard_of"])


def test_no_plugins_may_be_written_as_none(run: Callable[[str], Path]) -> None:
    assert atr_scale.load(run("meanmax"), plugins=None).embed_text(TEXTS[:1]).shape == (1, 16)


@pytest.mark.parametrize("place", [None, 3, b"run", "a" * 5000])
def test_what_is_no_path_is_one_short_line(place: Any) -> None:
    with pytest.raises(UserError, match="no checkpoint at ") as caught:
        atr_scale.load(place)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("file", ["model.safetensors", "text_encoder/tokenizer.json"])
def test_a_checkpoint_that_is_not_its_manifests_is_refused(
    run: Callable[[str], Path], tmp_path: Path, file: str
) -> None:
    """A flipped bit in weights is no error of their format: the vectors would be wrong without a word."""
    copy = shutil.copytree(run("meanmax"), tmp_path / "copy", symlinks=True)
    (copy / "best" / "state.json").write_text('{"step": 3}')
    run_checkpoints.seal(copy / "best")
    settings = copy / "best" / "config.resolved.yaml"
    settings.write_text(settings.read_text().replace("seed: 0", "seed: 1"))
    assert atr_scale.load(copy).config.run.seed == 1, "a configuration may be edited"
    damaged = copy / "best" / file
    contents = bytearray(damaged.read_bytes())
    contents[-9] ^= 1
    damaged.write_bytes(contents)
    with pytest.raises(UserError, match=rf"{file} has another checksum\): copy it anew"):
        atr_scale.load(copy)


def test_a_file_of_floats_beyond_any_audio_is_refused(model: TrainedModel, clips: list[Path], tmp_path: Path) -> None:
    tone, _ = soundfile.read(clips[0], dtype="float32")
    soundfile.write(tmp_path / "loud.wav", tone * np.float32(1e30), RATE, subtype="FLOAT")
    with pytest.raises(
        UserError, match=r"audio\[2\], .*loud\.wav, cannot be used: loud_audio: a sample of 3\.\d+e\+29"
    ):
        model.embed_audio([*clips[:2], tmp_path / "loud.wav"], batch_size=2)


def test_a_run_without_its_links_is_found(run: Callable[[str], Path], tmp_path: Path, clips: list[Path]) -> None:
    """As tools that copy no links leave it."""
    copy = shutil.copytree(run("meanmax"), tmp_path / "copy", symlinks=True)
    (copy / "best").unlink()
    assert np.array_equal(atr_scale.load(copy).embed_audio(clips), atr_scale.load(run("meanmax")).embed_audio(clips))
