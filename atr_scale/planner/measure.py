"""The costs of the real model, measured without its data and without a GPU.

The encoders run on tensors without values, in batches of two sizes: the cost of every operation is linear in the batch.
Scorer and objective run with real values on a few pairs, as one rank among several whose collectives are recorded.
Their costs are linear in the texts B of the global batch, in the audios b of the rank, in the pairs B b, and, if terms
read whole matrices, in B B.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from atr_scale.batch import Batch, TokenSequence
from atr_scale.losses import Budget, Objective
from atr_scale.model import Encoded, Retriever, StepContext
from atr_scale.planner.architecture import become_fake
from atr_scale.planner.ops import Collective, OpTable, Recorder
from atr_scale.planner.transfer import Phase
from atr_scale.precision import autocast
from atr_scale.teachers.ensemble import EnsembleMember, TeacherEnsemble
from atr_scale.teachers.tables import TeacherTable

ROWS = (4, 8)  # batch sizes of the two runs of the encoders
HEADS_RUNS = ((2, 2), (2, 3), (3, 2), (3, 3), (2, 4))  # (audios a rank, ranks), one run for each feature
NEVER_DENSE, ALWAYS_DENSE = Budget(dense=0, kept=0), Budget(dense=sys.maxsize, kept=0)


@dataclass(frozen=True)
class EncoderCosts:
    """Every operation of the encoders' forward and backward pass: base + slope * rows.

    phases: in the order in which they run. ends: the number of operations up to the end of each. outputs: encoder
    outputs, without values. samples: of a clip.
    """

    base: OpTable
    slope: OpTable
    phases: tuple[Phase, ...]
    ends: tuple[int, ...]
    outputs: Encoded
    samples: int

    def at(self, rows: int) -> OpTable:
        """The operations of one forward and backward pass of `rows` rows."""

        def line(base: NDArray[np.float64], slope: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.maximum(base + slope * rows, 0)

        a, s = self.base, self.slope
        columns = ("flops", "low", "nbytes", "live", "gradients")
        return OpTable(a.names, *(line(getattr(a, name), getattr(s, name)) for name in columns))

    def phase(self, name: Phase) -> slice:
        number = self.phases.index(name)
        return slice(self.ends[number - 1] if number else 0, self.ends[number])


@dataclass(frozen=True)
class HeadCosts:
    """Forward and backward pass of scorer and objective, with B texts and the b audios of this rank.

    terms: name -> coefficients of `features`. Names: flops (fp32), nbytes (of operations without FLOPs), kept (bytes
    alive after scorer and loss) and peak (most bytes alive). ops: operations for one tile. collectives: for each call
    its name, dtype, and coefficients of the bytes that a rank gives to it.
    """

    terms: dict[str, NDArray[np.float64]]
    ops: int
    collectives: list[tuple[str, torch.dtype, NDArray[np.float64]]]

    def at(self, name: str, texts: int, audios: int) -> float:
        return float(self.terms[name] @ features(texts, audios))


def measure_encoders(
    model: Retriever, seconds: float, tokens: int, gpu: bool = True, text_first: bool = True
) -> EncoderCosts:
    """Forward and backward pass of both encoders and projections. Afterwards their parameters have no values.

    seconds: length of the clips. tokens: length of the captions. gpu: operations and dtypes of a GPU, not of this CPU.
    text_first: whether the backward pass takes the text encoder before the audio encoder.
    """
    mode = FakeTensorMode()
    for part in (model.audio_encoder, model.audio_projection, model.text_encoder, model.text_projection):
        become_fake(part, mode)
    phases: tuple[Phase, ...] = ("text forward", "audio forward", "text backward", "audio backward")
    if not text_first:
        phases = (*phases[:2], phases[3], phases[2])
    samples = round(seconds * model.sample_rate)
    runs = [_run_encoders(model, mode, rows, samples, tokens, gpu, phases) for rows in ROWS]
    (first, ends, outputs), (second, _, _) = runs
    assert first.names == second.names, "another batch size runs other operations"
    span = ROWS[1] - ROWS[0]
    columns = ("flops", "low", "nbytes", "live", "gradients")
    slopes = [(getattr(second, name) - getattr(first, name)) / span for name in columns]
    bases = [getattr(first, name) - ROWS[0] * slope for name, slope in zip(columns, slopes, strict=True)]
    return EncoderCosts(OpTable(first.names, *bases), OpTable(first.names, *slopes), phases, ends, outputs, samples)


def _run_encoders(
    model: Retriever,
    mode: FakeTensorMode,
    rows: int,
    samples: int,
    tokens: int,
    gpu: bool,
    phases: Sequence[Phase],
) -> tuple[OpTable, tuple[int, ...], Encoded]:
    handles: list[Any] = []
    # Autocast for a GPU needs one: use a CPU's, with _GPUOperations for the differences.
    lowered = autocast(torch.device("cpu"), model.precision)
    policy = _GPUOperations(model.precision != "fp32") if gpu else nullcontext()
    known = [x for part in model.children() for x in (*part.parameters(), *part.buffers())]
    with mode, Recorder(known) as recorder, policy:
        handles = recorder.watch_gradients(model)
        with lowered:
            ids = torch.zeros(rows, tokens, dtype=torch.int64)
            text = model.text_projection(model.text_encoder(ids, torch.ones_like(ids)), model.reads_text_tokens)
        ends = [len(recorder.rows)]
        with lowered:
            waveform = torch.zeros(rows, samples)  # lives as long as the batch
            audio = model.audio_projection(model.audio_encoder(waveform), model.reads_audio_tokens)
        ends.append(len(recorder.rows))
        for phase in phases[2:]:
            of_text = phase == "text backward"
            sequence, tokens_read = (text, model.reads_text_tokens) if of_text else (audio, model.reads_audio_tokens)
            outputs = [x for x, read in ((sequence.tokens, tokens_read), (sequence.pooled, True)) if read]
            outputs = [x for x in outputs if x.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
            ends.append(len(recorder.rows))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return recorder.table(), tuple(ends), Encoded(text, audio)


class _GPUOperations(TorchFunctionMode):
    """Differences of a GPU from a CPU: fused attention also with dropout, and autocast to fp32 of norms and softmax."""

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


class Teachers(NamedTuple):
    """Widths of the teachers' embeddings, and what is averaged over them (objective.distillation.ensemble)."""

    widths: list[int]
    ensemble: Literal["cosines", "probabilities"] = "cosines"


