"""What is counted: an update of a configuration, and the cases that have budgets.

Small ones cover every scorer, loss and kind of encoder once; real ones have the sizes of training runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atr_scale.config import RunConfig, load_config
from atr_scale.losses.terms import LOSS_TERMS
from atr_scale.scorers import SCORERS
from tools.gpu_counts.counter import Counts
from tools.gpu_counts.update import Part, Workload, count_update

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = CONFIGS / "quickstart" / "pretrain.yaml"
SMALL_TEXT = "sentence-transformers/all-MiniLM-L6-v2"
LOSS_OPTIONS = {
    "pmr": ("objective.pmr.omega=14.3",),
    "distillation": ("objective.distillation.tables=[teacher]",),
}
SCORER_OPTIONS = {"coattention": ("model.scorer.options={depth: 1, pairs_per_tile: 16}",)}
KINDS_OF_AUDIO = ("small_cnn", "mn04", "tiny_cnn14", "tiny_htsat", "tiny_passt", "tiny_atst")


@dataclass(frozen=True)
class Case:
    """An update of a configuration, or a part of one."""

    config: RunConfig
    load: Workload
    part: Part = "update"

    def count(self) -> Counts:
        return count_update(self.config, self.load, self.part)


def recipe(path: Path, ranks: int, global_batch: int | None = None) -> Case:
    """A whole update of a configuration file. Raises UserError if it cannot be read or does not divide among ranks."""
    config = load_config(path)
    return Case(config, Workload.of(config, ranks, global_batch))


def small_cases() -> dict[str, Case]:
    """Every scorer, every loss in tiles, the kinds of audio encoders, and one whole update, with a text encoder."""
    found = {
        f"scorer {name}": _heads(16, 8, f"model.scorer.name={name}", *SCORER_OPTIONS.get(name, ())) for name in SCORERS
    }
    found |= {f"loss {name}": _heads(4096, 8, *_loss(name)) for name in LOSS_TERMS}
    found |= {f"audio {name}": _audio(name, 2, 2.0) for name in KINDS_OF_AUDIO}
    return {**found, "update": _update("train.zero_stage=1")}


def real_cases() -> dict[str, Case]:
    """The sizes of training runs, and what small cases leave out: dense losses, ResNet38, CLAP, GradCache, ZeRO 0."""
    cmsc = ("objective.cmsc.weight=1", "objective.intra_modal.weight=1")
    many = ("model.text.name=bert-base-uncased", "model.scorer.name=attention")
    dense = {f"loss {name}, dense": _heads(64, 8, *_loss(name)) for name in LOSS_TERMS}
    return dense | {
        "NT-Xent, 32,768 over 8": _heads(32_768, 8),
        "NT-Xent, 65,536 on one": _heads(65_536, 1),
        "PMR, 32,768 over 8": _heads(32_768, 8, *_loss("pmr")),
        "NT-Xent + CMSC + intra-modal, 32,768 over 8": _heads(32_768, 8, *cmsc),
        "TAP, 32,768 over 8": _heads(32_768, 8, "model.scorer.name=tap"),
        "LGMM, 2,048 over 8": _heads(2_048, 8, "model.scorer.name=lgmm"),
        "co-attention, 64 over 8": _heads(64, 8, "model.scorer.name=coattention"),
        "mn40, 64 x 30 s": _audio("mn40", 64, 30.0),
        "mn40, 64 of WavCaps' lengths": _audio("mn40", 64, 30.0, mixed=True),
        "HTS-AT, 64 x 10 s": _audio("htsat", 64, 10.0),
        "HTS-AT, 64 x 30 s in windows": _audio("htsat", 64, 30.0),
        "PaSST, 64 x 10 s": _audio("passt_s16", 64, 10.0),
        "Cnn14, 64 x 10 s": _audio("cnn14", 64, 10.0, "model.audio.spec_augment={time_drop_width: 64}"),
        "ResNet38, 64 x 10 s": _audio("resnet38", 64, 10.0),
        "CLAP, 64 x 10 s": _audio("clap", 64, 10.0),
        "ATST-Frame, 64 x 30 s in windows": _audio("atst_frame", 64, 30.0),
        "RoBERTa-large, 64 x 32 words": _text("roberta-large"),
        "step of 228 tensors, ZeRO 0": _update("train.zero_stage=0", *many, part="optimizer"),
        "step of 228 tensors, ZeRO 1": _update("train.zero_stage=1", *many, part="optimizer"),
        "update in two chunks": _update("train.zero_stage=1", "train.micro_batch_size=2"),
        "pretrain_wavcaps.yaml, one of 16": recipe(CONFIGS / "pretrain_wavcaps.yaml", 16),
    }


def _case(part: Part, load: Workload, *overrides: str) -> Case:
    return Case(load_config(BASE, [f"model.text.name={SMALL_TEXT}", *overrides]), load, part)


def _heads(batch: int, ranks: int, *overrides: str) -> Case:
    load = Workload(ranks, batch // ranks, seconds=0.001, words=24)
    return _case("heads", load, "model.projection.dim=512", *overrides)


def _loss(name: str) -> tuple[str, ...]:
    return ("objective.nt_xent.weight=0", f"objective.{name}.weight=1", *LOSS_OPTIONS.get(name, ()))


def _audio(name: str, rows: int, seconds: float, *overrides: str, mixed: bool = False) -> Case:
    load = Workload(1, rows, seconds, words=24, mixed=mixed)
    return _case("audio", load, f"model.audio.name={name}", *overrides)


def _text(name: str) -> Case:
    return _case("text", Workload(1, 64, 0.001, words=32), f"model.text.name={name}")


def _update(*overrides: str, part: Part = "update") -> Case:
    return _case(part, Workload(8, 4, seconds=1.0, words=12), *overrides)
