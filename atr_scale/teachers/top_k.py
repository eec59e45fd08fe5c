"""The best scores of a pairwise scorer, kept while clips are scored batch by batch: no matrix of all scores exists.

Shape suffixes: C captions, N clips, n clips of one batch, K best.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.evaluation.parallel import Parallel
from atr_scale.scorers.scorer import Scorer


@torch.no_grad()
def best_scores(
    scorer: Scorer, text: TokenSequence, audio: TokenSequence, k: int, *, batch_size: int, parallel: Parallel
) -> dict[str, Tensor]:
    """The k best clips of every caption and captions of every clip, as values of a `TeacherTable`, on every process.

    All other scores of a caption, or of a clip, are represented by their mean. text, audio: as `embed` returns them.
    batch_size: clips scored at once. All processes call this and divide the clips.
    """
    num_captions, num_clips, world = len(text.pooled), len(audio.pooled), parallel.world
    of_captions = _Best(num_captions, min(k, num_clips))
    of_clips = {
        "best": torch.zeros(num_clips, min(k, num_captions), dtype=torch.int32),
        "scores": torch.zeros(num_clips, min(k, num_captions)),
        "rest": torch.zeros(num_clips),
    }
    batches = torch.arange(num_clips).split(batch_size)
    own, surplus = parallel.batches(len(batches))
    text = text.to(parallel.device)
    progress = tqdm(own + surplus, desc="scoring pairs", unit="batch", disable=None if world.is_main else True)
    for done, number in enumerate(progress):
        clips = batches[number]
        scores = scorer.scores(text, audio.take(clips).to(parallel.device)).float().cpu()
        if done >= len(own):
            continue
        of_captions.add(scores, clips)
        for name, value in _of_columns(scores, k).items():
            of_clips[name][clips] = value
    found = {f"caption_{name}": value for name, value in of_captions.merged(world, num_clips).items()}
    for name, value in of_clips.items():  # every clip belongs to one process and is zero elsewhere
        found[f"clip_{name}"] = world.sum(value.to(world.device)).cpu()
    return found


class _Best:
    """The K best scores of each of C rows so far, and the sum of all scores, while columns arrive in batches."""

    def __init__(self, rows: int, k: int) -> None:
        self.k = k
        self.scores, self.best = torch.zeros(rows, 0), torch.zeros(rows, 0, dtype=torch.int32)
        self.total = torch.zeros(rows, dtype=torch.float64)

    def add(self, scores: Tensor, columns: Tensor) -> None:
        """scores: [C, n] with the columns of these numbers [n]."""
        self.total += scores.sum(1, dtype=torch.float64)
        self._keep(scores, columns.int().expand(len(scores), -1))

    def _keep(self, scores: Tensor, best: Tensor) -> None:
        scores, best = torch.cat([self.scores, scores], 1), torch.cat([self.best, best], 1)
        self.scores, place = scores.topk(min(self.k, scores.shape[1]), 1)
        self.best = best.gather(1, place)

    def merged(self, world: World, columns: int) -> dict[str, Tensor]:
        """The best of all processes, out of `columns` columns. All processes call this."""
        total = world.sum(self.total.to(world.device)).cpu()
        width = world.max_int(self.scores.shape[1])
        missing = width - self.scores.shape[1]  # of a process that has seen fewer columns than K
        scores = torch.nn.functional.pad(self.scores, (0, missing), value=-torch.inf)
        best = torch.nn.functional.pad(self.best, (0, missing))
        others = _Best(len(scores), self.k)
        for part in zip(
            *(world.gather(x.to(world.device)).cpu().split(len(scores)) for x in (scores, best)), strict=True
        ):
            others._keep(*part)
        rest = (total - others.scores.sum(1, dtype=torch.float64)) / max(1, columns - self.k)
        return {"best": others.best, "scores": others.scores, "rest": rest.float()}


def _of_columns(scores: Tensor, k: int) -> dict[str, Tensor]:
    """The best rows of each column of scores [C, n], [n, K], and the mean of the others, [n]."""
    values, best = scores.T.topk(min(k, len(scores)), 1)
    rest = (scores.sum(0, dtype=torch.float64) - values.sum(1, dtype=torch.float64)) / max(1, len(scores) - k)
    return {"best": best.int(), "scores": values, "rest": rest.float()}
