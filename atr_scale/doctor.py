"""Check an audio encoder: its sizes, whether a checkpoint loads, its speed and memory, the tags of a recording.

Shape suffixes: B batch, S samples, L classes.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atr_scale.data.decode import decode
from atr_scale.data.sample import BadSample
from atr_scale.encoders import AUDIO_ENCODERS, AudioEncoder, build_audio_encoder
from atr_scale.encoders.pretrained.load import identify, load_strictly
from atr_scale.encoders.pretrained.weights import checkpoint_path
from atr_scale.errors import UserError
from atr_scale.memory import peak_memory, reset_peak_memory

NUM_TAGS = 5


@dataclass(frozen=True)
class Measurement:
    """Speed and memory of an encoder.

    seconds: length of the clips. forward, training: clips per second. forward_memory, training_memory: peak memory in
    bytes beyond the weights, None if the system does not report it.
    """

    device: str
    dtype: str
    seconds: float
    batch_size: int
    forward: float
    forward_memory: int | None
    training: float
    training_memory: int | None


def time_encoder(encoder: AudioEncoder, seconds: float = 10.0, batch_size: int = 4, repeats: int = 3) -> Measurement:
    """Time `encoder` on noise, on its device: the median of `repeats` calls after one warm-up call.

    forward is evaluation without gradients, training is a forward and a backward pass. On a GPU memory is the memory of
    tensors. On a CPU it is the growth of the process, which is exact only in a new process.
    """
    parameter = next(encoder.parameters())
    device, was_training = parameter.device, encoder.training
    waveform_BS = 0.1 * torch.randn(batch_size, round(seconds * encoder.sample_rate), device=device)

    def forward() -> None:
        with torch.no_grad():
            encoder(waveform_BS)

    def training() -> None:
        sequence = encoder(waveform_BS)
        (sequence.tokens.float().square().mean() + sequence.pooled.float().square().mean()).backward()
        encoder.zero_grad()

    start = reset_peak_memory(device)
    encoder.eval()
    forward_rate = batch_size / _median_time(forward, repeats, device)
    forward_peak = peak_memory(device)
    encoder.train()
    training_rate = batch_size / _median_time(training, repeats, device)
    training_peak = peak_memory(device)
    encoder.train(was_training)
    on_gpu = device.type == "cuda"
    return Measurement(
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        dtype=str(parameter.dtype).removeprefix("torch."),
        seconds=seconds,
        batch_size=batch_size,
        forward=forward_rate,
        forward_memory=_growth(start, forward_peak),
        training=training_rate,
        training_memory=_growth(start, training_peak),
    )


def time_encoder_by_name(name: str, seconds: float, batch_size: int, repeats: int) -> Measurement:
    """Call `time_encoder` with a randomly initialised encoder, on a GPU if there is one."""
    encoder = build_audio_encoder(name).to("cuda" if torch.cuda.is_available() else "cpu")
    return time_encoder(encoder, seconds, batch_size, repeats)


def _median_time(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def top_tags(encoder: AudioEncoder, waveform_S: Tensor, labels: list[str], count: int = NUM_TAGS) -> dict[str, float]:
    """The `count` most probable classes of a clip [S] with their probabilities, the most probable first.

    labels: names of the classes; if empty, the names are the indices. Raises UserError if the encoder has no classifier
    or if the number of labels is not that of its classes.
    """
    probabilities_L = encoder.tags(waveform_S.unsqueeze(0))[0].sigmoid()
    names = labels or [f"class {i}" for i in range(len(probabilities_L))]
    if len(names) != len(probabilities_L):
        raise UserError(f"{len(names)} labels for {len(probabilities_L)} classes: give the labels of AudioSet")
    best = probabilities_L.topk(count)
    return {names[i]: p for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)}


def read_labels(path: Path) -> list[str]:
    """Names of the classes, from AudioSet's class_labels_indices.csv (index, mid, display_name).

    Raises UserError if the file is not such a list.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names = {int(row["index"]): row["display_name"] for row in csv.DictReader(file)}
    except FileNotFoundError:
        raise UserError(f"no labels at {path}: check the path") from None
    except (KeyError, ValueError, TypeError, OSError):
        names = {}
    if not names or sorted(names) != list(range(len(names))):
        raise UserError(f"{path} is no list of labels: give AudioSet's class_labels_indices.csv")
    return [names[i] for i in range(len(names))]


def read_audio(path: Path, sample_rate: int) -> Tensor:
    """Read a recording as mono float32 [samples] at `sample_rate` Hz. Raises UserError if it is not audio."""
    try:
        return torch.from_numpy(decode(path.read_bytes(), path.suffix.lstrip("."), sample_rate))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give an audio file") from None
    except BadSample as error:
        raise UserError(f"{path} cannot be decoded ({error}): give an audio file") from None


