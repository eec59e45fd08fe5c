"""`atr-scale plan`: memory, time and cost of a training run, before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from atr_scale.config import RunConfig
from atr_scale.data.loader_memory import LoaderMemory, loader_memory
from atr_scale.errors import UserError
from atr_scale.losses import build_objective
from atr_scale.model import Retriever, count_parameters
from atr_scale.planner.advice import Advice, advise
from atr_scale.planner.architecture import build_without_weights
from atr_scale.planner.costs import Costs
from atr_scale.planner.estimate import StepEstimate, estimate_step, fitting_micro_batch, largest_local_batch
from atr_scale.planner.gpus import GPU
from atr_scale.planner.measure import ALWAYS_DENSE, NEVER_DENSE, Teachers, measure_encoders, measure_heads
from atr_scale.planner.timeline import Cluster
from atr_scale.planner.zero_memory import Parameters
from atr_scale.teachers.targets import RANDOM_WIDTH
from atr_scale.training.param_groups import optimizer_groups

WAVCAPS_CLIPS = 403_050  # 7,568 h
SIZES = tuple(2**k for k in range(11))  # GPUs, 1 to 1024
DECODE_S = 0.00045  # seconds of one core for a second of flac at 32 kHz: 4.5 ms for 10 s

UNCUT_TOKENS = 64  # of the captions of a batch if no limit cuts them: captions of all corpora here are shorter


@dataclass(frozen=True)
class Row:
    """One cluster size. planned: None if the batch does not divide among the GPUs, or not even one pair fits on a GPU.

    largest, largest_cached: most pairs in one loss that fit, with a single forward pass and with GradCache.
    """

    world_size: int
    planned: StepEstimate | None
    fits_whole: bool
    largest: int
    largest_cached: int


@dataclass(frozen=True)
class RunPlan:
    """A plan with its inputs.

    epochs: over `clips` clips, or captions if train.epoch_of counts these. seconds: length of a clip. tokens: length of
    a caption. model: numbers of parameters by optimizer group, and of frozen ones. rows: all cluster sizes. chosen: the
    given one. advice: what would make its step faster. loader: the memory of a rank's loader.
    """

    config: RunConfig
    gpu: GPU
    nodes: int
    gpus_per_node: int
    clips: int
    seconds: float
    tokens: int
    epochs: float
    model: dict[str, int]
    costs: Costs
    chosen: Row
    rows: list[Row]
    advice: list[Advice]
    loader: LoaderMemory

    def hours(self, planned: StepEstimate) -> float:
        """Hours of the whole run."""
        return self.epochs * self.clips / planned.rate / 3600

    def cost(self, planned: StepEstimate) -> float:
        """USD of the whole run."""
        return self.hours(planned) * planned.split.world_size * self.gpu.price


def plan_run(
    config: RunConfig,
    gpu: GPU,
    *,
    nodes: int,
    gpus_per_node: int,
    clips: int = WAVCAPS_CLIPS,
    tokens: int | None = None,
    decode_s: float = DECODE_S,
) -> RunPlan:
    """Measure the model of `config` and plan its run.

    tokens: length of a caption; default: data.captions.max_tokens, or UNCUT_TOKENS if captions are not cut.
    decode_s: seconds of one core to decode a second of audio.

    Reads no shards and needs no GPU. Raises UserError if the batch does not divide among the GPUs, or if nothing fits.
    """
    train, data = config.train, config.data
    tokens = tokens or data.captions.max_tokens or UNCUT_TOKENS
    world_size = nodes * gpus_per_node
    if train.global_batch_size % world_size:
        raise UserError(
            f"train.global_batch_size = {train.global_batch_size} does not divide among {nodes} x {gpus_per_node} "
            f"GPUs: set it to a multiple, for example {-(-train.global_batch_size // world_size) * world_size}"
        )
    costs, model = measure_costs(config, data.crop_seconds, tokens)

    def cluster(size: int) -> Cluster:
        return Cluster(gpu, size, gpus_per_node, decode_s * data.crop_seconds, data.workers)

    chosen = _row(costs, cluster(world_size))
    if chosen.planned is None:
        raise UserError(
            f"not even one clip of {data.crop_seconds:g} s with its model fits into {gpu.memory / 2**30:.0f} GiB of a "
            f"{gpu.name}: give a larger --gpu, train.zero_stage=3, activation_checkpointing, or a shorter crop"
        )
    if train.steps is None:
        assert train.epochs is not None
        epochs = train.epochs
    else:
        epochs = train.steps * chosen.planned.samples / clips
    rows = [chosen if size == world_size else _row(costs, cluster(size)) for size in SIZES]
    advice = advise(costs, cluster(world_size), chosen.planned)
    return RunPlan(
        config,
        gpu,
        nodes,
        gpus_per_node,
        clips,
        data.crop_seconds,
        tokens,
        epochs,
        model,
        costs,
        chosen,
        rows,
        advice,
        _loader_memory(config, costs.encoders.samples, world_size),
    )


def _loader_memory(config: RunConfig, samples: int, world_size: int) -> LoaderMemory:
    """Memory of a rank's loader; of data.buffer_gb, or of as much shared memory as it likes."""
    data, local_batch = config.data, config.train.global_batch_size // world_size
    budget = None if data.buffer_gb is None else 1e9 * data.buffer_gb
    return loader_memory(samples, local_batch, data.workers, pinned=True, budget=budget)


