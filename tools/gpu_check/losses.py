"""Every loss on the device in fp32 against its dense formula in float64 on the CPU, with duplicates.

As one rank and as simulated ranks; at a usual temperature, and at one so low that sums are lost and the maxima path is
taken; with every kind of matrix product that the heads may use. Rows and columns come in several tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from atr_scale.distributed.world import World
from atr_scale.losses.tiled import tiles
from tests.losses import BLOCKS, CASES, dense_loss, tiled_loss, unit
from tools.gpu_check.rows import Case, Row, compared
from tools.gpu_check.runner import Setting
from tools.gpu_check.simulated import on_ranks

RANKS = 2
USUAL, LOW = 0.07, 1e-3  # temperatures
INTRA = 0.5  # of the contrast inside a modality, whose loss vanishes at a low one: a sample's score with itself is 1
BOUNDS = {"ieee": 1e-5, "tf32": 5e-3, "bf16x3": 1e-4}
LOW_BOUND = 1e-4  # at the low temperature, with its logits of up to 1,000
WIDTH, TEACHER_WIDTH = 64, 32
Key = tuple[str, str, float, str]  # loss, kind of block, temperature, products


def cases(setting: Setting, ranks: int) -> Iterator[Case]:
    batch = 96 if setting.quick else 960
    keys = [key for key in _keys() if setting.cuda or key[3] != "tf32"]  # a CPU has no TF32
    if ranks == 1:
        for key in keys:
            yield _name(key, 1), partial(_one_rank, key, batch, setting.device)
        return
    found = on_ranks(_all_of_a_rank, ranks, keys, batch, setting.device)
    for key in keys:
        yield _name(key, ranks), partial(_joined, key, batch, [rank[key] for rank in found])


def _keys() -> Iterator[Key]:
    for case, (function, _) in CASES.items():
        usual = INTRA if function == "intra_modal" else USUAL
        for kind in BLOCKS:
            yield case, kind, usual, "ieee"
        if usual == USUAL:
            yield case, "embedding", LOW, "ieee"
        if case == function:
            for products in list(BOUNDS)[1:]:
                yield case, "embedding", usual, products


def _name(key: Key, ranks: int) -> str:
    case, kind, temperature, products = key
    over = f", {ranks} ranks" if ranks > 1 else ""
    return f"{case}, {kind} scores, temperature {temperature:g}{over}, {products}"


def _inputs(batch: int, own: slice) -> list[Tensor]:
    """Texts, audios, ids and the two sides of a teacher; values that fp32 holds. Every eighth clip comes twice."""
    text, audio = (unit(batch, WIDTH, seed).float().double() for seed in (1, 2))
    clip, caption = torch.arange(batch), torch.arange(batch) + batch
    half = batch // 2
    clip[half::8] = clip[:half:8]  # on another rank
    caption[3::8] = caption[2::8]  # on the same one
    teacher = (unit(batch, TEACHER_WIDTH, seed).float().double() for seed in (3, 4))
    return [x[own] for x in (text, audio, torch.stack([clip, caption], 1), *teacher)]


def _found(key: Key, batch: int, device: str) -> list[Tensor]:
    """This rank's [loss, gradients of texts, audios and temperature], float64 on the CPU."""
    case, kind, temperature, products = key
    world = World.current()
    share = batch // world.size
    given = _inputs(batch, slice(world.rank * share, (world.rank + 1) * share))
    text, audio, *teacher = (x.to(device, torch.float32) for x in (*given[:2], *given[3:]))
    ids = given[2]  # stays on the host
    tau = torch.tensor([temperature], device=device)
    leaves = [x.requires_grad_() for x in (text, audio, tau)]
    make: Any = BLOCKS[kind]
    make = make if products == "ieee" else partial(make, products=products)
    with patch.object(tiles, "_tile_shape", lambda block, times_smaller: (batch // 3 + 7, batch // 5 + 3)):
        loss = tiled_loss(case, make, text, audio, tau, (ids, ids), (teacher[0], teacher[1]))
        return [x.detach().double().cpu() for x in (loss, *torch.autograd.grad(loss, leaves))]


def _expected(key: Key, batch: int) -> list[Tensor]:
    case, _, temperature, _ = key
    text, audio, ids, *teacher = _inputs(batch, slice(None))
    tau = torch.tensor([temperature]).double()
    leaves = [x.requires_grad_() for x in (text, audio, tau)]
    loss = dense_loss(case, text, audio, tau, (ids, ids), (teacher[0], teacher[1]))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _row(key: Key, found: list[Tensor], expected: list[Tensor]) -> Row:
    errors = [relative(got, want) for got, want in zip(found, expected, strict=True)]
    bound = LOW_BOUND if key[2] == LOW else BOUNDS[key[3]]
    names = ("loss", "texts", "audios", "temperature")
    note = ", ".join(f"{name} {error:.1e}" for name, error in zip(names, errors, strict=True))
    return compared(max(errors), bound, note=note)


def _one_rank(key: Key, batch: int, device: str) -> Row:
    return _row(key, _found(key, batch, device), _expected(key, batch))


def _all_of_a_rank(keys: list[Key], batch: int, device: str) -> dict[Key, list[Any] | str]:
    return {key: _or_error(key, batch, device) for key in keys}


def _or_error(key: Key, batch: int, device: str) -> list[Any] | str:
    """One case that fails on all ranks leaves the others standing."""
    try:
        return [x.numpy() for x in _found(key, batch, device)]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _joined(key: Key, batch: int, ranks: list[list[Any] | str]) -> Row:
    """The gradients of all ranks: rows of texts and audios side by side, parts of the temperature's added up."""
    for found in ranks:
        if isinstance(found, str):
            raise RuntimeError(found)
    losses, texts, audios, tau = ([torch.from_numpy(x) for x in column] for column in zip(*ranks, strict=True))
    spread = max(relative(loss, losses[0]) for loss in losses)
    row = _row(key, [losses[0], torch.cat(texts), torch.cat(audios), sum(tau, torch.zeros(1))], _expected(key, batch))
    return compared(max(float(row.error or 0), spread), row.bound or 0, note=row.note)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`, both in float64 on the CPU."""
    got, want = (x.detach().double().cpu() for x in (found, expected))
    scale, difference = float(want.norm()), float((got - want).norm())
    return difference / scale if scale else difference
