"""A score block inside one modality.

Shape suffixes: B samples of the global batch, b samples of this rank, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atr_scale.parallel.blocks import ALL, EmbeddingScores, matmul_into
from atr_scale.parallel.world import World


class ModalityScores(EmbeddingScores):
    """Cosines of all samples of the global batch against this rank's: `vectors` [b, d], unit length.

    The other ranks' vectors arrive without a gradient and none goes back to them: the scores are symmetric, and so is
    d loss / d scores of a loss that treats both directions alike (`intra_modal`), hence what a vector receives as a row
    on all ranks equals what it receives as a column here. One matrix product and a reduce-scatter less.
    """

    def __init__(self, vectors: Tensor, world: World | None = None) -> None:
        world = world or World.current()
        super().__init__(world.gather(vectors.detach()), vectors, world)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.audio,)

    def new_gradients(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(self._audio, dtype=self.dtype),)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        matmul_into(gradients[0][columns], gradient.T, self._text[rows], alpha=2)

    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Half of what its vectors received is as columns."""
        return (gradients[0] * self._audio).sum(dtype=torch.float64) / 2
