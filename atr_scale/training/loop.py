"""The training loop: one for every launcher, any number of ranks and every ZeRO stage.

    batches by plan -> update -> log -> evaluate -> checkpoint -> stop if told to

All of a run's position is the step: the plan, the learning rate and the seeds of random draws follow from it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from atr_scale import checkpoint
from atr_scale.batch import Batch
from atr_scale.config import RunConfig
from atr_scale.data.decode import Crop, decode
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.stream import describe, read_batches
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.start import distributed
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.evaluate import Evaluation, evaluate
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.selection import check_labels, check_selection, selection_score
from atr_scale.memory import peak_memory
from atr_scale.model import StepContext, count_parameters
from atr_scale.training.checks import (
    check_batch_size,
    check_run_folder,
    differences,
    new_model,
    num_steps,
    read_teacher,
    training_stream,
)
from atr_scale.training.engine import Engine, StepResult
from atr_scale.training.monitor import Monitor, Player, RetrievedClips
from atr_scale.training.param_groups import freeze
from atr_scale.training.preemption import PreemptionFlag
from atr_scale.training.run_info import write_environment
from atr_scale.training.schedule import learning_rate, seeds

logger = logging.getLogger(__name__)

DROP_GRACE = 10_000  # samples before the drop rate is judged: one bad file must not end a short run
SHOWN = ("t2a/R@1", "t2a/mAP@10", "a2t/R@1", "zero_shot/accuracy")
PREEMPTED = "preempted"


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    samples_seen: int = 0
    best: float = -math.inf
    best_metric: str | None = None  # evaluation.select, of which `best` is the highest so far
    skipped_steps: int = 0
    fp16_overflows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


def train(config: RunConfig) -> None:
    """Train, or go on where the run folder's newest good checkpoint stands."""
    with distributed() as (world, device):
        Training(config, world, device).run()


