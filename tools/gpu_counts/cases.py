"""The cases that budgets are kept for: every encoder, scorer and loss once in small, and the sizes that matter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atr_scale.config import RunConfig, load_config
from atr_scale.encoders import AUDIO_ENCODERS
from atr_scale.losses.terms import LOSS_TERMS
from atr_scale.scorers import SCORERS
from tools.gpu_counts.counter import Counts
from tools.gpu_counts.update import Part, Workload, count_update

ROOT = Path(__file__).parents[2]
WHOLE_RUN = ROOT / "configs" / "pretrain_wavcaps.yaml"
BASE = ROOT / "configs" / "quickstart" / "pretrain.yaml"
SMALL_TEXT = "sentence-transformers/all-MiniLM-L6-v2"
LOSSES = {
    "nt_xent": (),
    "pmr": ("objective.pmr.omega=14.3",),
    "cmsc": ("objective.cmsc.beta=0.2",),
    "intra_modal": (),
    "distillation": ("objective.distillation.tables=[teacher]",),
}


@dataclass(frozen=True)
class Case:
    """Part of an update of a configuration, with settings that differ from it."""

    part: Part
    load: Workload
    overrides: tuple[str, ...] = ()
    path: Path = BASE

    def config(self) -> RunConfig:
        return load_config(self.path, list(self.overrides))

    def count(self) -> Counts:
        return count_update(self.config(), self.load, self.part)


def _heads(batch: int, ranks: int, *overrides: str) -> Case:
    load = Workload(ranks, batch // ranks, seconds=0.001, words=24)
    return Case("heads", load, (f"model.text.name={SMALL_TEXT}", "model.projection.dim=512", *overrides))


def _loss(name: str) -> tuple[str, ...]:
    return ("objective.nt_xent.weight=0", f"objective.{name}.weight=1", *LOSSES.get(name, ()))


def _audio(name: str, rows: int, seconds: float, *overrides: str, mixed: bool = False) -> Case:
    load = Workload(1, rows, seconds, words=24, mixed=mixed)
    return Case("audio", load, (f"model.text.name={SMALL_TEXT}", f"model.audio.name={name}", *overrides))


def _text(name: str) -> Case:
    return Case("text", Workload(1, 64, 0.001, words=32), (f"model.text.name={name}",))


def _update(stage: int, *overrides: str) -> Case:
    load = Workload(8, 4, seconds=1.0, words=12)
    return Case("update", load, (f"model.text.name={SMALL_TEXT}", f"train.zero_stage={stage}", *overrides))


def small_cases() -> dict[str, Case]:
    """Every scorer and loss in its two forms, every kind of audio encoder, a text encoder, and whole updates."""
    found = {f"scorer {name}": _heads(64, 8, f"model.scorer.name={name}") for name in SCORERS}
    for name in LOSS_TERMS:
        found[f"loss {name}, dense"] = _heads(64, 8, *_loss(name))
        found[f"loss {name}, tiled"] = _heads(4096, 8, *_loss(name))
    for name in AUDIO_ENCODERS:
        if name.startswith("tiny_") or name in ("small_cnn", "mn04"):
            found[f"audio {name}"] = _audio(name, 2, 2.0)
    found["audio tiny_htsat, windows"] = _audio("tiny_htsat", 2, 25.0)
    found["audio mn04, lengths mixed"] = _audio("mn04", 8, 8.0, mixed=True)
    found["text"] = _text(SMALL_TEXT)
    found["update, ZeRO 1, text frozen"] = _update(1, "train.lr_text=0")
    return found


def real_cases() -> dict[str, Case]:
    """The sizes that training runs have."""
    cmsc = ("objective.cmsc.weight=1", "objective.cmsc.beta=0.2", "objective.intra_modal.weight=1")
    found = {
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
        "ATST-Frame, 64 x 30 s in windows": _audio("atst_frame", 64, 30.0),
        "RoBERTa-large, 64 x 32 words": _text("roberta-large"),
        "update in chunks, ZeRO 1": _update(1, "train.micro_batch_size=2"),
    }
    for stage in (0, 1):  # 228 trainable tensors
        found[f"update, ZeRO {stage}"] = _update(
            stage, "model.text.name=bert-base-uncased", "model.scorer.name=attention"
        )
    config = load_config(WHOLE_RUN)
    found["pretrain_wavcaps.yaml, one of 16"] = Case("update", Workload.of(config, 16), path=WHOLE_RUN)
    return found
