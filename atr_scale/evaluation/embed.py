"""Embeds every clip and caption of a split, as far as its scorer needs it. The processes divide the work.

Shape suffixes: N clips, C captions, T tokens, D width.

Only the split determines the batches: rank r embeds batches r, r + W, and so on. So any number of processes gives the
same numbers to the last bit, and uneven tails need no padding. The ranks exchange their batches one by one in main
memory: a rank holds the split and a few batches of every rank, and the split twice when it joins the batches.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from atr_scale.batch import TokenSequence
from atr_scale.config import RunConfig
from atr_scale.data.collate import pad
from atr_scale.data.decode import Crop, decode
from atr_scale.data.sample import READ_FAULTS, BadSample, RawSample
from atr_scale.data.shard_reader import ShardSet
from atr_scale.data.tokenizer import CaptionTokenizer, caption_tokenizer
from atr_scale.errors import Failure, UserError
from atr_scale.evaluation.facts import clip_fields
from atr_scale.evaluation.parallel import Parallel
from atr_scale.model import Retriever
from atr_scale.precision import encoder_products
from atr_scale.scorers.scorer import Scorer

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")
DECODE_THREADS = 2


@dataclass
class Embedded:
    """A split as input of the scorer, on the CPU, in the order of the split.

    text [C, T, D], audio [N, T, D]: token sequences. For a dual encoder they have no tokens, and `pooled` holds the
    embeddings, of unit length.
    """

    text: TokenSequence
    audio: TokenSequence
    captions: list[str]  # [C]
    owner: NDArray[np.int64]  # [C] index of each caption's clip
    clip_ids: list[str]  # [N]
    labels: list[str | None]  # [N]
    index: list[int]  # [N] row of each clip in the shard set
    fields: list[dict[str, Any]]  # [N] `clip_fields`
    dropped: Counter[str] = field(default_factory=Counter)  # unreadable samples, by reason


@dataclass
class _Part:
    """One embedded batch; `text` and `audio` are None if no clip of it is readable."""

    text: TokenSequence | None
    audio: TokenSequence | None
    captions: list[list[str]]
    clip_ids: list[str]
    labels: list[str | None]
    index: list[int]
    fields: list[dict[str, Any]]
    dropped: Counter[str]


Clips = list[tuple[int, RawSample, NDArray[np.float32]]]  # row in the shard set, sample, waveform


@contextmanager
def evaluating(model: Retriever) -> Iterator[None]:
    """The model is in evaluation mode, without gradients; afterwards in the mode in which it was.

    Its encoders multiply in their own precision.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), encoder_products(model.tf32):
            yield
    finally:
        model.train(was_training)