def measure_costs(config: RunConfig, seconds: float, tokens: int, gpu: bool = True) -> tuple[Costs, dict[str, int]]:
    """The costs of a configuration, and its numbers of parameters by optimizer group."""
    model = build_without_weights(config)
    groups = [[p.numel() for p in group["params"]] for group in optimizer_groups(model, config.train)]
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    sizes = {name: count_parameters(p for _, p in members) for name, members in model.parameter_groups().items()}
    # Under stage 3 the graph is whole, and the audio encoder ran last.
    text_first = model.text_learns_more and config.train.zero_stage < 3
    encoders = measure_encoders(model, seconds, tokens, gpu, text_first)
    teachers = Teachers(teacher_widths(config, model), config.objective.distillation.ensemble)
    tiled, dense = (
        measure_heads(model, build_objective(config.objective.terms, budget), encoders.outputs, teachers)
        for budget in (NEVER_DENSE, ALWAYS_DENSE)
    )
    scorer = model.scorer
    tile = getattr(scorer, "pairs_per_tile", None)
    costs = Costs(config, encoders, tiled, dense, Parameters(groups, frozen), not scorer.is_dual_encoder, tile)
    return costs, {**sizes, "frozen": sum(frozen)}


def teacher_widths(config: RunConfig, model: Retriever) -> list[int]:
    """Widths of the teachers' embeddings; of a table that does not exist yet, the width of this model."""
    section = config.objective.distillation
    if section.weight == 0:
        return []
    if section.targets != "estimated":
        return [RANDOM_WIDTH if section.targets == "random" else 1]
    widths = []
    for place in (table.path for table in section.tables):
        width = model.audio_projection.dim
        if Path(place).is_file():
            try:
                with safe_open(place, "pt") as file:
                    if "text" in file.keys():  # noqa: SIM118
                        width = math.prod(file.get_slice("text").get_shape()[1:])
            except SafetensorError as error:
                raise UserError(f"{place} is damaged ({error}): run `atr-scale estimate` again") from None
        widths.append(width)
    return widths


def _row(costs: Costs, cluster: Cluster) -> Row:
    train, size = costs.config.train, cluster.world_size
    batch, micro, fits = train.global_batch_size, None, False
    if batch % size == 0:
        local = batch // size
        most = fitting_micro_batch(costs, cluster, batch)
        fits = most == local
        micro = None if most is None else min(train.micro_batch_size or local, most)
    planned = None if micro is None else estimate_step(costs, cluster, batch, micro)
    largest = largest_local_batch(costs, cluster)
    small = train.micro_batch_size or max(1, largest // 4)
    cached = largest_local_batch(costs, cluster, small) if largest else 0
    return Row(size, planned, fits, size * largest, size * cached)
