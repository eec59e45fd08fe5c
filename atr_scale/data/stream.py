"""Shards to training batches.

    sample order (which samples) -> open (headers and captions) -> decode each crop into its row -> assemble -> Batch

Rank r takes rows [r b, (r + 1) b) of every global batch, in pieces, and worker w of n takes every n-th piece. Every
random choice depends only on the seed and the sample's position in the stream. So the ranks' rows are disjoint, their
union is the global batch, all ranks make the same number of steps, and reading can start at any batch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby, islice
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from atr_scale.batch import Batch, DroppedSample
from atr_scale.data.assembly import Piece, batch_of
from atr_scale.data.collate import DecodedClip, collate
from atr_scale.data.corpora import CORPORA
from atr_scale.data.decode import Crop, decode
from atr_scale.data.folds import without_fold
from atr_scale.data.loader_memory import LoaderMemory, loader_memory
from atr_scale.data.loader_watch import POLL_S, SILENCE_S, WorkerBoard, WorkerRow, watched_parcels
from atr_scale.data.options import DataSection
from atr_scale.data.paraphrases.stored import FILE, Paraphrases, refuse_evaluation_split
from atr_scale.data.sample import BadSample, RawSample
from atr_scale.data.sample_order import Rows, SampleOrder
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.shared_buffers import Parcel, SharedBuffers, WaveformRows
from atr_scale.data.storage import join
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.distributed.lifeline import deaf_children, end_with, obey
from atr_scale.distributed.world import World
from atr_scale.errors import OneLineError, UserError

logger = logging.getLogger(__name__)

GROUP = 32  # samples of local shards that are opened at once, each with a file handle
READ_THREADS = 8  # concurrent range reads of one worker if shards are remote


class Visit(NamedTuple):
    """One visit to one sample, with the random numbers in [0, 1) that decide which caption and crop are taken.

    source and sample: number of the corpus in the mixture, and of the sample in the corpus. caption: draws one of its
    captions. start: draws the place of the crop. reword: draws whether to take a paraphrase. paraphrase: draws which.
    """

    source: int
    sample: int
    caption: float
    start: float
    reword: float
    paraphrase: float


class TrainingStream(IterableDataset[Parcel | OneLineError]):
    """This rank's rows of the global batches `first` up to `last`, over any number of epochs, in pieces.

    Iterated by `read_batches`, in worker processes or in this one. Raises UserError if shards are missing or empty.
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
        sources: Sequence[ShardSet] | None = None,
    ) -> None:
        """sources: the shards of `data.train` if they are open already."""
        assert global_batch_size % world.size == 0
        self.sources = open_sources(data) if sources is None else sources
        if world.is_main:
            for shards in self.sources:
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
        self.paraphrase_rate = data.augmented_captions
        self.paraphrases = _read_paraphrases(self.sources) if data.augmented_captions else []
        self.crop_seconds, self.quantum = data.crop_seconds, max(1, round(data.crop_quantum * sample_rate))
        self.local_batch_size = global_batch_size // world.size
        self.rows = slice(world.rank * self.local_batch_size, (world.rank + 1) * self.local_batch_size)
        self.width = crop_samples(data, sample_rate)
        self.buffers, self.piece, self.keep_int16 = SharedBuffers(0, 0), self.local_batch_size, False
        self.outage_seconds, self.board = data.outage_seconds, WorkerBoard(0)
        self._row: WorkerRow | None = None  # of the board, in a worker
        self.first, self.last = 0, 0

    def between(self, first: int, last: int) -> TrainingStream:
        """Set which global batches are read: `first` up to, not including, `last`."""
        self.first, self.last = first, last
        return self

    def __iter__(self) -> Iterator[Parcel | OneLineError]:
        """In a worker process: its parcels, and at the end an error if it is one that its rank is to report."""
        worker = get_worker_info()
        assert worker is not None
        self._row = self.board.row(worker.id)
        try:
            with self._row.working(self.outage_seconds):
                yield from self.parcels(worker.id, worker.num_workers)
        except OneLineError as error:  # raised in a worker, it would arrive as a traceback
            yield error

    def parcels(self, start: int = 0, step: int = 1) -> Iterator[Parcel]:
        """Every `step`-th parcel, from number `start` on."""
        remote = any("://" in shards.location for shards in self.sources)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            fetch = partial(pool.map, self._read) if remote else partial(_in_groups, self._open)
            for first, rows in self._pieces(start, step):
                visits = _visits(self.seed, rows)
                buffer = self.buffers.take(start)
                piece = self._load(first, visits, fetch(visits), buffer.memory)
                yield Parcel.pack(piece, buffer.number)

    def shard_path(self, source: int, shard: int) -> str:
        """The path of a shard by the numbers of its corpus and of the shard."""
        shards = self.sources[source]
        return join(shards.location, shards.names[shard])

    def _pieces(self, start: int, step: int) -> Iterator[tuple[int, Rows]]:
        """Every `step`-th piece from `start` on: the place of its first row in the local batch, and its samples."""
        pieces = -(-self.local_batch_size // self.piece)
        wanted = range(start, (self.last - self.first) * pieces, step)
        for number, some in groupby(wanted, lambda piece: piece // pieces):
            batch = self.order.batch(self.first + number)[self.rows]
            for first in (piece % pieces * self.piece for piece in some):
                yield first, batch[first : first + self.piece]

    def _load(
        self, first: int, visits: Sequence[Visit], samples: Iterable[RawSample | BadSample], memory: np.ndarray
    ) -> Piece:
        """The readable ones of the visited `samples`, with their waveforms in `memory`. first: place of the first."""
        waveforms = WaveformRows(memory, self.width, self.keep_int16)
        clips: list[DecodedClip] = []
        places: list[int] = []
        dropped: list[DroppedSample] = []
        for place, (visit, sample) in enumerate(zip(visits, samples, strict=True), first):
            try:
                clips.append(self._decode(visit, sample, waveforms, len(clips)))
                places.append(place)
            except BadSample as error:
                dropped.append(DroppedSample(self._place(visit), error.reason, error.detail))
        return Piece(places, collate(waveforms.array[: len(clips)], clips, self.tokenizer, dropped))

    def _begin(self, visit: Visit) -> None:
        if self._row is not None:
            self._row.begin(visit.source, int(self.sources[visit.source].shard_of[visit.sample]))

    def _read(self, visit: Visit) -> RawSample | BadSample:
        self._begin(visit)
        try:
            return self.sources[visit.source].read(visit.sample)
        except BadSample as error:
            return error

    def _open(self, visit: Visit) -> RawSample | BadSample:
        self._begin(visit)
        try:
            return self.sources[visit.source].open(visit.sample)
        except BadSample as error:
            return error

    def _place(self, visit: Visit) -> str:
        shards = self.sources[visit.source]
        return f"{shards.corpus}/{shards.names[shards.shard_of[visit.sample]]}/{shards.keys[visit.sample]}"

    def _decode(self, visit: Visit, sample: RawSample | BadSample, waveforms: WaveformRows, row: int) -> DecodedClip:
        """Draw a caption of the sample, and write a crop of its audio to row `row`. Raises BadSample."""
        if isinstance(sample, BadSample):  # raised in a reading thread it would end the other reads
            raise sample
        self._begin(visit)
        caption, number = self._draw_caption(visit, sample)
        length = self._write_crop(visit, sample, waveforms, row)
        return DecodedClip(length, caption, sample.captions[number], number, sample.clip_id, self._place(visit))

    def _draw_caption(self, visit: Visit, sample: RawSample) -> tuple[str, int]:
        """(caption or a paraphrase of it, its index among the sample's captions)."""
        number = int(visit.caption * len(sample.captions))
        caption = sample.captions[number]
        if self.paraphrases and visit.reword < self.paraphrase_rate:
            found = self.paraphrases[visit.source].of(sample.clip_id, number, caption)
            caption = found[int(visit.paraphrase * len(found))] if found else caption
        return caption, number

    def _write_crop(self, visit: Visit, sample: RawSample, waveforms: WaveformRows, row: int) -> int:
        """Write a crop of the sample to row `row`; returns its length, a multiple of the quantum if it is not less."""
        out = waveforms.array[row]
        crop = Crop(start_fraction=visit.start, seconds=self.crop_seconds)
        waveform = decode(
            sample.audio, sample.extension, self.sample_rate, pcm_rate=sample.sample_rate, crop=crop, out=out
        )
        length = len(waveform) // self.quantum * self.quantum or len(waveform)
        start = int(visit.start * (len(waveform) - length))
        if waveform.dtype != out.dtype:
            waveforms.widen(row)
            waveforms.array[row][:length] = waveform[start : start + length]
        elif start:
            out[:length] = out[start : start + length]
        return length


def crop_samples(data: DataSection, sample_rate: int) -> int:
    """Samples of the longest training crop."""
    return max(1, round(data.crop_seconds * sample_rate))


def open_training_shards(data: DataSection, location: str) -> ShardSet:
    """The shards at `location`, without the fold that data.folds leaves out. Raises UserError as `open_shards` does."""
    shards, folds = open_shards(location), data.folds
    return shards if folds is None else without_fold(shards, folds.count, folds.held_out)


def open_sources(data: DataSection) -> list[ShardSet]:
    """The shards of the training mixture. Raises UserError if they are missing or empty."""
    sources = [open_training_shards(data, source.shards) for source in data.train]
    for shards in sources:
        if len(shards) == 0:
            raise UserError(f"no samples in {shards.location} (data.train): build shards with `atr-scale shards build`")
    return sources


def _in_groups(
    open_sample: Callable[[Visit], RawSample | BadSample], visits: Iterable[Visit]
) -> Iterator[RawSample | BadSample]:
    """map() in groups of GROUP samples: decoding between two of them would evict the parser's data from the cache."""
    samples = map(open_sample, visits)
    while group := list(islice(samples, GROUP)):
        yield from group


def _visits(seed: int, rows: Rows) -> list[Visit]:
    """The visits of neighbouring rows of a batch, with their random numbers."""
    draws = _draws(seed, int(rows.position[0]), len(rows.position))
    places = zip(rows.source.tolist(), rows.index.tolist(), draws, strict=True)
    return [Visit(source, index, *numbers) for source, index, numbers in places]


def _draws(seed: int, first: int, count: int) -> list[list[float]]:
    """Four random numbers in [0, 1) for each of the positions first, first + 1, ... of the stream.

    Philox is a counter-based generator: the numbers of a position are one block of it, found without those before.
    """
    numbers: list[list[float]] = (
        np.random.Generator(np.random.Philox(key=[seed, 2], counter=first)).random((count, 4)).tolist()
    )
    return numbers


def _read_paraphrases(sources: Sequence[ShardSet]) -> list[Paraphrases]:
    """The paraphrases of each source. UserError if there are none at all, or if a source is not a training split."""
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
    """Log the exclusion lists that shards were built with; warn if there was none although their corpus needs one."""
    # Lists that came from a file have its name; the others name unreadable files, not overlap with evaluation sets.
    applied = [e["name"] for e in shards.manifest.get("exclusions", []) if Path(e["name"]).suffix]
    corpus = CORPORA.get(shards.corpus)
    if applied:
        logger.info("%s was built without the clips of %s", shards.location, ", ".join(applied))
    elif corpus is not None and corpus.overlap_warning:
        logger.warning("%s was built without an exclusion list and %s", shards.location, corpus.overlap_warning)


def read_batches(
    stream: TrainingStream,
    workers: int,
    *,
    keep_int16: bool = False,
    pin_memory: bool = False,
    memory: LoaderMemory | None = None,
    silence_s: float = SILENCE_S,
) -> Iterator[Batch]:
    """The batches of `stream` in order, read ahead by `workers` processes (0: read on demand by this one).

    keep_int16: waveforms that are stored as 16-bit samples at the encoder's rate stay int16, for a GPU to convert.
    pin_memory: batches lie in page-locked memory, from which a GPU copies while it computes.
    memory: how much of it the workers' buffers take, by default as much as they like.
    silence_s: a worker that does nothing for so long, although it has not sent its part of the next batch, hangs.
    Raises Failure if a worker hangs or is gone, or if a store does not answer for data.outage_seconds.
    """
    context = None
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not by every worker
        for helper in (resource_tracker, forkserver):
            with deaf_children():
                helper.ensure_running()
    size = stream.local_batch_size
    memory = memory or loader_memory(stream.width, size, workers, pinned=pin_memory)
    stream.keep_int16, stream.piece = keep_int16, memory.rows
    stream.buffers = buffers = SharedBuffers(memory.rows * stream.width, memory.each, workers)
    stream.board = WorkerBoard(workers)

    def read_ahead() -> Iterator[Parcel]:
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=context,
            worker_init_fn=partial(_init_worker, os.getpid()),
            prefetch_factor=memory.prefetch,
            timeout=POLL_S,
        )
        return watched_parcels(loader, stream.board, stream.shard_path, silence_s)

    def assembled() -> Iterator[Batch]:
        # Closed also on an error: a loader that is left to the garbage collector waits 5 s for each of its workers.
        with closing(parcel.open(buffers) for parcel in (read_ahead() if workers else stream.parcels())) as pieces:
            for _ in range(stream.first, stream.last):
                yield batch_of(islice(pieces, memory.pieces), size, stream.width, stream.tokenizer, pin=pin_memory)
            next(pieces, None)  # at the end of its data the loader stops its workers

    batches = assembled()
    yield from _one_ahead(batches) if workers or pin_memory else batches


def _init_worker(rank_process: int, worker: int) -> None:
    end_with(rank_process)
    obey(rank_process)


def _one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; a thread assembles the next one while a step runs."""
    gpu = torch.cuda.is_available()
    prepare = partial(torch.cuda.set_device, torch.cuda.current_device()) if gpu else None
    with ThreadPoolExecutor(1, initializer=prepare) as thread:
        ahead = thread.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(next, batches, None)
            yield batch


def describe(sources: Sequence[ShardSet]) -> str:
    """One line that names the corpora of a run and their sizes."""
    parts = (f"{s.corpus} {s.split} ({len(s)} clips in {len(s.names)} shards)" for s in sources)
    return ", ".join(parts)
