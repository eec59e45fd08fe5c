"""Trackers beside TensorBoard, such as Weights & Biases: the tracker classes of accelerate, each in its own thread.

Only the main rank has any. Whatever a tracker does, training neither ends nor waits for it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atr_scale.errors import UserError, one_line
from atr_scale.files import atomic_write
from atr_scale.redaction import redact
from atr_scale.run_files import read_json_object

logger = logging.getLogger(__name__)

TENSORBOARD, WANDB = "tensorboard", "wandb"
IDS = "trackers.json"  # in the run folder: {tracker: id of the run}, for those that a later start continues
MOST_WAITING = 1000  # lines of values that wait for a tracker that is slow or blocked; later ones are lost
FINISH_S = 60.0  # for which the end of a run waits for the last values to be sent
GRACE_S = 5.0  # in which a tracker that has given up sending must have ended
PROJECT = "atr-scale"


def check_trackers(names: Sequence[str]) -> None:
    """UserError for a tracker that accelerate does not know, whose package is missing, or that knows no account."""
    if others := _others(names):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType

        installed = [each.value for each in get_available_trackers()]
        for name in others:
            if name not in LOGGER_TYPE_TO_CLASS:
                near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
                meant = f", did you mean {near[0]}" if near else ""
                raise UserError(
                    f"monitor: no tracker is called {name!r}{meant}: give some of {', '.join(LOGGER_TYPE_TO_CLASS)}"
                )
            if name in LoggerType.list() and name not in installed:
                wanted = '"atr-scale[trackers]"' if name == WANDB else name.replace("_", "-")
                raise UserError(f"monitor: {name} is not installed: pip install {wanted}, or take it out of the list")
        if WANDB in others:
            _check_account()


def _check_account() -> None:
    wandb: Any = importlib.import_module(WANDB)
    setup = wandb.setup(wandb.Settings(silent=True))
    # In a terminal wandb would ask for an account in the middle of the run. This asks nobody, not even the network.
    if setup.settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError(
            "monitor: wandb knows no account: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline, which "
            "writes into the run folder for a later `wandb sync`"
        )


class Trackers:
    """The trackers of one run, all but TensorBoard.

    names: those of `monitor`. resumed: whether to continue the runs whose ids the run folder has. Make it where no
    other thread reads environment variables.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], *, resumed: bool) -> None:
        others = _others(names)
        if not others:
            self._feeds: list[_Feed] = []
            return
        ids = _ids(run_dir) if resumed else {}
        if WANDB in others:
            ids.setdefault(WANDB, secrets.token_hex(4))
        with atomic_write(run_dir / IDS) as temporary:
            temporary.write_text(json.dumps({name: ids[name] for name in others if name in ids}), encoding="utf-8")
        _be_alone_for_accelerate()
        self._feeds = [_Feed(name, run_dir, ids.get(name)) for name in others]

    def configure(self, values: Mapping[str, float | str]) -> None:
        """The hyperparameters of the run, flat and without secrets."""
        for feed in self._feeds:
            feed.put(lambda tracker: tracker.store_init_configuration(dict(values)))

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        """Scalars by tag. step: None puts them behind the last step."""
        for feed in self._feeds:
            feed.log(dict(values), step)

    def close(self) -> None:
        """Wait until everything is handed on, at most about FINISH_S."""
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join()


