"""Tiled losses against dense ones and against the ring formulation: time and memory, forward and backward.

    OMP_NUM_THREADS=1 python -m tools.bench.losses

open_clip's loss is its own file, extracted from its wheel, which is downloaded once into ~/.cache/atr_scale/bench and
not installed. The ring formulation is written here: one call for each direction, which streams the other side in blocks
as a rank in a ring receives them, on one process and without the traffic.

Shape suffixes: B pairs, d width.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from atr_scale.losses import dense, tiled
from atr_scale.losses.tiled.tiles import LOSS_BYTES, Workspace, stripes_of, tiles_of
from atr_scale.score_block import EmbeddingScores, ModalityScores
from tools.bench.measure import Function, peak_mib, seconds
from tools.bench.table import Row, run

WIDTH = 512
BATCH, LARGE_BATCH, SOFT_BATCH = 8192, 16384, 4096
TEACHER_WIDTH = 1024  # of an ensemble, whose members' embeddings are joined
RING_RANKS = 8
PMR_PRODUCTS = 5  # three sweeps and two gradients
TEMPERATURE, OMEGA = 0.07, 10.0
Loss = Callable[[], Tensor]
CACHE = Path.home() / ".cache" / "atr_scale" / "bench"
OPEN_CLIP = "open_clip_torch==3.3.0"


def rows() -> Iterator[Row]:
    clip_loss = open_clip_loss()
    yield from nt_xent_and_pmr(clip_loss)
    yield from soft_targets()
    yield from narrow(clip_loss)
    yield from large_batch(clip_loss)


def nt_xent_and_pmr(clip_loss: nn.Module) -> Iterator[Row]:
    text, audio, temperature = inputs(BATCH)
    functions: dict[str, Loss] = {
        "nt_xent": lambda: tiled.nt_xent(EmbeddingScores(text, audio), temperature),
        "open_clip": lambda: clip_loss(audio, text, 1 / temperature),
        "ring": lambda: ring_nt_xent(text, audio, 1 / temperature),
        "pmr": lambda: tiled.pmr(EmbeddingScores(text, audio), temperature, OMEGA),
        "dense pmr": lambda: dense.pmr(text @ audio.T, temperature, OMEGA),
    }
    steps: dict[str, Function] = {name: step(loss, text, audio, temperature) for name, loss in functions.items()}
    steps["product"] = product(text, audio)
    taken = dict(zip(steps, seconds(*steps.values(), repeats=3), strict=True))
    at = f"B={BATCH}, d={WIDTH}"
    yield Row(f"NT-Xent, {at}", taken["nt_xent"], taken["open_clip"], "open_clip ClipLoss", "s", 0.45)
    yield Row(f"NT-Xent, {at}", taken["nt_xent"], taken["ring"], f"a call per direction, {RING_RANKS} blocks", "s")
    yield floor(f"NT-Xent, {at}", taken["nt_xent"], taken["product"], num_products(BATCH))
    yield Row(f"PMR, {at}", taken["pmr"], taken["dense pmr"], "dense", "s", 0.28)
    yield Row(f"PMR, {at}", taken["pmr"], taken["nt_xent"], "NT-Xent on score blocks", "s", 1.5)
    yield floor(f"PMR, {at}", taken["pmr"], taken["product"], PMR_PRODUCTS)
    yield Row(f"PMR, {at}", peak_mib(steps["pmr"]), peak_mib(steps["dense pmr"]), "dense", "MiB", 1 / 30)


def soft_targets() -> Iterator[Row]:
    text, audio, temperature = inputs(SOFT_BATCH)
    teachers = vectors(SOFT_BATCH, TEACHER_WIDTH, 2), vectors(SOFT_BATCH, TEACHER_WIDTH, 3)
    inside = vectors(SOFT_BATCH, WIDTH, 4), vectors(SOFT_BATCH, WIDTH, 5)
    at = f"B={SOFT_BATCH}, d={WIDTH}"

    def cmsc() -> Tensor:
        texts, audios = (ModalityScores(x) for x in inside)
        return tiled.cmsc(EmbeddingScores(text, audio), texts, audios, temperature, 0.3, 0.1)

    def dense_cmsc() -> Tensor:
        texts, audios = (x @ x.T for x in inside)
        return dense.cmsc(text @ audio.T, texts, audios, temperature, 0.3, 0.1)

    # The tiled loss, the dense one, the number of teacher score matrices, and the sum of their widths.
    pairs: dict[str, tuple[Loss, Loss, int, int]] = {
        f"distillation, {at}, teachers' width {TEACHER_WIDTH}": (
            lambda: tiled.distillation(EmbeddingScores(text, audio), EmbeddingScores(*teachers), temperature),
            lambda: dense.distillation(text @ audio.T, teachers[0] @ teachers[1].T, temperature),
            1,
            TEACHER_WIDTH,
        ),
        f"CMSC, {at}": (cmsc, dense_cmsc, 2, 2 * WIDTH),
    }
    for name, (tiled_loss, dense_loss, matrices, width) in pairs.items():
        ours, other = (step(loss, text, audio, temperature) for loss in (tiled_loss, dense_loss))
        our_time, their_time, product_time = seconds(ours, other, product(text, audio), repeats=3)
        yield Row(name, our_time, their_time, "dense", "s", 0.6)
        yield floor(name, our_time, product_time, num_products(SOFT_BATCH, matrices, width))
        yield Row(name, peak_mib(ours), peak_mib(other), "dense", "MiB")


def narrow(clip_loss: nn.Module) -> Iterator[Row]:
    text, audio, temperature = inputs(SOFT_BATCH)
    narrow_text, narrow_audio = (x.detach().bfloat16().requires_grad_() for x in (text, audio))

    def autocast() -> Tensor:
        with torch.autocast(text.device.type, torch.bfloat16):
            loss: Tensor = clip_loss(audio, text, 1 / temperature)
        return loss

    def ours() -> Tensor:
        return tiled.nt_xent(EmbeddingScores(narrow_text, narrow_audio), temperature)

    name = f"NT-Xent of bf16 vectors, B={SOFT_BATCH}, d={WIDTH}"
    mine, other = step(ours, narrow_text, narrow_audio, temperature), step(autocast, text, audio, temperature)
    our_time, their_time, product_time = seconds(mine, other, product(text, audio), repeats=3)
    yield Row(name, our_time, their_time, "open_clip ClipLoss, autocast to bf16", "s", 0.33)
    yield floor(name, our_time, product_time, num_products(SOFT_BATCH))


def large_batch(clip_loss: nn.Module) -> Iterator[Row]:
    text, audio, temperature = inputs(LARGE_BATCH)
    ours = step(lambda: tiled.nt_xent(EmbeddingScores(text, audio), temperature), text, audio, temperature)
    other = step(lambda: clip_loss(audio, text, 1 / temperature), text, audio, temperature)
    name = f"NT-Xent, B={LARGE_BATCH}, d={WIDTH}"
    our_time, their_time, product_time = seconds(ours, other, product(text, audio), repeats=2)
    yield Row(name, our_time, their_time, "open_clip ClipLoss", "s", 0.38)
    yield floor(name, our_time, product_time, num_products(LARGE_BATCH))
    yield Row(name, peak_mib(ours), peak_mib(other), "open_clip ClipLoss", "MiB", 1 / 25)


def floor(name: str, ours: float, product: float, number: float) -> Row:
    return Row(name, ours, number * product, f"its {number:.1f} matrix products alone", "s")


def product(text: Tensor, audio: Tensor) -> Function:
    """All scores once, tile by tile as in a loss, and nothing else: 2 B^2 d operations."""
    block = EmbeddingScores(text, audio)
    work = Workspace(block)

    def all_tiles() -> None:
        for tile in tiles_of(stripes_of(block)):
            block.stripe(tile.columns, tile.rows, out=work.get("scores", tile))

    return all_tiles


def num_products(batch: int, matrices: int = 0, width: int = 0) -> float:
    """Matrix products of width WIDTH in a loss with `matrices` teacher score matrices; `width`: sum of their widths.

    Scores once, and again for tiles that are not kept; the gradients of texts and of audios.
    """
    kept = (LOSS_BYTES - 4 * 2 * batch * WIDTH) / (4 * (1 + matrices) * batch**2)
    return 2 + (2 - min(1.0, max(0.0, kept))) * (1 + width / WIDTH)


def step(loss: Loss, *inputs: Tensor) -> Function:
    """Forward and backward."""
    return lambda: torch.autograd.grad(loss(), inputs)


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of texts and of audios [B, d], and the temperature."""
    text, audio = (vectors(batch, WIDTH, seed).requires_grad_() for seed in (0, 1))
    return text, audio, torch.tensor(TEMPERATURE, device=text.device, requires_grad=True)


