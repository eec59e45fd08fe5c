"""The record of optimizer steps: which steps and samples were left out, and the log lines.

Every rank keeps one, because some counts are sums over ranks.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from atr_scale.batch import DroppedSample, count_reasons
from atr_scale.config import RunConfig
from atr_scale.data.sample import READ_FAULTS
from atr_scale.distributed.world import World
from atr_scale.errors import Failure, UserError
from atr_scale.files import unless_full
from atr_scale.memory import peak_memory
from atr_scale.training.dropped import DroppedSamples
from atr_scale.training.monitor import Monitor
from atr_scale.training.schedule import RunLength
from atr_scale.training.step_result import StepResult

logger = logging.getLogger(__name__)

DROP_GRACE = 10_000  # samples before the drop rate is judged: one bad file must not end a short run


@dataclass
class Progress:
    """The state of a run that is saved with every checkpoint, beside the weights and the optimizer's state."""

    step: int = 0
    samples_seen: int = 0
    best: float = -math.inf
    best_metric: str | None = None  # evaluation.select, of which `best` is the highest value so far
    skipped_steps: int = 0
    fp16_overflows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass
class Taken:
    """What this rank has read for an optimizer step.

    keys: of samples. ids: `Batch.ids` of each loss. dropped: unreadable samples. waited: seconds of waiting for all of
    it. audio: seconds of its clips, without padding.
    """

    keys: list[str] = field(default_factory=list)
    ids: list[NDArray[np.int64]] = field(default_factory=list)
    dropped: list[DroppedSample] = field(default_factory=list)
    waited: float = 0.0
    audio: float = 0.0


@dataclass(frozen=True)
class Update:
    """An optimizer step whose result has not been read yet.

    step, samples_seen: of the run, up to and with this step. ended: when this rank was done with the step, or had given
    it to its GPU.
    """

    step: int
    samples_seen: int
    result: StepResult
    rates: dict[str, float]
    taken: Taken
    ended: float


@dataclass
class Interval:
    """Sums over the steps between two log lines, of which the first begins at `start`; dropped samples with steps.

    saving: seconds that training has stood still for checkpoints.
    """

    start: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    audio: float = 0.0
    saving: float = 0.0
    dropped: list[tuple[int, DroppedSample]] = field(default_factory=list)


@dataclass(frozen=True)
class _OfRank:
    """One rank's part of a log line. waited: share of the time. ids: of the logged step, `Taken.ids`."""

    dropped: list[tuple[int, DroppedSample]]
    waited: float
    audio: float
    ids: list[NDArray[np.int64]]


