"""Teacher scores of training captions and clips, and their correlation with the relevance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tools.study.corpora import Split
from tools.study.recipes import BASELINE
from tools.study.store import Line, Settings

# Numbers of captions and of clips -> scores [captions, clips] of one or several teachers.
Teach = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
SAMPLED_PAIRS = 400_000


def teacher(name: str, split: Split, seed: int, settings: Settings) -> Teach:
    """The teacher called `name`.

    true: the relevance. self: stage 1 with the same seed. ensemble: mean of the cosines of stage 1 over all seeds.
    probabilities: mean of their soft labels. random: scores of the ensemble for other clips. uniform: equal scores.
    """
    if name == "uniform":
        return lambda captions, clips: (torch.zeros(len(captions), len(clips)),)
    if name == "true":
        grades = torch.from_numpy(split.grades)
        return lambda captions, clips: (grades[captions][:, clips],)
    members = [_member(other, settings) for other in ((seed,) if name == "self" else settings.seeds)]

    def cosines(captions: Tensor, clips: Tensor) -> list[Tensor]:
        return [text[captions] @ audio[clips].T for text, audio in members]

    if name == "probabilities":
        return lambda captions, clips: tuple(cosines(captions, clips))
    if name == "random":
        other = torch.randperm(len(split.clips), generator=torch.Generator().manual_seed(seed))
        return lambda captions, clips: (torch.stack(cosines(captions, other[clips])).mean(0),)
    assert name in ("self", "ensemble"), name
    return lambda captions, clips: (torch.stack(cosines(captions, clips)).mean(0),)


def statistics(split: Split, settings: Settings) -> Line:
    """Rank correlation (Spearman) of the teachers with the relevance, and correlation (Pearson) between the members.

    Both are computed over a sample of training pairs whose caption belongs to another clip.
    """
    rng = np.random.default_rng(0)
    captions = torch.from_numpy(rng.integers(len(split.captions), size=SAMPLED_PAIRS))
    clips = torch.from_numpy(rng.integers(len(split.clips), size=SAMPLED_PAIRS))
    unmatched = split.owner[captions] != clips
    captions, clips = captions[unmatched], clips[unmatched]
    truth = split.grades[captions.numpy(), clips.numpy()]
    cosines = []
    for seed in settings.seeds:
        text, audio = _member(seed, settings)
        parts = zip(captions.split(20_000), clips.split(20_000), strict=True)
        cosines.append(torch.cat([(text[c] * audio[a]).sum(1) for c, a in parts]).numpy())
    between = np.corrcoef(np.stack(cosines))[np.triu_indices(len(cosines), 1)]
    metrics = {f"spearman/member {seed}": spearman(c, truth) for seed, c in zip(settings.seeds, cosines, strict=True)}
    metrics["spearman/ensemble"] = spearman(np.mean(cosines, axis=0), truth)
    return {"metrics": {**metrics, "pearson/between members": float(between.mean())}}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation (Spearman). Ties have the mean of their ranks."""
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _member(seed: int, settings: Settings) -> tuple[Tensor, Tensor]:
    kept = torch.load(settings.head(BASELINE, seed), weights_only=True)
    return kept["text"], kept["audio"]