def measure_heads(model: Retriever, objective: Objective, outputs: Encoded, teachers: Teachers) -> HeadCosts:
    """Costs of the scorer of `model` and of an objective on its encoder outputs.

    Opens and closes process groups of its own: none may be open.
    """
    found = [_run_heads(model, objective, outputs, teachers, local, size) for local, size in HEADS_RUNS]
    rows = np.array([features(local * size, local) for local, size in HEADS_RUNS])
    measured = {name: np.array([values[name] for values, _, _ in found]) for name in found[0][0]}
    terms = {name: np.linalg.solve(rows, values) for name, values in measured.items()}
    # The peak of a large batch may be at another moment than that of a small one. It holds at most the whole matrices
    # that the forward pass keeps, and as much again for their gradients.
    terms["peak"] = np.append(np.linalg.solve(rows[:4, :4], measured["peak"][:4]), 2 * terms["kept"][4])
    collectives = []
    for calls in zip(*(called for _, called, _ in found), strict=True):
        kinds = {(one.name, one.dtype) for one in calls}
        assert len(kinds) == 1, "another batch size calls other collectives"
        collectives.append((*kinds.pop(), np.linalg.solve(rows, [one.nbytes for one in calls])))
    return HeadCosts(terms, found[-1][2], collectives)


def features(texts: float, audios: float) -> NDArray[np.float64]:
    """[1, b, B, B b, B B] for B texts and b audios: the costs of scorer and objective are linear in these."""
    return np.array([1.0, audios, texts, texts * audios, texts * texts])


def _run_heads(
    model: Retriever, objective: Objective, outputs: Encoded, teachers: Teachers, local: int, size: int
) -> tuple[dict[str, float], list[Collective], int]:
    encoded = Encoded(*(_some_rows(side, local) for side in outputs))
    ids = torch.arange(local)
    nothing = torch.zeros(local, 0, dtype=torch.int64)
    batch = Batch(torch.zeros(local, 0), torch.zeros_like(ids), nothing, nothing, ids, ids, ids, ids)
    context = StepContext(teacher=random_teacher(teachers, local).labels if teachers.widths else None)
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


def random_teacher(teachers: Teachers, rows: int) -> TeacherEnsemble:
    ids = torch.arange(rows)
    table = TeacherTable("planned", ids, ids, ids, {})
    # Unit vectors as in real tables: the losses search scores outside of [-1, 1] for their maxima.
    values = [functional.normalize(torch.randn(rows, width), dim=1).half() for width in teachers.widths]
    members = [EnsembleMember(replace(table, values={"text": x, "audio": x})) for x in values]
    return TeacherEnsemble(members, teachers.ensemble)


@contextmanager
def _ranks(size: int) -> Iterator[None]:
    """Make this process rank 0 of `size`. Collectives move nothing; gathers repeat their input."""
    # torch has no public process group that needs no other processes.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
