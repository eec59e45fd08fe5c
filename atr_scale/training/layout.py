"""The charts of a run on one page, TensorBoard's CUSTOM SCALARS tab. docs/monitoring.md explains the tags."""

from __future__ import annotations

import re
from collections.abc import Iterable

Charts = dict[str, list[str]]


def layout(validation: Iterable[str]) -> dict[str, dict[str, list[str | list[str]]]]:
    """The charts by section and title, as SummaryWriter.add_custom_scalars takes them.

    validation: names of the sets that training evaluates. All other splits, which `atr-scale evaluate` adds, are test
    sets. A chart shows all tags that a regular expression matches from their beginning on.
    """
    own = f"(?:{'|'.join(re.escape(name) for name in validation) or 'validation'})"
    test = f"(?!train/|saving/|{own}/).+"
    sections: dict[str, Charts] = {
        "loss": {
            "loss": ["train/loss$"],
            "loss by term": ["train/loss/[^/]+$"],
            "loss by term and direction": ["train/loss/[^/]+/(?:t2a|a2t)$"],
        },
        "validation": _results(own),
        "test": _results(test),
        "optimizer": {
            "temperature": ["train/temperature$"],
            "learning rate": ["train/lr/.+"],
            "gradient norm": ["train/grad_norm$"],
            "gradient norm by group": ["train/grad_norm/.+"],
            "skipped steps, failed saves": ["train/(?:skipped_steps|fp16_overflows)$", "saving/failed$"],
        },
        "speed": {
            "samples a second": ["train/samples_per_s$"],
            "audio seconds a second": ["train/audio_s_per_s$"],
            "waiting for data, share of the time": ["train/data_wait.*"],
            "seconds of saving and of evaluation": ["train/saving_s$", "(?!train/).+/seconds$"],
            "peak memory of a rank, GB": ["train/memory_gb$"],
        },
        "data": {
            "duplicates, share of a batch": ["train/duplicates/.+"],
            "dropped samples": ["train/dropped/.+"],
            "epoch": ["train/epoch$"],
        },
    }
    return {
        section: {title: ["Multiline", tags] for title, tags in charts.items()} for section, charts in sections.items()
    }


def _results(split: str) -> Charts:
    """split: a regular expression of the names of splits."""
    return {
        "recall, text to audio": [f"{split}/t2a/R@(?:1|5|10)$"],
        "recall, audio to text": [f"{split}/a2t/R@(?:1|5|10)$"],
        "mean average precision, accuracy": [f"{split}/(?:(?:t2a|a2t)/mAP@10|zero_shot/accuracy)$"],
    }
