"""The objectives on score blocks: equal to `dense`, over any number of ranks, without a global score matrix.

Rows are texts and complete over the ranks together; columns are audios and complete on one rank. Column statistics are
local, row statistics are [B] vectors that meet by all-reduce; the scores themselves never travel. Every rank returns
the same global mean loss, and its backward yields this rank's share of the gradient: the sum over ranks is the whole.
Statistics are float64 whatever the scores.
"""

from atr_scale.losses.tiled.losses import cmsc, distillation, intra_modal, nt_xent
from atr_scale.losses.tiled.pmr import pmr

__all__ = ["cmsc", "distillation", "intra_modal", "nt_xent", "pmr"]
