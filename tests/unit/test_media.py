"""Containers that libsndfile does not read: through torchcodec, or one line that says how to get it."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from atr_scale.data.decode import Crop, decode
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import open_shards

RATE = 48_000
SECONDS = 3
# extension: format of the encoder, largest deviation of the waveform, seconds of padding that it may add
FORMATS = {
    "m4a": ("ipod", 0.05, 0.05),
    "mp4": ("mp4", 0.05, 0.05),
    "webm": ("webm", 0.05, 0.0),
    "aac": ("adts", None, 0.1),  # without a container that tells the delay of the encoder
    "oga": ("oga", 1e-4, 0.0),  # FLAC in Ogg
}


def tone() -> np.ndarray:
    t = np.arange(SECONDS * RATE) / RATE
    return (0.3 * np.sin(2 * np.pi * 440 * t) * (1 + t / SECONDS)).astype(np.float32)


def encode(extension: str) -> bytes:
    try:
        from torchcodec.encoders import AudioEncoder
    except (ImportError, RuntimeError, OSError):
        pytest.skip("torchcodec or ffmpeg is not installed")
    encoder = AudioEncoder(torch.from_numpy(np.stack([tone()] * 2)), sample_rate=RATE)
    return bytes(encoder.to_tensor(FORMATS[extension][0]).numpy())


@pytest.mark.parametrize("extension", FORMATS)
def test_other_containers_are_decoded(extension: str) -> None:
    audio, (_, deviation, padding) = encode(extension), FORMATS[extension]
    waveform = decode(audio, extension, RATE)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert SECONDS <= len(waveform) / RATE <= SECONDS + padding
    if deviation is not None:
        np.testing.assert_allclose(waveform[2000 : 2 * RATE], tone()[2000 : 2 * RATE], atol=deviation)
    crop = decode(audio, extension, 16_000, crop=Crop(0.5, 1.0))
    assert len(crop) == 16_000 and crop.any()


def test_a_video_without_sound_is_named() -> None:
    try:
        from torchcodec.encoders import VideoEncoder
    except (ImportError, RuntimeError, OSError):
        pytest.skip("torchcodec or ffmpeg is not installed")
    frames = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    video = bytes(VideoEncoder(frames, frame_rate=4).to_tensor("mp4").numpy())
    with pytest.raises(BadSample) as refused:
        decode(video, "mp4", RATE)
    assert str(refused.value.detail) == "torchcodec: no audio in it"


@pytest.mark.parametrize("extension", ["m4a", "oga"])
def test_a_cut_file_is_refused(extension: str) -> None:
    audio = encode(extension)
    with pytest.raises(BadSample, match=r"undecodable_audio|short_audio"):
        decode(audio[: len(audio) // 2], extension, RATE)


@pytest.mark.parametrize("encoding", ["flac", "keep"])
def test_shards_of_them_need_no_torchcodec(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny" / "audio").mkdir(parents=True)
    with open(tmp_path / "tiny" / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for extension in FORMATS:
            (tmp_path / "tiny" / "audio" / f"{extension}.{extension}").write_bytes(encode(extension))
            table.writerow([f"{extension}.{extension}", f"A tone of {extension}"])
    out = str(tmp_path / "out")
    manifest = build_shards("folder", tmp_path / "tiny", out, encoding=encoding, workers=1)
    assert (manifest["num_samples"], manifest["dropped"]) == (len(FORMATS), {})
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert check_shards(out, deep=True) == []
    shards = open_shards(out)
    assert {shards.read(i).extension for i in range(len(shards))} == {"flac"}


def test_m4a_in_shards_of_other_projects_is_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("1.m4a", encode("m4a")), ("1.json", json.dumps({"text": "A tone"}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sample = open_shards(str(tmp_path)).read(0)
    assert len(decode(sample.audio, sample.extension, RATE)) >= SECONDS * RATE


@pytest.mark.parametrize(
    "magic",
    [b"\0\0\0\x1cftypM4A ", b"\x1aE\xdf\xa3", b"0&\xb2u", b"\xff\xf1P\x80", b"OggS\0\2" + bytes(20) + b"\1\5\x7fFLAC"],
)
def test_without_torchcodec_one_line_says_how_to_get_it(magic: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(BadSample, match=r"undecodable_audio: .*pip install torchcodec==.*ffmpeg") as caught:
        decode(magic + bytes(2000), "m4a", RATE)
    assert "\n" not in str(caught.value)


def test_what_is_no_audio_needs_no_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(BadSample) as caught:
        decode(b"<html>not found</html>", "m4a", RATE)
    assert caught.value.reason == "undecodable_audio" and "torchcodec" not in caught.value.detail
