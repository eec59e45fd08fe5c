"""Losses on score blocks: equal to `dense`, over any number of ranks, without a matrix of all scores.

A row belongs to a text and is spread over the ranks; a column belongs to an audio and lies on one rank. Statistics of
columns are local, statistics of rows are [B] vectors that are all-reduced; scores never leave their rank. Every rank
returns the same loss, the mean over the global batch, and its backward pass yields its part of the gradient: the sum
over ranks is the whole. Statistics are float64, whatever the dtype of the scores. docs/math/tiled_losses.md has the
formulas, symbols and derivations.
"""

from atr_scale.losses.tiled.losses import cmsc, distillation, intra_modal, nt_xent
from atr_scale.losses.tiled.pmr import pmr

__all__ = ["cmsc", "distillation", "intra_modal", "nt_xent", "pmr"]
