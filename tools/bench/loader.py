"""Reading batches: this project's stream, and webdataset's own loader on the same shards.

Clips of 10 s at 32 kHz, crops of 10 s, batches of 32. The measurement covers everything from the file (in the page
cache) to the batch tensor: reading, decoding, drawing caption and crop, checks, ids, padding. It leaves out the
tokenizer, which both sides replace by a constant. For a GPU, 16-bit samples stay 16-bit and are scaled there; in the
comparison with webdataset, which returns float32, the conversion counts.
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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from atr_scale.data.options import DataSection, TrainingSource
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.stream import TrainingStream, read_batches
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.distributed.world import World
from tools.bench.table import Row, run

CLIPS, SECONDS, RATE = 320, 10.0, 32_000
BATCH = 32
CAPTIONS = 5
PCM_MS = 0.15  # goal for a clip of 16-bit samples
STEP_S = 0.03  # a training step of this length should find its next batch ready
WAIT = 0.01  # fraction of the time that counts as no waiting, if the worker has its own core
STEPS = 40
TURNS, ROUNDS = 7, 3
ENDLESS = 1 << 40
SOAK, SETTLED = 100_000, 10_000  # samples read in all, and after how many memory must no longer grow
WDS = "webdataset"


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus")
        shards = {encoding: write_shards(Path(folder), encoding) for encoding in ("pcm16", "flac")}
        pcm = shards["pcm16"]
        ours, bare = cpu_ms(our_batches(pcm, keep_int16=True), bare_reads(pcm))
        yield Row("pcm16 to int16, one process", ours, PCM_MS, "the figure to reach", "CPU ms a clip", 1.0)
        yield Row("pcm16 to int16, one process", ours, bare, "the system's read alone", "CPU ms a clip")
        for encoding, location in shards.items():
            ours, theirs = cpu_ms(our_batches(location), wds_batches(location))
            yield Row(f"{encoding} to float32, one process", ours, theirs, WDS, "CPU ms a clip", 1.0)
        for encoding, location in shards.items():
            ours, theirs = waiting(our_batches(location, 1, keep_int16=True)), waiting(wds_batches(location, 1))
            if encoding == "pcm16":
                yield Row("pcm16, one worker: waiting for data", ours, WAIT, "none", "share of the time", 1.0)
            yield Row(f"{encoding}, one worker: waiting for data", ours, theirs, WDS, "share of the time")
        ours, theirs = in_the_reader(our_batches(pcm, 1)), in_the_reader(wds_batches(pcm, 1))
        yield Row("pcm16, one worker: in the training process", ours, theirs, WDS, "CPU ms a clip", 1.0)
        settled, end = soak(our_batches(pcm, batches=SOAK // BATCH, keep_int16=True))
        yield Row(f"memory after {SOAK} samples", end, settled, f"after {SETTLED}", "MiB resident", 1.02)


def write_corpus(root: Path, clips: int = CLIPS) -> None:
    """A corpus of noise that falls with frequency: FLAC halves its size, like that of recordings."""
    (root / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["file_name," + ",".join(f"caption_{k + 1}" for k in range(CAPTIONS))]
    for number in range(clips):
        spectrum = np.fft.rfft(rng.standard_normal(int(SECONDS * RATE)))
        sound = np.fft.irfft(spectrum / np.sqrt(1 + np.arange(len(spectrum))))
        soundfile.write(root / "audio" / f"{number}.wav", 0.5 * sound / np.abs(sound).max(), RATE, subtype="PCM_16")
        captions = (f"A dog barks {k} times while vehicle {number} passes on a wet road" for k in range(CAPTIONS))
        lines.append(f"{number}.wav," + ",".join(captions))
    (root / "captions.csv").write_text("\n".join(lines), encoding="utf-8")


def write_shards(folder: Path, encoding: str) -> str:
    """Shards that were read from the disk, like a run's: those just written lie in smaller pieces in the page cache and
    take longer to copy."""
    out = folder / encoding
    build_shards("folder", folder / "corpus", str(out), shard_size=80, encoding=encoding, sample_rate=RATE, workers=1)
    for path in out.glob("*.tar"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.read()
    return str(out)


class NoTokenizer(CaptionTokenizer):
    """Returns the same ids for every caption."""

    def __init__(self) -> None:
        pass

    def clean(self, caption: str) -> str:
        return caption

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(captions), 16, dtype=torch.int64), torch.ones(len(captions), 16, dtype=torch.int64)


def our_batches(shards: str, workers: int = 0, batches: int = ENDLESS, *, keep_int16: bool = False) -> Iterator[Tensor]:
    stream = TrainingStream(
        DataSection(train=[TrainingSource(shards=shards, weight=None)], crop_seconds=SECONDS),
        tokenizer=NoTokenizer(),
        sample_rate=RATE,
        global_batch_size=BATCH,
        seed=0,
        world=World(),
    )
    for batch in read_batches(stream.between(0, batches), workers, keep_int16=keep_int16):
        yield batch.waveform


def bare_reads(shards: str) -> Iterator[Tensor]:
    """The lower bound: the bytes of random clips, copied from the page cache into two batches in turn."""
    found = open_shards(shards)
    files = [os.open(Path(shards) / name, os.O_RDONLY) for name in found.names]
    length = int(SECONDS * RATE)
    memory = [torch.zeros(BATCH, length, dtype=torch.int16) for _ in range(2)]
    order = np.random.default_rng(0)
    while True:
        memory.reverse()
        for row, clip in zip(memory[0].numpy(), order.integers(CLIPS, size=BATCH), strict=True):
            os.preadv(files[found.shard_of[clip]], [row], int(found.stop[clip]) - 2 * length)
        yield memory[0]


def wds_batches(shards: str, workers: int = 0) -> Iterator[Tensor]:
    """The pipeline of the library's documentation: decode, shuffle, crop, batch; endless."""
    import webdataset

    urls = sorted(str(path) for path in Path(shards).glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False, resampled=True, empty_check=False)
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


def cpu_ms(*loops: Iterator[Tensor]) -> list[float]:
    """CPU ms per clip of each endless loop after a first turn: the least of TURNS, as other programs only add to it."""
    taken: list[list[float]] = [[] for _ in loops]
    for turn in range(1 + TURNS):
        for batches, times in zip(loops, taken, strict=True):
            start = time.process_time()
            for waveform in islice(batches, CLIPS // BATCH):
                assert waveform.shape == (BATCH, int(SECONDS * RATE))
            if turn:
                times.append(1000 * (time.process_time() - start) / CLIPS)
    return [min(times) for times in taken]


def waiting(batches: Iterator[Tensor]) -> float:
    """Fraction of the time that STEPS steps wait for their batches, once the workers run; the least of ROUNDS."""
    shares = []
    with closing(batches):  # type: ignore[type-var]
        next(batches)
        time.sleep(1)
        for _ in range(ROUNDS):
            began, waited = time.perf_counter(), 0.0
            for _ in range(STEPS):
                start = time.perf_counter()
                next(batches)
                waited += time.perf_counter() - start
                time.sleep(STEP_S)  # a step on a GPU, which does not use this processor
            shares.append(waited / (time.perf_counter() - began))
    return min(shares)


def in_the_reader(batches: Iterator[Tensor]) -> float:
    """CPU ms per clip in the process that reads the batches."""
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
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    run(__doc__, rows)
