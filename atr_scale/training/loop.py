"""The training loop: one for every launcher, any number of ranks and every ZeRO stage.

    batches in sample order -> optimizer step -> log -> checkpoint -> validation -> stop if a signal has come

The position of a run is its step: sample order, learning rate and random seeds follow from it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch

from atr_scale import checkpoint, run_checkpoints
from atr_scale.batch import Batch
from atr_scale.config import RunConfig
from atr_scale.data.loader_memory import loader_memory_here
from atr_scale.data.loader_watch import SILENCE_SHARE
from atr_scale.data.outage import STORE
from atr_scale.data.stream import describe, read_batches
from atr_scale.distributed.start import distributed
from atr_scale.distributed.world import World
from atr_scale.evaluation.parallel import Abandoned
from atr_scale.evaluation.results import record_training
from atr_scale.evaluation.selection import selection_score
from atr_scale.files import full_disk_in_one_line, unless_full
from atr_scale.model import StepContext, count_parameters
from atr_scale.precision import Precision, encoder_products
from atr_scale.remote.mirror import Mirror
from atr_scale.remote.resume import mirrored
from atr_scale.run_checkpoints import Score
from atr_scale.run_files import PREEMPTED
from atr_scale.training.attempts import attempted
from atr_scale.training.checks import (
    check_batch_size,
    check_length,
    check_run_folder,
    check_temporary_folder,
    checkpoint_to_resume,
)
from atr_scale.training.engine import Engine
from atr_scale.training.fingerprints import INPUTS, of_validation, same_inputs
from atr_scale.training.heartbeat import LEAST_HANG_S, Heartbeat, longest_silence, watched_rank
from atr_scale.training.monitor import Monitor
from atr_scale.training.parts import RunParts, announced, open_parts, open_validation
from atr_scale.training.preemption import PreemptionFlag, leave_marker, preemptible
from atr_scale.training.profile import StepProfile
from atr_scale.training.record import Progress, Record, Taken, Update
from atr_scale.training.run_info import write_environment
from atr_scale.training.run_lock import only_training
from atr_scale.training.saving import Saver
from atr_scale.training.schedule import RunLength, describe_length, learning_rate, run_length, seeds
from atr_scale.training.trackers import check_trackers
from atr_scale.training.validation import Validator

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> None:
    """Train, or continue from the newest intact checkpoint in the run folder."""
    precision = Precision(config.train.precision, config.train.tf32)
    with (
        distributed(longest_silence(config)) as (world, device),
        encoder_products(precision.tf32),
        mirrored(config.run.dir, world, config.data.outage_seconds) as mirror,
        only_training(config.run.folder, world, one_folder=mirror is None),
        attempted(config.run.folder, world) as attempt,
        full_disk_in_one_line(config.run.folder),
        preemptible(config.run.folder, world, attempt) as stop,
        watched_rank(config, world, attempt, mirror.last_words if mirror else lambda: None) as heartbeat,
        STORE.waiting_with(config.data.outage_seconds, heartbeat.wait),
    ):
        logger.info(precision.describe(device, config.train.head_products))
        if mirror:
            mirror.start()
        training = Training(config, world, device, heartbeat, stop, mirror)
        attempt.follow(training.progress, training.parts.length.steps)
        stop.begin()
        training.run()
        if mirror:
            with heartbeat.wait("uploading"):
                mirror.finish(config.data.outage_seconds, lambda: stop.received is not None, heartbeat.beat)


class Training:
    """One run: its parts, the engine that trains the model, and its progress."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        device: torch.device,
        heartbeat: Heartbeat | None = None,
        stop: PreemptionFlag | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """Checks come first, cheap ones before expensive ones. DeepSpeed starts after all inputs have been opened.

        heartbeat: told of progress and declared waits, by default one that nobody reads. stop: a signal's flag, by
        default one that no signal sets. mirror: uploads what is saved, if the run is on S3.
        """
        self.config, self.world, self.device = config, world, device
        self.heartbeat = heartbeat or Heartbeat()
        self.run_dir = config.run.folder
        check_batch_size(config, world.size)
        check_temporary_folder(config.data.workers)
        check_run_folder(self.run_dir)
        world.from_main(lambda: check_trackers(config.monitor))
        self.stop = stop or PreemptionFlag(world)
        validation = open_validation(config)
        resume_from = checkpoint_to_resume(config, world)
        torch.manual_seed(config.run.seed)  # the same new weights on every rank
        self.parts = open_parts(config, world, resume_from)
        stream, gpu = self.parts.stream, device.type == "cuda"
        self.memory = loader_memory_here(stream.width, stream.local_batch_size, config.data, world, pinned=gpu)
        self.inputs = same_inputs(config, stream.sources, validation, world, resume_from)
        if resume_from:
            check_length(config, resume_from, self.parts.length.steps)
        with announced("starting", f"DeepSpeed (ZeRO {config.train.zero_stage}) on {world.size} ranks"):
            self.engine = Engine(self.parts.model, config.train, world, device)
        self.progress = self._resumed(resume_from) if resume_from else Progress()
        self.monitor = Monitor(
            self.run_dir,
            world.is_main,
            resume_step=self.progress.step if resume_from else None,
            total_steps=self.parts.length.steps,
            trackers=config.monitor,
        )
        self.validator = Validator(
            config, validation, self.parts.tokenizer, world, device, self.monitor, self._is_told_to_stop
        )
        self.saver = Saver(config, world, self.monitor, resume_from, self.heartbeat, mirror)
        self.record = Record(config, self.progress, self.parts.length, self.monitor, world, device)
        self.profile = StepProfile(config.train.profile, self.run_dir, world.rank, device, self.parts.length.steps)
        self.heartbeat.tell(steps=self.parts.length.steps)
        self.heartbeat.step = self.progress.step
        self._unread: Update | None = None
        self._stopping = False
        self._evaluation_is_due = bool(resume_from and self._was_not_evaluated(resume_from))
        if world.is_main:
            self._describe_run(self.parts)
            if resume_from:
                self._tell_new_length(resume_from)

    def _describe_run(self, parts: RunParts) -> None:
        """Write the files that describe this start of the run, and log its summary."""
        config = self.config
        (self.run_dir / PREEMPTED).unlink(missing_ok=True)
        (self.run_dir / "config.resolved.yaml").write_text(config.to_yaml(), encoding="utf-8")
        write_environment(self.run_dir, self.world.size)
        if parts.initial:
            parts.initial.write(self.run_dir)
        record_training(self.run_dir, config, self.progress.step, parts.length.steps)
        self.monitor.text("configuration", f"```yaml\n{config.to_yaml()}\n```")
        self.monitor.hyperparameters(config.model_dump(mode="json"))
        self.monitor.page(list(self.validator.sets))
        logger.info(
            "%s: %.1f M parameters, %d ranks on %s, ZeRO %d, %s, steps %d to %d; reads %s",
            self.run_dir, count_parameters(parts.model.parameters()) / 1e6, self.world.size, self.device.type,
            config.train.zero_stage, config.train.precision, self.progress.step, parts.length.steps,
            describe(parts.stream.sources),
        )  # fmt: skip
        logger.info("%s", self.memory.describe())
        logger.info("%s; visits: %s", *describe_length(config, parts.length))

    def _tell_new_length(self, resumed_from: Path) -> None:
        """Log what another length than that of the checkpoint does to the learning rate from here on."""
        saved = checkpoint.read_config(resumed_from, self.config.plugins)
        old, new, step = run_length(saved, self.parts.stream.sources), self.parts.length, self.progress.step
        if new.steps != old.steps:
            was, now = (self._learning_rates(step, length)["heads"] for length in (old, new))
            logger.info(
                "%s: %d steps instead of %d; from step %d on the schedule is the new one: there, the learning rate of "
                "heads is %.3g, and %.3g in the old one",
                self.run_dir, new.steps, old.steps, step, now, was,
            )  # fmt: skip

    def run(self) -> None:
        """Train from the current step to the last one, or until a signal has asked for a stop."""
        batches, length = self._batches(), self.parts.length
        self.record.start()
        if self._evaluation_is_due:
            self._validate()
        while self.progress.step < length.steps and not self._stopping:
            self.profile.begin(self.progress.step + 1)
            with self.profile.named(f"optimizer step {self.progress.step + 1}"):
                self._step(batches)
            if self.profile.ends():
                self._write_profile()
            last = self.progress.step == length.steps
            due = self._due(self._evaluate_every), self._due(self._save_every)
            if last or self._stopping or any(due):
                self._read()
            self._evaluation_is_due = (last or due[0]) and bool(self.validator.sets)
            if last or self._stopping or due[1] or self._evaluation_is_due:
                self._save()  # first: an evaluation that fails must not cost what was trained
            if self._evaluation_is_due and not self._stopping:
                self._validate()
        self._write_profile()  # of a run that ends within the steps of the trace
        with self.heartbeat.wait("handing the last values to trackers"):
            self.monitor.close()
        if self._evaluation_is_due or self.progress.step < length.steps:
            self._leave()
        elif self.world.is_main:
            run = self.config.run.dir
            with unless_full(self.run_dir, "results"):
                record_training(self.run_dir, self.config, length.steps, length.steps)
            logger.info("%s: trained to step %d; measure it with `atr-scale evaluate %s`", run, length.steps, run)

    def _write_profile(self) -> None:
        start = time.perf_counter()
        with self.heartbeat.wait("writing a trace"), unless_full(self.run_dir, "the trace"):
            self.profile.write()
        self.record.leave_out(time.perf_counter() - start)

    @property
    def _evaluate_every(self) -> int:
        return self.config.train.evaluate_every or max(1, math.ceil(self.parts.length.epoch_steps))

    @property
    def _save_every(self) -> int:
        return self.config.train.checkpoint_every or self._evaluate_every

    def _was_not_evaluated(self, checkpoint: Path) -> bool:
        """Whether the attempt before ended between saving the checkpoint and recording its score."""
        due = self._due(self._evaluate_every) or self.progress.step == self.parts.length.steps
        score = run_checkpoints.read_score(checkpoint)
        wanted = self.config.evaluation.select, of_validation(self.inputs)
        evaluated = score is not None and (score.metric, score.data) == wanted
        return due and not evaluated and bool(self.validator.sets)

    def _resumed(self, folder: Path) -> Progress:
        """Load a checkpoint into the engine and return the progress that was saved with it."""
        with announced("resuming", f"from {folder}"):
            state, select = checkpoint.read_state(folder), self.config.evaluation.select
            self.engine.load(folder, state)
        progress = Progress(**{field.name: state[field.name] for field in fields(Progress) if field.name in state})
        best = run_checkpoints.best_scored(self.run_dir, select)
        score = best and run_checkpoints.read_score(best)
        if score:  # checkpoints of version 0.4 and older have none; a newer one is saved before its own is known
            same_data = score.data == of_validation(self.inputs)
            progress.best, progress.best_metric = score.value if same_data else -math.inf, select
        elif progress.best_metric != select:
            progress.best = -math.inf  # the best value of another metric
        return progress

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches of all steps that are left."""
        losses, gpu = self.config.train.accum_steps, self.device.type == "cuda"
        stream = self.parts.stream.between(self.progress.step * losses, self.parts.length.steps * losses)
        return read_batches(
            stream,
            self.config.data.workers,
            keep_int16=gpu,
            pin_memory=gpu,
            memory=self.memory,
            silence_s=SILENCE_SHARE * (self.config.train.hang_seconds or LEAST_HANG_S),
        )

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step, with its record."""
        train, step, teacher = self.config.train, self.progress.step, self.parts.teacher
        taken = Taken()
        context = StepContext(step, teacher=teacher.labels if teacher else None)
        drawn = seeds(self.config.run.seed, step, train.accum_steps, self.world.rank)
        rates = self._learning_rates(step)
        stop = self.stop.received is not None or self.monitor.lost is not None
        result = self.engine.update(self._take(batches, taken), rates, drawn, context, stop=stop)
        ended = time.perf_counter()
        self.progress.step += 1
        self.progress.samples_seen += train.accum_steps * train.global_batch_size
        self._read()  # of the step before: this one may still run on the device
        self._unread = Update(
            self.progress.step,
            self.progress.samples_seen,
            result,
            rates,
            taken,
            ended,
        )
        self.heartbeat.beat(self.progress.step)
        self.saver.record()

    def _read(self) -> None:
        """Read the result of the step that has not been read yet: count, log, and learn whether to stop."""
        if self._unread is None:
            return
        update, self._unread = self._unread, None
        self._stopping = self._stopping or update.result.stop
        self.record.add(update)
        self.heartbeat.tell(
            samples_seen=update.samples_seen,
            skipped_steps=self.progress.skipped_steps,
            fp16_overflows=self.progress.fp16_overflows,
            retries=STORE.retries,
        )

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def _take(self, batches: Iterator[Batch], taken: Taken) -> Iterator[Batch]:
        """The batches of the next optimizer step, each taken when the one before is done with: memory holds no more.

        What they bring is added to `taken`.
        """
        for _ in range(self.config.train.accum_steps):
            start = time.perf_counter()
            with self.heartbeat.reading(), self.profile.named("reading a batch"):
                batch = next(batches)
            taken.waited += time.perf_counter() - start
            taken.keys += batch.keys
            taken.ids.append(batch.ids.numpy())
            taken.dropped += batch.dropped
            taken.audio += int(batch.lengths.sum()) / self.parts.model.sample_rate
            yield batch
            del batch

    def _learning_rates(self, step: int, length: RunLength | None = None) -> dict[str, float]:
        """By group. length: that of another schedule than the run's."""
        train, length = self.config.train, length or self.parts.length
        peaks = {"audio": train.lr_audio, "text": train.lr_text, "heads": train.lr_heads}
        return {
            name: learning_rate(
                step,
                peak=train.lr if peak is None else peak,
                warmup_steps=length.warmup_steps,
                steps=length.steps,
                floor=train.lr_floor,
                schedule=train.schedule,
                decay_steps=length.decay_steps,
                cooldown_steps=length.cooldown_steps,
            )
            for name, peak in peaks.items()
        }

    def _validate(self) -> None:
        """Evaluate the validation sets, and record the score of the checkpoint of this step.

        On a signal it is abandoned; the next start of the run evaluates first.
        """
        start = time.perf_counter()
        try:
            with self.heartbeat.wait("evaluating"):
                found = self.validator.evaluate(self.engine.model, self.progress.step)
        except Abandoned:
            self._stopping = True
            return
        select = self.config.evaluation.select
        score = selection_score({name: each.metrics for name, each in found.items()}, select)
        folder = checkpoint.folder_of(self.run_dir, self.progress.step)
        saved = self._finish_save() and folder == self.saver.last  # else it has failed
        improved = saved and score > self.progress.best
        if improved:
            self.progress.best, self.progress.best_metric = score, select
        with unless_full(self.run_dir, "results"):
            self.validator.record(found, improved)
        if self.world.is_main and saved:
            with unless_full(self.run_dir, f"the score of {folder.name}"):
                run_checkpoints.write_score(folder, Score(select, score, of_validation(self.inputs)))
                if improved:
                    run_checkpoints.link(self.run_dir, "best", folder)
        self._evaluation_is_due = False
        self.record.leave_out(time.perf_counter() - start)

    def _is_told_to_stop(self) -> bool:
        """Looked at in every batch of an evaluation, which is progress."""
        self.heartbeat.beat()
        return self.stop.is_up()

    def _save(self) -> None:
        """Save, and learn whether a signal has come meanwhile. Raises Failure if the run folder is lost."""
        start = time.perf_counter()
        self.monitor.flush()
        self.world.raise_together(self.monitor.lost)
        self.record.count_dropped()
        state = {**asdict(self.progress), "world_size": self.world.size, INPUTS: self.inputs}
        with self.heartbeat.wait("saving"):
            self.saver.start(self.engine, state, self._ends)
        self._stopping = self._stopping or self.stop.agree()
        if self._stopping or self.progress.step == self.parts.length.steps:
            self._finish_save()
        self.record.saved(time.perf_counter() - start)

    def _finish_save(self) -> bool:
        """Wait for the files of the last save. Returns whether it is there."""
        with self.heartbeat.wait("saving"):
            return self.saver.finish(self._ends)

    def _ends(self) -> bool:
        return self._stopping or self.progress.step == self.parts.length.steps or self.stop.agree()

    def _leave(self) -> None:
        leave_marker(self.run_dir, self.stop.received)
        if self.world.is_main:
            evaluation = ", whose evaluation is repeated" if self._evaluation_is_due else ""
            logger.warning(
                "told to stop: saved at step %d of %d; the same command continues from there%s",
                self.progress.step, self.parts.length.steps, evaluation,
            )  # fmt: skip
