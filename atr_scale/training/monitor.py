"""The record of a run: metrics.jsonl, TensorBoard, other trackers and the progress bar."""

from __future__ import annotations

import errno
import functools
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from atr_scale import plots
from atr_scale.errors import Failure
from atr_scale.files import FULL, atomic_write, sync
from atr_scale.redaction import REDACTED, is_secret_name, redact
from atr_scale.run_files import METRICS, append_json_lines
from atr_scale.sections import flat
from atr_scale.training.layout import layout
from atr_scale.training.media_budget import MediaBudget
from atr_scale.training.players import RetrievedClips, picture
from atr_scale.training.trackers import TENSORBOARD, Trackers, log_results

logger = logging.getLogger(__name__)

PAUSE_S = 60.0  # between two lines about a record that cannot be written

P = ParamSpec("P")


def _record(write: Callable[Concatenate[Monitor, P], None]) -> Callable[Concatenate[Monitor, P], None]:
    """A method of the main rank's monitor that writes. A failure to write is noted, and does not end training."""

    @functools.wraps(write)
    def written(self: Monitor, /, *args: P.args, **more: P.kwargs) -> None:
        if not self._open:
            return
        try:
            write(self, *args, **more)
        except OSError as error:
            self._note(error)

    return written


class Monitor:
    """Writes run_dir/metrics.jsonl and to trackers, and shows progress. Only the main rank does so.

    On a full disk the lines are kept and written later; pictures and sounds of that time are lost. `lost`: why the
    folder cannot be written to if the reason is another one, which does not pass: training cannot save either.

    resume_step: None starts a new record. N continues a run from its checkpoint of step N: lines of later steps are
    removed, so the file becomes the one of an uninterrupted run. Hence log and evaluate a step before saving it.
    total_steps: the end of the progress bar. Counters (`dropped/...`, `skipped_steps`) are totals since the start.
    trackers: names; "tensorboard" writes run_dir/tensorboard, others get scalars and hyperparameters alone.
    """

    def __init__(
        self,
        run_dir: Path,
        is_main: bool,
        *,
        resume_step: int | None = None,
        total_steps: int | None = None,
        trackers: Sequence[str] = (TENSORBOARD,),
    ) -> None:
        self._writer: SummaryWriter | None = None
        self._open = is_main
        self.lost: Failure | None = None
        if not is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS
        cut_lines(self._path, resume_step)
        self._path.touch()
        self._unwritten: list[dict[str, object]] = []
        self._noted: float | None = None
        self._hook = threading.excepthook
        threading.excepthook = _without_writers(self._hook)
        self._media = MediaBudget(run_dir / "tensorboard", total_steps)
        purge_step = 0 if resume_step is None else resume_step + 1
        if TENSORBOARD in trackers:
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=20)
        self._trackers = Trackers(run_dir, trackers, resumed=resume_step is not None)
        self._first = resume_step or 0
        self._total = total_steps
        self._started = time.monotonic()
        self._bar = tqdm(
            total=total_steps, initial=self._first, desc="training", unit="step", dynamic_ncols=True, disable=None
        )

    @_record
    def train(self, step: int, values: Mapping[str, float]) -> None:
        """One line of training; docs/monitoring.md has the keys."""
        shown = {key: f"{values[key]:.4g}" for key in ("loss", "samples_per_s") if key in values}
        if self._bar.disable:
            logger.info("step %s%s%s", step, f"/{self._total}" if self._total else "", self._pace(step, shown))
        else:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        self._write("train", step, values)
        self._scalars("train", step, values)

    @_record
    def evaluation(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Metrics of a split, tags `<split>/t2a/R@1`."""
        self._write("evaluation", step, {"split": split, **values})
        self._scalars(split, step, values)

    @_record
    def saving(self, step: int, failed: int) -> None:
        """How many saves in a row have had no space on the disk; the tag `saving/failed`."""
        self._write("saving", step, {"failed": failed})
        self._scalars("saving", step, {"failed": failed})

    @_record
    def heatmap(
        self,
        step: int,
        scores: Tensor | NDArray[np.floating],
        names: Sequence[str] = (),
        split: str = "validation",
    ) -> None:
        """A picture of the similarity [texts, audios] of a few pairs, which lie on the diagonal. names: captions."""
        if self._writer is not None and self._media.is_open(step):
            figure = plots.heatmap(_numpy(scores), f"similarity, {split}, step {step}", names=names)
            self._show(step, picture(f"{split}/similarity", figure))

    @_record
    def retrieved(self, step: int, queries: Sequence[RetrievedClips], split: str = "validation") -> None:
        """A few queries with their retrieved clips: a table, and a player for every clip."""
        if self._writer is None:
            return
        for number, query in enumerate(queries):
            self._writer.add_text(f"{split}/retrieved-{number}", redact(query.table()), step)
            if self._media.is_open(step):
                tag = f"{split.replace('/', '-')} at step {step}/query-{number}"
                self._show(step, query.players(tag))

    @_record
    def text(self, tag: str, markdown: str) -> None:
        """Markdown, from which secrets are removed. Put YAML into a code fence."""
        if self._writer is None:
            return
        self._writer.add_text(tag, redact(markdown), 0)

    @_record
    def hyperparameters(self, config: Mapping[str, object]) -> None:
        """The configuration, as nested dicts, for trackers and TensorBoard's HPARAMS tab, which shows the run as a row.

        The tab reads the metrics of a row from the last values of the run's scalars.
        """
        values = dict(_hyperparameters(config))
        self._trackers.configure(values)
        if self._writer is not None:
            _, start, _ = hparams(values, {})
            self._file.add_summary(start)

    @_record
    def page(self, validation: Sequence[str]) -> None:
        """The charts of TensorBoard's CUSTOM SCALARS tab. validation: names of the sets that training evaluates."""
        if self._writer is None:
            return
        self._writer.add_custom_scalars(layout(validation))

    @_record
    def flush(self) -> None:
        """Write everything logged so far to the disk. Call this before a checkpoint becomes the latest one."""
        self._write_lines()
        sync(self._path)
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write everything to the disk and close the files. Later calls do nothing."""
        self.flush()
        if not self._open:
            return
        self._bar.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._note(error)
        self._trackers.close()
        threading.excepthook = self._hook
        self._writer, self._open = None, False

    @property
    def _file(self) -> FileWriter:
        assert self._writer is not None
        writer: FileWriter = self._writer._get_file_writer()  # a new one after a failure
        return writer

    def _note(self, error: OSError) -> None:
        """A write has failed."""
        if self._writer is not None:  # its thread may have ended; the next write makes one
            self._writer.file_writer = self._writer.all_writers = None
        reason = f"{self._path.parent} cannot be written to ({error.strerror or error})"
        if error.errno not in FULL:
            self.lost = Failure(
                f"{reason}: mend that, and start the same command again to go on from the last checkpoint"
            )
        if self._noted is None or time.monotonic() - self._noted > PAUSE_S:
            self._noted = time.monotonic()
            logger.error("%s: the record of the run waits for it", reason)

    def _write(self, kind: str, step: int, values: Mapping[str, float | str]) -> None:
        line: dict[str, object] = {"kind": kind, "step": step, **values}
        wild = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if wild:  # JSON has no NaN, and a reader must be able to tell a non-finite metric from a missing one
            line |= dict.fromkeys(wild) | {"nonfinite": wild}
        self._unwritten.append(line)
        self._write_lines()

    def _write_lines(self) -> None:
        if not self._path.exists():  # a new file would hide that the others are gone
            raise FileNotFoundError(errno.ENOENT, "it is gone")
        while self._unwritten:  # one by one: if the disk is full again after some, those do not come twice
            append_json_lines(self._path, self._unwritten[:1])
            del self._unwritten[0]

    def _scalars(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        tagged = {f"{prefix}/{key}": value for key, value in values.items()}
        self._trackers.log(tagged, step)
        if self._writer is None:
            return
        # All in one event: half the bytes of one each.
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged.items()]
        self._file.add_summary(Summary(value=scalars), step)

    def _show(self, step: int, media: Summary) -> None:
        """Pictures or sounds."""
        assert self._writer is not None
        if self._media.take(step, media.ByteSize()):
            self._file.add_summary(media, step)

    def _pace(self, step: int, shown: Mapping[str, str]) -> str:
        text = "".join(f", {key} {value}" for key, value in shown.items())
        if not self._total or step <= self._first:
            return text
        left = (time.monotonic() - self._started) / (step - self._first) * (self._total - step)
        return f"{text}, ETA {tqdm.format_interval(left)}"


def _without_writers(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[[threading.ExceptHookArgs], None]:
    """TensorBoard's writing thread ends with a traceback; the calling thread gets the same error, and tells it."""

    def told(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            hook(args)

    return told


def record_evaluation(run_dir: Path, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
    """Add the metrics of finished evaluations, by split, to the scalars of a run's TensorBoard files and trackers.

    The HPARAMS tab shows them. Nothing is done if the run has neither.
    """
    if (run_dir / TENSORBOARD).is_dir():
        with SummaryWriter(str(run_dir / TENSORBOARD)) as writer:
            for split, metrics in values.items():
                for key, value in metrics.items():
                    writer.add_scalar(f"{split}/{key}", value, step)
    log_results(run_dir, step, values)


def _hyperparameters(config: Mapping[str, object]) -> Iterator[tuple[str, float | str]]:
    """Everything that has a value, except the name of the run folder; what is no number as text."""
    for key, value in flat(config):
        if is_secret_name(key.rpartition(".")[2]) and value:
            yield key, REDACTED
        elif key != "run.dir" and value is not None:
            yield key, value if type(value) in (int, float) else redact(str(value))


def cut_lines(path: Path, last_step: int | None) -> None:
    """Drop lines {"step": ...} of steps after last_step (all lines if None), and a line that a kill has cut short."""
    if not path.exists():
        return
    kept = []
    if last_step is not None:
        for line in path.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: dropping a line that cannot be read", path)
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def _numpy(values: Tensor | NDArray[np.floating]) -> NDArray[np.float32]:
    return torch.as_tensor(values).detach().float().cpu().numpy()
