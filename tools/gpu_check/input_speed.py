"""From shards to features: the loader, the copy of a batch to the device, and the front ends."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from atr_scale.encoders import build_audio_encoder
from tools.bench.loader import BATCH, our_batches, write_corpus, write_shards
from tools.gpu_check.encoders import FRONT_ENDS
from tools.gpu_check.measure import measured, median_ms
from tools.gpu_check.rows import Case, Row, Skip
from tools.gpu_check.runner import Setting

SECONDS = 10.0


def cases(setting: Setting) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus", 6 if setting.quick else 64)
        for encoding in ("pcm16", "flac"):
            shards = write_shards(Path(folder), encoding)
            for workers in (0,) if setting.quick else (1, 4):
                yield f"loader, {encoding}, {workers} workers: a clip", partial(loader, setting, shards, workers)
    yield "batch of int16 to the device", partial(to_device, setting)
    for kind, name in FRONT_ENDS.items():
        yield f"front end, {kind}", partial(front_end, setting, name)


def loader(setting: Setting, shards: str, workers: int) -> Row:
    """Time between clips of 10 s at 32 kHz, read one batch after another; pinned memory is not part of it."""
    batches = our_batches(shards, workers, keep_int16=True)
    clock = time.perf_counter if workers else time.process_time
    number = 1 if setting.quick else 10
    next(batches)
    start = clock()
    for _ in islice(batches, number):
        pass
    ms = 1000 * (clock() - start) / (number * BATCH)
    return Row(ms=ms, note=f"{1000 / ms:.0f} clips a second")


def to_device(setting: Setting) -> Row:
    if not setting.cuda:
        raise Skip("needs CUDA")
    batch = torch.zeros(BATCH, round(SECONDS * 32_000), dtype=torch.int16, pin_memory=True)
    ms = median_ms(lambda: batch.to("cuda", non_blocking=True), lambda _: ())
    rate, ceiling = 2 * batch.numel() / ms / 1e6, setting.ceilings.get("host to device pinned")
    return Row(ms=ms, gb_per_s=rate, share=rate / ceiling.gb_per_s if ceiling and ceiling.gb_per_s else None)


def front_end(setting: Setting, name: str) -> Row:
    """int16 of a batch to features. GB/s: bytes of the waveform and of the features over the time."""
    front = build_audio_encoder(name).front_end.to(setting.device)
    samples = round(SECONDS * front.settings.sample_rate)
    size = 2 if setting.quick else BATCH

    def fresh(number: int) -> tuple[torch.Tensor]:
        generator = torch.Generator(setting.device).manual_seed(number)
        noise = torch.randint(-9000, 9000, (size, samples), generator=generator, device=setting.device)
        return (noise.to(torch.int16),)

    row = measured(setting, front, fresh, alone=False)
    waveform = fresh(0)[0]
    nbytes = waveform.nbytes + front(waveform).nbytes
    assert row.ms is not None
    return Row(ms=row.ms, gb_per_s=nbytes / row.ms / 1e6, launches=row.launches, syncs=row.syncs, peak_mib=row.peak_mib)
