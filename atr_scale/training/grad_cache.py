"""GradCache (Gao et al. 2021, arXiv 2101.06983): the exact gradient of a loss over more pairs than one forward holds.

    encode chunk by chunk without graphs -> compute the loss and its gradient by all encoder outputs
        -> encode each chunk again, now with a graph, and backpropagate its part of that gradient

A chunk that keeps its graph from the first pass needs no second one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from atr_scale.batch import Batch, TokenSequence
from atr_scale.model import NO_CONTEXT, Encoded, StepContext
from atr_scale.training.chunks import Chunks, side_stream


@dataclass(frozen=True)
class GradCache:
    """Adds up the gradient of a batch, chunk by chunk.

    forward: a Retriever's call, wrapped or not. backward: takes a scalar, and whether this is the last call for a
    batch; gradients of its calls add up. chunk_size: rows of a forward pass. kept_chunks: number of first chunks that
    keep their graph. encoders_learn: whether anything does that the encodings depend on.
    """

    forward: Callable[..., Any]
    backward: Callable[[Tensor, bool], object]
    device: torch.device
    chunk_size: int
    kept_chunks: int = 0
    encoders_learn: bool = True

    @cached_property
    def _side(self) -> Any:
        return side_stream(self.device)

    def accumulate(
        self, batch: Batch, seed: int, factor: float | Tensor, context: StepContext = NO_CONTEXT
    ) -> dict[str, Tensor]:
        """Add the gradient of factor * loss of `batch` to the parameters. Returns the loss terms.

        `batch` stays on its device; its chunks are copied to `self.device` one by one. Random draws follow from `seed`
        and the chunk's number, so both forward passes of a chunk draw the same.
        """
        chunks = Chunks(batch, self.chunk_size, self.device, self._side)
        kept_chunks = self.kept_chunks if self.encoders_learn else 0
        encoded = []
        for number, chunk in enumerate(chunks.start_at(0)):
            with torch.set_grad_enabled(number < kept_chunks):
                encoded.append(self._encode(chunk, seed + 1 + number, context))
        leaves = Encoded(*(_as_leaves(TokenSequence.cat(list(side))) for side in zip(*encoded, strict=True)))
        kept = encoded[:kept_chunks]
        del encoded

        torch.manual_seed(seed)
        terms: dict[str, Tensor] = self.forward(chunks.table, context, encoded=leaves)
        self.backward(terms["loss"] * factor, not self.encoders_learn)
        if self.encoders_learn:
            self._through_encoders(chunks, kept, leaves, seed, context)
        return terms

    def _through_encoders(
        self, chunks: Chunks, kept: list[Encoded], leaves: Encoded, seed: int, context: StepContext
    ) -> None:
        """Backpropagate the gradients of `leaves`, chunk by chunk. kept: the encodings of the first, with graphs."""
        first, again = 0, chunks.start_at(len(kept))
        for number in range(len(chunks)):
            chunk = kept.pop(0) if kept else self._encode(next(again), seed + 1 + number, context)
            self._send_back(chunk, leaves, first, number == len(chunks) - 1)
            first += len(chunk.text.pooled)
            del chunk  # frees a kept graph before the next chunk's

    def _encode(self, chunk: Batch, seed: int, context: StepContext) -> Encoded:
        torch.manual_seed(seed)
        encoded: Encoded = self.forward(chunk, context, encode_only=True)
        return encoded

    def _send_back(self, chunk: Encoded, leaves: Encoded, first: int, last: bool) -> None:
        """Backpropagate the gradient of the rows from `first` on through the graph of `chunk`, their encoding."""
        sums = []
        for own, whole in zip(chunk, leaves, strict=True):
            for out, leaf in ((own.tokens, whole.tokens), (own.pooled, whole.pooled)):
                if out.requires_grad and leaf.grad is not None:
                    # The token axis of a chunk may be shorter than that of the whole batch.
                    gradient = leaf.grad[first : first + out.shape[0], : out.shape[1]]
                    sums.append((out * gradient).sum())
        if sums:  # a loss may read no encoding, such as one that reads its own parameters alone
            self.backward(torch.stack(sums).sum(), last)


def _as_leaves(sequence: TokenSequence) -> TokenSequence:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    return sequence.map(leaf, leaf)
