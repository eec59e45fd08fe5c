"""Files of a study: tokens, trained heads, and one JSON line per finished run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atr_scale.errors import UserError
from tools.study.recipes import LEARNING_RATES, SWEEP, Recipe

Line = dict[str, Any]
ESC50 = "esc50"


@dataclass(frozen=True)
class Settings:
    """out: folder of the study. demo: folder of the demo corpora. steps, encoder_steps: optimizer steps of a head and
    of the encoders. esc50: folder of ESC-50, weights of mn04, and folder of a sentence encoder for its captions.
    """

    out: Path
    demo: Path
    seeds: tuple[int, ...]
    steps: int
    encoder_steps: int
    esc50: tuple[Path, Path, Path] | None = None

    def tokens(self, encoders: str, seed: int) -> Path:
        return self.out / "tokens" / (f"{ESC50}.pt" if encoders == ESC50 else f"{encoders}-{seed}.pt")

    def head(self, recipe: Recipe, seed: int) -> Path:
        return self.out / "heads" / f"{hashlib.sha256(recipe.key.encode()).hexdigest()[:12]}-{seed}.pt"

    @property
    def runs(self) -> Path:
        return self.out / "runs.jsonl"

    def lines(self) -> list[Line]:
        """Finished runs. A last line that a crash cut short is left out."""
        if not self.runs.exists():
            return []
        return [json.loads(line) for line in self.runs.read_text(encoding="utf-8").splitlines() if line.endswith("}")]

    def claim(self) -> None:
        """Store the fixed settings in `out`. Raises UserError if it holds runs with other settings."""
        stamp, wanted = self.out / "study.json", {"steps": self.steps, "encoder_steps": self.encoder_steps}
        if stamp.exists() and (found := json.loads(stamp.read_text(encoding="utf-8"))) != wanted:
            raise UserError(
                f"{self.out} holds runs with {found}, not {wanted}: give another --out, or the same settings"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(wanted), encoding="utf-8")


def name_of(kind: str, recipe: Recipe | None, seed: int) -> str:
    """Name of a run. kind: "sweep", "demo", "esc50" or "teachers"."""
    return f"{kind} {recipe.key if recipe else ''} {seed}"


def chosen_rates(lines: list[Line]) -> dict[str, float]:
    """Learning rate of each family: the one with the best t2a mAP@10 on the validation split in the sweep."""
    found = {line["name"]: line["metrics"]["validation/t2a/mAP@10"] for line in lines if line["kind"] == "sweep"}
    by_family: dict[str, dict[float, float]] = {}
    for recipe in SWEEP:
        value = next((v for name, v in found.items() if name.startswith(f"sweep {recipe.key} ")), None)
        if value is not None and recipe.lr is not None:
            by_family.setdefault(recipe.family, {})[recipe.lr] = value
    return {
        family: max(values, key=lambda lr: values[lr])
        for family, values in by_family.items()
        if len(values) == len(LEARNING_RATES)
    }
