"""Names that people script against: they can be imported, take these arguments, and give what they say."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import typer

from atr_scale.cli import app
from atr_scale.encoders import AUDIO_ENCODERS, TokenSequence
from atr_scale.evaluation.metrics import retrieval_metrics
from atr_scale.losses import dense, tiled
from atr_scale.score_block import EmbeddingScores, StoredScores
from atr_scale.scorers import SCORERS, build_scorer
from tests.sequences import random_sequence

NEEDED = inspect.Parameter.empty
LOSSES: dict[str, dict[str, Any]] = {
    "nt_xent": {"scores": NEEDED, "temperature": NEEDED, "positives": None},
    "pmr": {"scores": NEEDED, "temperature": NEEDED, "omega": NEEDED, "positives": None, "detach_prior": False},
    "distillation": {"scores": NEEDED, "teacher_scores": NEEDED, "temperature": NEEDED},
    "cmsc": {
        "scores": NEEDED, "text_scores": NEEDED, "audio_scores": NEEDED, "temperature": NEEDED, "beta": NEEDED,
        "target_temperature": NEEDED, "positives": None,
    },
    "intra_modal": {"scores": NEEDED, "temperature": NEEDED, "same": None},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "atr_scale:load": {"run_or_checkpoint": NEEDED, "device": None},
    "atr_scale.inference:TrainedModel.embed_text": {"self": NEEDED, "texts": NEEDED},
    "atr_scale.inference:TrainedModel.embed_audio": {"self": NEEDED, "audio": NEEDED, "sample_rate": None},
    "atr_scale.inference:TrainedModel.similarity": {"self": NEEDED, "texts": NEEDED, "audio": NEEDED},
    "atr_scale.encoders:build_audio_encoder": {"name": NEEDED, "checkpoint": None},
    "atr_scale.encoders:build_text_encoder": {"name_or_path": NEEDED, "pooling": "first"},
    "atr_scale.scorers:build_scorer": {"name": NEEDED, "dim": NEEDED},
    "atr_scale.evaluation.metrics:retrieval_metrics": {"scores": NEEDED, "text_audio_ids": NEEDED, "audio_ids": NEEDED},
    "atr_scale.score_block:EmbeddingScores": {"text": NEEDED, "audio": NEEDED},
    "atr_scale.score_block:StoredScores": {"scores": NEEDED},
}
AUDIO_NAMES = "cnn14 resnet38 htsat passt_s16 passt_s10 atst_frame mn04 mn10 mn40 clap"
SCORER_NAMES = "pooled mean max meanmax netrvlad attention tap lgmm coattention"


def beginning(function: Callable[..., Any], count: int) -> dict[str, Any]:
    """Names and defaults of the first arguments; all that follow are optional."""
    arguments = list(inspect.signature(function).parameters.values())
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert all(p.default is not NEEDED or p.kind in optional for p in arguments[count:])
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in arguments[:count])
    return {p.name: p.default for p in arguments[:count]}


@pytest.mark.parametrize("place", OTHERS)
def test_functions_keep_their_arguments(place: str) -> None:
    module, _, path = place.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert beginning(found, len(OTHERS[place])) == OTHERS[place]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_keep_their_arguments_dense_and_tiled(name: str) -> None:
    """A block in the place of each score matrix, otherwise the same."""
    assert beginning(getattr(dense, name), len(LOSSES[name])) == LOSSES[name]
    expected = {key.replace("scores", "block"): value for key, value in LOSSES[name].items()}
    assert beginning(getattr(tiled, name), len(expected)) == expected


def test_names_of_encoders_and_scorers_stay() -> None:
    assert set(AUDIO_NAMES.split()) <= set(AUDIO_ENCODERS)
    assert set(SCORER_NAMES.split()) <= set(SCORERS)


@pytest.mark.parametrize("name", SCORER_NAMES.split())
def test_every_scorer_scores_any_two_sets(name: str) -> None:
    torch.manual_seed(0)
    scorer = build_scorer(name, dim=8).double()
    text, audio = random_sequence([2, 3, 1], 8, 0), random_sequence([4, 2], 8, 1)
    assert isinstance(text, TokenSequence)
    scores = scorer.scores(text, audio)
    assert scores.shape == (3, 2) and scores.isfinite().all()


def test_one_process_needs_no_group() -> None:
    text, audio = (torch.nn.functional.normalize(torch.randn(4, 8, dtype=torch.float64), dim=1) for _ in range(2))
    ids = torch.arange(4)[:, None].repeat(1, 2)
    expected = dense.nt_xent(text @ audio.T, 0.1, torch.eye(4, dtype=torch.bool))
    for block in (EmbeddingScores(text, audio), StoredScores(text @ audio.T)):
        assert torch.allclose(tiled.nt_xent(block, 0.1, positives=(ids, ids)), expected, atol=1e-12, rtol=0)


def test_metrics_keep_their_keys() -> None:
    found = retrieval_metrics(torch.eye(3), torch.arange(3), torch.arange(3))
    kinds = ("R@1", "R@5", "R@10", "mAP@10", "median_rank")
    assert {f"{way}/{kind}" for way in ("t2a", "a2t") for kind in kinds} <= set(found)
    assert found["t2a/R@1"] == found["a2t/mAP@10"] == 1


def test_verbs_stay() -> None:
    verbs: Any = typer.main.get_command(app)
    stay = {"shards", "demo-data", "train", "plan", "evaluate", "estimate", "augment-captions", "doctor"}
    assert stay <= set(verbs.commands)
    assert {"build", "check"} <= set(verbs.commands["shards"].commands)
