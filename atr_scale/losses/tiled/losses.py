"""NT-Xent, distillation, CMSC and intra-modal contrast: one soft cross-entropy with different targets.

Shape suffixes: B texts of the global batch, b audios of this rank, k id columns.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.losses.directions import listening
from atr_scale.losses.targets import Ids, Pairs, Positives, PositivesMean
from atr_scale.losses.tiled.soft_cross_entropy import Logits, Targets, soft_cross_entropy
from atr_scale.score_block import ScoreBlock


def nt_xent(
    block: ScoreBlock,
    temperature: float | Tensor,
    positives: Ids | Positives | None = None,
    kept_bytes: int | None = None,
    t2a_share: float = 0.5,
    positives_mean: PositivesMean = "queries",
    least_temperature: float | None = None,
) -> Tensor:
    """`dense.nt_xent` on a score block.

    positives: (text ids [B, k], audio ids [b, k]) int64; a pair is positive if any column agrees.
    kept_bytes, here and below: bytes of the gradients and of the tiles that are kept for the backward pass; by default
    `tiles.loss_bytes`. least_temperature: the temperature is never below this number of the host; by default the
    temperature is read, for which the host waits for a GPU.
    """
    targets = Targets(Positives.of(block, positives, positives_mean), t2a_share=t2a_share)
    return soft_cross_entropy(block, temperature, targets, kept_bytes, least_temperature)


def distillation(
    block: ScoreBlock,
    teacher_block: ScoreBlock,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None = None,
    teacher_block_a2t: ScoreBlock | None = None,
    kept_bytes: int | None = None,
    t2a_share: float = 0.5,
    least_temperature: float | None = None,
) -> Tensor:
    """`dense.distillation` on a score block; the teacher's blocks: of the same shape, without a gradient.

    The mean cosine of an ensemble is one `EmbeddingScores`: the members' embeddings joined along their width, with the
    texts' times their member's weight.
    """
    blocks = [teacher_block] if teacher_block_a2t is None else [teacher_block, teacher_block_a2t]
    for each in blocks:
        _same_shape(block, "teacher_block", each)
    own = temperature if teacher_temperature is None else teacher_temperature
    teacher = tuple(Logits.of(own, least_temperature, each) for each in blocks)
    targets = Targets(Positives.none(block), beta=1.0, teacher=teacher, t2a_share=t2a_share)
    return soft_cross_entropy(block, temperature, targets, kept_bytes, least_temperature)


def cmsc(
    block: ScoreBlock,
    text_block: ScoreBlock,
    audio_block: ScoreBlock,
    temperature: float | Tensor,
    beta: float,
    target_temperature: float | Tensor,
    positives: Ids | Positives | None = None,
    mode: Literal["each", "add"] = "each",
    kept_bytes: int | None = None,
    t2a_share: float = 0.5,
    least_temperature: float | None = None,
) -> Tensor:
    """`dense.cmsc` on score blocks [B, b] with B = all texts = all audios.

    text_block: all texts against this rank's texts. audio_block: all audios against this rank's audios.
    """
    if block.shape[0] != block.num_columns:
        raise UserError(f"cmsc needs as many texts as audios, got scores {[block.shape[0], block.num_columns]}")
    _same_shape(block, "text_block", text_block)
    _same_shape(block, "audio_block", audio_block)
    if mode == "add":
        teacher: tuple[Logits, ...] = (Logits.of(target_temperature, least_temperature, text_block, audio_block),)
    else:
        teacher = tuple(Logits.of(target_temperature, least_temperature, each) for each in (text_block, audio_block))
    pairs = Positives.of(block, positives)
    targets = Targets(pairs, beta=beta, teacher=teacher, divergence=True, t2a_share=t2a_share)
    return soft_cross_entropy(block, temperature, targets, kept_bytes, least_temperature)


def intra_modal(
    block: ScoreBlock,
    temperature: float | Tensor,
    same: Ids | Pairs | None = None,
    kept_bytes: int | None = None,
    least_temperature: float | None = None,
) -> Tensor:
    """`dense.intra_modal` on a block of one modality's samples: all of the global batch x this rank's.

    same: (ids [B, k] of all samples, ids [b, k] of this rank's) int64; pairs that agree in any column are no negatives.
    On `ModalityScores` the gradient needs no traffic between ranks.
    """
    if block.shape[0] != block.num_columns:
        raise UserError(f"intra_modal needs samples against themselves, got {[block.shape[0], block.num_columns]}")
    pairs = same if same is None or isinstance(same, Pairs) else Pairs.agreeing(block, same)
    excluded = None if pairs is None else pairs.beside_itself(block)
    targets = Targets(Positives.of(block), excluded=excluded)
    with listening():  # its directions lie inside one modality, and are told to nobody
        return soft_cross_entropy(block, temperature, targets, kept_bytes, least_temperature)


def _same_shape(block: ScoreBlock, name: str, other: ScoreBlock) -> None:
    if other.shape != block.shape:
        raise UserError(f"{name} is {list(other.shape)} and the scores are {list(block.shape)}: they must agree")
