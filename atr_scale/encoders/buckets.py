"""Clips of unequal lengths, each encoded as if it were alone.

Convolutions feel the padding beyond a clip's end, so clips run in buckets of exactly equal length.

Shape suffixes: B batch, S samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atr_scale.batch import TokenSequence


def encode_in_buckets(
    encode: Callable[[Tensor], TokenSequence],
    waveform_BS: Tensor,
    lengths_B: Tensor | None,
    equal_rounds: Callable[[int], int] | None = None,
) -> TokenSequence:
    """Runs `encode` once per distinct length, on the clips of that length cut to it; rows keep their order.

    lengths: int64 [B] in samples, None if all clips fill the whole width. Rows of shorter clips get masked zeros up
    to the most tokens of the batch.

    equal_rounds: takes this rank's number of calls of `encode` and returns the number every rank must make (parameters
    sharded over ranks are gathered inside the calls, which would wait for each other forever otherwise). Surplus calls
    repeat one clip; their results enter with a factor of zero, so that their backward runs too and changes nothing.
    """
    assert len(waveform_BS) > 0, "an empty batch has no clip to encode"
    if lengths_B is None:
        buckets = {waveform_BS.shape[1]: list(range(len(waveform_BS)))}
    else:
        buckets = {}
        for row, length in enumerate(lengths_B.tolist()):
            assert 0 <= length <= waveform_BS.shape[1], "a clip's length exceeds its batch's width"
            buckets.setdefault(length, []).append(row)

    # Agreed on before the first call: a rank that asked later would meet the others inside their calls.
    surplus = equal_rounds(len(buckets)) - len(buckets) if equal_rounds else 0
    assert surplus >= 0, "equal_rounds returned fewer rounds than this rank needs"

    if len(buckets) == 1:
        (length,) = buckets
        joined = encode(waveform_BS[:, :length])
    else:
        parts = [encode(waveform_BS[rows, :length]) for length, rows in buckets.items()]
        order = torch.tensor([row for rows in buckets.values() for row in rows], device=waveform_BS.device)
        joined = TokenSequence.cat(parts).take(order.argsort())

    if surplus:
        length, rows = next(iter(buckets.items()))
        again = [encode(waveform_BS[rows[:1], :length]) for _ in range(surplus)]
        nothing = sum((part.tokens * 0).sum() + (part.pooled * 0).sum() for part in again)
        joined = joined.map(lambda tokens: tokens + nothing, lambda pooled: pooled + nothing)
    return joined