def embed(model: Retriever, shards: ShardSet, config: RunConfig, parallel: Parallel) -> Embedded:
    """Embed all of `shards`; every process gets the whole result.

    config: of the model; gives the batch size, the seconds of a clip that are read, and how captions are tokenized.
    Logs a warning about unreadable samples. If no clip is readable, raises Failure if reading has failed, and UserError
    if all are damaged. Raises Abandoned in all processes if one was asked to stop.
    """
    batch_size, world = config.evaluation.batch_size, parallel.world
    tokenizer = caption_tokenizer(model.text_encoder.tokenizer, config.data.captions)
    own, surplus = parallel.batches(-(-len(shards) // batch_size))

    def load(number: int) -> tuple[Clips, Counter[str]]:
        rows = range(number * batch_size, min((number + 1) * batch_size, len(shards)))
        return _load(shards, rows, model.sample_rate, config.data.evaluation_seconds)

    parts: list[_Part] = []
    numbers = own + surplus
    progress = tqdm(
        parallel.each(numbers),
        total=len(numbers),
        desc=f"embedding {shards.corpus}",
        unit="batch",
        disable=None if world.is_main else True,
    )
    with evaluating(model):
        for _, (clips, dropped) in zip(progress, load_ahead(load, numbers), strict=True):
            part = _embed_batch(model, tokenizer, clips, dropped, parallel)
            if len(parts) < len(own):
                parts.append(part)
    embedded = _join(list(world.gather_each(parts)), shards)
    if embedded.dropped and world.is_main:
        logger.warning("%s: unreadable and left out: %s", shards.location, dict(embedded.dropped))
    return embedded


def as_read(scorer: Scorer, sequence: TokenSequence, side: Literal["text", "audio"]) -> TokenSequence:
    """The part of a text or audio sequence that `scorer` reads, on the CPU."""
    if scorer.is_dual_encoder:
        pooled = scorer.embed_text(sequence) if side == "text" else scorer.embed_audio(sequence)
        return _without_tokens(pooled).to("cpu")
    if side == "text" and not scorer.reads_text_tokens:
        return _without_tokens(sequence.pooled).to("cpu")
    return sequence.to("cpu")


def load_ahead(load: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """load(item) for every item, in order; threads compute a few of them ahead."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > 2 * DECODE_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _without_tokens(pooled: Tensor) -> TokenSequence:
    return TokenSequence(
        pooled.new_zeros(len(pooled), 0, pooled.shape[1]),
        torch.zeros(len(pooled), 0, dtype=torch.bool, device=pooled.device),
        pooled,
    )


def _load(shards: ShardSet, rows: Sequence[int], sample_rate: int, seconds: float) -> tuple[Clips, Counter[str]]:
    """The readable clips of these rows, and the unreadable ones by reason."""
    clips, dropped = [], Counter[str]()
    for row in rows:
        try:
            sample = shards.read(row)
            crop = Crop(start_fraction=0.0, seconds=seconds)
            waveform = decode(sample.audio, sample.extension, sample_rate, pcm_rate=sample.sample_rate, crop=crop)
        except BadSample as error:
            dropped[error.reason] += 1
            continue
        clips.append((row, sample, waveform))
    return clips, dropped


def _embed_batch(
    model: Retriever,
    tokenizer: CaptionTokenizer,
    clips: Clips,
    dropped: Counter[str],
    parallel: Parallel,
) -> _Part:
    samples = [sample for _, sample, _ in clips]
    captions = [sample.captions for sample in samples]
    text = audio = None
    if clips or parallel.lockstep:
        # In lockstep a batch without a readable clip still runs: on silence, and its result is not used.
        waveform, lengths = pad([w for _, _, w in clips] or [np.zeros(model.sample_rate, np.float32)])
        input_ids, attention_mask = tokenizer([c for group in captions for c in group] or ["silence"])
        device = parallel.device
        text = as_read(model.scorer, model.encode_text(input_ids.to(device), attention_mask.to(device)), "text")
        audio = as_read(model.scorer, model.encode_audio(waveform.to(device), lengths), "audio")
    return _Part(
        text=text if clips else None,
        audio=audio if clips else None,
        captions=captions,
        clip_ids=[sample.clip_id for sample in samples],
        labels=[sample.label for sample in samples],
        index=[row for row, _, _ in clips],
        fields=[clip_fields(sample, len(waveform) / model.sample_rate) for _, sample, waveform in clips],
        dropped=dropped,
    )


def _join(parts: list[_Part], shards: ShardSet) -> Embedded:
    full = [part for part in parts if part.clip_ids]
    dropped = sum((part.dropped for part in parts), Counter[str]())
    if not full:
        error = Failure if any(dropped[reason] for reason in READ_FAULTS) else UserError
        raise error(f"no readable clip in {shards.location}: {dict(dropped)}; run `atr-scale shards check`")
    groups = [group for part in full for group in part.captions]
    return Embedded(
        text=TokenSequence.cat([part.text for part in full if part.text]),
        audio=TokenSequence.cat([part.audio for part in full if part.audio]),
        captions=[caption for group in groups for caption in group],
        owner=np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        clip_ids=[clip for part in full for clip in part.clip_ids],
        labels=[label for part in full for label in part.labels],
        index=[row for part in full for row in part.index],
        fields=[fields for part in full for fields in part.fields],
        dropped=dropped,
    )
