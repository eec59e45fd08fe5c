"""Audio encoders, forward and backward under bf16: attention, compiled, channels last; one length, mixed, long.

Weights are random. TFLOP/s are of matrix products, convolutions and attention, its share of bf16 products.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atr_scale.encoders import AudioEncoder, build_audio_encoder
from tools.gpu_check.measure import measured
from tools.gpu_check.rows import Case, Row, Skip
from tools.gpu_check.runner import Setting


class _Way(NamedTuple):
    """A way to run an encoder. lengths: kind of the batch."""

    name: str
    options: dict[str, Any]
    lengths: str = "one length"
    channels_last: bool = False


EAGER, FUSED = _Way("eager", {"attention": "eager"}), _Way("sdpa", {"attention": "sdpa"})
COMPILED = _Way("compile", {"compile": True})
PLAIN, LAST = _Way("as built", {}), _Way("channels_last", {}, channels_last=True)
MIXED, LONG = _Way("as built", {}, "mixed lengths"), _Way("as built", {}, "30 s in windows")
ENCODERS = {
    "mn40": (PLAIN, LAST, MIXED),
    "htsat": (EAGER, FUSED, LONG),
    "passt_s16": (EAGER, FUSED, COMPILED, LONG),
    "cnn14": (PLAIN, LAST, MIXED),
    "atst_frame": (EAGER, FUSED),
}
QUICK = {"tiny_passt": (EAGER, FUSED, LONG), "tiny_cnn14": (LAST, MIXED)}
CLIPS = 32


def cases(setting: Setting) -> Iterator[Case]:
    for name, ways in (QUICK if setting.quick else ENCODERS).items():
        for way in ways:
            yield f"{name}, {way.name}, {way.lengths}", partial(row, setting, name, way)


def row(setting: Setting, name: str, way: _Way) -> Row:
    if way.options.get("compile") and not (setting.cuda and importlib.util.find_spec("triton")):
        raise Skip("needs CUDA and the package triton")
    gc.collect()  # the encoder of the last row
    encoder = build_audio_encoder(name, **way.options).to(setting.device).train()
    if way.channels_last:
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = forward_and_backward(encoder, setting.device)
    fresh = partial(_batch, setting, encoder.sample_rate, way.lengths)
    waveform, lengths = fresh(0)
    flops = 0.0
    if not way.options.get("compile"):  # a compiled function must not run in a mode
        with FlopCounterMode(display=False) as counter:
            step(waveform, lengths)
        flops = float(counter.get_total_flops())
    found = measured(setting, step, fresh, "bf16", repeats=3, alone=False)
    assert found.ms is not None
    rate = flops / found.ms / 1e9 if flops else None
    ceiling = setting.ceilings.get("gemm bf16")
    share = rate / ceiling.tflops if rate and ceiling and ceiling.tflops else None
    clips = 1000 * len(waveform) / found.ms
    note = f"{clips:.0f} clips a second; {found.note}".rstrip("; ")
    return replace(found, tflops=rate, share=share, note=note)


def forward_and_backward(encoder: AudioEncoder, device: str) -> Callable[[Tensor, Tensor], None]:
    parameters = [p for p in encoder.parameters() if p.requires_grad]

    def step(waveform: Tensor, lengths: Tensor) -> None:
        with torch.autocast(device, torch.bfloat16):
            found = encoder(waveform, lengths)
        total = found.tokens.float().square().mean() + found.pooled.float().square().mean()
        torch.autograd.grad(total, parameters, allow_unused=True)

    return step


def _batch(setting: Setting, sample_rate: int, kind: str, number: int) -> tuple[Tensor, Tensor]:
    """Noise of 10 s clips, of lengths of 1 to 10 s in half seconds, or of 30 s clips."""
    clips = 2 if setting.quick else CLIPS // 3 if kind.startswith("30") else CLIPS
    seconds = 30.0 if kind.startswith("30") else 2.0 if setting.quick else 10.0
    samples = round(seconds * sample_rate)
    generator = torch.Generator(setting.device).manual_seed(number)
    waveform = 0.1 * torch.randn(clips, samples, generator=generator, device=setting.device)
    lengths = torch.full((clips,), samples)
    if kind == "mixed lengths":
        halves = 2 + torch.arange(clips) % round(2 * seconds - 1)
        lengths = (halves * sample_rate // 2).clamp(max=samples)
        waveform *= torch.arange(samples, device=setting.device) < lengths.to(setting.device)[:, None]
    return waveform, lengths
