"""The dry run: what a training run would be, without starting it."""

from __future__ import annotations

from atr_scale.config import RunConfig
from atr_scale.data.shard_reader import open_shards, refuse_repeated_ids
from atr_scale.distributed.world import World
from atr_scale.model import count_parameters
from atr_scale.planner.zero_memory import Parameters
from atr_scale.training.checks import check_batch_size
from atr_scale.training.param_groups import describe_layers
from atr_scale.training.parts import open_parts, open_validation
from atr_scale.training.schedule import describe_length


def dry_run(config: RunConfig, world_size: int) -> str:
    """Model size, memory for states, steps and shards, as lines of text.

    Reads all that the run itself starts from, also the weights of train.initial_checkpoint and the teacher tables.
    Raises UserError as the run would.
    """
    check_batch_size(config, world_size)
    validation = open_validation(config)
    parts = open_parts(config, World(0, world_size))
    model, stream, length = parts.model, parts.stream, parts.length
    train, (steps, visits) = config.train, describe_length(config, length)
    total = count_parameters(model.parameters())
    groups = {name: count_parameters(p for _, p in members) for name, members in model.parameter_groups().items()}
    stage = train.zero_stage
    sizes = Parameters([[p.numel() for p in model.parameters() if p.requires_grad]], [total - sum(groups.values())])
    values = sum(sizes.states(stage, world_size).values()) + sum(
        sizes.gradients(stage, world_size, train.accum_steps > 1)
    )
    used, objective = config.model, config.objective
    losses = [f"{term.weight:g} {name}" for name, term in objective.terms.items() if term.weight]
    lines = [
        f"networks    {used.audio.name}, {used.text.name}, scorer {used.scorer.name}",
        f"loss        {' + '.join(losses)}, temperature {objective.temperature.initial:g}"
        + (" at first" if objective.temperature.learnable else ""),
        f"model       {total / 1e6:.2f} M parameters ({', '.join(f'{k} {n / 1e6:.2f} M' for k, n in groups.items())})",
        f"memory      {values / 2**30:.2f} GiB a rank for parameters, gradients and moments "
        f"(ZeRO {stage}, {world_size} ranks); activations come on top: `atr-scale plan` counts them",
        f"batch       {train.global_batch_size} pairs a loss, {train.global_batch_size // world_size} a rank, "
        f"{train.accum_steps} losses a step",
        f"steps       {steps}",
        f"visits      {visits}",
        f"precision   {train.precision}",
        *describe_layers(model, train),
    ]
    if parts.initial:
        lines.append(f"initial     {parts.initial}")
    folds = config.data.folds
    left_out = f", without fold {folds.held_out} of {folds.count}" if folds else ""
    for source, shards in zip(config.data.train, stream.sources, strict=True):
        lines.append(f"train       {source.shards}: {len(shards)} clips in {len(shards.names)} shards{left_out}")
    for found in parts.teacher.coverage if parts.teacher else ():
        lines.append(f"teachers    {found.location}: {found.describe()}")
    for name, shards in {**validation, **({"test": open_shards(config.data.test)} if config.data.test else {})}.items():
        refuse_repeated_ids(shards)
        lines.append(f"{name:<11} {shards.location}: {len(shards)} clips in {len(shards.names)} shards")
    return "\n".join(lines)
