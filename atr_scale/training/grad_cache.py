"""GradCache (Gao et al. 2021, arXiv 2101.06983): the exact gradient of a loss over more pairs than one forward holds.

    encode chunk by chunk without graphs -> compute the loss and its gradient by all encoder outputs
        -> encode each chunk again, now with a graph, and backpropagate its part of that gradient

A chunk that keeps its graph from the first pass needs no second one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atr_scale.batch import Batch, TokenSequence
from atr_scale.model import NO_CONTEXT, Encoded, StepContext


@dataclass(frozen=True)
class GradCache:
    """Adds up the gradient of a batch, chunk by chunk.

    forward: a Retriever's call, wrapped or not. backward: takes a scalar, and whether this is the last call for a
    batch; gradients of its calls add up.
    chunk_size: rows of a forward pass. kept_chunks: number of first chunks that keep their graph.
    """

    forward: Callable[..., Any]
    backward: Callable[[Tensor, bool], object]
    device: torch.device
    chunk_size: int
    kept_chunks: int = 0

    def accumulate(
        self, batch: Batch, seed: int, factor: float | Tensor, context: StepContext = NO_CONTEXT
    ) -> dict[str, Tensor]:
        """Add the gradient of factor * loss of `batch` to the parameters. Returns the loss terms.

        `batch` stays on its device; its chunks are copied to `self.device` one by one. Random draws follow from `seed`
        and the chunk's number, so both forward passes of a chunk draw the same.
        """
        order = batch.lengths.argsort(stable=True)  # clips of one length run together
        chunks = order.split(self.chunk_size)
        encoded = []
        for number, rows in enumerate(chunks):
            with torch.set_grad_enabled(number < self.kept_chunks):
                encoded.append(self._encode(batch, rows, seed + 1 + number, context))
        leaves = Encoded(*(_as_leaves(TokenSequence.cat(list(side))) for side in zip(*encoded, strict=True)))
        kept = encoded[: self.kept_chunks]
        del encoded

        torch.manual_seed(seed)
        without_audio = replace(batch, waveform=batch.waveform[:, :0])
        terms: dict[str, Tensor] = self.forward(without_audio.take(order).to(self.device), context, encoded=leaves)
        self.backward(terms["loss"] * factor, False)

        first = 0
        for number, rows in enumerate(chunks):
            again = kept.pop(0) if kept else self._encode(batch, rows, seed + 1 + number, context)
            self._send_back(again, leaves, first, last=number == len(chunks) - 1)
            del again  # frees a kept graph before the next chunk's
            first += len(rows)
        return terms

    def _encode(self, batch: Batch, rows: Tensor, seed: int, context: StepContext) -> Encoded:
        torch.manual_seed(seed)
        encoded: Encoded = self.forward(cut(batch, rows).take(rows).to(self.device), context, encode_only=True)
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
        if sums:
            self.backward(torch.stack(sums).sum(), last)


def cut(batch: Batch, rows: Tensor) -> Batch:
    """All rows of a batch, cut to the longest clip and the longest caption of `rows`."""
    samples = int(batch.lengths[rows].max())
    tokens = int(batch.attention_mask[rows].any(0).nonzero().max()) + 1
    return replace(
        batch,
        waveform=batch.waveform[:, :samples],
        input_ids=batch.input_ids[:, :tokens],
        attention_mask=batch.attention_mask[:, :tokens],
    )


def _as_leaves(sequence: TokenSequence) -> TokenSequence:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    return sequence.map(leaf, leaf)
