"""Evaluates a model on a split: embeds it, scores all pairs, measures retrieval and classification."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from atr_scale.batch import stable_id
from atr_scale.checkpoint import load_retriever, read_state
from atr_scale.config import RunConfig, parse_config
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.storage import make_folder
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import Embedded, as_read, embed, evaluating
from atr_scale.evaluation.facts import Facts
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.predictions import write_predictions
from atr_scale.evaluation.relevance import read_relevance
from atr_scale.evaluation.report import write_report
from atr_scale.evaluation.rerank import rerank
from atr_scale.evaluation.result import EvaluationResult, evaluate_labelled, evaluate_retrieval
from atr_scale.evaluation.results import checkpoint_name, record_results, run_folder
from atr_scale.evaluation.retrieval_scores import DualEncoderScores, RetrievalScores, ScoreMatrix
from atr_scale.evaluation.score import score
from atr_scale.evaluation.sounds import Sounds
from atr_scale.model import Retriever
from atr_scale.precision import Precision, Products

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstStage:
    """A dual encoder that chooses the candidates of each query for a pairwise scorer."""

    name: str
    embedded: Embedded  # the same split, by the dual encoder
    candidates: int  # of each query


@dataclass
class Evaluation:
    """Evaluation of one split. The results are on the main rank alone, the rest on every rank."""

    results: list[EvaluationResult]
    metrics: dict[str, float]
    embedded: Embedded
    scores: RetrievalScores

    @property
    def dropped(self) -> Counter[str]:
        """Unreadable samples, by reason."""
        return self.embedded.dropped

    def save(self, folder: Path) -> None:
        """Write the files of every result into the folder."""
        for result in self.results:
            result.save(folder)


@dataclass(frozen=True)
class _Classes:
    """Labels of a split as classes: the caption of each [classes], the class of every clip [clips], the scores
    [classes, clips]."""

    captions: list[str]
    labels: NDArray[np.int64]
    scores: torch.Tensor


def evaluate(
    model: Retriever,
    shards: ShardSet,
    config: RunConfig,
    *,
    split: str,
    step: int,
    parallel: Parallel,
    relevance: str | Path | None = None,
    first_stage: FirstStage | None = None,
) -> Evaluation:
    """Retrieval metrics of a split and, if all of its clips have a label, zero-shot classification.

    All processes call this. split, step: names of the results. relevance: a file as `read_relevance` describes, for
    graded metrics. first_stage: the model scores only these candidates; by default it scores all pairs. Raises
    UserError if the first stage could read other clips than the model, or if the relevance file does not fit the split,
    and Abandoned in all processes if one of them was asked to stop.
    """
    with evaluating(model):
        embedded = embed(model, shards, config, parallel)
        scores = _score_split(model, shards, embedded, config, parallel, first_stage)
        parallel.check()
        ids = np.array([stable_id(clip) for clip in embedded.clip_ids])
        ranks = scores.ranks(ids[embedded.owner], ids, parallel.world)
        classes = _score_classes(model, embedded, config, parallel)
    results = []
    if parallel.world.is_main:
        first_caption = np.searchsorted(embedded.owner, np.arange(len(ids)))
        shown = [f"{embedded.captions[c]} ({id})" for c, id in zip(first_caption, embedded.clip_ids, strict=True)]
        grades = None if relevance is None else read_relevance(relevance, shards, embedded)
        facts = Facts.of(embedded.clip_ids, embedded.captions, embedded.fields)
        results.append(evaluate_retrieval(split, step, scores, ranks, embedded.captions, shown, grades, facts))
        if classes is not None:
            name = f"{split}/classes"
            results.append(evaluate_labelled(name, step, classes.scores, classes.captions, shown, classes.labels))
        products = Precision(model.precision, model.tf32).products(parallel.device)
        results = [replace(result, precision=products) for result in results]
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    return Evaluation(results, parallel.world.gather_objects(metrics)[0], embedded, scores)


def _score_split(
    model: Retriever,
    shards: ShardSet,
    embedded: Embedded,
    config: RunConfig,
    parallel: Parallel,
    first_stage: FirstStage | None,
) -> RetrievalScores:
    if first_stage is not None:
        first = first_stage.embedded
        if first.clip_ids != embedded.clip_ids or first.captions != embedded.captions:
            raise UserError(f"{first_stage.name} could not read the same clips of {shards.location}: check the shards")
        candidates = _dual_encoder_scores(first, parallel)
        reranked = rerank(model.scorer, embedded.text, embedded.audio, candidates, first_stage.candidates, parallel)
        reranked.method = f"the best {first_stage.candidates} of {first_stage.name} re-ranked"
        return reranked
    if model.scorer.is_dual_encoder:
        return _dual_encoder_scores(embedded, parallel)
    batch_size = config.evaluation.batch_size
    return ScoreMatrix(score(model.scorer, embedded.text, embedded.audio, batch_size=batch_size, parallel=parallel))


def _dual_encoder_scores(embedded: Embedded, parallel: Parallel) -> DualEncoderScores:
    return DualEncoderScores(embedded.text.pooled.to(parallel.device), embedded.audio.pooled.to(parallel.device))


def _score_classes(model: Retriever, embedded: Embedded, config: RunConfig, parallel: Parallel) -> _Classes | None:
    """None if a clip has no label. Every process embeds the captions of all classes, which keeps them in lockstep."""
    labels = [label for label in embedded.labels if label is not None]
    if len(labels) < len(embedded.labels):
        return None
    names = sorted(set(labels))
    captions = [config.evaluation.class_prompt.replace("{label}", name.replace("_", " ")) for name in names]
    tokenizer = caption_tokenizer(model.text_encoder.tokenizer, config.data.captions)
    input_ids, attention_mask = (part.to(parallel.device) for part in tokenizer(captions))
    text = as_read(model.scorer, model.encode_text(input_ids, attention_mask), "text")
    batch_size = config.evaluation.batch_size
    scores = score(model.scorer, text, embedded.audio, batch_size=batch_size, parallel=parallel)
    return _Classes(captions, np.array([names.index(label) for label in labels]), scores)


def evaluate_run(
    location: str,
    *,
    split: str,
    world: World,
    device: torch.device,
    shards: str | None = None,
    out: Path | None = None,
    class_prompt: str | None = None,
    relevance: str | Path | None = None,
    rerank_top: int | None = None,
    candidates: str | None = None,
    precision: Products | None = None,
    plugins: Sequence[str] = (),
) -> Evaluation:
    """Evaluate a run's best checkpoint (or one checkpoint folder), write results and report; all processes call this.

    The arguments are the options of `atr-scale evaluate`.
    shards: location; default data.<split> of the configuration, or the set of data.validation with that name.
    out: folder of the results; default the run folder.
    class_prompt: default evaluation.class_prompt.
    relevance: a file as `read_relevance` describes.
    rerank_top: the model scores only this number of candidates of each query, which the dual encoder of the run
    `candidates` chooses.
    precision: of the encoders of the models, default that of their runs.
    plugins: as for `load_retriever`.
    Raises UserError if a model or the shards do not exist, or if the two models do not fit together.
    """
    if (rerank_top is None) != (candidates is None):
        raise UserError("re-ranking needs both --rerank K and --candidates RUN, the run whose best K are re-ranked")
    if out is not None:
        make_folder(str(out))
    parallel = Parallel(world, device)
    model, trained, folder = load_retriever(location, plugins, precision)
    logger.info(Precision(model.precision, model.tf32).describe(device, trained.train.head_products))
    config = trained
    if rerank_top is not None and model.scorer.is_dual_encoder:
        raise UserError(
            f"{location} has the dual encoder {config.model.scorer.name}, whose search over all clips is exact and "
            "fast: evaluate it without --rerank, or give a run with a pairwise scorer"
        )
    if class_prompt is not None:
        values = config.model_dump()
        values["evaluation"]["class_prompt"] = class_prompt
        config = parse_config(values, "the command line")
    opened = open_shards(shards or _shards_of(config, location, split))
    first_stage = None
    if rerank_top is not None and candidates is not None:
        first_stage = _first_stage(candidates, rerank_top, opened, parallel, plugins, precision)
    evaluation = evaluate(
        model.to(device),
        opened,
        config,
        split=split,
        step=read_state(folder)["step"],
        parallel=parallel,
        relevance=relevance,
        first_stage=first_stage,
    )
    if world.is_main:
        run_dir = run_folder(location, folder)
        _save(evaluation, opened, out or run_dir, run_dir, folder, trained, split, graded=relevance is not None)
    return evaluation


def _save(
    evaluation: Evaluation,
    shards: ShardSet,
    target: Path,
    run_dir: Path,
    checkpoint: Path,
    config: RunConfig,
    split: str,
    *,
    graded: bool,
) -> None:
    """Write results, predictions and report into the folder `target`. config: that of the training."""
    evaluation.save(target)
    sounds = Sounds(shards, evaluation.embedded.index)
    for result in evaluation.results:
        sounds.save(target, result)
    write_predictions(target, split, evaluation.scores, evaluation.embedded, graded)
    name = checkpoint_name(run_dir, checkpoint)
    record_results(target, run_dir.resolve().name, config, evaluation.results, checkpoint=name, saved=True)
    write_report(target)


def _shards_of(config: RunConfig, location: str, split: str) -> str:
    places = {**config.data.validation_sets, "test": config.data.test}
    place = places.get(split)
    if place is None:
        known = ", ".join(name for name, named in places.items() if named)
        raise UserError(
            f"the configuration of {location} names no shards for the split {split!r}"
            + (f" (it names {known})" if known else "")
            + ": give --shards DIR"
        )
    return place


def _first_stage(
    location: str,
    candidates: int,
    shards: ShardSet,
    parallel: Parallel,
    plugins: Sequence[str],
    precision: Products | None,
) -> FirstStage:
    model, config, _ = load_retriever(location, plugins, precision)
    if not model.scorer.is_dual_encoder:
        raise UserError(
            f"{location} has the pairwise scorer {config.model.scorer.name} and cannot choose candidates: give "
            "--candidates a run with one of the scorers pooled, mean, max, meanmax, netrvlad, attention"
        )
    return FirstStage(location, embed(model.to(parallel.device), shards, config, parallel), candidates)
