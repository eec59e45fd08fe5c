"""The measured costs of a configuration, and the division of a global batch that they are evaluated at."""

from __future__ import annotations

from dataclasses import dataclass

from atr_scale.config import RunConfig
from atr_scale.losses.terms import DEFAULT_BUDGET
from atr_scale.planner.measure import EncoderCosts, HeadCosts
from atr_scale.planner.zero_memory import Parameters
from atr_scale.score_block import STRIPE_COLUMNS


@dataclass(frozen=True)
class BatchSplit:
    """The pairs of one loss (global_batch), divided among the ranks and, on a rank, into micro-batches."""

    world_size: int
    global_batch: int
    micro_batch: int

    @property
    def local_batch(self) -> int:
        return self.global_batch // self.world_size

    @property
    def chunks(self) -> int:
        """Micro-batches of a rank; more than one is GradCache."""
        return -(-self.local_batch // self.micro_batch)


@dataclass(frozen=True)
class Costs:
    """All measurements of a configuration.

    tiled_heads, dense_heads: with the losses of large and of small batches. pairwise: scores are stored, [B, b].
    pairs_per_tile: a limit of the scorer, None if it has none.
    """

    config: RunConfig
    encoders: EncoderCosts
    tiled_heads: HeadCosts
    dense_heads: HeadCosts
    parameters: Parameters
    pairwise: bool
    pairs_per_tile: int | None

    def heads(self, texts: int) -> HeadCosts:
        """Costs of scorer and objective for a global batch of so many texts."""
        return self.dense_heads if DEFAULT_BUDGET.allows_dense(texts) else self.tiled_heads

    def pairs_at_once(self, texts: int, audios: int) -> int:
        """Scores that are in memory together."""
        columns = audios if DEFAULT_BUDGET.allows_dense(texts) else min(audios, STRIPE_COLUMNS)
        return min(texts * columns, self.pairs_per_tile or texts * columns)
