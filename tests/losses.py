"""Every loss twice, dense and on score blocks, from the same vectors: what the two must agree on.

Shape suffixes: b texts or audios of this rank (all of them in the dense formulas), d and r widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.distributed.world import World
from atr_scale.losses import dense, tiled
from atr_scale.losses.targets import positives_mask
from atr_scale.losses.tiled.tiles import LOSS_BYTES
from atr_scale.score_block import EmbeddingScores, ModalityScores, ScoreBlock, StoredScores

Pair = tuple[Tensor, Tensor]  # of texts, of audios
MakeBlock = Callable[[Tensor, Tensor], ScoreBlock]
BLOCKS: dict[str, MakeBlock] = {
    "embedding": EmbeddingScores,
    "stored": lambda text, audio: StoredScores(text @ audio.T),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nt_xent": ("nt_xent", {}),
    "nt_xent_share": ("nt_xent", {"t2a_share": 0.8}),
    "nt_xent_pairs": ("nt_xent", {"t2a_share": 0.3, "positives_mean": "pairs"}),
    "pmr": ("pmr", {"omega": 4.0}),
    "pmr_share": ("pmr", {"omega": 4.0, "t2a_share": 1.0}),
    "pmr_pairs": ("pmr", {"omega": 4.0, "t2a_share": 0.7, "positives_mean": "pairs"}),
    "pmr_detached": ("pmr", {"omega": 4.0, "detach_prior": True}),
    "pmr_by_batch": ("pmr", {"omega": 0.1, "scale_by_batch": True}),
    "pmr_sharp": ("pmr", {"omega": 120.0}),
    "distillation": ("distillation", {}),
    "cmsc": ("cmsc", {"beta": 0.3, "target_temperature": 0.2}),
    "cmsc_add": ("cmsc", {"beta": 0.3, "target_temperature": 0.2, "mode": "add"}),
    "cmsc_share": ("cmsc", {"beta": 0.3, "target_temperature": 0.2, "t2a_share": 0.2}),
    "cmsc_hard": ("cmsc", {"beta": 0.0, "target_temperature": 0.2}),
    "cmsc_soft": ("cmsc", {"beta": 1.0, "target_temperature": 0.05}),
    "intra_modal": ("intra_modal", {}),
    "intra_modal_local": ("intra_modal", {}),  # on blocks whose gradient stays on the rank
}
SQUARE = [name for name, (function, _) in CASES.items() if function in ("cmsc", "intra_modal")]


def unit(rows: int, width: int, seed: int) -> Tensor:
    """Random unit vectors, float64."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def dense_loss(
    case: str, text: Tensor, audio: Tensor, temperature: Tensor | float, ids: Pair | None, teacher: Pair
) -> Tensor:
    """`teacher` [b, r] twice: their products are a teacher's scores, or similarities inside a modality."""
    name, options = CASES[case]
    scores, positives = text @ audio.T, None if ids is None else positives_mask(*ids)
    if name == "distillation":
        return dense.distillation(scores, teacher[0] @ teacher[1].T, temperature)
    if name == "cmsc":
        in_text, in_audio = (x @ x.T for x in teacher)
        return dense.cmsc(scores, in_text, in_audio, temperature, positives=positives, **options)
    if name == "intra_modal":
        same = (None, None) if ids is None else [positives_mask(x, x) for x in ids]
        both = zip((text, audio), same, strict=True)
        of_text, of_audio = (dense.intra_modal(x @ x.T, temperature, agreeing) for x, agreeing in both)
        return (of_text + of_audio) / 2
    return getattr(dense, name)(scores, temperature, positives=positives, **options)


def tiled_loss(
    case: str,
    make: MakeBlock,
    text: Tensor,
    audio: Tensor,
    temperature: Tensor | float,
    ids: Pair | None,
    teacher: Pair,
    kept_bytes: int = LOSS_BYTES,
) -> Tensor:
    """The same over ranks: all arguments are this rank's."""
    world = World.current()
    name, options = CASES[case]
    kept: dict[str, Any] = {} if name == "pmr" else {"kept_bytes": kept_bytes}
    if name == "intra_modal":
        same = (None, None) if ids is None else [(world.gather(x), x) for x in ids]
        local = case == "intra_modal_local"
        inside = [ModalityScores(x) if local else make(world.gather(x), x) for x in (text, audio)]
        both = zip(inside, same, strict=True)
        of_text, of_audio = (tiled.intra_modal(b, temperature, agreeing, **kept) for b, agreeing in both)
        return (of_text + of_audio) / 2
    block = make(world.gather(text), audio)
    if name == "distillation":
        return tiled.distillation(block, make(world.gather(teacher[0]), teacher[1]), temperature, **kept)
    positives = None if ids is None else (world.gather(ids[0]), ids[1])
    if name == "cmsc":
        in_text, in_audio = ModalityScores(teacher[0]), make(world.gather(teacher[1]), teacher[1])
        return tiled.cmsc(block, in_text, in_audio, temperature, positives=positives, **options, **kept)
    return getattr(tiled, name)(block, temperature, positives=positives, **options, **kept)
