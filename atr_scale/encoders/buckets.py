"""Clips of unequal lengths, each encoded as if it were the only one.

Padding after the end of a clip changes the output of convolutions, so a bucket holds clips of exactly one length.

Shape suffixes: B batch, S samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from atr_scale.batch import TokenSequence, on_device


def encode_in_buckets(
    encode: Callable[[Tensor], TokenSequence],
    waveform_BS: Tensor,
    lengths_B: Tensor | None,
    equal_rounds: Callable[[int], int] | None = None,
) -> TokenSequence:
    """Call `encode` once per distinct length, with the clips of that length. The rows keep their order.

    lengths: int64 [B] in samples, None if all clips have S samples. The tokens of shorter clips are padded with masked
    zeros to the most tokens of the batch.

    equal_rounds: takes the number of calls that this rank needs and returns the number that every rank must make.
    Parameters that are sharded over ranks are gathered inside the calls, so ranks with unequal numbers of calls would
    wait for each other forever. Surplus calls repeat one clip. Their results are multiplied by zero, so that their
    backward pass runs too and changes nothing.
    """
    assert len(waveform_BS) > 0, "an empty batch has no clip to encode"
    if lengths_B is None:
        buckets = {waveform_BS.shape[1]: list(range(len(waveform_BS)))}
    else:
        buckets = {}
        for row, length in enumerate(lengths_B.tolist()):
            assert 0 <= length <= waveform_BS.shape[1], "a clip's length exceeds its batch's width"
            buckets.setdefault(length, []).append(row)

    # The ranks agree before the first call: later, some of them would already be inside their calls.
    surplus = equal_rounds(len(buckets)) - len(buckets) if equal_rounds else 0
    assert surplus >= 0, "equal_rounds returned fewer rounds than this rank needs"

    if len(buckets) == 1:
        (length,) = buckets
        joined = encode(waveform_BS[:, :length])
    else:
        order = on_device(np.concatenate(list(buckets.values())), waveform_BS.device)
        groups = order.split([len(rows) for rows in buckets.values()])
        parts = [
            encode(waveform_BS[:, :length].index_select(0, rows)) for length, rows in zip(buckets, groups, strict=True)
        ]
        joined = TokenSequence.cat(parts).take(order.argsort())

    if surplus:
        length, (row, *_) = next(iter(buckets.items()))
        again = [encode(waveform_BS[row : row + 1, :length]) for _ in range(surplus)]
        nothing = sum((part.tokens * 0).sum() + (part.pooled * 0).sum() for part in again)
        joined = joined.map(lambda tokens: tokens + nothing, lambda pooled: pooled + nothing)
    return joined