class Training:
    """One run: what it reads, what it trains, where it stands."""

    def __init__(self, config: RunConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.run_dir = Path(config.run.dir)
        check_batch_size(config, world.size)
        check_run_folder(self.run_dir)
        self.stop = PreemptionFlag()
        self.validation = {name: open_shards(place) for name, place in config.data.validation_sets.items()}
        check_selection(config.evaluation.select, list(self.validation))
        check_labels(config.evaluation.select, self.validation)
        resume_from = self._find_checkpoint()
        if resume_from is not None:
            self._check_resume(resume_from)
        torch.manual_seed(config.run.seed)  # the same new weights on every rank
        model = new_model(config, world, resume_from)
        self.tokenizer = caption_tokenizer(model.text_encoder.tokenizer, config.data.captions)
        freeze(model, config.train)
        self.stream = training_stream(config, self.tokenizer, model.sample_rate, world)
        self.teacher = read_teacher(config, self.stream.sources)
        self.steps, self.warmup_steps = num_steps(config, self.stream)
        self.epoch_steps = max(1, math.ceil(self.stream.order.epoch_batches / config.train.accum_steps))
        self.engine = Engine(model, config.train, world, device)
        self.progress, self._logged_step = Progress(), 0
        if resume_from is not None:
            self._resume(resume_from)
        self.monitor = Monitor(
            self.run_dir,
            world.is_main,
            resume_step=self.progress.step if resume_from else None,
            total_steps=self.steps,
        )
        self._bad_in_a_row = 0
        self._since_log = Interval()
        if world.is_main:
            (self.run_dir / PREEMPTED).unlink(missing_ok=True)
            (self.run_dir / "config.resolved.yaml").write_text(config.to_yaml())
            write_environment(self.run_dir, world.size)
            self.monitor.text("configuration", f"```yaml\n{config.to_yaml()}\n```")
            logger.info(
                "%s: %.1f M parameters, %d ranks on %s, ZeRO %d, %s, steps %d to %d; reads %s",
                self.run_dir, count_parameters(model.parameters()) / 1e6, world.size, device.type,
                config.train.zero_stage, config.train.precision, self.progress.step, self.steps,
                describe(self.stream.sources),
            )  # fmt: skip

    def run(self) -> None:
        train = self.config.train
        losses = train.accum_steps
        stream = self.stream.between(self.progress.step * losses, self.steps * losses)
        gpu = self.device.type == "cuda"
        batches = read_batches(stream, self.config.data.workers, keep_int16=gpu, pin_memory=gpu)
        self._since_log = Interval()
        while self.progress.step < self.steps:
            step = self.progress.step
            taken = self._take(batches)
            context = StepContext(step, teacher=self.teacher.block if self.teacher else None)
            drawn = seeds(self.config.run.seed, step, losses, self.world.rank)
            result = self.engine.update(taken, self._learning_rates(step), drawn, context)
            self.progress.step += 1
            self.progress.samples_seen += losses * train.global_batch_size
            self._judge(result, taken)
            last = self.progress.step == self.steps
            if last or self.progress.step % train.log_every == 0:
                self._log(result, step)
            stopping = self.stop.agreed(self.world)
            improved = False
            if last or (not stopping and self._due(train.evaluate_every or self.epoch_steps)):
                improved = self._validate()
            if (
                last
                or stopping
                or improved
                or self._due(train.checkpoint_every or train.evaluate_every or self.epoch_steps)
            ):
                self._save(improved)
            if stopping and not last:
                self._leave()
                break
        self.monitor.close()
        if self.world.is_main and self.progress.step == self.steps:
            logger.info("%s: trained to step %d; measure it with `atr-scale evaluate`", self.run_dir, self.steps)

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def _take(self, batches: Iterator[Batch]) -> list[Batch]:
        """The next update's batches, with the time it took to wait for them."""
        start = time.perf_counter()
        taken = [next(batches) for _ in range(self.config.train.accum_steps)]
        self._since_log.waited += time.perf_counter() - start
        for batch in taken:
            self._since_log.dropped.update(batch.dropped)
        return taken

    def _learning_rates(self, step: int) -> dict[str, float]:
        train = self.config.train
        peaks = {"audio": train.lr_audio, "text": train.lr_text, "heads": train.lr_heads}
        return {
            name: learning_rate(
                step,
                peak=train.lr if peak is None else peak,
                warmup_steps=self.warmup_steps,
                steps=self.steps,
                floor=train.lr_floor,
            )
            for name, peak in peaks.items()
        }

    def _judge(self, result: StepResult, taken: list[Batch]) -> None:
        """Count skipped updates; after too many in a row, stop on all ranks."""
        if result.applied:
            self._bad_in_a_row = 0
            return
        if result.overflow:
            self.progress.fp16_overflows += 1
            return
        self.progress.skipped_steps += 1
        self._bad_in_a_row += 1
        step = self.progress.step
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.world.rank in result.bad_ranks:
            path = self.run_dir / f"nonfinite-step-{step}-rank-{self.world.rank}.json"
            path.write_text(json.dumps([key for batch in taken for key in batch.keys]))
        if self.world.is_main:
            logger.warning(
                "step %d: non-finite loss or gradient on ranks %s; all ranks skip this update, its samples are in %s",
                step, list(result.bad_ranks), self.run_dir / f"nonfinite-step-{step}-rank-*.json",
            )  # fmt: skip
        if self._bad_in_a_row >= self.config.train.max_bad_steps:
            raise RuntimeError(
                f"{self._bad_in_a_row} non-finite updates in a row up to step {step}: lower train.lr, or look at the "
                f"samples in {self.run_dir}/nonfinite-step-*.json; the last checkpoint is untouched"
            )

    def _log(self, result: StepResult, step: int) -> None:
        self._count_dropped()
        interval, self._since_log = self._since_log, Interval()
        seconds = time.perf_counter() - interval.start
        dropped, seen = sum(self.progress.dropped.values()), self.progress.samples_seen
        samples = (self.progress.step - self._logged_step) * self.config.train.accum_steps
        self._logged_step = self.progress.step
        values = {
            "loss": result.terms["loss"],
            **{f"loss/{name}": value for name, value in result.terms.items() if name != "loss"},
            **{f"lr/{name}": rate for name, rate in self._learning_rates(step).items()},
            "temperature": result.temperature,
            "grad_norm": result.gradient_norm,
            "samples_per_s": samples * self.config.train.global_batch_size / seconds,
            "data_wait": interval.waited / seconds,
            "memory_gb": peak_memory(self.device) / 1e9,
            "samples_seen": float(seen),
            "epoch": seen / self.config.train.global_batch_size / self.stream.order.epoch_batches,
            "skipped_steps": float(self.progress.skipped_steps),
            "fp16_overflows": float(self.progress.fp16_overflows),
            **{f"dropped/{reason}": float(n) for reason, n in self.progress.dropped.items()},
        }
        self.monitor.train(self.progress.step, values)
        if dropped > self.config.data.max_drop_rate * max(seen, DROP_GRACE):
            raise UserError(
                f"{dropped} of {seen} samples were unreadable ({self.progress.dropped}), more than data.max_drop_rate "
                f"= {self.config.data.max_drop_rate}: run `atr-scale shards check` on data.train"
            )

    def _count_dropped(self) -> None:
        """Add what all ranks dropped since the last count to the run's totals."""
        for counts in self.world.gather_objects(self._since_log.dropped):
            self.progress.dropped = dict(Counter(self.progress.dropped) + counts)
        self._since_log.dropped = Counter()

    def _validate(self) -> bool:
        """Evaluate every set of data.validation; whether this is the best step so far."""
        if not self.validation:
            return False
        start = time.perf_counter()
        found = {name: self._evaluate(name, shards) for name, shards in self.validation.items()}
        # The speed that is logged is training's own.
        self._since_log.start += time.perf_counter() - start
        score = selection_score(found, self.config.evaluation.select)
        if score <= self.progress.best:
            return False
        self.progress.best, self.progress.best_metric = score, self.config.evaluation.select
        return True

    def _evaluate(self, name: str, shards: ShardSet) -> dict[str, float]:
        """Metrics of one validation set, logged under its name."""
        start, step = time.perf_counter(), self.progress.step
        evaluation = evaluate(
            self.engine.model,
            shards,
            self.config,
            split=name,
            step=step,
            parallel=Parallel(self.world, self.device, lockstep=self.config.train.zero_stage == 3),
        )
        self.monitor.evaluation(step, name, evaluation.metrics)
        for result in evaluation.results:
            self.monitor.heatmap(step, result.excerpt, result.excerpt_names, result.split)
        if evaluation.results:
            self.monitor.retrieved(step, players(evaluation, shards), name)
            logger.info(
                "step %d: %s %s (%.0f s)",
                step,
                name,
                ", ".join(f"{key} {evaluation.metrics[key]:.3f}" for key in SHOWN if key in evaluation.metrics),
                time.perf_counter() - start,
            )
        return evaluation.metrics

    def _save(self, best: bool) -> None:
        start = time.perf_counter()
        self.monitor.flush()
        self._count_dropped()
        state = {**asdict(self.progress), "world_size": self.world.size}
        folder = checkpoint.save(self.run_dir, self.engine, self.world, self.config.to_yaml(), state)
        if self.world.is_main:
            if best:
                checkpoint.link(self.run_dir, "best", folder)
            checkpoint.prune(self.run_dir, self.config.train.keep_checkpoints)
        self._since_log.start += time.perf_counter() - start

    def _leave(self) -> None:
        if self.world.is_main:
            (self.run_dir / PREEMPTED).write_text(f"{self.stop.received or 'another rank was told'}\n")
            logger.warning(
                "told to stop: saved at step %d of %d; the same command goes on from there",
                self.progress.step, self.steps,
            )  # fmt: skip

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, decided by the main rank for all."""
        found: Path | UserError | None = None
        if self.world.is_main:
            try:
                found = checkpoint.newest_sound(self.run_dir)
            except UserError as error:
                found = error
        found = self.world.gather_objects(found)[0]
        if isinstance(found, UserError):
            raise found
        return found

    def _check_resume(self, folder: Path) -> None:
        """UserError if the checkpoint is of another run than this one: of another configuration or number of ranks."""
        saved = checkpoint.read_config(folder, self.config.plugins)
        drift = differences(saved.model_dump(mode="json"), self.config.model_dump(mode="json"))
        if drift:
            raise UserError(
                f"{self.run_dir} was trained with another configuration ({'; '.join(drift)}): "
                "restore these values, or give another run.dir"
            )

        state = checkpoint.read_state(folder)
        if state["world_size"] != self.world.size and self.config.train.zero_stage > 0:
            raise UserError(
                f"{folder} holds ZeRO {self.config.train.zero_stage} shards of {state['world_size']} ranks, not "
                f"{self.world.size}: start as many ranks, or give another run.dir with "
                f"train.initial_checkpoint={folder}"
            )

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        self.engine.load(folder)
        self.progress = Progress(**{key: value for key, value in state.items() if key != "world_size"})
        if self.progress.best_metric != self.config.evaluation.select:
            self.progress.best = -math.inf  # it was of another metric
        self._logged_step = self.progress.step


@dataclass
class Interval:
    """What adds up between two log lines."""

    start: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)


def players(evaluation: Evaluation, shards: ShardSet) -> list[RetrievedClips]:
    """The examples of a retrieval result with the sound of what they found."""
    shown = []
    for example in evaluation.results[0].examples:
        if example.direction != "t2a":
            continue
        clips = []
        for item in example.retrieved[:3]:
            sample = shards.read(evaluation.embedded.index[item.index])
            waveform = decode(sample.audio, sample.extension, 16_000, pcm_rate=sample.sample_rate, crop=Crop(0.0, 10.0))
            clips.append(Player(item.name, item.score, item.hit, waveform, 16_000))
        shown.append(RetrievedClips(example.query, example.rank, clips))
    return shown
