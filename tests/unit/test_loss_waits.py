"""What a loss reads of the device, for which the host of a GPU would wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atr_scale.losses import LOSS_TERMS, Budget, LossInputs
from atr_scale.losses.soft_labels import SoftLabels
from atr_scale.losses.terms import LossTerm
from atr_scale.score_block import EmbeddingScores, StoredScores
from tests.losses import unit

N = 24
IDS = torch.stack([torch.arange(N) % (N - 2), torch.arange(N) // 2 + 100], 1)
OPTIONS: dict[str, dict[str, Any]] = {
    "nt_xent": {},
    "pmr": {"omega": 14.3},
    "cmsc": {"beta": 0.3},
    "intra_modal": {},
    "distillation": {"tables": ["given by the test"]},
}
# Operations whose result, or its size, the host needs.
READS = ("_local_scalar_dense", "nonzero", "unique", "bincount", "repeat_interleave", "masked_select", "is_nonzero")


class Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        if name.startswith(READS) or any(x is not None and x.dtype == torch.bool for x in indices):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def reads(names: list[str], least: float, stored: bool = False) -> list[str]:
    """Those of a batch in forward and backward, of these terms together."""
    text, audio, in_text, in_audio = (unit(N, 6, seed).float().requires_grad_() for seed in range(4))
    teacher = EmbeddingScores(unit(N, 6, 5).float(), unit(N, 6, 6).float(), largest=1.0)
    tau = torch.tensor([0.07], requires_grad=True)
    terms: list[LossTerm] = [LOSS_TERMS[name](LOSS_TERMS[name].Section(weight=1.0, **OPTIONS[name])) for name in names]
    with Reads() as found:
        block = StoredScores(text @ audio.T, largest=1.0) if stored else EmbeddingScores(text, audio, largest=1.0)
        given = LossInputs(
            block,
            tau,
            IDS,
            lambda: in_text,
            lambda: in_audio,
            lambda: pytest.fail("no term reads tokens"),
            lambda: pytest.fail("no term reads tokens"),
            lambda: SoftLabels.of(teacher),
            least_temperature=least,
        )
        torch.stack([term(given, Budget(dense=0)) for term in terms]).sum().backward()
    return found.seen


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_loss_reads_nothing(name: str, stored: bool) -> None:
    """If the host knows that no sum of exponentials can be lost: scores are cosines, the temperature is above 1/70."""
    assert reads([name], least=0.02, stored=stored) == []


def test_all_terms_read_the_temperature_once_if_its_minimum_may_lose_sums() -> None:
    assert reads(list(OPTIONS), least=0.01) == ["_local_scalar_dense"]


def test_reads_are_seen() -> None:
    values = torch.arange(3.0)
    with Reads() as found:
        float(values[0])
        values.nonzero()
        _ = values[values > 1]
        values[torch.tensor([0])]
    assert found.seen == ["_local_scalar_dense", "nonzero", "index.Tensor"]
