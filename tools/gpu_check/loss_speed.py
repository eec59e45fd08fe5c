"""Losses, forward and backward: time, memory and launches against open_clip's loss and against their own products.

B texts against b audios of width 512: whole batches, and one rank of eight without its network. open_clip's loss is
NT-Xent with two logit matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from atr_scale.distributed.world import World
from atr_scale.losses import tiled
from atr_scale.score_block import EmbeddingScores, ModalityScores
from tools.bench.losses import open_clip_file, open_clip_loss
from tools.gpu_check.measure import Fresh, measured
from tools.gpu_check.rows import Case, Row, Skip
from tools.gpu_check.runner import Setting
from tools.gpu_check.simulated import SilentWorld

WIDTH = 512
TEMPERATURE, OMEGA = 0.07, 10.0
PRODUCTS = ("ieee", "tf32", "bf16x3")
Loss = Callable[[Tensor, Tensor, Tensor, World, str], Tensor]


def cases(setting: Setting) -> Iterator[Case]:
    large, small = (["nt_xent", "pmr"], list(LOSSES))
    sizes = [(256, 1, small), (256, 8, small)]
    if not setting.quick:
        sizes = [(8192, 1, small), (32_768, 8, small), (32_768, 1, large), (65_536, 1, large)]
    for batch, ranks, names in sizes:
        clip = _OpenClip(setting, batch)
        place = f"B = {batch:,}" + (f", rank of {ranks}" if ranks > 1 else "")
        if ranks == 1:
            for kind in clip.kinds:
                yield f"open_clip, {place}, {kind}", partial(clip.row, kind)
        for name in names:
            for products in PRODUCTS:
                reference = clip.times if (name, ranks) == ("nt_xent", 1) else {}
                yield f"{name}, {place}, {products}", partial(ours, setting, name, batch, ranks, products, reference)


def ours(setting: Setting, name: str, batch: int, ranks: int, products: str, reference: dict[str, float]) -> Row:
    if products == "tf32" and not setting.cuda:
        raise Skip("needs CUDA")
    world: World = SilentWorld(0, ranks) if ranks > 1 else World()

    def step(text: Tensor, audio: Tensor, temperature: Tensor) -> None:
        loss = LOSSES[name](text, audio, temperature, world, products)
        torch.autograd.grad(loss, (text, audio, temperature), allow_unused=True)

    row = measured(setting, step, _fresh(setting, batch, ranks), products, repeats=3)
    row.reference.update(reference)
    return row


def _fresh(setting: Setting, batch: int, ranks: int) -> Fresh:
    """Unit vectors of all texts and of this rank's audios, and the temperature."""

    def fresh(number: int) -> tuple[Tensor, Tensor, Tensor]:
        text = vectors(setting, batch, WIDTH, number)
        audio = vectors(setting, batch // ranks, WIDTH, 99 + number)
        temperature = torch.tensor([TEMPERATURE], device=setting.device, requires_grad=True)
        return text.requires_grad_(), audio.requires_grad_(), temperature

    return fresh


def vectors(setting: Setting, rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator, device=setting.device), dim=1)


def _ids(text: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """On the host. Each pair is its own clip and caption, but every eighth caption comes twice."""
    clip = torch.arange(len(text))
    ids = torch.stack([clip, clip - (clip % 8 == 7).long()], 1)
    return ids, ids[: len(audio)]


def _nt_xent(text: Tensor, audio: Tensor, temperature: Tensor, world: World, products: str) -> Tensor:
    return tiled.nt_xent(_block(text, audio, world, products), temperature, _ids(text, audio))


def _pmr(text: Tensor, audio: Tensor, temperature: Tensor, world: World, products: str) -> Tensor:
    return tiled.pmr(_block(text, audio, world, products), temperature, OMEGA, _ids(text, audio))


def _distillation(text: Tensor, audio: Tensor, temperature: Tensor, world: World, products: str) -> Tensor:
    wide_text, wide_audio = (
        torch.cat([x, x], 1).detach() for x in (text, audio)
    )  # cosines of twice the width, times 2
    teacher = _block(wide_text, wide_audio, world, products)
    return tiled.distillation(_block(text, audio, world, products), teacher, temperature)


def _cmsc(text: Tensor, audio: Tensor, temperature: Tensor, world: World, products: str) -> Tensor:
    texts, audios = (_inside(x[: len(audio)].detach(), world, products) for x in (text, audio))
    block, ids = _block(text, audio, world, products), _ids(text, audio)
    return tiled.cmsc(block, texts, audios, temperature, 0.3, 0.1, ids)


def _intra_modal(text: Tensor, audio: Tensor, temperature: Tensor, world: World, products: str) -> Tensor:
    return tiled.intra_modal(_inside(audio, world, products), temperature)


def _block(text: Tensor, audio: Tensor, world: World, products: Any) -> EmbeddingScores:
    return EmbeddingScores(text, audio, world, products, largest=1.0)


def _inside(own: Tensor, world: World, products: Any) -> ModalityScores:
    return ModalityScores(own, world, products)


LOSSES: dict[str, Loss] = {
    "nt_xent": _nt_xent,
    "pmr": _pmr,
    "distillation": _distillation,
    "cmsc": _cmsc,
    "intra_modal": _intra_modal,
}


class _OpenClip:
    """open_clip's loss on one batch size. times: name -> ms of what was measured, for the rows that compare with it."""

    def __init__(self, setting: Setting, batch: int) -> None:
        self.setting, self.batch = setting, batch
        self.times: dict[str, float] = {}
        self.kinds = ("fp32", "autocast to bf16", "compiled")

    def row(self, kind: str) -> Row:
        if open_clip_file() is None:
            raise Skip("needs the package open_clip: pip install --no-deps open_clip_torch")
        if kind == "compiled" and not self.setting.cuda:
            raise Skip("needs CUDA")
        loss: nn.Module = open_clip_loss()
        compiled: Callable[..., Tensor] = torch.compile(loss) if kind == "compiled" else loss

        def step(text: Tensor, audio: Tensor, temperature: Tensor) -> None:
            with torch.autocast(self.setting.device, torch.bfloat16, enabled=kind == "autocast to bf16"):
                found = compiled(audio, text, 1 / temperature)
            torch.autograd.grad(found, (text, audio, temperature))

        fresh, products = _fresh(self.setting, self.batch, 1), "bf16" if kind.startswith("auto") else "ieee"
        try:
            row = measured(self.setting, step, fresh, products, repeats=3, alone=kind != "compiled")
        except Exception as error:  # of a reference: it says nothing about this project
            raise Skip(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
        assert row.ms is not None
        self.times[f"open_clip, {kind}"] = row.ms
        return row
