"""The backward pass of a loss in three parts: of the loss, of the one encoder, of the other.

Gradients of the encoder that goes first cross the network while the other one's are computed.
"""

from __future__ import annotations

from torch import Tensor

from atr_scale.batch import TokenSequence


class Cut:
    """Cuts the graph between the encodings of a batch and their loss.

    Give it to `Retriever.forward`, which calls it with the text's encoding and then with the audio's. After the
    backward pass of the loss `passes` holds what is left: for each side the encodings and their gradients.
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

    def passes(self, audio_first: bool) -> list[tuple[list[Tensor], list[Tensor]]]:
        """The backward passes of the encoders, as roots and their gradients, in this order."""
        found = []
        for side in reversed(self._sides) if audio_first else self._sides:
            reached = [(out, own.grad) for out, own in side if own.grad is not None]
            if reached:
                roots, gradients = zip(*reached, strict=True)
                found.append((list(roots), list(gradients)))
        return found
