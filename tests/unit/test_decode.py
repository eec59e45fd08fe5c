"""Decoding: crops, rates, and every fault a file can have."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from atr_scale.data.audio_source import open_audio
from atr_scale.data.decode import Crop, decode
from atr_scale.data.sample import BadSample

RATE = 16_000


def noise(seconds: float = 2.0, channels: int = 1, seed: int = 0) -> np.ndarray:
    samples = 0.3 * np.random.default_rng(seed).standard_normal((int(seconds * RATE), channels)).clip(-3, 3)
    return samples.astype(np.float32)


def encode(samples: np.ndarray, form: str, subtype: str | None = None, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def reason(audio: bytes, extension: str = "wav", **options: object) -> str:
    with pytest.raises(BadSample) as caught:
        decode(audio, extension, RATE, **options)  # type: ignore[arg-type]
    return caught.value.reason


FORMATS = [("flac", "FLAC", "PCM_16"), ("wav", "WAV", "PCM_16"), ("ogg", "OGG", "VORBIS"), ("mp3", "MP3", None)]


@pytest.mark.parametrize(("extension", "form", "subtype"), FORMATS)
def test_whole_clip_is_float32_mono(extension: str, form: str, subtype: str | None) -> None:
    stereo = noise(channels=2)
    waveform = decode(encode(stereo, form, subtype), extension, RATE)
    assert waveform.dtype == np.float32 and waveform.ndim == 1 and waveform.flags["C_CONTIGUOUS"]
    if extension in ("flac", "wav"):
        np.testing.assert_allclose(waveform, stereo.mean(axis=1), atol=4e-5)
    assert abs(len(waveform) - len(stereo)) <= (2304 if extension == "mp3" else 0)


@pytest.mark.parametrize(("extension", "form", "subtype"), FORMATS[:2])
@settings(max_examples=30, deadline=None)
@given(fraction=st.floats(0, 1), seconds=st.floats(0.01, 3))
def test_crop_equals_full_decode_then_crop(
    extension: str, form: str, subtype: str | None, fraction: float, seconds: float
) -> None:
    audio = encode(noise(), form, subtype)
    whole = decode(audio, extension, RATE)
    wanted = round(seconds * RATE)
    start = int(fraction * (len(whole) - wanted)) if wanted < len(whole) else 0
    np.testing.assert_array_equal(decode(audio, extension, RATE, crop=Crop(fraction, seconds)), whole[start:][:wanted])


@settings(max_examples=30, deadline=None)
@given(rate=st.sampled_from([8000, 22_050, 32_000, 44_100, 48_000]), seconds=st.floats(0.05, 1.9))
def test_crop_has_exactly_its_length_at_every_rate(rate: int, seconds: float) -> None:
    audio = encode(noise(), "WAV", "PCM_16", rate=rate)
    clip_seconds = 2 * RATE / rate
    waveform = decode(audio, "wav", 32_000, crop=Crop(0.3, seconds))
    if round(seconds * rate) < 2 * RATE:
        assert len(waveform) == round(seconds * 32_000)
    else:
        assert abs(len(waveform) - clip_seconds * 32_000) <= 1


def test_resampling_is_soxr_hq() -> None:
    samples = noise()[:, 0]
    waveform = decode(encode(samples, "WAV", "FLOAT"), "wav", 32_000)
    np.testing.assert_array_equal(waveform, soxr.resample(samples, RATE, 32_000, quality="HQ"))


@pytest.mark.parametrize(("extension", "form", "subtype"), [*FORMATS, ("pcm", "RAW", "PCM_16")])
@pytest.mark.parametrize("channels", [1, 2])
def test_decoding_into_a_row(extension: str, form: str, subtype: str | None, channels: int) -> None:
    """The same samples are at its beginning, and the rest of it is unchanged."""
    if extension == "pcm" and channels == 2:
        return
    audio = encode(noise(channels=channels), form, subtype)
    options: dict[str, Any] = {"pcm_rate": RATE, "crop": Crop(0.3, 0.7)}
    for rate in (RATE, 12_000):
        row = np.full(3 * RATE, 7, np.float32)
        found = decode(audio, extension, rate, out=row, **options)
        np.testing.assert_array_equal(found, decode(audio, extension, rate, **options))
        assert found.base is row and (row[len(found) :] == 7).all()


@pytest.mark.parametrize(
    ("extension", "form", "subtype"), [("pcm", "RAW", "PCM_16"), ("flac", "FLAC", "PCM_16"), ("wav", "WAV", "PCM_16")]
)
def test_16_bit_samples_stay_so_in_an_int16_row(extension: str, form: str, subtype: str) -> None:
    audio = encode(noise(), form, subtype)
    options: dict[str, Any] = {"pcm_rate": RATE, "crop": Crop(0.3, 0.7)}
    row = np.full(3 * RATE, 7, np.int16)
    found = decode(audio, extension, RATE, out=row, **options)
    assert found.base is row and (row[len(found) :] == 7).all()
    np.testing.assert_array_equal(found / np.float32(32768), decode(audio, extension, RATE, **options))


@pytest.mark.parametrize(
    ("extension", "form", "subtype", "channels", "rate"),
    [
        ("flac", "FLAC", "PCM_24", 1, RATE),
        ("flac", "FLAC", "PCM_16", 2, RATE),
        ("pcm", "RAW", "PCM_16", 1, 12_000),
        ("wav", "WAV", "PCM_16", 1, 12_000),
        ("wav", "WAV", "FLOAT", 1, RATE),
        ("ogg", "OGG", "VORBIS", 1, RATE),
    ],
)
def test_what_does_not_fit_an_int16_row_is_float32(
    extension: str, form: str, subtype: str, channels: int, rate: int
) -> None:
    audio = encode(noise(channels=channels), form, subtype)
    options: dict[str, Any] = {"pcm_rate": RATE, "crop": Crop(0.3, 0.7)}
    row = np.full(3 * RATE, 7, np.int16)
    found = decode(audio, extension, rate, out=row, **options)
    assert found.dtype == np.float32 and (row == 7).all()
    np.testing.assert_array_equal(found, decode(audio, extension, rate, **options))


def test_of_a_long_flac_only_the_crop_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[int] = []
    read = soundfile.SoundFile.read

    def counting(file: soundfile.SoundFile, *arguments: object, **options: object) -> np.ndarray:
        samples = read(file, *arguments, **options)
        frames.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    clip = noise(60.0)
    found = decode(encode(clip, "FLAC", "PCM_16"), "flac", RATE, crop=Crop(0.5, 1.0))
    assert frames == [RATE] and len(found) == RATE
    np.testing.assert_allclose(found, clip[int(29.5 * RATE) : int(30.5 * RATE), 0], atol=4e-5)


def test_no_clip_is_longer_than_the_crop() -> None:
    """Half a sample more than the crop at 1 kHz is 16 samples at 32 kHz."""
    assert len(decode(encode(noise()[:1050], "WAV", rate=1000), "wav", 32_000, crop=Crop(0.0, 1.0496))) == 33_587


def test_pcm() -> None:
    samples = (noise()[:, 0] * 32768).astype("<i2")
    audio = samples.tobytes()
    np.testing.assert_array_equal(decode(audio, "pcm", RATE, pcm_rate=RATE), samples / np.float32(32768))
    crop = decode(audio, "pcm", RATE, pcm_rate=RATE, crop=Crop(1.0, 0.5))
    np.testing.assert_array_equal(crop, samples[-8000:] / np.float32(32768))
    assert open_audio(audio, "pcm", RATE).frames == len(samples)
    assert reason(audio, "pcm") == "undecodable_audio"
    assert reason(audio[:-1], "pcm", pcm_rate=RATE) == "undecodable_audio"
    assert reason(b"", "pcm", pcm_rate=RATE) == "empty_audio"


@pytest.mark.parametrize(
    ("extension", "form", "subtype", "expected"),
    [
        ("flac", "FLAC", "PCM_16", {"undecodable_audio", "short_audio"}),
        ("mp3", "MP3", None, {"short_audio", "undecodable_audio"}),
    ],
)
def test_a_cut_file_is_refused(extension: str, form: str, subtype: str | None, expected: set[str]) -> None:
    audio = encode(noise(3.0), form, subtype)
    for share in (0.25, 0.5, 0.75):
        assert reason(audio[: int(len(audio) * share)], extension) in expected


def test_a_cut_ogg_never_crashes() -> None:
    """Vorbis has no length in its header: what is left decodes as a shorter clip, or not at all."""
    audio = encode(noise(3.0), "OGG", "VORBIS")
    for share in (0.01, 0.3, 0.6, 0.9):
        try:
            waveform = decode(audio[: int(len(audio) * share)], "ogg", RATE)
        except BadSample:
            continue
        assert 0 < len(waveform) < 3 * RATE


def test_empty_silent_and_non_finite_audio() -> None:
    assert reason(b"") == "empty_audio"
    assert reason(encode(np.zeros((0, 1), np.float32), "WAV")) == "empty_audio"
    assert reason(encode(np.zeros(RATE, np.float32), "FLAC"), "flac") == "silent_audio"
    for value in (np.nan, np.inf, -np.inf):
        samples = noise()[:, 0]
        samples[1000] = value
        assert reason(encode(samples, "WAV", "FLOAT")) == "nonfinite_audio"
    assert reason(encode(np.array([[np.inf, -np.inf]] * 100, np.float32), "WAV", "FLOAT")) == "nonfinite_audio"


def test_silence_that_quantises_to_nothing_but_one_sample_is_kept() -> None:
    samples = np.zeros(RATE, np.int16)
    samples[5] = 1
    assert decode(encode(samples, "WAV"), "wav", RATE).any()


@pytest.mark.parametrize(
    "junk", [b"<html>404</html>", b"\0" * 4096, b"RIFF\xff\xff\xff\xffWAVE", b"fLaC" + b"\xff" * 99]
)
def test_junk_is_undecodable(junk: bytes) -> None:
    assert reason(junk) in ("undecodable_audio", "empty_audio")


def test_lying_headers() -> None:
    wav = bytearray(encode(noise(1.0), "WAV", "PCM_16"))
    wav[24:28] = struct.pack("<I", 1)  # one sample a second
    assert reason(bytes(wav)) == "undecodable_audio"
    flac = bytearray(encode(noise(1.0), "FLAC", "PCM_16"))
    # STREAMINFO: the low 32 bits of total_samples lie at bytes 22 to 25.
    for claimed, expected in ((RATE * 20, {"short_audio", "undecodable_audio"}), (RATE * 7200, {"huge_audio"})):
        flac[22:26] = struct.pack(">I", claimed)
        assert reason(bytes(flac), "flac") in expected


def test_over_an_hour_is_refused_without_decoding() -> None:
    hour = np.zeros(1001 * 3600, np.int8).astype(np.int16)
    assert reason(encode(hour, "WAV", "PCM_U8", rate=1000)) == "huge_audio"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_crash(data: st.DataObject) -> None:
    extension, form, subtype = data.draw(st.sampled_from(FORMATS))
    audio = bytearray(encode(noise(0.3), form, subtype))
    for _ in range(data.draw(st.integers(1, 8))):
        audio[data.draw(st.integers(0, len(audio) - 1))] = data.draw(st.integers(0, 255))
    try:
        waveform = decode(bytes(audio), extension, RATE)
    except BadSample:
        return
    assert np.isfinite(waveform).all() and waveform.any()


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("extension", ["pcm", "flac"])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_a_crop_in_a_pause_moves_to_the_sound(extension: str, fraction: float, dtype: type) -> None:
    """A short knock in seconds of silence: the crop has the knock at its start fraction, whichever that is.

    The absolute value of the knock's samples does not fit int16.
    """
    clip = np.zeros(10 * RATE, np.float32)
    clip[7 * RATE : 7 * RATE + 50] = -1
    audio = (clip * 32768).astype("<i2").tobytes() if extension == "pcm" else encode(clip, "FLAC")
    found = decode(audio, extension, RATE, pcm_rate=RATE, crop=Crop(fraction, 1.0), out=np.zeros(RATE, dtype))
    assert len(found) == RATE and found.any() and found.dtype == dtype
    if fraction == 0.4:
        assert abs(int(np.abs(found.astype(float)).argmax()) - 0.4 * RATE) <= 1
