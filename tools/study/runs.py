"""One run: train a recipe with a seed, test it, measure its cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atr_scale.evaluation.metrics import GRADED_AT, classification, graded
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.rerank import rerank
from atr_scale.evaluation.retrieval_scores import RetrievalScores, ScoreMatrix
from atr_scale.files import atomic_write
from tools.bench.measure import peak_mib
from tools.study import teachers
from tools.study.corpora import TESTS, TRAINING, Demo, Split, read_demo
from tools.study.encoders import EXTRA_CAPTIONS, draw_captions, epochs, load
from tools.study.head import Head, Optimizer
from tools.study.negatives import KINDS, Negatives, hard_negatives
from tools.study.recipes import BASELINE, RERANKED, SMALL_BATCH, Recipe
from tools.study.store import ESC50, Line, Settings
from tools.study.tokens import Tokens

CROP_TOKENS = 32  # ten seconds, as in the training of the encoders
FIRST_STAGE = replace(BASELINE, batch=SMALL_BATCH)
KEPT = (BASELINE, FIRST_STAGE, RERANKED)  # recipes that others start from
KEPT_METRICS = ("t2a/R@1", "t2a/R@10", "t2a/mAP@10", "a2t/R@1", "a2t/mAP@10")


@dataclass(frozen=True)
class Pairs:
    """Training data of a head: tokens of clips and captions, and a function that draws captions for clips."""

    audio: Tokens
    text: Tokens
    draw: Callable[[Tensor, np.random.Generator], Tensor]
    text_ids: Tensor  # equal captions have equal ids


@lru_cache(1)
def demo_of(folder: Path) -> Demo:
    return read_demo(folder)


@lru_cache(2)
def tokens_of(path: Path) -> dict[str, Tokens]:
    return load(path)


@lru_cache(None)
def negatives_of(folder: Path, name: str) -> Negatives:
    return hard_negatives(demo_of(folder).tests[name])


def run_demo(recipe: Recipe, seed: int, lr: float, settings: Settings, validate: bool = False) -> Line:
    """Train and test on the demo corpora. validate: test only on the validation split."""
    demo, tokens = demo_of(settings.demo), tokens_of(settings.tokens(recipe.encoders, seed))
    if recipe.rerank is not None:
        return {"metrics": _test_reranked(recipe.rerank, seed, settings)}
    head = _head(recipe, seed, tokens)
    if recipe.teacher is not None:
        state = _kept(BASELINE, seed, settings)["state"]
        head.load_state_dict({**state, "temperature.log_temperature": head.temperature.log_temperature.detach()})
    split = demo.of((recipe.encoders,) if recipe.encoders in TRAINING else tuple(TRAINING))
    teach = teachers.teacher(recipe.teacher, split, seed, settings) if recipe.teacher and recipe.distillation else None
    cost = train(head, recipe, seed, lr, settings.steps, _pairs(recipe, split, tokens), teach)
    if validate:
        place = "validation"
        scores = head.score(tokens[f"{place}/text"].all(), tokens[f"{place}/audio"].all())
        return {"metrics": _retrieval(place, ScoreMatrix(scores), demo.validation), "cost": cost}
    metrics: dict[str, float] = {}
    for name, test in demo.tests.items():
        way = recipe.long_clips if recipe.long_clips in ("windows", "crop") else "audio"
        audio, text = tokens[f"{name}/{way}"], tokens[f"{name}/text"]
        scores = head.score(text.all(), audio.all())
        metrics |= _retrieval(name, ScoreMatrix(scores), test)
        negatives = negatives_of(settings.demo, name)
        metrics |= _hard(name, head, scores, negatives, tokens[f"{name}/negatives"], audio, test.owner)
    if recipe in KEPT:
        _keep(head, settings.head(recipe, seed), tokens)
    return {"metrics": metrics, "cost": cost}


def run_esc50(recipe: Recipe, seed: int, lr: float, settings: Settings) -> Line:
    """Train on folds 1 to 4 of ESC-50 with class captions, test on fold 5."""
    path = settings.tokens(ESC50, seed)
    tokens = tokens_of(path)
    info = torch.load(path.with_suffix(".labels.pt"), weights_only=True)
    head = _head(recipe, seed, tokens)
    classes = torch.arange(len(tokens["train/text"]))
    pairs = Pairs(tokens["train/audio"], tokens["train/text"], lambda clips, rng: info["train"][clips], classes)
    cost = train(head, recipe, seed, lr, settings.steps, pairs, None)
    scores = head.score(tokens["train/text"].all(), tokens["test/audio"].all())
    return {"metrics": classification(scores, info["test"]), "cost": cost}


def train(
    head: Head, recipe: Recipe, seed: int, lr: float, steps: int, pairs: Pairs, teach: teachers.Teach | None
) -> dict[str, float]:
    """Train the head, then set evaluation mode. Returns CPU seconds and peak memory of a step, and the last loss."""
    rng = np.random.default_rng([seed, 2])
    torch.manual_seed(seed)
    head.train()
    optimizer = Optimizer([p for p in head.parameters() if p.requires_grad], lr, steps)
    began = time.process_time()
    last: list[float] = []
    for step, clips in enumerate(epochs(len(pairs.audio), recipe.batch, steps, rng)):
        captions = pairs.draw(clips, rng)
        ids = torch.stack([clips, pairs.text_ids[captions]], 1)
        scores = () if teach is None else teach(captions, clips)
        text, audio = pairs.text.take(captions), pairs.audio.take(clips, CROP_TOKENS)
        loss = head(text, audio, ids, step, scores)
        optimizer.step(loss, step)
        last = [*last[-19:], loss.item()]
    cost = {"cpu_seconds_per_step": (time.process_time() - began) / steps}
    cost["peak_mb"] = peak_mib(lambda: head(text, audio, ids, steps, scores).backward())
    head.eval()
    return {**cost, "last_loss": float(np.mean(last))}


def _head(recipe: Recipe, seed: int, tokens: dict[str, Tokens]) -> Head:
    torch.manual_seed(seed)
    return Head(tokens["train/audio"].pooled.shape[1], tokens["train/text"].pooled.shape[1], recipe)


def _pairs(recipe: Recipe, split: Split, tokens: dict[str, Tokens]) -> Pairs:
    counts = torch.bincount(split.owner) + recipe.extra_captions
    if recipe.extra_captions:
        split = split.with_more_captions(EXTRA_CAPTIONS)
    known: dict[str, int] = {}
    text_ids = torch.tensor([known.setdefault(caption.text, len(known)) for caption in split.captions])
    return Pairs(
        tokens["train/audio"],
        tokens["train/more" if recipe.extra_captions else "train/text"],
        lambda clips, rng: draw_captions(split.owner, clips, rng, counts[clips]),
        text_ids,
    )


def _retrieval(name: str, scores: RetrievalScores, split: Split) -> dict[str, float]:
    found = scores.ranks(split.owner, torch.arange(len(split.clips))).metrics()
    found |= graded(scores.lists(GRADED_AT), split.grades)
    return {f"{name}/{key}": found[key] for key in (*KEPT_METRICS, "t2a/mAP@16", "t2a/nDCG@16")}


@torch.no_grad()
def _hard(
    name: str, head: Head, scores: Tensor, negatives: Negatives, texts: Tokens, clips: Tokens, owner: Tensor
) -> dict[str, float]:
    """Fraction of hard negatives that score lower with the clip than the true caption. Ties count half."""
    sources = torch.tensor(negatives.sources)
    true, wrong = scores[sources, owner[sources]], torch.empty(len(sources))
    for some in torch.arange(len(clips)).split(5):
        rows = torch.nonzero((owner[sources] >= some[0]) & (owner[sources] <= some[-1]))[:, 0]
        if len(rows):
            found = head.score(texts.take(rows), clips.take(some))
            wrong[rows] = found[torch.arange(len(rows)), owner[sources[rows]] - some[0]]
    right = (true > wrong).double() + 0.5 * (true == wrong)
    kinds = np.array(negatives.kinds)
    return {f"{name}/hard/{kind}": float(right[torch.from_numpy(kinds == kind)].mean()) for kind in KINDS}


@torch.no_grad()
def _test_reranked(candidates: int, seed: int, settings: Settings) -> dict[str, float]:
    tokens, demo = tokens_of(settings.tokens("all", seed)), demo_of(settings.demo)
    first, second = _head(FIRST_STAGE, seed, tokens), _head(RERANKED, seed, tokens)
    for head, recipe in ((first, FIRST_STAGE), (second, RERANKED)):
        head.load_state_dict(_kept(recipe, seed, settings)["state"])
        head.eval()
    metrics: dict[str, float] = {}
    for name in TESTS:
        text, audio = tokens[f"{name}/text"].all(), tokens[f"{name}/audio"].all()
        scores = ScoreMatrix(first.score(text, audio))
        found = rerank(second.scorer, *second.project(text, audio), scores, candidates, Parallel())
        metrics |= _retrieval(name, found, demo.tests[name])
    return metrics


def _keep(head: Head, path: Path, tokens: dict[str, Tokens]) -> None:
    """Save the weights, and for a dual encoder the embeddings of the training split."""
    kept: dict[str, object] = {"state": head.state_dict()}
    if head.scorer.is_dual_encoder:
        with torch.no_grad():
            text, audio = head.project(tokens["train/text"].all(), tokens["train/audio"].all())
            kept |= {"text": head.scorer.embed_text(text), "audio": head.scorer.embed_audio(audio)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save(kept, temporary)


def _kept(recipe: Recipe, seed: int, settings: Settings) -> dict[str, dict[str, Tensor]]:
    kept: dict[str, dict[str, Tensor]] = torch.load(settings.head(recipe, seed), weights_only=True)
    return kept
