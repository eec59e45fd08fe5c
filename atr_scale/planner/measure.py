"""The costs of the real model, measured without its data and without a GPU.

The encoders run on tensors without values, in batches of two sizes: what every operation costs is linear in the batch.
Scorer and objective run for real on a few pairs, as one rank among several whose collectives are recorded: their costs
are linear in the texts B of the global batch, in the audios b of the rank, in the pairs B b, and, if terms see whole
matrices, in B B.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from atr_scale.batch import Batch, TokenSequence
from atr_scale.encoders.windows import window_starts
from atr_scale.losses import Budget, Objective
from atr_scale.model import AUTOCAST, Encoded, Retriever, StepContext
from atr_scale.planner.architecture import become_fake
from atr_scale.planner.ops import Collective, OpTable, Recorder
from atr_scale.teachers.tables import TeacherEnsemble, TeacherTable

ROWS = (4, 8)  # of the encoders' two runs
HEADS_RUNS = ((2, 2), (2, 3), (3, 2), (3, 3), (2, 4))  # (audios a rank, ranks), one run for each feature
NEVER_DENSE, ALWAYS_DENSE = Budget(dense=0, kept=0), Budget(dense=sys.maxsize, kept=0)
PHASES = ("text forward", "audio forward", "audio backward", "text backward")


@dataclass(frozen=True)
class EncoderCosts:
    """Every operation of the encoders' forward and backward, linear in the rows; ends: of PHASES in the operations.

    outputs: what the heads read, of one row, on tensors without values.
    """

    base: OpTable
    slope: OpTable
    ends: tuple[int, ...]
    outputs: Encoded

    def at(self, rows: int) -> OpTable:
        """The operations for so many rows in one forward."""

        def line(base: NDArray[np.float64], slope: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.maximum(base + slope * rows, 0)

        a, s = self.base, self.slope
        columns = ("flops", "low", "nbytes", "live", "gradients")
        return OpTable(a.names, *(line(getattr(a, name), getattr(s, name)) for name in columns))

    def phase(self, name: str) -> slice:
        number = PHASES.index(name)
        return slice(self.ends[number - 1] if number else 0, self.ends[number])


@dataclass(frozen=True)
class HeadCosts:
    """Scorer and objective, forward and backward, at B texts and b audios of this rank.

    terms: name -> coefficients of 1, b, B, B b and B B. Names: flops (fp32), nbytes (of operations without FLOPs), kept
    (bytes alive after the scorer and the loss) and peak (at the most). ops: operations for one tile. collectives: per
    call its name, dtype, and coefficients of the bytes given.
    """

    terms: dict[str, NDArray[np.float64]]
    ops: int
    collectives: list[tuple[str, torch.dtype, NDArray[np.float64]]]

    def at(self, name: str, texts: int, audios: int) -> float:
        return float(self.terms[name] @ features(texts, audios))


def measure_encoders(model: Retriever, seconds: float, tokens: int, gpu: bool = True) -> EncoderCosts:
    """Forward and backward of both encoders and projections. Afterwards their parameters have no values.

    seconds: length of the clips; tokens: word pieces of the captions. gpu: the operations and dtypes of a GPU instead
    of a CPU's.
    """
    mode = FakeTensorMode()
    for part in (model.audio_encoder, model.audio_projection, model.text_encoder, model.text_projection):
        become_fake(part, mode)
    runs = [_run_encoders(model, mode, rows, seconds, tokens, gpu) for rows in ROWS]
    (first, ends, outputs), (second, _, _) = runs
    assert first.names == second.names, "another batch size runs other operations"
    span = ROWS[1] - ROWS[0]
    columns = ("flops", "low", "nbytes", "live", "gradients")
    slopes = [(getattr(second, name) - getattr(first, name)) / span for name in columns]
    bases = [getattr(first, name) - ROWS[0] * slope for name, slope in zip(columns, slopes, strict=True)]
    return EncoderCosts(OpTable(first.names, *bases), OpTable(first.names, *slopes), ends, outputs)


def _run_encoders(
    model: Retriever, mode: FakeTensorMode, rows: int, seconds: float, tokens: int, gpu: bool
) -> tuple[OpTable, tuple[int, ...], Encoded]:
    handles: list[Any] = []
    dtype = AUTOCAST.get(model.precision)
    # Without a GPU there is no autocast for one: a CPU's, and what a GPU's does otherwise.
    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    policy = _GPUOperations(dtype is not None) if gpu else nullcontext()
    known = [x for part in model.children() for x in (*part.parameters(), *part.buffers())]
    with mode, Recorder(known) as recorder, policy:
        handles = recorder.watch_gradients(model)
        with autocast:
            ids = torch.zeros(rows, tokens, dtype=torch.int64)
            text = model.text_projection(model.text_encoder(ids, torch.ones_like(ids)), model.reads_text_tokens)
        ends = [len(recorder.rows)]
        with autocast:
            waveform = torch.zeros(rows, round(seconds * model.sample_rate))  # lives as long as the batch
            audio = model.audio_projection(_encode_audio(model, waveform), model.reads_audio_tokens)
        ends.append(len(recorder.rows))
        for sequence, tokens_read in ((audio, model.reads_audio_tokens), (text, model.reads_text_tokens)):
            outputs = [x for x, read in ((sequence.tokens, tokens_read), (sequence.pooled, True)) if read]
            outputs = [x for x in outputs if x.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
            ends.append(len(recorder.rows))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return recorder.table(), tuple(ends), Encoded(text, audio)


def _encode_audio(model: Retriever, waveform: Tensor) -> TokenSequence:
    """Clips of one length. Windows become rows, as `AudioEncoder.forward` makes them; tensors without values cannot be
    joined by their masks, so the tokens of the last window are all real here."""
    encoder, (rows, samples) = model.audio_encoder, waveform.shape
    if encoder.window is None or samples <= encoder.window:
        return encoder.encode(waveform)
    count = len(window_starts(samples, encoder.window, encoder.window_hop))
    found = encoder.encode(torch.zeros(rows * count, encoder.window))
    tokens = found.tokens.reshape(rows, -1, found.tokens.shape[-1])
    return TokenSequence(tokens, found.mask.reshape(rows, -1), found.pooled.unflatten(0, (rows, count)).mean(1))


class _GPUOperations(TorchFunctionMode):
    """What a GPU does and a CPU does not: fused attention also with dropout; autocast to fp32 of norms and softmax."""

    IN_FP32 = (functional.layer_norm, functional.group_norm, functional.softmax, torch.softmax, Tensor.softmax)

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            args, kwargs["dropout_p"] = args[:4], 0.0
        elif self.autocast and func in self.IN_FP32 and args and args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


def measure_heads(model: Retriever, objective: Objective, outputs: Encoded, teachers: list[int]) -> HeadCosts:
    """The scorer of `model`, and an objective, on what its encoders give out; teachers: widths of the distillation
    tables.

    Opens and closes process groups of its own: none may be open.
    """
    found = [_run_heads(model, objective, outputs, teachers, share, size) for share, size in HEADS_RUNS]
    rows = np.array([features(share * size, share) for share, size in HEADS_RUNS])
    measured = {name: np.array([values[name] for values, _, _ in found]) for name in found[0][0]}
    terms = {name: np.linalg.solve(rows, values) for name, values in measured.items()}
    # The peak of a large batch may be at another moment than that of a small one. Of whole matrices it holds at most
    # what the forward keeps, and as much again for their gradients.
    terms["peak"] = np.append(np.linalg.solve(rows[:4, :4], measured["peak"][:4]), 2 * terms["kept"][4])
    collectives = []
    for calls in zip(*(called for _, called, _ in found), strict=True):
        kinds = {(one.name, one.dtype) for one in calls}
        assert len(kinds) == 1, "another batch size calls other collectives"
        collectives.append((*kinds.pop(), np.linalg.solve(rows, [one.nbytes for one in calls])))
    return HeadCosts(terms, found[-1][2], collectives)


def features(texts: float, audios: float) -> NDArray[np.float64]:
    """What all costs of the heads are linear in."""
    return np.array([1.0, audios, texts, texts * audios, texts * texts])


def _run_heads(
    model: Retriever, objective: Objective, outputs: Encoded, teachers: list[int], share: int, size: int
) -> tuple[dict[str, float], list[Collective], int]:
    encoded = Encoded(*(_some_rows(side, share) for side in outputs))
    ids = torch.arange(share)
    nothing = torch.zeros(share, 0, dtype=torch.int64)
    batch = Batch(torch.zeros(share, 0), torch.zeros_like(ids), nothing, nothing, ids, ids, torch.zeros_like(ids))
    context = StepContext(teacher=_teacher(teachers, share).block if teachers else None)
    leaves = [x for side in encoded for x in (side.tokens, side.pooled)]
    parameters = [*model.parameters(), *objective.parameters()]
    with _ranks(size), Recorder([*parameters, *leaves]) as recorder:
        loss = objective(model.loss_inputs(batch, encoded, context))["loss"]
        forward = len(recorder.rows)
        loss.backward()
    for parameter in parameters:
        parameter.grad = None
    table = recorder.table()
    return (
        {
            "flops": table.flops.sum(),
            "nbytes": table.nbytes[table.flops == 0].sum(),
            "kept": table.live[forward - 1],
            "peak": table.live.max(),
        },
        recorder.collectives,
        len(table.names),
    )


def _some_rows(sequence: TokenSequence, rows: int) -> TokenSequence:
    """Random leaves of the shapes and dtypes of `sequence`."""

    def leaf(x: Tensor) -> Tensor:
        return torch.randn(rows, *x.shape[1:]).to(x.dtype).requires_grad_()

    return TokenSequence(
        leaf(sequence.tokens), torch.ones(rows, sequence.mask.shape[1], dtype=torch.bool), leaf(sequence.pooled)
    )


def _teacher(widths: list[int], rows: int) -> TeacherEnsemble:
    ids = torch.arange(rows)
    table = TeacherTable("planned", ids, ids, torch.zeros_like(ids), {})
    # Unit vectors, as tables hold: wider scores would be searched for their maxima, which real ones rarely are.
    values = [functional.normalize(torch.randn(rows, width), dim=1).half() for width in widths]
    return TeacherEnsemble([TeacherTable(**{**vars(table), "values": {"text": x, "audio": x}}) for x in values])


@contextmanager
def _ranks(size: int) -> Iterator[None]:
    """This process as rank 0 of `size`; collectives move nothing: gathers repeat what they are given."""
    # torch has no public process group of a size that no processes are there for.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