def log_results(run_dir: Path, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
    """Add metrics of finished evaluations, by split, to the runs of trackers that can be continued.

    They come behind the last step of training; SPLIT/step is the step of the checkpoint.
    """
    trackers = Trackers(run_dir, list(_ids(run_dir)), resumed=True)
    for split, metrics in values.items():
        trackers.log({**{f"{split}/{key}": value for key, value in metrics.items()}, f"{split}/step": step}, None)
    trackers.close()


class _Feed:
    """One tracker and the thread that alone calls it. Only the first fault is logged; one at the start ends it."""

    def __init__(self, name: str, run_dir: Path, run_id: str | None) -> None:
        self._name, self._run_dir, self._id = name, run_dir, run_id
        self._waiting: queue.Queue[Callable[[Any], object] | None] = queue.Queue(MOST_WAITING)
        self._first = self._last = 0
        self._lost, self._said = 0, False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Any], object]) -> None:
        """Let the thread make this call of the tracker. It is lost if too many wait already."""
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            self._lose(f"has not answered for {MOST_WAITING} lines of values, later ones are lost")

    def log(self, values: dict[str, float], step: int | None) -> None:
        if step is not None:  # wandb refuses a step below the last one: what is told late comes at the last one
            self._last = step = max(step, self._last)

        def call(tracker: Any) -> None:
            if step is None or step >= self._first:
                tracker.log(values, step=step)

        self.put(call)

    def end(self) -> None:
        with contextlib.suppress(queue.Full):  # it does not answer: `join` gives up
            self._waiting.put(None, timeout=GRACE_S)

    def join(self) -> None:
        self._thread.join(FINISH_S + GRACE_S)
        if self._thread.is_alive():
            logger.warning("monitor: %s has not taken all values within %.0f s, the rest is lost", self._name, FINISH_S)
        elif self._lost:
            logger.warning("monitor: %d lines of values did not reach %s", self._lost, self._name)

    def _run(self) -> None:
        tracker = None
        try:
            tracker = self._started()
        except BaseException as error:  # nothing may end in the hook of threads, which prints a traceback
            self._lose(error)
        while (call := self._waiting.get()) is not None:
            if tracker is None:
                self._lost += 1
                continue
            try:
                call(tracker)
            except Exception as error:
                self._lose(error)
        if tracker is not None:
            try:
                tracker.finish()
            except Exception as error:
                self._lose(error)

    def _started(self) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[self._name]
        folder = (str(self._run_dir),) if kind.requires_logging_directory else ()
        tracker = kind(os.environ.get("WANDB_PROJECT") or PROJECT, *folder, **self._options())
        tracker.main_process_only = False  # only the main rank has it
        tracker.start()
        run = tracker.tracker
        step = getattr(run, "step", 0)
        self._first = step if isinstance(step, int) else 0  # a continued run of wandb has the steps before it already
        url = None if getattr(run, "offline", False) else getattr(run, "url", None)
        logger.info("monitor: %s writes to %s", self._name, url or getattr(run, "dir", PROJECT))
        return tracker

    def _options(self) -> dict[str, Any]:
        if self._name != WANDB:
            return {}
        wandb: Any = importlib.import_module(WANDB)
        # No copy of the log and of the command line, whose overrides may hold secrets.
        settings = wandb.Settings(
            console="off", x_disable_meta=True, disable_git=True, save_code=False, silent=True, finish_timeout=FINISH_S
        )
        name = os.environ.get("WANDB_NAME") or self._run_dir.resolve().name
        return {"id": self._id, "resume": "allow", "name": name, "dir": str(self._run_dir), "settings": settings}

    def _lose(self, cause: BaseException | str) -> None:
        self._lost += 1
        if not self._said:
            self._said = True
            told = cause if isinstance(cause, str) else f"{type(cause).__name__}: {one_line(str(cause))}"
            logger.warning("monitor: %s: %s; the run goes on", self._name, redact(told))


def _be_alone_for_accelerate() -> None:
    """The state that accelerate's trackers and its logger ask for: that of a single process on the CPU.

    Else accelerate would set the GPU, and below `accelerate launch --use_deepspeed` start a process group.
    """
    from accelerate import PartialState

    meanwhile = {"LOCAL_RANK": None, "ACCELERATE_CPU_AFFINITY": None, "ACCELERATE_TORCH_DEVICE": "cpu"}
    found = {name: os.environ.get(name) for name in meanwhile}
    _set(meanwhile)
    try:
        PartialState()
    finally:
        _set(found)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _others(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name != TENSORBOARD]


def _ids(run_dir: Path) -> dict[str, str]:
    return {name: str(value) for name, value in (read_json_object(run_dir / IDS) or {}).items()}