class Record:
    """Counts the steps of a run into its progress, and logs them."""

    def __init__(
        self,
        config: RunConfig,
        progress: Progress,
        length: RunLength,
        monitor: Monitor,
        world: World,
        device: torch.device,
    ) -> None:
        self.config, self.progress, self.length, self.monitor = config, progress, length, monitor
        self.world, self.device = world, device
        self.run_dir = config.run.folder
        self._bad_in_a_row, self._logged_step = 0, progress.step
        self._interval = Interval()
        self._dropped = DroppedSamples(self.run_dir, progress.step) if world.is_main else None

    def start(self) -> None:
        """Training begins now: the time before belongs to no log line."""
        self._interval = Interval()

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training since the last log line, whose speed is that of training alone."""
        self._interval.start += seconds

    def saved(self, seconds: float) -> None:
        """Time that training has stood still for a checkpoint."""
        self.leave_out(seconds)
        self._interval.saving += seconds

    def add(self, update: Update) -> None:
        """Count an optimizer step, and log it if it is due. All ranks raise together if the run cannot go on."""
        self._interval.dropped += [(update.step, sample) for sample in update.taken.dropped]
        self._interval.waited += update.taken.waited
        self._interval.audio += update.taken.audio
        self._count_skipped(update)
        if update.step in (1, self.length.steps) or update.step % self.config.train.log_every == 0:
            self._log(update)

    def count_dropped(self) -> None:
        """Count and name the samples that all ranks have dropped since the last count. All ranks call this."""
        self._count_dropped(self.world.gather_objects(self._interval.dropped))
        self._interval.dropped = []

    def _count_dropped(self, of_ranks: Iterable[list[tuple[int, DroppedSample]]]) -> None:
        samples = [each for rank in of_ranks for each in rank]
        counts = count_reasons(sample for _, sample in samples)
        self.progress.dropped = dict(Counter(self.progress.dropped) + counts)
        if self._dropped:
            self._dropped.add(samples)

    def _count_skipped(self, update: Update) -> None:
        """Count skipped steps. After too many in a row all ranks raise Failure."""
        result, step = update.result, update.step
        if result.applied:
            self._bad_in_a_row = 0
            return
        if result.overflow:
            self.progress.fp16_overflows += 1
            return
        self.progress.skipped_steps += 1
        self._bad_in_a_row += 1
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.world.rank in result.bad_ranks:
            path = self.run_dir / f"nonfinite-step-{step}-rank-{self.world.rank}.json"
            with unless_full(self.run_dir, path.name):
                path.write_text(json.dumps(update.taken.keys), encoding="utf-8")
        if self.world.is_main:
            logger.warning(
                "step %d: non-finite loss or gradient on ranks %s; all ranks skip this step, its samples are in %s",
                step, list(result.bad_ranks), self.run_dir / f"nonfinite-step-{step}-rank-*.json",
            )  # fmt: skip
        if self._bad_in_a_row >= self.config.train.max_bad_steps:
            raise Failure(
                f"{self._bad_in_a_row} non-finite steps in a row up to step {step}: lower train.lr, or look at the "
                f"samples in {self.run_dir}/nonfinite-step-*.json; the last checkpoint is untouched"
            )

    def _log(self, update: Update) -> None:
        result, train = update.result, self.config.train
        interval, self._interval = self._interval, Interval(start=update.ended)
        seconds = update.ended - interval.start
        own = _OfRank(interval.dropped, interval.waited / seconds, interval.audio, update.taken.ids)
        ranks = self.world.gather_objects(own)
        self._count_dropped(rank.dropped for rank in ranks)
        waits = [rank.waited for rank in ranks]
        losses = [np.concatenate(parts) for parts in zip(*(rank.ids for rank in ranks), strict=True)]
        repeated = np.mean([share_of_repeated(ids) for ids in losses], axis=0)
        seen = update.samples_seen
        samples = (update.step - self._logged_step) * train.accum_steps * train.global_batch_size
        self._logged_step = update.step
        values = {
            "loss": result.terms["loss"],
            **{f"loss/{name}": value for name, value in result.terms.items() if name != "loss"},
            **{f"lr/{name}": rate for name, rate in update.rates.items()},
            "temperature": result.temperature,
            "grad_norm": result.gradient_norm,
            **{f"grad_norm/{name}": norm for name, norm in result.gradient_norms.items()},
            "samples_per_s": samples / seconds,
            "audio_s_per_s": sum(rank.audio for rank in ranks) / seconds,
            "data_wait": max(waits),
            "data_wait/mean": sum(waits) / len(waits),
            "saving_s": interval.saving,
            "duplicates/clips": float(repeated[0]),
            "duplicates/captions": float(repeated[1]),
            "memory_gb": peak_memory(self.device) / 1e9,
            "samples_seen": float(seen),
            "epoch": seen / self.length.epoch_visits,
            "skipped_steps": float(self.progress.skipped_steps),
            "fp16_overflows": float(self.progress.fp16_overflows),
            **{f"dropped/{reason}": float(n) for reason, n in self.progress.dropped.items()},
        }
        self.monitor.train(update.step, values)
        check_drop_rate(self.progress.dropped, seen, self.config.data.max_drop_rate)


def share_of_repeated(ids: NDArray[np.int64]) -> list[float]:
    """For each column, the share of rows whose id another row has too. ids: [B, k] of the pairs of a global batch."""
    counts = (np.unique(column, return_counts=True)[1] for column in ids.T)
    return [float(count[count > 1].sum() / len(ids)) for count in counts]


def check_drop_rate(dropped: dict[str, int], seen: int, rate: float) -> None:
    """Raises UserError if more than the fraction `rate` of the `seen` samples is unreadable. dropped: by reason.

    Raises Failure instead if there were not too many without errors of reading: then the shards are not at fault.
    """
    count, allowed = sum(dropped.values()), rate * max(seen, DROP_GRACE)
    if count > allowed:
        damaged = sum(number for reason, number in dropped.items() if reason not in READ_FAULTS)
        raise (UserError if damaged > allowed else Failure)(
            f"{count} of {seen} samples were unreadable ({dropped}), more than data.max_drop_rate = {rate}: run "
            "`atr-scale shards check` on data.train"
        )
