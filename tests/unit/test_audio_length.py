"""Files whose headers do not say how long the audio is, or say more than is there, one test for each kind."""

from __future__ import annotations

import csv
import io
import mmap
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from atr_scale.data.audio_length import know_length
from atr_scale.data.audio_source import open_audio
from atr_scale.data.decode import Crop, decode, decode_source
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import open_shards

RATE = 16_000
SECONDS = 5


def tone(seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    """A tone in noise that grows louder, so that no two places are alike and no part of a file is small."""
    t = np.arange(int(seconds * rate)) / rate
    noise = 0.3 * np.random.default_rng(0).standard_normal(len(t)).clip(-3, 3)
    return (0.1 * (1 + t / seconds) * (np.sin(2 * np.pi * 440 * t) + noise)).astype(np.float32)


def encode(form: str, subtype: str | None = None, samples: np.ndarray | None = None, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone() if samples is None else samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def patched(audio: bytes, at: int, field: bytes) -> bytes:
    return audio[:at] + field + audio[at + len(field) :]


def mp3_stream(**options: object) -> bytes:
    """MP3 frames of a variable bit rate without the Xing frame in front of them."""
    audio = encode("MP3", **options)  # type: ignore[arg-type]
    at = audio.index(b"Xing" if b"Xing" in audio else b"Info")
    return audio[audio.index(audio[:2], at) :]


def mp3_in_wav(stream: bytes, size: int) -> bytes:
    head = struct.pack("<4sIHHIIHHHHIHHH", b"fmt ", 30, 0x55, 1, RATE, 4000, 1, 0, 12, 1, 2, 288, 1, 1393)
    return (
        b"RIFF" + struct.pack("<I", len(head) + 12 + size) + b"WAVE" + head + b"data" + struct.pack("<I", size) + stream
    )


def id3(content: bytes) -> bytes:
    """A tag with a picture that looks like frame headers."""
    size = bytes(len(content) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\0\0" + size + content


def au(size: int) -> bytes:
    return patched(encode("AU"), 8, struct.pack(">I", size))


def wav(size: int) -> bytes:
    audio = encode("WAV")
    return patched(patched(audio, audio.index(b"data") + 4, struct.pack("<I", size)), 4, struct.pack("<I", size))


def caf(size: int) -> bytes:
    audio = encode("CAF")
    return patched(audio, audio.index(b"data") + 4, struct.pack(">q", size))


def w64(size: int) -> bytes:
    audio = encode("W64")
    return patched(audio, audio.index(b"data") + 16, struct.pack("<q", size))


def rf64(size: int) -> bytes:
    audio = encode("RF64")
    return patched(audio, audio.index(b"ds64") + 8, 3 * struct.pack("<q", size))


def flac_without_length() -> bytes:
    audio = encode("FLAC")
    return patched(audio, 21, bytes([audio[21] & 0xF0]) + bytes(4))


def ogg_without_end(subtype: str) -> bytes:
    audio = encode("OGG", subtype)
    last = audio.rindex(b"OggS")
    return audio[: audio.rindex(b"OggS", 0, last)] + audio[audio.rindex(b"OggS", 0, last) : last]


# Files of five seconds whose header does not say so.
UNKNOWN: dict[str, Callable[[], bytes]] = {
    "mp3 without a frame count": mp3_stream,
    "mp3 behind a picture": lambda: id3(b"\xff\xfb" * 4000) + mp3_stream(),
    "mp3 behind an empty tag": lambda: id3(b"") + encode("MP3"),
    "mp3 in front of a tag": lambda: mp3_stream() + b"TAG" + b"\xff" * 3000,
    "mp3 in wav": lambda: mp3_in_wav(mp3_stream(), len(mp3_stream())),
    "mp3 in wav of unknown size": lambda: mp3_in_wav(mp3_stream(), 0),
    "flac of unknown length": flac_without_length,
    "flac of unknown length behind a tag": lambda: id3(b"title") + flac_without_length(),
    "wav of size 0": lambda: wav(0),
    "wav of size 0xffffffff": lambda: wav(0xFFFF_FFFF),
    "wav of size 0x7fffffff": lambda: wav(0x7FFF_FFFF),
    "rf64 of size 0": lambda: rf64(0),
    "rf64 of size -1": lambda: rf64(-1),
    "caf of size -1": lambda: caf(-1),
    "caf of size 0": lambda: caf(0),
    "au of size 0": lambda: au(0),
    "au of size -1": lambda: au(0xFFFF_FFFF),
    "w64 of size 0": lambda: w64(0),
    "w64 of the largest size": lambda: w64((1 << 63) - 1),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_length_is_that_of_the_audio(kind: str) -> None:
    audio = UNKNOWN[kind]()
    known = know_length(audio)
    assert not known.cut and know_length(known.audio).audio == known.audio
    waveform = decode(audio, "wav", RATE)
    source = open_audio(audio, "wav")
    # An MP3 without the encoder's own frame does not tell how many samples of padding it has: at most three frames.
    slack = 3 * 576 if "mp3" in kind else 0
    assert SECONDS * RATE <= len(waveform) <= SECONDS * RATE + slack
    assert source.frames == len(waveform)
    if not slack:
        np.testing.assert_allclose(waveform, tone(), atol=4e-5)
    crop = decode(audio, "wav", RATE, crop=Crop(0.9, 0.5))
    start = int(0.9 * (len(waveform) - RATE // 2))
    np.testing.assert_allclose(crop, waveform[start : start + RATE // 2], atol=2e-4)


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_a_crop_of_an_mp3_of_a_low_bit_rate_is_whole(rate: int) -> None:
    """Its frames need more of those before them than libsndfile decodes after a seek."""
    steady = 0.3 * np.sin(2 * np.pi * 440 * np.arange(SECONDS * rate) / rate)
    audio = encode("MP3", samples=steady, rate=rate)
    whole = decode(audio, "mp3", rate)
    for fraction in (0.2, 0.5, 0.9):
        start = int(fraction * (len(whole) - rate // 2))
        crop = decode(audio, "mp3", rate, crop=Crop(fraction, 0.5))
        np.testing.assert_allclose(crop, whole[start : start + rate // 2], atol=2e-3)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_of_every_version(rate: int, channels: int) -> None:
    samples = np.stack([tone(rate=rate)] * channels, 1)
    audio = mp3_stream(samples=samples, rate=rate)
    source = open_audio(audio, "mp3")
    assert 0 <= source.frames - SECONDS * rate <= 3 * 1152
    assert len(decode_source(source, rate)) == source.frames


def test_two_mp3_in_a_row_have_both_lengths() -> None:
    both = encode("MP3") + id3(bytes(5000)) + encode("MP3")
    assert abs(len(decode(both, "mp3", RATE)) - 2 * SECONDS * RATE) < 5 * 576


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_without_its_last_page_ends_at_the_page_before(subtype: str) -> None:
    """Every part of it can be read: libsndfile does not seek in Opus without a last page."""
    audio = ogg_without_end(subtype)
    assert not know_length(audio).cut
    whole = decode(audio, "ogg", RATE)
    assert 3 * RATE < len(whole) < SECONDS * RATE
    source = open_audio(audio, "ogg")
    parts = [source.read(start, min(9000, source.frames - start)) for start in range(0, source.frames, 9000)]
    np.testing.assert_allclose(np.concatenate(parts)[: 3 * RATE], whole[: 3 * RATE], atol=2e-2)


def checksum(page: bytes) -> bytes:
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C1_1DB7 if crc >> 31 else 0)) & 0xFFFF_FFFF
    return struct.pack("<I", crc)


def test_an_opus_whose_last_page_is_not_marked_is_whole() -> None:
    """libsndfile fails at its end if it is read in more than one piece."""
    audio = encode("OGG", "OPUS")
    last = audio.rindex(b"OggS")
    assert audio[last + 5] == 4
    page = patched(patched(audio[last:], 5, b"\0"), 22, bytes(4))
    source = open_audio(audio[:last] + patched(page, 22, checksum(page)), "opus")
    assert source.stored == audio
    pieces = [source.read(start, min(60_000, source.frames - start)) for start in (0, 60_000)]
    assert sum(map(len, pieces)) == SECONDS * RATE


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_is_never_read_in_part(subtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile reads the first of several streams, as a radio station sends them."""
    both = encode("OGG", subtype) + encode("OGG", subtype)
    try:
        assert len(decode(both, "ogg", RATE)) == 2 * SECONDS * RATE
    except BadSample as error:
        assert error.reason == "undecodable_audio"
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(BadSample, match=r"undecodable_audio: .*several Ogg streams.*pip install torchcodec"):
        decode(both, "ogg", RATE)


def cut(audio: bytes) -> bytes:
    return audio[: len(audio) * 6 // 10]


# Files that promise five seconds, of which three are there; all but flac say so before they are decoded.
CUT: dict[str, Callable[[], bytes]] = {
    "mp3": lambda: cut(encode("MP3")),
    "mp3 in wav": lambda: mp3_in_wav(cut(mp3_stream()), len(mp3_stream())),
    "wav": lambda: cut(encode("WAV")),
    "wav with floats": lambda: cut(encode("WAV", "FLOAT")),
    "rf64": lambda: cut(encode("RF64")),
    "vorbis": lambda: cut(encode("OGG", "VORBIS")),
    "opus": lambda: cut(encode("OGG", "OPUS")),
    "aiff": lambda: cut(encode("AIFF")),
    "au": lambda: cut(encode("AU")),
    "caf": lambda: cut(encode("CAF")),
    "w64": lambda: cut(encode("W64")),
    "flac": lambda: cut(encode("FLAC")),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_cut_file_is_refused_or_kept_as_it_is(kind: str) -> None:
    audio = CUT[kind]()
    with pytest.raises(BadSample) as caught:
        decode(audio, "", RATE)
    assert caught.value.reason == ("undecodable_audio" if kind == "flac" else "short_audio")
    source = open_audio(audio, "", keep_cut=True)
    waveform = decode_source(source, RATE)
    assert RATE < len(waveform) == source.frames < 4 * RATE
    assert source.stored is not None
    np.testing.assert_array_equal(decode(source.stored, "", RATE), waveform)


def test_a_few_missing_bytes_are_a_miscounted_header() -> None:
    audio = wav(2 * SECONDS * RATE + 44)
    assert len(decode(audio, "wav", RATE)) == SECONDS * RATE


def test_a_wav_without_audio_in_front_of_other_chunks_is_empty() -> None:
    audio = encode("WAV", samples=np.zeros(0, np.float32)) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    with pytest.raises(BadSample, match="empty_audio"):
        decode(audio, "wav", RATE)


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_beyond_one_are_scaled(subtype: str) -> None:
    """Integers in a float file, as pandas and numpy write them."""
    source = open_audio(encode("WAV", subtype, 32768 * tone()), "wav")
    waveform = decode_source(source, RATE)
    assert np.abs(waveform).max() == pytest.approx(1) and source.gain < 1e-3
    np.testing.assert_allclose(waveform, tone() / np.abs(tone()).max(), atol=1e-6)
    untouched = open_audio(encode("WAV", subtype), "wav")
    np.testing.assert_allclose(decode_source(untouched, RATE), tone(), atol=1e-7)
    assert untouched.gain == 1


@pytest.mark.parametrize("peak", [1e20, 3e38])
def test_floats_that_are_no_sound_are_refused(peak: float) -> None:
    with pytest.raises(BadSample, match="loud_audio"):
        decode(encode("WAV", "FLOAT", (np.sign(tone()) * peak).astype(np.float32)), "wav", RATE)


def test_a_rate_that_flac_cannot_hold_ends_no_build(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "odd", {"fast.wav": encode("WAV", rate=700_000), "good.wav": encode("WAV")})
    manifest = build_shards("folder", root, tmp_path / "out", sample_rate=None, workers=1)
    assert (manifest["num_samples"], manifest["dropped"]) == (1, {"undecodable_audio": 1})


def write_corpus(root: Path, files: dict[str, bytes]) -> Path:
    (root / "audio").mkdir(parents=True)
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for name, audio in files.items():
            (root / "audio" / name).write_bytes(audio)
            table.writerow([name, f"A tone of {name}"])
    return root


EXTENSION = {"mp3": "mp3", "flac": "flac", "vorbis": "ogg", "opus": "opus"}


def odd_files() -> dict[str, bytes]:
    kinds = {**{f"unknown {k}": v() for k, v in UNKNOWN.items()}, **{f"cut {k}": v() for k, v in CUT.items()}}
    kinds["ogg without end"] = ogg_without_end("OPUS")
    kinds["quiet"] = encode("WAV", "FLOAT", 1e-6 * tone())
    kinds["loud"] = encode("WAV", "FLOAT", 1e21 * tone())
    kinds["beyond one"] = encode("WAV", "FLOAT", 100 * tone())
    kinds["silent"] = encode("WAV", samples=0 * tone())
    return {f"{kind}.{next((e for k, e in EXTENSION.items() if k in kind), 'wav')}": v for kind, v in kinds.items()}


@pytest.mark.parametrize("encoding", ["flac", "pcm16", "keep"])
@pytest.mark.parametrize("keep_cut", [False, True])
@pytest.mark.slow
def test_a_fresh_build_of_all_kinds_has_no_finding(
    encoding: str, keep_cut: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the build stores, `shards check --deep` decodes, to the length in the JSON of each sample."""
    root = write_corpus(tmp_path / "odd", odd_files())
    out = str(tmp_path / "out")
    manifest = build_shards("folder", root, out, encoding=encoding, sample_rate=RATE, workers=1, keep_cut=keep_cut)
    assert check_shards(out, deep=True) == []
    # Quiet floats are zeros at 16 bits only.
    dropped = {"loud_audio": 1, "silent_audio": 1 if encoding == "keep" else 2}
    if not keep_cut:
        dropped |= {"short_audio": len(CUT) - 1, "undecodable_audio": 1}
    assert manifest["dropped"] == dropped and manifest["scaled"] == 1
    assert "1 clips have float samples beyond 1 and are scaled: odd/beyond one.wav" in caplog.text
    shards = open_shards(out)
    assert len(shards) == len(odd_files()) - sum(dropped.values())
    for i in range(len(shards)):
        sample = shards.read(i)
        waveform = decode(sample.audio, sample.extension, RATE, pcm_rate=sample.sample_rate)
        assert len(waveform) / RATE == pytest.approx(sample.meta["duration"], abs=1e-5), sample.clip_id


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_damaged_headers_end_in_audio_or_a_reason(data: st.DataObject) -> None:
    """Bytes are changed, removed and cut off, mostly where the headers are."""
    kinds = {**UNKNOWN, **CUT}
    audio = bytearray(kinds[data.draw(st.sampled_from(sorted(kinds)))]())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, 128), st.integers(0, len(audio) - 1)))
        audio[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    audio = audio[: data.draw(st.one_of(st.none(), st.integers(0, len(audio))))]
    try:
        source = open_audio(bytes(audio), "wav", keep_cut=data.draw(st.booleans()))
        if source.frames > 20 * RATE:
            return
        waveform = decode_source(source, RATE)
    except BadSample:
        return
    assert np.isfinite(waveform).all() and waveform.any()


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3"])
def test_a_mapped_file_is_not_copied(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"long.{extension}"
    soundfile.write(path, 0.3 * np.random.default_rng(0).standard_normal(120 * RATE), RATE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as audio:
        tracemalloc.start()
        try:
            know_length(audio)  # type: ignore[arg-type]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < path.stat().st_size / 10
