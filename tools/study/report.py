"""Write tables and figures of all finished runs into the section "Study" of RESULTS.md, with a list of missing runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from atr_scale.errors import UserError
from tools.study import pictures
from tools.study.corpora import TESTS
from tools.study.found import TITLES, Found, Value, scorers
from tools.study.negatives import KINDS
from tools.study.recipes import BASELINE, BATCH, EXPERIMENTS, TEMPERATURE, WIDTH, Recipe
from tools.study.store import ESC50, Settings, chosen_rates

BEGIN, END = "<!-- study: written by tools.study -->", "<!-- study: end -->"
METRICS = {"t2a/R@1": "R@1", "t2a/mAP@10": "mAP@10", "t2a/nDCG@16": "nDCG@16", "a2t/R@1": "a2t R@1"}
REAL = {"zero_shot/accuracy": "accuracy", "class/mAP": "class mAP"}


def write_results(settings: Settings, results: Path) -> None:
    """Replace the text between the two markers, or append a section with an empty part for the reasons."""
    found = Found(settings)
    if not found.lines:
        raise UserError(f"no finished runs in {settings.out}: call without --report first")
    settings.claim()
    folder = results.parent / "docs" / "figures"
    drawn = pictures.draw(found, folder)
    block = "\n".join([BEGIN, "", *_section(found, settings, drawn), "", END])
    text = results.read_text(encoding="utf-8") if results.exists() else "# Results\n"
    if BEGIN in text:
        text = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n## Study\n\n{block}\n\n### Reasons\n"
    results.write_text(text, encoding="utf-8")


def _section(found: Found, settings: Settings, drawn: Sequence[str]) -> list[str]:
    rates = ", ".join(f"{family} {rate:g}" for family, rate in chosen_rates(settings.lines()).items())
    out = [
        "Synthetic demo corpora (`atr-scale demo-data`), whose relevance is known. The results do not show how large an"
        " effect is on real recordings. `python -m tools.study`, "
        f"{len(settings.seeds)} seeds, mean ± standard deviation over seeds, percent.",
        "",
        "All rows use small_cnn and the text encoder of the demo. They are trained once per seed on the three corpora"
        f" ({settings.encoder_steps} steps, the sum of three NT-Xent losses with a head each: meanmax, tap, lgmm), then"
        f" frozen. On their tokens each row trains projections (two layers, width {WIDTH}) and a scorer:"
        f" {settings.steps} steps, batch {BATCH}, Adam, crops of 10 s, learned temperature from {TEMPERATURE}."
        " The model after the last step is tested. The learning rate of a family is chosen on the validation split with"
        f" the first seed and NT-Xent: {rates or 'not run'}. Seeds change encoders, heads and batches. Chance level of"
        " t2a R@1: 0.4 (AudioCaps format, 250 clips, 1,250 captions) and 1.7 (Clotho format, 60 clips, 300 captions)."
        " nDCG@16 uses the relevance as gain.",
    ]
    missing: list[str] = []
    for letter, experiment in EXPERIMENTS.items():
        out += ["", f"### {letter}) {experiment.title}", "", *([experiment.note, ""] if experiment.note else [])]
        out += _retrieval_table(found, experiment.rows)
        missing += _missing(found, f"{letter})", experiment.rows)
        if letter in drawn:
            out += ["", f"![{experiment.title}](docs/figures/study-{letter}.png)"]
        if letter in ("a", "b"):
            out += _real_table(found, experiment.rows)
        if letter == "d":
            out += ["", "### e) Hard negatives", "", *_negatives_table(found)]
            out += ["", "![Hard negatives](docs/figures/study-e.png)"] if "e" in drawn else []
        if letter == "g":
            out += _teacher_table(found)
    out += ["", "### j) Cost", "", *_cost_table(found)]
    out += ["", "![Cost](docs/figures/study-j.png)"] if "j" in drawn else []
    return [*out, "", "### Not run", "", *_not_run(found, missing)]


def _retrieval_table(found: Found, rows: Mapping[str, Recipe]) -> list[str]:
    keys = [f"{test}/{metric}" for test in TESTS for metric in METRICS]
    heads = [f"{TITLES[test]}: {name}" if k == 0 else name for test in TESTS for k, name in enumerate(METRICS.values())]
    return _table(heads, {name: [_percent(found.value(recipe, key)) for key in keys] for name, recipe in rows.items()})


def _real_table(found: Found, rows: Mapping[str, Recipe]) -> list[str]:
    cells = {name: [_percent(found.value(r, key, ESC50)) for key in REAL] for name, r in rows.items()}
    if not any(cell for row in cells.values() for cell in row):
        return []
    head = (
        "ESC-50, real recordings: mn04 frozen, class captions by a frozen sentence encoder, folds 1-4 train, 5 tests."
    )
    return ["", head, "", *_table(list(REAL.values()), cells)]


def _negatives_table(found: Found) -> list[str]:
    keys = [f"{test}/hard/{kind}" for test in TESTS for kind in KINDS]
    heads = [f"{TITLES[test]}: {kind}" if k == 0 else kind for test in TESTS for k, kind in enumerate(KINDS)]
    rows = {name: [_percent(found.value(recipe, key)) for key in keys] for name, recipe in scorers(found).items()}
    note = (
        "Percentage of captions that score higher with their clip than a copy in which one stated fact is made false:"
        " another count, the two events in the other order (the same words), the opposite pitch or loudness. Chance is"
        " 50. Rows marked (d) have the smaller batch of experiment d."
    )
    return [note, "", *_table(heads, rows)]


def _teacher_table(found: Found) -> list[str]:
    values = found.statistics()
    if not values:
        return []
    note = "Over pairs of the training split whose caption belongs to another clip:"
    return ["", note, "", "| | |", "|-|-|", *(f"| {key.replace('/', ', ')} | {v:.3f} |" for key, v in values.items())]


def _cost_table(found: Found) -> list[str]:
    base = found.value(BASELINE, "audiocaps/t2a/mAP@10")
    cells = {}
    for name, recipe in scorers(found).items():
        seconds = found.value(recipe, "cpu_seconds_per_step", part="cost")
        peak = found.value(recipe, "peak_mb", part="cost")
        mine = found.value(recipe, "audiocaps/t2a/mAP@10")
        gain = f"{100 * (mine[0] - base[0]):+.1f}" if mine and base else ""
        cells[name] = [
            str(recipe.batch),
            f"{1000 * seconds[0]:.0f}" if seconds else "",
            f"{peak[0]:.0f}" if peak else "",
            gain,
        ]
    note = (
        "One thread. CPU time of a step of projections and scorer (forward, backward, Adam), peak memory of the tensors"
        " in a step, and the gain in mAP@10 on the AudioCaps format over meanmax with batch 64, in points."
    )
    return [note, "", *_table(["batch", "ms a step", "MB", "gain"], cells)]


def _not_run(found: Found, missing: list[str]) -> list[str]:
    fixed = [
        "f) resizing with HTS-AT: the demo corpora are too small to train an encoder of that size from random weights",
        "h) paraphrases by a language model",
    ]
    if not any(line["kind"] == ESC50 for line in found.lines.values()):
        fixed.append("a), b) on ESC-50: `--esc50`, `--mn04` and `--sentences` were not given")
    else:
        for letter in ("a", "b"):
            missing += _missing(found, f"{letter}) on ESC-50", EXPERIMENTS[letter].rows, ESC50)
    return [f"- {line}" for line in [*fixed, *missing]]


def _missing(found: Found, place: str, rows: Mapping[str, Recipe], kind: str = "demo") -> list[str]:
    counts = {name: len(found.runs(recipe, kind)) for name, recipe in rows.items()}
    return [
        f"{place} {name}: {count} of {len(found.seeds)} seeds"
        for name, count in counts.items()
        if count < len(found.seeds)
    ]


def _table(heads: list[str], rows: Mapping[str, list[str]]) -> list[str]:
    out = [f"| | {' | '.join(heads)} |", "|" + "-|" * (len(heads) + 1)]
    return out + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items() if any(cells)]


def _percent(value: Value | None) -> str:
    if value is None:
        return ""
    mean, deviation, seeds = value
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}" if seeds > 1 else f"{100 * mean:.1f}"
