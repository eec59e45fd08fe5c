"""The compared recipes. A recipe is one training of projections, scorer and objective on tokens of frozen encoders.

Experiments with the same recipe share its runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

STEPS, BATCH, WIDTH, TEMPERATURE = 200, 64, 128, 0.07
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
NT_XENT: dict[str, dict[str, Any]] = {"nt_xent": {"weight": 1.0}}


@dataclass(frozen=True)
class Recipe:
    """scorer, options: see build_scorer. objective: options of loss terms by name.

    encoders: their training data: "all", one of the corpora, or "resized" (all, with long clips resized).
    long_clips: encoding of long test clips: "whole", "windows", "crop", "resize".
    extra_captions: number of further captions per training clip.
    batch: number of pairs in a loss.
    teacher: source of the teacher scores, see teachers.py. `distillation` is the weight of that term. Such a run starts
        from the run of BASELINE with the same seed.
    rerank: number of candidates of a dual encoder that the trained model of this recipe re-ranks.
    lr: learning rate, None for the one that the sweep chose for the family.
    """

    scorer: str = "meanmax"
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: NT_XENT)
    encoders: str = "all"
    long_clips: str = "whole"
    extra_captions: int = 0
    batch: int = BATCH
    teacher: str | None = None
    distillation: float = 0.0
    rerank: int | None = None
    lr: float | None = None

    @property
    def key(self) -> str:
        """Name of the recipe in runs: all values that differ from the defaults, as JSON."""
        default = asdict(Recipe())
        return json.dumps({k: v for k, v in asdict(self).items() if v != default[k]}, sort_keys=True)

    @property
    def family(self) -> str:
        """Family of the scorer. Recipes of one family share a learning rate."""
        return self.scorer if self.scorer in ("tap", "lgmm", "coattention") else "cosine"

    @property
    def depends(self) -> bool:
        """Whether the recipe needs runs of others: of BASELINE, or of the two stages of re-ranking."""
        return self.teacher is not None or self.rerank is not None


BASELINE = Recipe()
TAP, LGMM = Recipe("tap", {"attention_dim": WIDTH}), Recipe("lgmm")
SMALL_BATCH = 16
CO_ATTENTION = Recipe(
    "coattention",
    {"width": 32, "heads": 2, "ffn_width": 64, "pool_width": 64, "joint": 64, "dropout": 0.0},
    batch=SMALL_BATCH,
)


def _pmr(omega: float, **options: bool) -> dict[str, dict[str, Any]]:
    return {"pmr": {"weight": 1.0, "omega": omega, **options}}


def _lgmm(beta: float = 0.0, intra: float = 0.0) -> Recipe:
    """LGMM with its loss terms; a weight of 0 leaves a term out."""
    terms: dict[str, dict[str, Any]] = dict(NT_XENT)
    if beta:
        terms["cmsc"] = {"weight": 1.0, "beta": beta, "beta_warmup_steps": STEPS // 4}
    if intra:
        terms["intra_modal"] = {"weight": intra}
    return replace(LGMM, objective=terms)


def _layers(configuration: str, depth: int) -> Recipe:
    return replace(CO_ATTENTION, options={**CO_ATTENTION.options, "configuration": configuration, "depth": depth})


def _distilled(teacher: str, supervised: float, weight: float = 1.0) -> Recipe:
    terms = {"nt_xent": {"weight": supervised}}
    return replace(BASELINE, objective=terms, teacher=teacher, distillation=weight)


RERANKED = _layers("iterating", 3)
REVISED_AT = 1 / TEMPERATURE


@dataclass(frozen=True)
class Experiment:
    """A question and the recipes that answer it, by their names in the table."""

    title: str
    rows: Mapping[str, Recipe]
    note: str = ""


EXPERIMENTS: dict[str, Experiment] = {
    "a": Experiment(
        "Pooling",
        {
            **{name: Recipe(name) for name in ("mean", "max", "meanmax", "pooled", "netrvlad", "attention")},
            "tap": TAP,
            "lgmm": LGMM,
        },
        "`pooled` is the pooled embedding of the audio encoder, mean plus maximum before the projection.",
    ),
    "b": Experiment(
        "NT-Xent against PMR",
        {
            "meanmax, NT-Xent": BASELINE,
            **{
                f"meanmax, PMR ω = {omega:.3g}": replace(BASELINE, objective=_pmr(omega))
                for omega in (1.0, 5.0, REVISED_AT, 30.0)
            },
            **{
                f"meanmax, PMR ω = {omega:.3g}, prior detached": replace(
                    BASELINE, objective=_pmr(omega, detach_prior=True)
                )
                for omega in (5.0, REVISED_AT)
            },
            "meanmax, PMR ω = 0.1, prior times batch": replace(BASELINE, objective=_pmr(0.1, scale_by_batch=True)),
            "tap, NT-Xent": TAP,
            **{f"tap, PMR ω = {omega:.3g}": replace(TAP, objective=_pmr(omega)) for omega in (5.0, REVISED_AT)},
        },
        "The prior starts from ω; 14.3 is one over the initial temperature.",
    ),
    "c": Experiment(
        "LGMM's loss terms",
        {
            "lgmm, NT-Xent": LGMM,
            "+ intra-modal contrast": _lgmm(intra=1.0),
            **{f"+ CMSC, β = {beta}": _lgmm(beta) for beta in (0.1, 0.2, 0.3, 0.5)},
            "+ CMSC, β = 0.2, and intra-modal contrast": _lgmm(0.2, 1.0),
            "meanmax, NT-Xent": BASELINE,
            "meanmax + CMSC, β = 0.2": replace(_lgmm(0.2), scorer="meanmax"),
        },
        "β rises over the first quarter of the steps. NT-Xent plus CMSC is one soft cross-entropy with β / 2.",
    ),
    "d": Experiment(
        "Co-attention",
        {
            "meanmax": replace(BASELINE, batch=SMALL_BATCH),
            "tap": replace(TAP, batch=SMALL_BATCH),
            "lgmm": replace(LGMM, batch=SMALL_BATCH),
            "co-attention, single": _layers("single", 1),
            **{
                f"co-attention, {configuration}, depth {depth}": _layers(configuration, depth)
                for configuration in ("stacking", "iterating")
                for depth in (3, 5, 7)
            },
            **{f"meanmax, best {k} re-ranked by iterating, depth 3": replace(RERANKED, rerank=k) for k in (10, 50)},
        },
        f"All with batch {SMALL_BATCH};"
        " width 32, 2 heads, feed-forward 64, no dropout. At depth 1 the three configurations are one.",
    ),
    "f": Experiment(
        "Long clips",
        {
            f"{recipe.scorer}, {name}": replace(recipe, encoders=encoders, long_clips=way)
            for recipe in (BASELINE, TAP)
            for name, encoders, way in (
                ("whole clip in one pass", "all", "whole"),
                ("windows of 10 s", "all", "windows"),
                ("the middle 10 s", "all", "crop"),
                ("log-mel resized to 10 s", "resized", "resize"),
            )
        },
        "Clips of the Clotho-format test last 15 to 30 s. Training uses crops of 10 s, in the last row resized clips.",
    ),
    "g": Experiment(
        "Estimated correspondences",
        {
            "stage 1": BASELINE,
            "supervised alone, again": _distilled("uniform", 1.0, 0.0),
            **{
                f"{name}, supervised weight {supervised:g}": _distilled(teacher, supervised)
                for teacher, name in (("true", "true"), ("ensemble", "ensemble"), ("self", "self"))
                for supervised in (0.0, 1.0)
            },
            "ensemble, λ = 0.25, supervised weight 1": _distilled("ensemble", 1.0, 0.25),
            "ensemble, λ = 0.5, supervised weight 1": _distilled("ensemble", 1.0, 0.5),
            "ensemble of probabilities, supervised weight 0": _distilled("probabilities", 0.0),
            "random, supervised weight 1": _distilled("random", 1.0),
            "uniform, supervised weight 1": _distilled("uniform", 1.0),
        },
        "Stage 2 starts from stage 1 with the same seed and trains for as many steps. The temperature is 0.05 for"
        " teacher and student, λ = 1 unless stated. The ensemble is stage 1 of all seeds, with their encoders.",
    ),
    "h": Experiment(
        "More captions",
        {
            f"{recipe.scorer}, {count} further captions a clip": replace(recipe, extra_captions=count)
            for recipe in (BASELINE, TAP)
            for count in (0, 1, 5)
        },
        "Further captions come from the grammar, which knows the scene; a language model knows only the caption. So"
        " this is an upper bound for paraphrases. The encoders have not been trained on them.",
    ),
    "i": Experiment(
        "From one corpus to another",
        {f"trained on {name}": Recipe(encoders=name) for name in ("audiocaps", "clotho", "wavcaps", "all")},
        "The encoders are also trained on that corpus alone, for as many steps. WavCaps has no test split.",
    ),
}

SWEEP = [replace(recipe, lr=lr) for recipe in (BASELINE, TAP, LGMM, RERANKED) for lr in LEARNING_RATES]
