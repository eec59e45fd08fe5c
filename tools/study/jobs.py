"""All runs of a study, in processes of one thread each. Finished runs are skipped."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

import torch
from tqdm import tqdm

from atr_scale.errors import UserError
from tools.study import encoders, esc50, runs, teachers
from tools.study.recipes import BASELINE, EXPERIMENTS, SWEEP, Recipe
from tools.study.store import ESC50, Line, Settings, chosen_rates, name_of

logger = logging.getLogger("study")
ON_ESC50 = ("a", "b")
ENSEMBLE = "g"  # needs the same cheap run of every seed
# All groups run with the first seed before they run with the others. Those that need their own encoders come last.
GROUPS = ("abch", "d", ESC50, "fi")


@dataclass(frozen=True)
class Job:
    """kind: "tokens" (writes a file), or the kind of a line of runs.jsonl: "sweep", "demo", "esc50", "teachers"."""

    kind: str
    recipe: Recipe | None
    seed: int
    encoders: str = ""

    @property
    def name(self) -> str:
        return name_of(self.kind, self.recipe, self.seed)


def phases(settings: Settings, chosen: Sequence[str]) -> Iterator[list[Job]]:
    """Yield lists of jobs. The jobs of a list may run in parallel; a list starts when the one before is finished."""
    first, *others = settings.seeds
    if ENSEMBLE in chosen:
        yield from _phases_of([ENSEMBLE], settings.seeds, first)
        if others:
            yield [Job("teachers", None, first)]
    for seeds in [first], others:
        for group in GROUPS:
            if group != ESC50:
                yield from _phases_of([letter for letter in chosen if letter in group], seeds, first)
            elif settings.esc50 is not None:
                real = _recipes([letter for letter in chosen if letter in ON_ESC50])
                yield [Job("tokens", None, first, ESC50)] if real else []
                yield [Job("esc50", recipe, seed) for seed in seeds for recipe in real]


def _phases_of(letters: Sequence[str], seeds: Sequence[int], first: int) -> Iterator[list[Job]]:
    """Yield the jobs seed by seed, so that an interrupted study has complete tables of fewer seeds.

    The learning rates are chosen with the first seed. Recipes that depend on other runs come last.
    """
    recipes = _recipes(letters)
    if any(recipe.teacher for recipe in recipes) and BASELINE not in recipes:
        recipes.insert(0, BASELINE)
    families = {recipe.family for recipe in recipes}
    for seed in seeds:
        yield [Job("tokens", None, seed, name) for name in dict.fromkeys(recipe.encoders for recipe in recipes)]
        if seed == first:
            yield [Job("sweep", recipe, seed) for recipe in SWEEP if recipe.family in families]
        yield [Job("demo", recipe, seed) for recipe in recipes if not recipe.depends]
    yield [Job("demo", recipe, seed) for seed in seeds for recipe in recipes if recipe.depends]


def _recipes(letters: Sequence[str]) -> list[Recipe]:
    """The recipes of some experiments, each once."""
    return list({r.key: r for letter in letters for r in EXPERIMENTS[letter].rows.values()}.values())


def perform(job: Job, settings: Settings, rates: dict[str, float]) -> Line:
    """Do a job, in a worker process."""
    if job.kind == "tokens":
        path = settings.tokens(job.encoders, job.seed)
        if job.encoders == ESC50:
            assert settings.esc50 is not None
            esc50.write_tokens(*settings.esc50, path)
        else:
            demo = runs.demo_of(settings.demo)
            encoders.save_tokens(encoders.tokens_of_demo(demo, job.encoders, job.seed, settings.encoder_steps), path)
        return {}
    if job.kind == "teachers":
        return teachers.statistics(runs.demo_of(settings.demo).training, settings)
    assert job.recipe is not None
    lr = job.recipe.lr or rates[job.recipe.family]
    if job.kind == "esc50":
        line = runs.run_esc50(job.recipe, job.seed, lr, settings)
    else:
        line = runs.run_demo(job.recipe, job.seed, lr, settings, validate=job.kind == "sweep")
    return {**line, "lr": lr}


def run(settings: Settings, chosen: Sequence[str], workers: int, minutes: float) -> bool:
    """Do all jobs that are not finished, until the time is up. Returns whether all of them succeeded."""
    end, failed = time.monotonic() + 60 * minutes, 0
    settings.claim()
    context = multiprocessing.get_context("spawn")  # forking a process with threads of torch can deadlock
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        for phase in phases(settings, chosen):
            lines = settings.lines()
            done, rates = {line["name"] for line in lines}, chosen_rates(lines)
            todo = [job for job in phase if not _is_done(job, settings, done)]
            running: dict[Future[Line], Job] = {}
            bar = tqdm(total=len(todo), desc="study", unit="run", disable=None)
            while running or (todo and time.monotonic() < end):
                while todo and len(running) < workers and time.monotonic() < end:
                    job = todo.pop(0)
                    running[pool.submit(perform, job, settings, rates)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    bar.update()
                    try:
                        line = future.result()
                    except UserError:
                        raise
                    except Exception:
                        logger.exception("%s failed", job.name)
                        failed += 1
                    else:
                        _note(job, line, settings)
            bar.close()
    return failed == 0


def _begin() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # denormal weights after a sharp softmax slow a step threefold


def _is_done(job: Job, settings: Settings, done: set[str]) -> bool:
    if job.kind == "tokens":
        return settings.tokens(job.encoders, job.seed).exists()
    return job.name in done


def _note(job: Job, line: Line, settings: Settings) -> None:
    logger.info("%s done", job.name if job.kind != "tokens" else f"tokens {job.encoders} {job.seed}")
    if job.kind == "tokens":
        return
    with settings.runs.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": job.name, "kind": job.kind, "seed": job.seed, **line}) + "\n")
