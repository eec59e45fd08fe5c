"""report.md of a run: tables, pictures and examples, made from the files of the run folder."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from atr_scale import plots
from atr_scale.errors import UserError
from atr_scale.evaluation.example_tables import examples_table, misses_table, table_cell
from atr_scale.evaluation.metrics import CUTOFFS, GRADED_AT, PRECISION_AT, RECALL_AT
from atr_scale.evaluation.result import EvaluationResult
from atr_scale.evaluation.sounds import sound_path
from atr_scale.sections import flat

logger = logging.getLogger(__name__)

Line = Mapping[str, object]
DIRECTIONS = (("t2a", "text → audio"), ("a2t", "audio → text"))


def write_report(run_dir: Path, results: Sequence[EvaluationResult] | None = None) -> Path:
    """Write run_dir/report.md and run_dir/figures/*.png; returns the report's path.

    results: the evaluations to show; default every `evaluation-<split>.json` in the folder. Curves are drawn from
    metrics.jsonl, configuration and environment are read from config.resolved.yaml and environment.json. A part whose
    file does not exist is left out. Raises UserError if there is neither an evaluation nor metrics.jsonl.
    """
    if results is None:
        results = [EvaluationResult.load(path) for path in sorted(run_dir.glob("evaluation-*.json"))]
    lines = _read_lines(run_dir / "metrics.jsonl")
    if not results and not lines:
        raise UserError(f"{run_dir}: neither metrics.jsonl nor evaluation-*.json; give the folder of a run")
    train = [line for line in lines if line.get("kind") == "train"]
    evaluations = [line for line in lines if line.get("kind") == "evaluation"]
    pictures = _Pictures(run_dir / "figures")
    parts = [f"# {run_dir.resolve().name}", _headline(results)]
    for result in results:
        parts += _split(result, pictures, run_dir)
    if train:
        parts += ["## Training", _training_table(train), pictures("loss", plots.loss(train), "training loss")]
    parts += _curves(evaluations, pictures)
    if train:
        parts += [pictures("schedule", plots.schedule(train), "learning rate, temperature, gradient norm")]
        parts += [pictures("speed", plots.speed(train), "throughput, data wait, memory"), _losses_of_data(train)]
    if (run_dir / "tensorboard").is_dir():
        parts.append(_look_closer(run_dir))
    parts += [*_configuration(run_dir), *_environment(run_dir)]
    path = run_dir / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    logger.info("report: %s", path)
    return path


class _Pictures:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, figure: Figure, caption: str) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = name.replace("/", "-")
        figure.savefig(self.folder / f"{name}.png")
        return f"![{caption}]({self.folder.name}/{name}.png)"


def _headline(results: Sequence[EvaluationResult]) -> str:
    def one(result: EvaluationResult) -> str:
        keys = ("zero_shot/accuracy",) if result.labelled else ("t2a/R@1", f"t2a/mAP@{PRECISION_AT}")
        shown = ", ".join(f"{key} **{_percent(result.metrics[key])}**" for key in keys)
        chance = 1 / (result.num_texts if result.labelled else result.num_clips)
        return f"- {result.split}, step {result.step}: {shown} (chance {_percent(chance)})"

    return "\n".join(one(result) for result in results)


def _split(result: EvaluationResult, pictures: _Pictures, run_dir: Path) -> Iterator[str]:
    kind = "classes" if result.labelled else "captions"
    yield f"## {result.split}: {result.num_clips} clips, {result.num_texts} {kind}, step {result.step}"
    if result.labelled:
        yield _labelled_table(result)
        title, columns = f"similarity, {result.split}", "clips of the class (mean)"
    else:
        yield _retrieval_table(result)
        figure = plots.recall_and_ranks(result.ranks.t2a, result.ranks.best_a2t(), result.num_clips, result.num_texts)
        yield pictures(f"ranks-{result.split}", figure, "recall at k and ranks")
        title, columns = f"similarity, {result.split}: pairs on the diagonal", "clip of the caption in that row"
    figure = plots.heatmap(result.excerpt, title, "", columns, result.excerpt_names)
    yield pictures(f"similarity-{result.split}", figure, "similarity")

    def link(clip: int) -> str | None:
        path = sound_path(run_dir, result.split, clip)
        return path.relative_to(run_dir).as_posix() if path.exists() else None

    for heading, examples, table in (
        ("Worst misses", result.misses, misses_table),
        ("Examples", result.examples, examples_table),
    ):
        for direction, title in DIRECTIONS:
            shown = [example for example in examples if example.direction == direction]
            if shown:
                yield f"### {heading}, {title}\n\n" + table(shown, link)


def _retrieval_table(result: EvaluationResult) -> str:
    rows = [f"| | {' | '.join(title for _, title in DIRECTIONS)} |", "|:-|-:|-:|"]
    several = (
        f"t2a/nDCG@{GRADED_AT}" in result.metrics
    )  # mAP@16 then counts several relevant clips, and has its own row
    names = [*(f"R@{k}" for k in RECALL_AT), *(key for key in CUTOFFS if not (several and key == f"mAP@{GRADED_AT}"))]
    for name in names:
        cells = [_with_interval(result, f"{direction}/{name}", _percent) for direction, _ in DIRECTIONS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    cells = [_with_interval(result, f"{direction}/median_rank", "{:g}".format) for direction, _ in DIRECTIONS]
    rows.append(f"| median rank | {' | '.join(cells)} |")
    if several:
        for name, note in ((f"mAP@{GRADED_AT}", "several relevant clips"), (f"nDCG@{GRADED_AT}", "graded relevance")):
            rows.append(f"| {name}, {note} | {_with_interval(result, f't2a/{name}', _percent)} | |")
    note = (
        f"In brackets: 95 % bootstrap intervals over clips. Chance is R@1 {_percent(1 / result.num_clips)} for text →"
        f" audio. Audio → text recall counts the best ranked caption of a clip. Scoring: {result.method}."
    )
    return "\n".join(rows) + "\n\n" + note


def _labelled_table(result: EvaluationResult) -> str:
    names = {
        "zero_shot/accuracy": "zero-shot accuracy",
        "zero_shot/R@5": "class among the first five",
        "zero_shot/mAP": "mean 1 / rank of the class",
        "class/R@1": "class caption → clip, precision at 1",
        f"class/mAP@{PRECISION_AT}": f"class caption → clips, mAP@{PRECISION_AT}",
        "class/mAP": "class caption → clips, mAP",
    }
    rows = [f"| {name} | {_with_interval(result, key, _percent)} |" for key, name in names.items()]
    return "\n".join(["| | |", "|:-|-:|", *rows])


def _training_table(train: Sequence[Line]) -> str:
    def values(key: str) -> np.ndarray:
        return plots.series(train, key)[1]

    rows = {"steps": f"{train[-1]['step']}"}
    for key, name, show in (("samples_seen", "pairs seen", "{:,.0f}"), ("epoch", "epochs", "{:.2f}")):
        if len(values(key)):
            rows[name] = show.format(values(key)[-1])
    loss = values("loss")
    if len(loss):
        tail = loss[-max(1, len(loss) // 20) :]
        first = int(plots.series(train, "loss")[0][0])
        name = "loss, first" if first == 1 else f"loss, step {first}"  # version 0.5 logged the tenth step first
        rows[f"{name} → mean of the last {len(tail)} logged"] = f"{loss[0]:.3f} → {tail.mean():.3f} nats"
    for key, name, text in (
        ("samples_per_s", "throughput (median)", "{:.4g} samples/s"),
        ("data_wait", "waiting for data (median)", "{:.1%} of the time"),
    ):
        if len(values(key)):
            rows[name] = text.format(np.median(values(key)))
    if len(values("memory_gb")):
        rows["peak memory of a rank"] = f"{values('memory_gb').max():.2f} GB"
    if len(values("temperature")):
        rows["temperature, first → last"] = f"{values('temperature')[0]:.4g} → {values('temperature')[-1]:.4g}"
    return "\n".join(["| | |", "|:-|-:|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _losses_of_data(train: Sequence[Line]) -> str:
    """Dropped samples and skipped optimizer steps. Zeros are written too, so that they are not mistaken for missing."""
    dropped = {key.removeprefix("dropped/"): _last(train, key) for key in plots.keys_under(train, "dropped")}
    reasons = [f"{count:g} × {reason}" for reason, count in dropped.items() if count]
    nonfinite = sum("nonfinite" in line for line in train)
    return "\n".join(
        [
            "### Drops and skips",
            "",
            f"- samples dropped: {', '.join(reasons) or 'none'}",
            f"- optimizer steps skipped: {_last(train, 'skipped_steps'):g}",
            f"- fp16 overflows: {_last(train, 'fp16_overflows'):g}",
            f"- logged lines with a non-finite value: {nonfinite}",
        ]
    )


def _last(train: Sequence[Line], key: str) -> float:
    values = plots.series(train, key)[1]
    return float(values[-1]) if len(values) else 0.0


def _curves(evaluations: Sequence[Line], pictures: _Pictures) -> Iterator[str]:
    for split in dict.fromkeys(str(line.get("split")) for line in evaluations):
        lines = [line for line in evaluations if line.get("split") == split]
        if any("t2a/R@1" in line for line in lines):
            yield pictures(f"curve-{split}", plots.validation(lines, split), f"{split} retrieval over steps")
        if any("zero_shot/accuracy" in line for line in lines):
            yield pictures(f"zero-shot-{split}", plots.zero_shot(lines, split), f"{split} zero-shot over steps")


def _look_closer(run_dir: Path) -> str:
    resolved = run_dir.resolve()
    inside = resolved.is_relative_to(Path.cwd())
    shown = os.path.relpath(resolved) if inside else str(run_dir)
    return (
        "## Look closer\n\n"
        "Curves, similarity pictures and audio players of retrieved clips:\n\n"
        f"    tensorboard --logdir {shlex.quote(shown)} --host 127.0.0.1\n\n"
        "then open http://127.0.0.1:6006 (from another machine: `ssh -L 6006:127.0.0.1:6006 HOST`)."
    )


def _configuration(run_dir: Path) -> Iterator[str]:
    path = run_dir / "config.resolved.yaml"
    if path.exists():
        rows = [f"| {key} | {table_cell(text)} |" for key, text in _flat(OmegaConf.to_container(OmegaConf.load(path)))]
        yield "## Configuration\n\n<details><summary>config.resolved.yaml</summary>\n"
        yield "\n".join(["| key | value |", "|:-|:-|", *rows])
        yield "</details>"


def _environment(run_dir: Path) -> Iterator[str]:
    path = run_dir / "environment.json"
    if path.exists():
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = [f"| {key} | {table_cell(text)} |" for key, text in _flat(table) if text not in ("None", "")]
        yield "## Environment\n\n<details><summary>environment.json</summary>\n"
        yield "\n".join(["| key | value |", "|:-|:-|", *rows])
        yield "</details>"


def _flat(values: object) -> Iterator[tuple[str, str]]:
    for key, value in flat(values):
        yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last line of a run that has not ended, or was killed
            logger.warning("%s: a line that cannot be read is left out", path)
    return lines


def _with_interval(result: EvaluationResult, key: str, show: Callable[[float], str]) -> str:
    text = show(result.metrics[key])
    if key in result.intervals:
        low, high = result.intervals[key]
        text += f" [{show(low).removesuffix(' %')}, {show(high).removesuffix(' %')}]"
    return text


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
