"""A model on a split: embed, score, measure."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atr_scale.batch import stable_id
from atr_scale.checkpoint import WEIGHTS, load_retriever, read_state
from atr_scale.config import RunConfig, parse_config
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.tokenizer import CaptionTokenizer, caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.coarse import Precision
from atr_scale.evaluation.embed import Embedded, as_read, embed
from atr_scale.evaluation.rank_counts import MatrixScores, VectorScores
from atr_scale.evaluation.relevance import read_relevance
from atr_scale.evaluation.report import write_report
from atr_scale.evaluation.result import EvaluationResult, evaluate_labelled, evaluate_retrieval
from atr_scale.evaluation.score import Reranked, rerank, score
from atr_scale.model import Retriever

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstStage:
    """What a pairwise scorer re-ranks: scores [C, N] of the model `name`, and how many candidates of each query."""

    name: str
    scores: VectorScores
    candidates: int
    captions: list[str]
    clip_ids: list[str]


@dataclass
class Evaluation:
    """Results of one split on the main rank (none elsewhere), its metrics on every rank, and unreadable samples."""

    results: list[EvaluationResult]
    metrics: dict[str, float]
    dropped: Counter[str]
    embedded: Embedded

    def save(self, folder: Path) -> None:
        for result in self.results:
            result.save(folder)


def evaluate(
    model: Retriever,
    shards: ShardSet,
    config: RunConfig,
    *,
    split: str,
    step: int,
    world: World,
    device: torch.device,
    tokenizer: CaptionTokenizer,
    lockstep: bool = False,
    relevance: str | Path | None = None,
    first_stage: FirstStage | None = None,
) -> Evaluation:
    """Retrieval metrics of a split and, where all of its clips carry a label, zero-shot classification.

    relevance: a file of `read_relevance` for graded metrics. first_stage: the scores whose best candidates alone are
    scored by the model; otherwise every pair is.
    """
    options: dict[str, Any] = {"world": world, "device": device}
    embedded = embed(
        model,
        shards,
        tokenizer,
        batch_size=config.evaluation.batch_size,
        seconds=config.data.evaluation_seconds,
        lockstep=lockstep,
        **options,
    )
    if embedded.dropped:
        logger.warning("%s: unreadable and left out: %s", shards.location, dict(embedded.dropped))
    was_training = model.training
    model.eval()
    options["batch_size"], options["lockstep"] = config.evaluation.batch_size, lockstep
    ids = np.array([stable_id(clip) for clip in embedded.clip_ids])
    owners = ids[embedded.owner]
    scores: VectorScores | MatrixScores | Reranked
    method = "every pair scored"
    if first_stage is None and model.scorer.is_dual_encoder:
        scores = _vector_scores(embedded, config.evaluation.precision, device)
    elif first_stage is None:
        scores = MatrixScores(score(model.scorer, embedded.text, embedded.audio, **options))
    else:
        if first_stage.clip_ids != embedded.clip_ids or first_stage.captions != embedded.captions:
            raise UserError(f"{first_stage.name} could not read the same clips of {shards.location}: check the shards")
        scores = rerank(
            model.scorer, embedded.text, embedded.audio, first_stage.scores, first_stage.candidates,
            world=world, device=device,
        )  # fmt: skip
        method = f"the best {first_stage.candidates} of {first_stage.name} re-ranked"
    table = scores.ranks(owners, ids, world)
    # The class captions run on every rank alike: in lockstep, and with the same rounding.
    classes = _classes(embedded, config.evaluation.class_prompt)
    if classes is not None:
        prompts, labels = classes
        input_ids, attention_mask = tokenizer(prompts)
        with torch.no_grad():
            encoded = model.encode_text(input_ids.to(device), attention_mask.to(device))
            text = as_read(model.scorer, encoded, "text")
        class_scores = score(model.scorer, text, embedded.audio, **options)
    model.train(was_training)
    results = []
    if world.is_main:
        first = np.searchsorted(embedded.owner, np.arange(len(ids)))
        shown = [f"{embedded.captions[c]} ({clip})" for c, clip in zip(first, embedded.clip_ids, strict=True)]
        grades = None if relevance is None else read_relevance(relevance, shards, embedded)
        results.append(
            evaluate_retrieval(
                split,
                step,
                scores,
                embedded.captions,
                shown,
                owners,
                ids,
                table=table,
                method=method,
                grades=grades,
            )
        )
        if classes is not None:
            results.append(evaluate_labelled(f"{split}/classes", step, class_scores, prompts, shown, labels))
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    return Evaluation(results, world.gather_objects(metrics)[0], embedded.dropped, embedded)


def _vector_scores(embedded: Embedded, precision: Precision, device: torch.device) -> VectorScores:
    return VectorScores(embedded.text.pooled.to(device), embedded.audio.pooled.to(device), precision)


def _classes(embedded: Embedded, prompt: str) -> tuple[list[str], np.ndarray] | None:
    """(captions of the classes, class number of every clip) of a labelled split; None where a clip has no label."""
    labels = [label for label in embedded.labels if label is not None]
    if len(labels) < len(embedded.labels):
        return None
    names = sorted(set(labels))
    prompts = [prompt.replace("{label}", name.replace("_", " ")) for name in names]
    return prompts, np.array([names.index(label) for label in labels])


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
    precision: str | None = None,
    plugins: Sequence[str] = (),
) -> Evaluation:
    """Evaluate a run's best checkpoint (or one checkpoint folder) and write results and report; all ranks call this.

    shards: default the configuration's data.<split>, or the set of data.validation with that name. out: default the run
    folder. plugins: as for `load_retriever`. class_prompt, precision: default the
    configuration's evaluation.*. relevance: file of graded relevance.
    rerank_top: score only so many candidates of each query, those of the run `candidates`, whose scorer must have
    vectors. Raises UserError where a model or the shards are not there, or where the two do not go together.
    """
    model, config, folder = load_retriever(location, plugins)
    values = config.model_dump()
    given = {"class_prompt": class_prompt, "precision": precision}
    values["evaluation"] |= {name: value for name, value in given.items() if value is not None}
    config = parse_config(values, "the command line")
    places = {**config.data.validation_sets, "test": config.data.test}
    place = shards or places.get(split)
    if place is None:
        known = ", ".join(name for name, named in places.items() if named)
        raise UserError(
            f"the configuration of {location} names no shards for the split {split!r}"
            + (f" (it names {known})" if known else "")
            + ": give --shards DIR"
        )
    if (rerank_top is None) != (candidates is None):
        raise UserError("re-ranking needs both --rerank K and --candidates RUN, the run whose best K are re-ranked")
    opened = open_shards(place)
    first_stage = None
    if rerank_top is not None and candidates is not None:
        first_stage = _first_stage(candidates, rerank_top, config.evaluation.precision, opened, world, device, plugins)
    evaluation = evaluate(
        model.to(device),
        opened,
        config,
        split=split,
        step=read_state(folder)["step"],
        world=world,
        device=device,
        tokenizer=caption_tokenizer(model.text_encoder.tokenizer, config.data.captions),
        relevance=relevance,
        first_stage=first_stage,
    )
    if world.is_main:
        # A copied run folder may have lost its links, or have folders in their place.
        target = out or (folder.parent.parent if (Path(location) / WEIGHTS).is_file() else Path(location))
        evaluation.save(target)
        write_report(target)
    return evaluation


def _first_stage(
    location: str,
    candidates: int,
    precision: Precision,
    shards: ShardSet,
    world: World,
    device: torch.device,
    plugins: Sequence[str],
) -> FirstStage:
    model, config, _ = load_retriever(location, plugins)
    if not model.scorer.is_dual_encoder:
        raise UserError(
            f"{location} scores pairs by {config.model.scorer.name} and cannot choose candidates: give --candidates a "
            "run with one of the scorers pooled, mean, max, meanmax, netrvlad, attention"
        )
    options: dict[str, Any] = {"batch_size": config.evaluation.batch_size, "world": world, "device": device}
    seconds = config.data.evaluation_seconds
    embedded = embed(
        model.to(device),
        shards,
        caption_tokenizer(model.text_encoder.tokenizer, config.data.captions),
        seconds=seconds,
        **options,
    )
    scores = _vector_scores(embedded, precision, device)
    return FirstStage(location, scores, candidates, embedded.captions, embedded.clip_ids)
