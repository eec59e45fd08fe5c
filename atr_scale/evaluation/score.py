"""The score matrix of a split, for any scorer. The processes divide the work.

Shape suffixes: C captions, N clips.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from atr_scale.batch import TokenSequence
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.ranks import ieee_products
from atr_scale.scorers.scorer import Scorer

SUMMED = 1 << 24  # scores in one all-reduce


@torch.no_grad()
def score(scorer: Scorer, text: TokenSequence, audio: TokenSequence, *, batch_size: int, parallel: Parallel) -> Tensor:
    """[C, N] float32 on the CPU of every process: scores of all captions with all clips, which `embed` returned.

    batch_size: clips scored at once. Only the split determines the batches, so any number of processes gives the same
    scores. Raises Abandoned if a process was asked to stop.
    """
    if scorer.is_dual_encoder:
        with ieee_products():
            return text.pooled @ audio.pooled.T
    num_clips, world = len(audio.pooled), parallel.world
    batches = torch.arange(num_clips).split(batch_size)
    own, surplus = parallel.batches(len(batches))
    text = text.to(parallel.device)
    out = torch.zeros(len(text.pooled), num_clips)
    numbers = own + surplus
    progress = tqdm(
        parallel.each(numbers),
        total=len(numbers),
        desc="scoring pairs",
        unit="batch",
        disable=None if world.is_main else True,
    )
    for done, number in enumerate(progress):
        columns = scorer.scores(text, audio.take(batches[number]).to(parallel.device)).float().cpu()
        if done < len(own):
            out[:, batches[number]] = columns
    if world.size > 1:  # every column comes from one process and is zero elsewhere, so the sum is exact
        for rows in out.split(max(1, SUMMED // num_clips)):
            rows.copy_(world.sum(rows.to(world.device)))
    return out
