"""Reading batches: this project's stream, and webdataset's own loader on the same shards.

Clips of 10 s at 32 kHz, crops of 10 s, batches of 32. Counted is everything from the file (in the page cache) to the
batch tensor: reading, decoding, drawing caption and crop, checks, ids, padding; not tokenising, for which both sides
give the same constant.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import webdataset
from torch import Tensor

from atr_scale.config import DataSection, Source
from atr_scale.data.shards import build
from atr_scale.data.stream import TrainingStream, read_batches
from atr_scale.data.text import CaptionTokenizer
from atr_scale.parallel.world import World
from tools.bench.measure import seconds
from tools.bench.table import Row, run

CLIPS, SECONDS, RATE = 320, 10.0, 32_000
BATCH = 32
CAPTIONS = 5
PCM_MS = 0.15  # what a clip of 16-bit samples may cost
STEP_S = 0.03  # a training step of so long has to find its next batch ready
STEPS = 60
SOAK, SETTLED = 100_000, 10_000  # samples read in all, and after which memory is to stay where it is
WDS = "webdataset"


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus")
        shards = {encoding: build_shards(Path(folder), encoding) for encoding in ("pcm16", "flac")}
        for encoding, location in shards.items():
            ours, theirs = seconds(
                lambda at=location: drain(our_batches(at)), lambda at=location: drain(wds_batches(at))
            )  # type: ignore[misc]
            ours, theirs = 1000 * ours / CLIPS, 1000 * theirs / CLIPS
            if encoding == "pcm16":
                yield Row("16-bit samples, one process", ours, PCM_MS, "the figure to reach", "CPU ms a clip", 1.0)
            yield Row(f"{encoding}, one process", ours, theirs, WDS, "CPU ms a clip", 1.0)
            yield Row(f"{encoding}, one process", 1000 / ours, 1000 / theirs, WDS, "clips / CPU s", 1.0, at_least=True)
        pcm = shards["pcm16"]
        for encoding, location in shards.items():
            ours, theirs = waiting(our_batches(location, 1)), waiting(wds_batches(location, 1))
            yield Row(f"{encoding}, one worker: waiting for data", ours, theirs, WDS, "share of the time")
        ours, theirs = in_the_reader(our_batches(pcm, 1)), in_the_reader(wds_batches(pcm, 1))
        yield Row("pcm16, one worker: in the training process", ours, theirs, WDS, "CPU ms a clip", 1.0)
        settled, end = soak(our_batches(pcm, batches=SOAK // BATCH))
        yield Row(f"memory after {SOAK} samples", end, settled, f"after {SETTLED}", "MiB resident", 1.02)


def write_corpus(root: Path) -> None:
    """Noise that falls with frequency: FLAC halves it, as it does recordings."""
    (root / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["file_name," + ",".join(f"caption_{k + 1}" for k in range(CAPTIONS))]
    for number in range(CLIPS):
        spectrum = np.fft.rfft(rng.standard_normal(int(SECONDS * RATE)))
        sound = np.fft.irfft(spectrum / np.sqrt(1 + np.arange(len(spectrum))))
        soundfile.write(root / "audio" / f"{number}.wav", 0.5 * sound / np.abs(sound).max(), RATE, subtype="PCM_16")
        captions = (f"A dog barks {k} times while vehicle {number} passes on a wet road" for k in range(CAPTIONS))
        lines.append(f"{number}.wav," + ",".join(captions))
    (root / "captions.csv").write_text("\n".join(lines))


def build_shards(folder: Path, encoding: str) -> str:
    out = str(folder / encoding)
    build("folder", folder / "corpus", out, shard_size=80, encoding=encoding, sample_rate=RATE, workers=1)
    return out


class NoTokenizer(CaptionTokenizer):
    """The same ids for every caption."""

    def __init__(self) -> None:
        pass

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(captions), 16, dtype=torch.int64), torch.ones(len(captions), 16, dtype=torch.int64)


def our_batches(shards: str, workers: int = 0, batches: int = CLIPS // BATCH) -> Iterator[Tensor]:
    """An epoch, or as much as is asked for; with workers endless."""
    stream = TrainingStream(
        DataSection(train=[Source(shards=shards, weight=None)], crop_seconds=SECONDS),
        tokenizer=NoTokenizer(),
        sample_rate=RATE,
        global_batch_size=BATCH,
        seed=0,
        world=World(),
    )
    for batch in read_batches(stream.between(0, 1 << 40 if workers else batches), workers):
        yield batch.waveform


def wds_batches(shards: str, workers: int = 0) -> Iterator[Tensor]:
    """What the library's documentation shows: decode, shuffle, crop, batch; with workers endless."""
    urls = sorted(str(path) for path in Path(shards).glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), resampled=workers > 0, empty_check=False)
    dataset = dataset.shuffle(CLIPS).map(wds_sample).batched(BATCH, collation_fn=wds_collate)
    context = multiprocessing.get_context("forkserver") if workers else None
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    for batch in loader:
        yield batch[0]


def wds_sample(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
    record = json.loads(sample["json"])
    if "pcm" in sample:
        waveform = np.frombuffer(sample["pcm"], "<i2").astype(np.float32) / 32768
    else:
        waveform, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
    length = int(SECONDS * RATE)
    start = np.random.randint(len(waveform) - length + 1)
    return waveform[start : start + length], record["captions"][np.random.randint(len(record["captions"]))]


def wds_collate(samples: list[tuple[np.ndarray, str]]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.stack([torch.from_numpy(w) for w, _ in samples]), *NoTokenizer()([caption for _, caption in samples])


def drain(batches: Iterable[Tensor]) -> None:
    for waveform in batches:
        assert waveform.shape == (BATCH, int(SECONDS * RATE))


def waiting(batches: Iterator[Tensor]) -> float:
    """Share of the time that a loop of STEPS steps waits for its batches, once the workers run."""
    with closing(batches):  # type: ignore[type-var]
        next(batches)
        time.sleep(1)
        began, waited = time.perf_counter(), 0.0
        for _ in range(STEPS):
            start = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - start
            time.sleep(STEP_S)  # a step on a GPU, which leaves this processor alone
        return waited / (time.perf_counter() - began)


def in_the_reader(batches: Iterator[Tensor]) -> float:
    """CPU ms a clip that the process which reads the batches spends itself."""
    with closing(batches):  # type: ignore[type-var]
        next(batches)
        start = time.process_time()
        for _ in range(STEPS):
            next(batches)
        return 1000 * (time.process_time() - start) / STEPS / BATCH


def soak(batches: Iterable[Tensor]) -> tuple[float, float]:
    """Resident MiB after SETTLED samples and at the end."""
    settled = 0.0
    for number, _ in enumerate(batches, 1):
        if number == SETTLED // BATCH:
            settled = resident_mib()
    return settled, resident_mib()


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    run(__doc__, rows)