def vectors(batch: int, width: int, seed: int) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return normalize(torch.randn(batch, width, generator=torch.Generator().manual_seed(seed)), dim=1).to(device)


def ring_nt_xent(text: Tensor, audio: Tensor, scale: Tensor) -> Tensor:
    """NT-Xent as the mean of two calls, each with one side as queries and the other side streamed."""
    loss: Tensor = (_OneDirection.apply(text, audio, scale) + _OneDirection.apply(audio, text, scale)) / 2
    return loss


class _OneDirection(torch.autograd.Function):
    """mean_i (lse_j scale q_i . k_j - scale q_i . k_i) in RING_RANKS blocks of keys with a running log-sum-exp.

    The backward pass computes the logits of a block again, once for the gradients of both sides.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        log_sums = torch.full_like(queries[:, 0], -torch.inf)
        for block in keys.chunk(RING_RANKS):
            for part, sums in zip(queries.chunk(RING_RANKS), log_sums.chunk(RING_RANKS), strict=True):
                torch.logaddexp(sums, (part @ block.T).mul_(scale).logsumexp(1), out=sums)
        ctx.save_for_backward(queries, keys, scale, log_sums)
        return (log_sums - scale * (queries * keys).sum(1)).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, scale, log_sums = ctx.saved_tensors
        weight = grads[0] / len(queries)
        by_queries, by_keys = -weight * keys, -weight * queries  # of sum_i q_i . k_i
        for block, by_block in zip(keys.chunk(RING_RANKS), by_keys.chunk(RING_RANKS), strict=True):
            for part, sums, by_part in zip(
                *(x.chunk(RING_RANKS) for x in (queries, log_sums, by_queries)), strict=True
            ):
                softmax = (part @ block.T).mul_(scale).sub_(sums[:, None]).exp_().mul_(weight)
                by_part.addmm_(softmax, block)
                by_block.addmm_(softmax.T, part)
        by_scale = (by_queries * queries).sum()
        return by_queries * scale, by_keys * scale, by_scale


def open_clip_file() -> Path | None:
    """The file of open_clip's losses, of the installed package or fetched before; None if there is neither."""
    package = importlib.util.find_spec("open_clip")
    places = [] if package is None else [Path(place) for place in package.submodule_search_locations or ()]
    return next((path for folder in (*places, CACHE / OPEN_CLIP) if (path := folder / "loss.py").exists()), None)


def fetch_open_clip() -> Path:
    """The same from the package index, without installing it."""
    wheels = CACHE / OPEN_CLIP
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), OPEN_CLIP]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{OPEN_CLIP} cannot be fetched: {found.stderr.strip().splitlines()[-1]}")
    (wheel,) = wheels.glob("*.whl")
    (wheels / "loss.py").write_bytes(zipfile.ZipFile(wheel).read("open_clip/loss.py"))
    return wheels / "loss.py"


def open_clip_loss() -> nn.Module:
    """open_clip's ClipLoss on one rank."""
    spec = importlib.util.spec_from_file_location("open_clip_loss", open_clip_file() or fetch_open_clip())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: nn.Module = module.ClipLoss(cache_labels=True)
    return loss


if __name__ == "__main__":
    run(__doc__, rows)
