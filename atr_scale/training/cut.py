"""The backward pass of a loss in three parts: of the loss, of the text encoder, of the audio encoder.

Gradients of the text encoder cross the network while the audio encoder's are computed.
"""

from __future__ import annotations

from torch import Tensor

from atr_scale.batch import TokenSequence


class Cut:
    """Cuts the graph between the encodings of a batch and their loss.

    Give it to `Retriever.forward`, which calls it with the text's encoding and then with the audio's. After the
    backward pass of the loss `passes` is what is left of it.
    """

    def __init__(self) -> None:
        self._sides: list[list[tuple[Tensor, Tensor]]] = []

    def __call__(self, encoded: TokenSequence) -> TokenSequence:
        side: list[tuple[Tensor, Tensor]] = []
        self._sides.append(side)

        def leaf(out: Tensor) -> Tensor:
            if not out.requires_grad:
                return out
            own = out.detach().requires_grad_()
            side.append((out, own))
            return own

        return encoded.map(leaf, leaf)

    def passes(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """The backward passes of the encoders, as roots and their gradients."""
        found = []
        for side in self._sides:
            reached = [(out, own.grad) for out, own in side if own.grad is not None]
            if reached:
                roots, gradients = zip(*reached, strict=True)
                found.append((list(roots), list(gradients)))
        return found
