"""Shards to batches.

    sample order (which samples) -> open (headers and captions) -> decode the crop into its row -> fill holes -> Batch

Rank r takes rows [r b, (r + 1) b) of every global batch, worker w of n the batches w, w + n, ... of its rank; every
random choice hangs on the seed and the sample's position in the stream. So ranks are disjoint, their union is the
global batch, all make equal steps, and the first batch to be read can be any.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from atr_scale.batch import Batch, caption_id, stable_id
from atr_scale.data.corpora import CORPORA
from atr_scale.data.decode import Crop, decode
from atr_scale.data.options import DataSection
from atr_scale.data.paraphrases.stored import FILE, Paraphrases, refuse_evaluation_split
from atr_scale.data.sample import BadSample, RawSample
from atr_scale.data.sample_order import Rows, SampleOrder
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.shared_buffers import Parcel, SharedBuffers, WaveformRows
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.distributed.world import World
from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

GROUP = 32  # samples of local shards that are opened at once, each with a file handle
READ_THREADS = 8  # concurrent range reads of one worker where shards are remote
PREFETCH = 4  # batches that a worker reads ahead
HELD = 2  # batches that a training step holds, and the next one; read ahead, also the one after that


class DecodedClip(NamedTuple):
    """One decoded sample: how many samples it has in its row of the batch, its caption of this visit and which one that
    is, who it is, and where it lies."""

    length: int
    caption: str
    caption_index: int
    clip_id: str
    place: str


class TrainingStream(IterableDataset[Parcel | UserError]):
    """This rank's batches from global batch `first` up to `last`, endlessly many epochs if need be.

    Iterated by `read_batches`, in worker processes or in this one.
    """

    def __init__(
        self,
        data: DataSection,
        *,
        tokenizer: CaptionTokenizer,
        sample_rate: int,
        global_batch_size: int,
        seed: int,
        world: World,
    ) -> None:
        assert global_batch_size % world.size == 0
        self.sources = [open_shards(source.shards) for source in data.train]
        for source, shards in zip(data.train, self.sources, strict=True):
            if len(shards) == 0:
                raise UserError(
                    f"no samples in {source.shards} (data.train): build shards with `atr-scale shards build`"
                )
            if world.is_main:
                _check_exclusions(shards)
        given = [source.weight for source in data.train]
        weights = [float(len(s)) if w is None else w for w, s in zip(given, self.sources, strict=True)]
        self.order = SampleOrder(
            [len(s) for s in self.sources],
            global_batch_size,
            weights=weights,
            seed=seed,
            window=data.shuffle_window,
            block=data.shuffle_block,
        )
        self.tokenizer, self.sample_rate, self.seed = tokenizer, sample_rate, seed
        self.augmented_share = data.augmented_captions
        self.paraphrases = _read_paraphrases(self.sources) if data.augmented_captions else []
        self.crop_seconds, self.quantum = data.crop_seconds, max(1, round(data.crop_quantum * sample_rate))
        share = global_batch_size // world.size
        self.rows = slice(world.rank * share, (world.rank + 1) * share)
        self.width = max(1, round(data.crop_seconds * sample_rate))
        self.buffers, self.keep_int16 = SharedBuffers(0, 0), False
        self.first, self.last = 0, 0

    def between(self, first: int, last: int) -> TrainingStream:
        """Set which global batches are read: `first` up to, not including, `last`."""
        self.first, self.last = first, last
        return self

    def __iter__(self) -> Iterator[Parcel | UserError]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        remote = any("://" in shards.location for shards in self.sources)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            read = partial(pool.map, self._read) if remote else partial(_in_groups, self._open)
            for number in range(self.first + start, self.last, step):
                rows = self.order.batch(number)[self.rows]
                buffer = self.buffers.take(start)
                try:
                    batch = self._load(rows, read(rows.source.tolist(), rows.index.tolist()), buffer.memory)
                except UserError as error:  # travels as a value: raised in a worker it would arrive as a traceback
                    yield error
                    return
                yield Parcel.pack(batch, buffer.number)

    def _load(self, rows: Rows, raw: Iterable[RawSample | BadSample], memory: np.ndarray) -> Batch:
        """The batch of samples as they lie there; its waveform is in `memory`."""
        waveforms = WaveformRows(memory, self.width, self.keep_int16)
        clips: list[DecodedClip | None] = []
        dropped: Counter[str] = Counter()
        sources = rows.source.tolist()
        draws = _draws(self.seed, int(rows.position[0]), len(sources))
        places = map(self._place, sources, rows.index.tolist())
        for row, (sample, source, draw, place) in enumerate(zip(raw, sources, draws, places, strict=True)):
            try:
                clips.append(self._decode(sample, source, draw, place, waveforms, row))
            except BadSample as error:
                dropped[error.reason] += 1
                logger.debug("dropped %s: %s", place, error)
                clips.append(None)
        good = [k for k, clip in enumerate(clips) if clip is not None]
        if not good:
            raise UserError(
                f"all {len(clips)} samples of a batch are unreadable ({dict(dropped)}): "
                "run `atr-scale shards check` on data.train"
            )
        # A copy of a good row fills the hole; the positives treat it as what it is, the same clip again.
        origin = [k if clip is not None else good[k % len(good)] for k, clip in enumerate(clips)]
        for k, other in enumerate(origin):
            if k != other:
                waveforms.array[k] = waveforms.array[other]
        return collate(waveforms.array, [clip for k in origin if (clip := clips[k])], self.tokenizer, dropped)

    def _read(self, source: int, index: int) -> RawSample | BadSample:
        try:
            return self.sources[source].read(index)
        except BadSample as error:
            return error

    def _open(self, source: int, index: int) -> RawSample | BadSample:
        try:
            return self.sources[source].open(index)
        except BadSample as error:
            return error

    def _place(self, source: int, index: int) -> str:
        shards = self.sources[source]
        return f"{shards.corpus}/{shards.names[shards.shard_of[index]]}/{shards.keys[index]}"

    def _decode(
        self,
        sample: RawSample | BadSample,
        source: int,
        draw: list[float],
        place: str,
        waveforms: WaveformRows,
        number: int,
    ) -> DecodedClip:
        """Draw caption and crop, write the samples to row `number`. Raises BadSample."""
        if isinstance(sample, BadSample):  # raised by a thread it would end the other reads
            raise sample
        which, fraction, reword, paraphrase = draw
        drawn = int(which * len(sample.captions))
        caption = sample.captions[drawn]
        if self.paraphrases and reword < self.augmented_share:
            reworded = self.paraphrases[source].of(sample.clip_id, drawn, caption)
            caption = reworded[int(paraphrase * len(reworded))] if reworded else caption
        crop = Crop(start_fraction=fraction, seconds=self.crop_seconds)
        row = waveforms.array[number]
        waveform = decode(
            sample.audio, sample.extension, self.sample_rate, pcm_rate=sample.sample_rate, crop=crop, out=row
        )
        kept = len(waveform) // self.quantum * self.quantum or len(waveform)
        start = int(fraction * (len(waveform) - kept))
        if waveform.dtype != row.dtype:
            waveforms.widen(number)
            row = waveforms.array[number]
            row[:kept] = waveform[start : start + kept]
        elif start:
            row[:kept] = row[start : start + kept]
        return DecodedClip(kept, caption, drawn, sample.clip_id, place)


def _in_groups(
    open_sample: Callable[[int, int], RawSample | BadSample], sources: Iterable[int], indices: Iterable[int]
) -> Iterator[RawSample | BadSample]:
    """map(), GROUP samples at once: one by one, the audio of each would drive all that parsing needs from the cache."""
    samples = map(open_sample, sources, indices)
    while group := list(islice(samples, GROUP)):
        yield from group


def _draws(seed: int, first: int, count: int) -> list[list[float]]:
    """Four numbers in [0, 1) for each of the positions first, first + 1, ... of the stream.

    Philox counts: a position's numbers are one block of it and can be had without those before.
    """
    return np.random.Generator(np.random.Philox(key=[seed, 2], counter=first)).random((count, 4)).tolist()


def _read_paraphrases(sources: Sequence[ShardSet]) -> list[Paraphrases]:
    """Of each source. UserError where none has any, or where they belong to another split than training."""
    for shards in sources:
        refuse_evaluation_split(shards.location, shards.split)
    found = [Paraphrases(shards.location) for shards in sources]
    if not any(map(len, found)):
        raise UserError(
            f"data.augmented_captions is set, but no {FILE} in data.train ({', '.join(s.location for s in sources)}) "
            "holds a paraphrase: run `atr-scale augment-captions` on those shards, or leave it at 0"
        )
    return found


def _check_exclusions(shards: ShardSet) -> None:
    """Say which overlap lists shards were built with; warn if there was none and their corpus calls for one."""
    # Lists that came from a file carry its name; others (files that nobody can read) are about no overlap.
    applied = [e["name"] for e in shards.manifest.get("exclusions", []) if Path(e["name"]).suffix]
    corpus = CORPORA.get(shards.corpus)
    if applied:
        logger.info("%s was built without the clips of %s", shards.location, ", ".join(applied))
    elif corpus is not None and corpus.overlap_warning:
        logger.warning("%s was built without an overlap list and %s", shards.location, corpus.overlap_warning)


def collate(
    waveform: np.ndarray, clips: Sequence[DecodedClip], tokenizer: CaptionTokenizer, dropped: Counter[str]
) -> Batch:
    """Clips as one batch; the rows of `waveform` [b, width] begin with their samples and are joined in place."""
    longest = max(clip.length for clip in clips)
    for row, clip in zip(waveform, clips, strict=True):
        if clip.length < longest:
            row[clip.length : longest] = 0
    input_ids, attention_mask = tokenizer([clip.caption for clip in clips])
    return Batch(
        waveform=torch.from_numpy(_narrow(waveform, longest)),
        lengths=torch.tensor([clip.length for clip in clips]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        clip_ids=torch.tensor([stable_id(clip.clip_id) for clip in clips]),
        caption_ids=torch.tensor([caption_id(clip.caption) for clip in clips]),
        caption_index=torch.tensor([clip.caption_index for clip in clips]),
        keys=[clip.place for clip in clips],
        dropped=dropped,
    )


def _narrow(waveform: np.ndarray, width: int) -> np.ndarray:
    """The first `width` columns, contiguous in the same memory."""
    if width == waveform.shape[1]:
        return waveform
    narrow = waveform.reshape(-1)[: len(waveform) * width].reshape(-1, width)
    for row in range(1, len(waveform)):  # forward: what is written lies before all that is still to be moved
        narrow[row] = waveform[row, :width]
    return narrow


def pad(waveforms: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """([b, longest] float32, [b] int64 lengths)."""
    lengths = torch.tensor([len(w) for w in waveforms])
    out = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(out, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return out, lengths


def read_batches(
    stream: TrainingStream, workers: int, *, keep_int16: bool = False, pin_memory: bool = False
) -> Iterator[Batch]:
    """Batches of `stream` in order, read ahead by `workers` processes (0: when they are asked for, by this one).

    keep_int16: waveforms that are stored as 16-bit samples at the encoder's rate stay so, for a GPU to convert.
    pin_memory: batches lie in page-locked memory, from which a GPU copies while it computes.
    """
    context = None
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not by every worker
    size = (stream.rows.stop - stream.rows.start) * stream.width
    stream.keep_int16 = keep_int16
    stream.buffers = buffers = SharedBuffers(size, PREFETCH + HELD + 1 if workers else HELD, workers)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        prefetch_factor=PREFETCH if workers else None,
    )
    batches = _opened(loader, buffers)
    yield from _one_ahead(batches, pin_memory) if workers or pin_memory else batches


def _opened(parcels: Iterable[Parcel | UserError], buffers: SharedBuffers) -> Iterator[Batch]:
    for parcel in parcels:
        if isinstance(parcel, UserError):
            raise parcel
        yield parcel.open(buffers)


def _one_ahead(batches: Iterator[Batch], pin_memory: bool) -> Iterator[Batch]:
    """The batches, taken and pinned by a thread while a step runs."""

    def take() -> Batch | None:
        batch = next(batches, None)
        return batch.pin_memory() if batch is not None and pin_memory else batch

    prepare = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
    with ThreadPoolExecutor(1, initializer=prepare) as thread:
        ahead = thread.submit(take)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(take)
            yield batch


def describe(sources: Sequence[ShardSet]) -> str:
    """One line on what a run reads."""
    parts = (f"{s.corpus} {s.split} ({len(s)} clips in {len(s.names)} shards)" for s in sources)
    return ", ".join(parts)