def diagnose(
    name: str | None = None,
    checkpoint: str | Path | None = None,
    *,
    audio: Path | None = None,
    labels: Path | None = None,
    seconds: float = 10.0,
    batch_size: int = 4,
    repeats: int = 3,
) -> dict[str, Any]:
    """Examine the encoder `name`, by default the one that `checkpoint` fits. Returns all results by name.

    checkpoint: the file of the original project, or its name in the weights table.
    audio: recording to tag. labels: file with the names of the classes. seconds, batch_size: length and number of the
    timed clips. repeats: number of timed calls.
    Raises UserError if the checkpoint does not load or fits no encoder or several, or if `audio` cannot be tagged.
    """
    if audio is not None and checkpoint is None:
        raise UserError("--audio without --checkpoint: random weights cannot tag, give the original file too")
    if labels is not None and audio is None:
        raise UserError("--labels without --audio: give a recording to tag")
    names = read_labels(labels) if labels is not None else []
    checkpoint = None if checkpoint is None else checkpoint_path(checkpoint)
    if name is None:
        if checkpoint is None:
            raise UserError(f"nothing to examine: give --checkpoint, or --encoder: {', '.join(AUDIO_ENCODERS)}")
        name = _only(identify(checkpoint), checkpoint)
    encoder = build_audio_encoder(name)
    facts: dict[str, Any] = {"encoder": name}
    if checkpoint is not None:
        loaded = load_strictly(encoder, encoder.layouts, name, checkpoint)
        facts |= {
            "checkpoint": str(checkpoint),
            "layout": loaded.layout.name,
            "entries_loaded": loaded.num_loaded,
            "entries_derived": loaded.num_derived,
            "entries_unused": loaded.num_unused,
        }
    if audio is not None:
        waveform_S = read_audio(audio, encoder.sample_rate)
        facts |= {"audio": str(audio), "tags": top_tags(encoder, waveform_S, names)}
    with torch.no_grad():
        tokens = int(encoder(torch.zeros(1, 10 * encoder.sample_rate)).mask.sum())
    facts |= {
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "parameters_trained": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        "sample_rate": encoder.sample_rate,
        "native_seconds": encoder.native_seconds,
        "dim": encoder.dim,
        "tokens_per_second": tokens / 10,
        "tokens_per_10_seconds": tokens,
    }
    return {**facts, "measured": asdict(_measure_in_fresh_process(name, seconds, batch_size, repeats))}


def _measure_in_fresh_process(name: str, seconds: float, batch_size: int, repeats: int) -> Measurement:
    """Time in a new process, because memory that this process has freed would hide the growth."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        try:
            return fresh.submit(time_encoder_by_name, name, seconds, batch_size, repeats).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            raise UserError(
                f"timing {name} on {batch_size} clips of {seconds:g} s needs more memory than there is: "
                "give a smaller --batch-size or fewer --seconds"
            ) from None


def _only(names: list[str], checkpoint: Path) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise UserError(f"{checkpoint} fits no known encoder: give --encoder NAME to see what is wrong with it")
    raise UserError(f"{checkpoint} loads into {' and '.join(names)}: choose one with --encoder")


def describe_facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The results of `diagnose` as rows of a table: a name and a text."""
    measured, native = facts["measured"], facts["native_seconds"]
    rows = [("encoder", facts["encoder"])]
    if "layout" in facts:
        rows += [
            ("checkpoint", f"{facts['checkpoint']} loads"),
            ("layout", facts["layout"]),
            (
                "entries",
                f"{facts['entries_loaded']} loaded; ignored: {facts['entries_derived']} derived, "
                f"{facts['entries_unused']} unused",
            ),
        ]
    rows += [
        ("parameters", f"{facts['parameters'] / 1e6:.2f} M, {facts['parameters_trained'] / 1e6:.2f} M of them trained"),
        ("sample rate", f"{facts['sample_rate']} Hz"),
        ("native length", "any" if native is None else f"{native:g} s, longer clips in windows"),
        ("dim", str(facts["dim"])),
        ("tokens", f"{facts['tokens_per_second']:g} per second of audio, {facts['tokens_per_10_seconds']} per 10 s"),
        ("forward", _cost(measured["forward"], measured["forward_memory"])),
        ("forward, backward", _cost(measured["training"], measured["training_memory"])),
        (
            "measured with",
            f"{measured['device']}; {measured['dtype']}, {measured['batch_size']} clips of {measured['seconds']:g} s",
        ),
    ]
    if "tags" in facts:
        rows.append(("tags", facts["audio"]))
        rows += [("", f"{probability:.3f} {tag}") for tag, probability in facts["tags"].items()]
    return rows


def _growth(start: int | None, peak: int) -> int | None:
    return None if start is None else peak - start


def _cost(rate: float, memory: int | None) -> str:
    peak = "peak memory unknown" if memory is None else f"{memory / 2**20:.0f} MiB at the peak, beyond the weights"
    return f"{rate:.3g} clips/s, {peak}"


def write_facts(facts: dict[str, Any], path: Path) -> None:
    """Write the results of `diagnose` as JSON. Raises UserError if the file cannot be written."""
    try:
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give another file") from None
