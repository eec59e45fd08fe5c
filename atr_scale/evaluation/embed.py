"""Every clip and caption of a split as the scorer reads it, the work shared by all ranks.

Shape suffixes: N clips, C captions, T tokens, D width.

Batches are fixed by the split alone: rank r embeds batches r, r + W, ...; so one rank and several give the same numbers
to the last bit, and uneven tails need no padding.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from atr_scale.batch import TokenSequence
from atr_scale.data.collate import pad
from atr_scale.data.decode import Crop, decode
from atr_scale.data.sample import BadSample, RawSample
from atr_scale.data.shard_reader import ShardSet
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.scorers.scorer import Scorer

S = TypeVar("S")
T = TypeVar("T")
DECODE_THREADS = 2


@dataclass
class Embedded:
    """A split as the scorer reads it, on the CPU, in the split's order.

    text [C, T, D], audio [N, T, D]: for a dual encoder without tokens, `pooled` being the unit vectors; captions
    [C] and the clip of each, owner [C]; clip_ids, labels and the index in the shard set, each [N]; samples that could
    not be read, by reason.
    """

    text: TokenSequence
    audio: TokenSequence
    captions: list[str]
    owner: np.ndarray
    clip_ids: list[str]
    labels: list[str | None]
    index: list[int]
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass
class _Part:
    """What one batch gives."""

    number: int
    text: TokenSequence | None
    audio: TokenSequence | None
    captions: list[list[str]]
    clip_ids: list[str]
    labels: list[str | None]
    index: list[int]
    dropped: Counter[str]


@torch.no_grad()
def embed(
    model: Retriever,
    shards: ShardSet,
    tokenizer: CaptionTokenizer,
    *,
    batch_size: int,
    seconds: float,
    world: World,
    device: torch.device,
    lockstep: bool = False,
) -> Embedded:
    """Embed all of `shards` over the ranks; every rank gets the whole result.

    seconds: how much of a clip's start is heard. lockstep: all ranks run equally many batches, which parameters sharded
    over ranks need; surplus results are thrown away.
    """
    total = -(-len(shards) // batch_size)
    mine = list(range(world.rank, total, world.size))
    surplus = -(-total // world.size) - len(mine) if lockstep else 0
    order = mine + [world.rank % total] * surplus

    def load(number: int) -> tuple[list[tuple[int, RawSample, np.ndarray]], Counter[str]]:
        first = number * batch_size
        return _load(shards, range(first, min(first + batch_size, len(shards))), model.sample_rate, seconds)

    was_training = model.training
    model.eval()
    parts: list[_Part] = []
    progress = tqdm(order, desc=f"embedding {shards.corpus}", unit="batch", disable=None if world.is_main else True)
    for number, (clips, dropped) in zip(progress, load_ahead(load, order), strict=True):
        if len(parts) < len(mine):
            parts.append(_embed_batch(model, tokenizer, number, clips, dropped, device, with_surplus=lockstep))
        else:
            _embed_batch(model, tokenizer, number, clips, dropped, device, with_surplus=lockstep)
    model.train(was_training)
    everything = [part for rank in world.gather_objects(parts) for part in rank]
    return _join(sorted(everything, key=lambda part: part.number), shards)


def as_read(scorer: Scorer, sequence: TokenSequence, side: Literal["text", "audio"]) -> TokenSequence:
    """What `scorer` needs of a side, on the CPU."""
    if scorer.is_dual_encoder:
        pooled = scorer.embed_text(sequence) if side == "text" else scorer.embed_audio(sequence)
        return without_tokens(pooled).to("cpu")
    if side == "text" and not scorer.reads_text_tokens:
        return without_tokens(sequence.pooled).to("cpu")
    return sequence.to("cpu")


def without_tokens(pooled: Tensor) -> TokenSequence:
    return TokenSequence(
        pooled.new_zeros(len(pooled), 0, pooled.shape[1]),
        torch.zeros(len(pooled), 0, dtype=torch.bool, device=pooled.device),
        pooled,
    )


def _load(
    shards: ShardSet, rows: Sequence[int], sample_rate: int, seconds: float
) -> tuple[list[tuple[int, RawSample, np.ndarray]], Counter[str]]:
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
    number: int,
    clips: list[tuple[int, RawSample, np.ndarray]],
    dropped: Counter[str],
    device: torch.device,
    *,
    with_surplus: bool,
) -> _Part:
    samples = [sample for _, sample, _ in clips]
    captions = [sample.captions for sample in samples]
    # A batch without a readable clip still runs in lockstep, on silence.
    waveform, lengths = pad([w for _, _, w in clips] or [np.zeros(model.sample_rate, np.float32)])
    input_ids, attention_mask = tokenizer([c for group in captions for c in group] or ["silence"])
    if clips or with_surplus:
        text = as_read(model.scorer, model.encode_text(input_ids.to(device), attention_mask.to(device)), "text")
        audio = as_read(model.scorer, model.encode_audio(waveform.to(device), lengths.to(device)), "audio")
    return _Part(
        number=number,
        text=text if clips else None,
        audio=audio if clips else None,
        captions=captions,
        clip_ids=[sample.clip_id for sample in samples],
        labels=[sample.label for sample in samples],
        index=[row for row, _, _ in clips],
        dropped=dropped,
    )


def _join(parts: list[_Part], shards: ShardSet) -> Embedded:
    full = [part for part in parts if part.clip_ids]
    dropped = sum((part.dropped for part in parts), Counter[str]())
    if not full:
        raise UserError(f"no readable clip in {shards.location}: {dict(dropped)}; run `atr-scale shards check`")
    groups = [group for part in full for group in part.captions]
    return Embedded(
        text=TokenSequence.cat([part.text for part in full if part.text]),
        audio=TokenSequence.cat([part.audio for part in full if part.audio]),
        captions=[caption for group in groups for caption in group],
        owner=np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        clip_ids=[clip for part in full for clip in part.clip_ids],
        labels=[label for part in full for label in part.labels],
        index=[row for part in full for row in part.index],
        dropped=dropped,
    )


def load_ahead(load: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """load(item) for every item in order, a few computed ahead by threads."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > 2 * DECODE_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
