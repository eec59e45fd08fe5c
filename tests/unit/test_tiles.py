"""How the tiled losses come by their results: one exponential or maxima, tiles kept or not, narrow vectors, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atr_scale import score_block as blocks
from atr_scale.losses import dense, tiled
from atr_scale.losses.tiled import tiles
from atr_scale.losses.tiled.exponentials import MaximaShift
from atr_scale.losses.tiled.tiles import LOSS_BYTES
from atr_scale.score_block import EmbeddingScores, StoredScores
from tests.losses import BLOCKS, CASES, dense_loss, tiled_loss, unit
from tools.bench.measure import peak_mib

TEACHER_WIDTH = 5


@pytest.fixture
def maxima_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that maxima were looked for."""
    taken: list[str] = []
    original = MaximaShift.__init__

    def spy(*arguments: Any) -> None:
        taken.append("maxima")
        original(*arguments)

    monkeypatch.setattr(MaximaShift, "__init__", spy)
    return taken


def test_tiles_on_a_gpu_follow_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and large ones of whole columns; with a little less free memory the same, so that no last bit changes."""
    for free, size in ((80, 4), (70, 4), (20, 1), (18, 1)):
        monkeypatch.setattr(tiles, "free_device_memory", lambda _, free=free: free * 2**30)
        tiles.loss_bytes.cache_clear()
        assert tiles.loss_bytes(torch.device("cuda")) == size * 2**30
        shapes = [
            t.shape for t in tiles.tiles_of(tiles.stripes_of(StoredScores(torch.empty(65_536, 65_536, device="meta"))))
        ]
        assert shapes == [(65_536, size * 2**30 // tiles.TILES_AT_ONCE // (4 * 65_536))] * (128 // size)
    tiles.loss_bytes.cache_clear()


def test_names_of_a_workspace_share_memory_only_between_sweeps() -> None:
    block = StoredScores(torch.zeros(6, 3))
    (stripe,) = tiles.stripes_of(block)
    work = tiles.Workspace(block)
    first, second = work.get("scores", stripe), work.get("gradient", stripe)
    assert work.get("scores", stripe).data_ptr() == first.data_ptr() != second.data_ptr()
    work.start_sweep()
    again = {work.get(name, stripe).data_ptr() for name in ("logits", "weights")}
    assert again == {first.data_ptr(), second.data_ptr()}
    assert work.get("third", stripe).data_ptr() not in again


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "STRIPE_COLUMNS", 7)
    monkeypatch.setattr(tiles, "TILE_ROWS", 6)


def both(
    case: str, batch: int, temperature: float, dtype: torch.dtype, kind: str = "embedding", kept_bytes: int = LOSS_BYTES
) -> list[list[Tensor]]:
    """[loss, gradients of texts and audios] of the tiled loss, and of the dense one in float64."""
    teacher = unit(batch, TEACHER_WIDTH, 3), unit(batch, TEACHER_WIDTH, 4)
    found = []
    for make, kept in ((BLOCKS[kind], dtype), (None, torch.float64)):
        text, audio = (unit(batch, 6, seed).to(dtype).to(kept).requires_grad_() for seed in (1, 2))
        given = teacher[0].to(dtype).to(kept), teacher[1].to(dtype).to(kept)
        if make is None:
            loss = dense_loss(case, text, audio, temperature, None, given)
        else:
            loss = tiled_loss(case, make, text, audio, temperature, None, given, kept_bytes)
        found.append([loss.detach(), *torch.autograd.grad(loss, (text, audio))])
    return found


@pytest.mark.parametrize("case", CASES)
def test_one_exponential_serves_usual_temperatures(case: str, maxima_taken: list[str]) -> None:
    both(case, 20, 0.07, torch.float32)
    assert not maxima_taken or case in ("pmr_by_batch", "pmr_sharp")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "dtype, temperature, slack", [(torch.float32, 1e-3, 1e-4), (torch.float64, 2e-4, 1e-11)], ids=["fp32", "fp64"]
)
def test_maxima_where_one_shift_loses_sums(
    case: str, dtype: torch.dtype, temperature: float, slack: float, maxima_taken: list[str]
) -> None:
    """Without the maxima sums are zero and the loss is infinite.

    A prior multiplies the rounding of a score by its inverse temperature, and tiles of other shapes round otherwise:
    a processor's matrix product decides by how much.
    """
    if case == "pmr_sharp":
        slack *= 1000 if dtype == torch.float32 else 100
    elif case.startswith("pmr"):
        slack *= 2
    found, expected = both(case, 20, temperature, dtype)
    assert maxima_taken or "intra" in case  # where every sum has a score of exactly one
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() <= slack * (1 + want.abs().max())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["nt_xent", "pmr"])
def test_scores_may_be_anything(name: str, maxima_taken: list[str]) -> None:
    options = {"omega": 3.0} if name == "pmr" else {}
    stored = [(200 * torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))] * 2
    stored = [x.clone().requires_grad_() for x in stored]
    found = getattr(tiled, name)(StoredScores(stored[0]), 0.1, **options)
    expected = getattr(dense, name)(stored[1], 0.1, **options)
    assert maxima_taken and abs(found - expected) <= 1e-12 * abs(expected)
    (got,), (want,) = torch.autograd.grad(found, stored[0]), torch.autograd.grad(expected, stored[1])
    assert (got - want).abs().max() <= 1e-12 * (1 + want.abs().max())


def test_scores_that_are_no_numbers_give_a_loss_that_is_none() -> None:
    scores = torch.zeros(4, 4)
    for value in (torch.nan, torch.inf):
        scores[1, 2] = value
        assert tiled.nt_xent(StoredScores(scores), 0.1).isnan()
        assert not tiled.pmr(StoredScores(scores), 0.1, 1.0).isfinite()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", [case for case in CASES if "pmr" not in case])
def test_kept_tiles_change_nothing_but_the_work(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = EmbeddingScores.stripe

    def counted(*arguments: Any) -> Tensor:
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(EmbeddingScores, "stripe", counted)
    results, work = list[list[Tensor]](), list[int]()
    gradients = 8 * 6 * (20 + (0 if "intra" in case else 20))
    for budget in (0, gradients + 6 * 7 * 8 * 5, 2**30):  # none, a few, all
        made.clear()
        results.append(both(case, 20, 0.1, torch.float64, kept_bytes=budget)[0])
        work.append(len(made))
    for other in results[1:]:
        assert all((a - b).abs().max() <= 1e-12 for a, b in zip(results[0], other, strict=True))
    assert work[0] == 2 * work[2] and work[2] < work[1] < work[0]


@pytest.mark.parametrize("case", CASES)
def test_bf16_vectors(case: str) -> None:
    """Logits are fp32, so the loss has no bias; gradients are rounded once, when they are handed out."""
    found, expected = both(case, 96, 0.05, torch.bfloat16)
    assert found[0].dtype == torch.float32 and abs(found[0] - expected[0]) <= 2e-6 * (1 + abs(expected[0]))
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 3e-3 * want.norm() + 1e-9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_no_matrix_of_all_pairs_is_alive(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 1024
    monkeypatch.setattr(blocks, "STRIPE_COLUMNS", 64)
    monkeypatch.setattr(tiles, "TILE_ROWS", 128)
    text, audio = (unit(batch, 6, seed).float().requires_grad_() for seed in (1, 2))
    teacher = unit(batch, TEACHER_WIDTH, 3).float(), unit(batch, TEACHER_WIDTH, 4).float()

    def step() -> None:
        loss = tiled_loss(case, EmbeddingScores, text, audio, 0.1, None, teacher, kept_bytes=0)
        torch.autograd.grad(loss, (text, audio))

    matrix = batch * batch * 4 / 2**20
    assert 0 < peak_mib(step) < matrix / 4
