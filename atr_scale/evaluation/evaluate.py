"""A model on a split: embed, score, measure."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from atr_scale.config import RunConfig, parse_config
from atr_scale.data.batch import stable_id
from atr_scale.data.index import ShardSet, open_shards
from atr_scale.data.text import CaptionTokenizer
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import Embedded, embed
from atr_scale.evaluation.report import write_report
from atr_scale.evaluation.result import EvaluationResult, evaluate_labelled, evaluate_retrieval
from atr_scale.model import Retriever, load_retriever
from atr_scale.parallel.world import World

logger = logging.getLogger(__name__)


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
) -> Evaluation:
    """Retrieval metrics of a split and, where all of its clips carry a label, zero-shot classification."""
    embedded = embed(
        model,
        shards,
        tokenizer,
        batch_size=config.evaluation.batch_size,
        seconds=config.data.evaluation_seconds,
        world=world,
        device=device,
        lockstep=lockstep,
    )
    if embedded.dropped:
        logger.warning("%s: unreadable and left out: %s", shards.location, dict(embedded.dropped))
    # The class captions run on every rank alike: in lockstep, and with the same rounding.
    class_vectors = _class_vectors(model, embedded, tokenizer, config.evaluation.class_prompt, device)
    results = []
    if world.is_main:
        ids = np.array([stable_id(clip) for clip in embedded.clip_ids])
        first = np.searchsorted(embedded.owner, np.arange(len(ids)))
        shown = [f"{embedded.captions[c]} ({clip})" for c, clip in zip(first, embedded.clip_ids, strict=True)]
        retrieval = evaluate_retrieval(split, step, embedded.scores, embedded.captions, shown, ids[embedded.owner], ids)
        results.append(retrieval)
        if class_vectors is not None:
            prompts, vectors, labels = class_vectors
            scores = vectors @ embedded.audio.T
            results.append(evaluate_labelled(f"{split}/classes", step, scores, prompts, shown, labels))
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    return Evaluation(results, world.gather_objects(metrics)[0], embedded.dropped, embedded)


@torch.no_grad()
def _class_vectors(
    model: Retriever, embedded: Embedded, tokenizer: CaptionTokenizer, prompt: str, device: torch.device
) -> tuple[list[str], torch.Tensor, np.ndarray] | None:
    """(captions, unit vectors, label number of every clip) of a labelled split; None where a clip has no label."""
    labels = [label for label in embedded.labels if label is not None]
    if len(labels) < len(embedded.labels):
        return None
    classes = sorted(set(labels))
    prompts = [prompt.replace("{label}", name.replace("_", " ")) for name in classes]
    input_ids, attention_mask = tokenizer(prompts)
    was_training = model.training
    model.eval()
    vectors = model.scorer.embed_text(model.encode_text(input_ids.to(device), attention_mask.to(device))).cpu()
    model.train(was_training)
    number = {name: i for i, name in enumerate(classes)}
    return prompts, vectors, np.array([number[label] for label in labels])


def evaluate_run(
    location: str,
    *,
    shards: str | None,
    split: str,
    out: Path | None,
    class_prompt: str | None,
    world: World,
    device: torch.device,
) -> Evaluation:
    """Evaluate a run's best checkpoint (or one checkpoint folder) and write results and report; all ranks call this.

    shards: default the configuration's data.<split>. out: default the run folder. Raises UserError where the model or
    the shards are not there.
    """
    model, config, folder = load_retriever(location)
    if class_prompt:
        values = config.model_dump()
        values["evaluation"]["class_prompt"] = class_prompt
        config = parse_config(values, "--class-prompt")
    place = shards or {"validation": config.data.validation, "test": config.data.test}.get(split)
    if place is None:
        raise UserError(f"the configuration of {location} names no data.{split}: give --shards DIR")
    captions = config.data.captions
    evaluation = evaluate(
        model.to(device),
        open_shards(place),
        config,
        split=split,
        step=json.loads((folder / "state.json").read_text())["step"],
        world=world,
        device=device,
        tokenizer=CaptionTokenizer(config.model.text.name, captions.cleaning, captions.max_tokens),
    )
    if world.is_main:
        target = out or folder.parent.parent
        evaluation.save(target)
        write_report(target)
    return evaluation
