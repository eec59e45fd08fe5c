"""Shards to batches, by plan.

    plan (which samples) -> read (one byte range a sample) -> decode the crop -> fill holes -> Batch

Rank r takes rows [r b, (r + 1) b) of every global batch, worker w of n the batches w, w + n, ... of its rank; every
random choice hangs on the seed and the sample's position in the stream. So ranks are disjoint, their union is the
global batch, all make equal steps, and the first batch to be read can be any.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from atr_scale.config import DataSection
from atr_scale.data.augment.stored import FILE, Paraphrases, refuse_evaluation_split
from atr_scale.data.batch import Batch, caption_id, stable_id
from atr_scale.data.decode import Crop, decode
from atr_scale.data.index import ShardSet, open_shards
from atr_scale.data.plan import Plan, Rows
from atr_scale.data.sample import BadSample, RawSample
from atr_scale.data.text import CaptionTokenizer
from atr_scale.errors import UserError
from atr_scale.parallel.world import World

logger = logging.getLogger(__name__)

READ_THREADS = 8  # concurrent range reads of one worker where shards are remote


@dataclass(frozen=True)
class Clip:
    """One decoded sample: waveform [samples] float32, its caption of this visit and which one that is, who it is, and
    where it lies."""

    waveform: np.ndarray
    caption: str
    caption_index: int
    clip_id: str
    place: str


class TrainingStream(IterableDataset[Batch | UserError]):
    """This rank's batches from global batch `first` up to `last`, endlessly many epochs if need be."""

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
        self.plan = Plan(
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
        self.first, self.last = 0, 0

    def between(self, first: int, last: int) -> TrainingStream:
        """Set which global batches are read: `first` up to, not including, `last`."""
        self.first, self.last = first, last
        return self

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        remote = any("://" in shards.location for shards in self.sources)
        with ThreadPoolExecutor(READ_THREADS if remote else 1) as pool:
            for number in range(self.first + start, self.last, step):
                rows = self.plan.batch(number)[self.rows]
                try:
                    yield self._load(rows, pool)
                except UserError as error:  # travels as a value: raised in a worker it would arrive as a traceback
                    yield error
                    return

    def _load(self, rows: Rows, pool: ThreadPoolExecutor) -> Batch:
        raw = pool.map(self._read, rows.source.tolist(), rows.index.tolist())
        clips: list[Clip | None] = []
        dropped: Counter[str] = Counter()
        places = map(self._place, rows.source.tolist(), rows.index.tolist())
        for sample, source, position, place in zip(
            raw, rows.source.tolist(), rows.position.tolist(), places, strict=True
        ):
            clip = sample if isinstance(sample, BadSample) else self._decode(sample, source, position, place)
            if isinstance(clip, BadSample):
                dropped[clip.reason] += 1
                logger.debug("dropped %s: %s", place, clip)
            clips.append(None if isinstance(clip, BadSample) else clip)
        good = [clip for clip in clips if clip is not None]
        if not good:
            raise UserError(
                f"all {len(clips)} samples of a batch are unreadable ({dict(dropped)}): "
                "run `atr-scale shards check` on data.train"
            )
        # A copy of a good row fills the hole; the positives treat it as what it is, the same clip again.
        filled = [clip if clip is not None else good[i % len(good)] for i, clip in enumerate(clips)]
        return collate(filled, self.tokenizer, dropped)

    def _read(self, source: int, index: int) -> RawSample | BadSample:
        try:
            return self.sources[source].read(index)
        except BadSample as error:
            return error

    def _place(self, source: int, index: int) -> str:
        shards = self.sources[source]
        return f"{shards.corpus}/{shards.names[shards.shard_of[index]]}/{shards.keys[index]}"

    def _decode(self, sample: RawSample, source: int, position: int, place: str) -> Clip | BadSample:
        rng = np.random.default_rng([self.seed, 2, position])
        drawn = int(rng.integers(len(sample.captions)))
        caption = sample.captions[drawn]
        fraction = float(rng.random())
        if self.paraphrases and rng.random() < self.augmented_share:
            reworded = self.paraphrases[source].of(sample.clip_id, drawn, caption)
            caption = reworded[int(rng.integers(len(reworded)))] if reworded else caption
        crop = Crop(start_fraction=fraction, seconds=self.crop_seconds)
        try:
            waveform = decode(sample.audio, sample.extension, self.sample_rate, pcm_rate=sample.sample_rate, crop=crop)
        except BadSample as error:
            return error
        kept = len(waveform) // self.quantum * self.quantum or len(waveform)
        start = int(fraction * (len(waveform) - kept))
        return Clip(waveform[start : start + kept], caption, drawn, sample.clip_id, place)


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
    """Say which overlap lists WavCaps shards were built with; warn where they may hold other corpora's test clips."""
    if shards.corpus != "wavcaps":
        return
    applied = [e["name"] for e in shards.manifest.get("exclusions", []) if e["name"].endswith((".json", ".csv"))]
    if applied:
        logger.info("%s was built without the clips of %s", shards.location, ", ".join(applied))
    else:
        logger.warning(
            "%s was built without an overlap list and may hold test clips of AudioCaps and Clotho: build it again with "
            "WavCaps' blacklist folder in place, or --exclude FILE",
            shards.location,
        )


def collate(clips: Sequence[Clip], tokenizer: CaptionTokenizer, dropped: Counter[str] | None = None) -> Batch:
    """Clips as one batch, waveforms padded with zeros to the longest."""
    waveform, lengths = pad([clip.waveform for clip in clips])
    input_ids, attention_mask = tokenizer([clip.caption for clip in clips])
    return Batch(
        waveform=waveform,
        lengths=lengths,
        input_ids=input_ids,
        attention_mask=attention_mask,
        clip_ids=torch.tensor([stable_id(clip.clip_id) for clip in clips]),
        caption_ids=torch.tensor([caption_id(clip.caption) for clip in clips]),
        caption_index=torch.tensor([clip.caption_index for clip in clips]),
        keys=[clip.place for clip in clips],
        dropped=dropped or Counter(),
    )


def pad(waveforms: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """([b, longest] float32, [b] int64 lengths)."""
    lengths = torch.tensor([len(w) for w in waveforms])
    out = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(out, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return out, lengths


def read_batches(stream: TrainingStream, workers: int, *, pin_memory: bool = False) -> Iterator[Batch]:
    """Batches of `stream` in order, read ahead by `workers` processes (0: in this one)."""
    context = None
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not by every worker
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def describe(sources: Sequence[ShardSet]) -> str:
    """One line on what a run reads."""
    parts = (f"{s.corpus} {s.split} ({len(s)} clips in {len(s.names)} shards)" for s in sources)
    return ", ".join(parts)
