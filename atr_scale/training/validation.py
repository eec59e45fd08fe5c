"""Validation during training: metrics of every set of data.validation, in the record and in TensorBoard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from atr_scale.config import RunConfig
from atr_scale.data.shard_reader import ShardSet
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.distributed.world import World
from atr_scale.evaluation.evaluate import evaluate
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.result import EvaluationResult
from atr_scale.evaluation.results import record_results
from atr_scale.evaluation.sounds import Sounds
from atr_scale.model import Retriever
from atr_scale.training.monitor import Monitor
from atr_scale.training.players import retrieved_clips

logger = logging.getLogger(__name__)

SHOWN = ("t2a/R@1", "t2a/mAP@10", "a2t/R@1", "zero_shot/accuracy")  # metrics in the log line


class Validated(NamedTuple):
    """Metrics of a validation set, on every rank, and the results behind them, on the main rank alone.

    The embeddings and scores of an evaluation are not in it: they would stay in memory while other sets are evaluated.
    sounds: the audio of its clips.
    """

    metrics: dict[str, float]
    results: list[EvaluationResult]
    sounds: Sounds


@dataclass(frozen=True)
class Validator:
    """Evaluates a model on the validation sets. All ranks call it together."""

    config: RunConfig
    sets: Mapping[str, ShardSet]
    tokenizer: CaptionTokenizer
    world: World
    device: torch.device
    monitor: Monitor
    stops: Callable[[], bool]  # of `Parallel`

    def evaluate(self, model: Retriever, step: int) -> dict[str, Validated]:
        """Metrics and results of every set by its name, logged as those of the model after `step` optimizer steps.

        Raises Abandoned on all ranks if one was asked to stop.
        """
        return {name: self._evaluate_set(model, step, name, shards) for name, shards in self.sets.items()}

    def record(self, found: Mapping[str, Validated], best: bool) -> None:
        """Add what `evaluate` has found to results.json; of the best step also the results' own files."""
        if not self.world.is_main:
            return
        run_dir = self.config.run.folder
        results = [result for each in found.values() for result in each.results]
        for each in found.values() if best else ():
            for result in each.results:
                result.save(run_dir)
                each.sounds.save(run_dir, result)
        for checkpoint in ("best", "last") if best else ("last",):
            saved = checkpoint == "best"
            name = run_dir.resolve().name
            record_results(run_dir, name, self.config, results, checkpoint=checkpoint, saved=saved)

    def _evaluate_set(self, model: Retriever, step: int, name: str, shards: ShardSet) -> Validated:
        start = time.perf_counter()
        evaluation = evaluate(
            model,
            shards,
            self.config,
            split=name,
            step=step,
            parallel=Parallel(self.world, self.device, lockstep=self.config.train.zero_stage == 3, stops=self.stops),
        )
        self.monitor.evaluation(step, name, {**evaluation.metrics, "seconds": time.perf_counter() - start})
        sounds = Sounds(shards, evaluation.embedded.index)
        for result in evaluation.results:
            self.monitor.heatmap(step, result.excerpt, result.excerpt_names, result.split)
        if evaluation.results:
            self.monitor.retrieved(step, retrieved_clips(evaluation, sounds), name)
            shown = ", ".join(f"{key} {evaluation.metrics[key]:.3f}" for key in SHOWN if key in evaluation.metrics)
            logger.info("step %d: %s %s (%.0f s)", step, name, shown, time.perf_counter() - start)
        return Validated(evaluation.metrics, evaluation.results, sounds)
