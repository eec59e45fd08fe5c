"""Clips whose samples encode the clip's number and their own position, so that tests can identify any piece of them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from atr_scale.batch import Batch, stable_id
from atr_scale.data.options import DataSection, TrainingSource
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.stream import TrainingStream
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.distributed.world import World

RATE = 8000
CAPTIONS = 3
# int16 sample = PER_CLIP * clip number + 1 + time in units of TICK samples; clips 0 to 63 of up to 5 s.
PER_CLIP, TICK = 512, 80
QUANTUM = 2000
CROP = 8000


def duration(number: int) -> int:
    """Samples of clip `number`: 0.4 to 2.8 s."""
    return 3200 + 1600 * (number % 13)


def waveform(number: int) -> np.ndarray:
    return (PER_CLIP * number + 1 + np.arange(duration(number)) // TICK).astype(np.int16)


def write_corpus(root: Path, numbers: Iterable[int]) -> Path:
    """A folder corpus of the clips `numbers`, each with captions that name it."""
    (root / "audio").mkdir(parents=True)
    lines = ["file_name,caption_1,caption_2,caption_3"]
    for n in numbers:
        soundfile.write(root / "audio" / f"{n:02}.wav", waveform(n), RATE)
        lines.append(f"{n:02}.wav," + ",".join(f"clip {n} take {k}" for k in range(CAPTIONS)))
    (root / "captions.csv").write_text("\n".join(lines))
    return root


def write_laion(folder: Path, shards: dict[str, list[int]], subtype: str = "PCM_16") -> str:
    """Tars of LAION's audio-dataset layout, no manifest; every shard numbers its keys from zero."""
    folder.mkdir(parents=True)
    for name, numbers in shards.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for key, n in enumerate(numbers):
                audio = io.BytesIO()
                soundfile.write(audio, waveform(n), RATE, format="FLAC", subtype=subtype)
                text = {"text": [f"clip {n} take {k}" for k in range(CAPTIONS)], "tag": [f"class {n % 3}"]}
                for extension, payload in (("flac", audio.getvalue()), ("json", json.dumps(text).encode())):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
    return str(folder)


def write_shards(root: Path, numbers: Iterable[int], *, shard_size: int = 7, encoding: str = "pcm16") -> str:
    """Shards of a new corpus at `root`; returns their folder."""
    out = str(root / "shards")
    build_shards("folder", write_corpus(root, numbers), out, shard_size=shard_size, encoding=encoding, sample_rate=RATE)
    return out


class NumberTokenizer(CaptionTokenizer):
    """The numbers in a caption as its token ids: [clip, take]."""

    def __init__(self) -> None:
        pass

    def clean(self, caption: str) -> str:
        return caption

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[int(n) for n in re.findall(r"\d+", caption)] for caption in captions])
        return ids, torch.ones_like(ids)


def open_stream(
    *shards: str | TrainingSource, world: World | None = None, batch: int = 12, seed: int = 0
) -> TrainingStream:
    """A stream of coded clips, crops of 1 s in steps of 0.25 s."""
    sources = [s if isinstance(s, TrainingSource) else TrainingSource(shards=s, weight=None) for s in shards]
    data = DataSection(
        train=sources, crop_seconds=CROP / RATE, crop_quantum=QUANTUM / RATE, shuffle_window=16, shuffle_block=4
    )
    return TrainingStream(
        data,
        tokenizer=NumberTokenizer(),
        sample_rate=RATE,
        global_batch_size=batch,
        seed=seed,
        world=world or World(),
    )


def samples(batch: Batch, row: int) -> np.ndarray:
    """[samples] int: a row's waveform in units of 16-bit samples."""
    waveform = batch.waveform[row].numpy()
    return waveform.astype(int) if waveform.dtype == np.int16 else np.rint(waveform * 32768).astype(int)


def clip_and_start(batch: Batch, row: int) -> tuple[int, int]:
    """(clip number, first sample) of a row's waveform, decoded from it and checked over its whole length."""
    length = int(batch.lengths[row])
    values = samples(batch, row)
    assert not values[length:].any(), "padding is zero"
    numbers = np.unique((values[:length] - 1) // PER_CLIP)
    assert len(numbers) == 1, f"clips {numbers} in one row"
    ticks = (values[:length] - 1) % PER_CLIP
    start = (int(ticks[0]) + 1) * TICK - int(np.argmax(ticks != ticks[0]))  # the first change of tick is exact
    assert np.array_equal(values[:length], waveform(int(numbers[0]))[start : start + length])
    return int(numbers[0]), start


def rows_of(batch: Batch) -> list[tuple[str, int, int, int, int]]:
    """(place, clip, first sample, length, take) of every row; asserts that audio and caption are of one clip."""
    found = []
    for row in range(len(batch.keys)):
        number, start = clip_and_start(batch, row)
        clip, take = batch.input_ids[row].tolist()
        assert clip == number, f"the audio of clip {number} with a caption of clip {clip}"
        assert int(batch.caption_index[row]) == take
        found.append((batch.keys[row], number, start, int(batch.lengths[row]), take))
    return found


def clip_id(corpus: str, number: int) -> int:
    return stable_id(f"{corpus}/{number:02}.wav")
