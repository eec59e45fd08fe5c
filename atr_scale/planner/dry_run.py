"""What a run would be, without starting it."""

from __future__ import annotations

from atr_scale.config import RunConfig
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.evaluation.selection import check_labels, check_selection
from atr_scale.model import count_parameters
from atr_scale.planner.zero_memory import Parameters
from atr_scale.training.checks import check_batch_size, new_model, num_steps, read_teacher, training_stream
from atr_scale.training.param_groups import describe_layers, freeze


def dry_run(config: RunConfig, world_size: int) -> str:
    """Model size, memory for states, steps and shards, as lines of text. Raises UserError as the run itself would:
    all that it starts from is read, the weights of train.initial_checkpoint and the distillation tables too."""
    check_batch_size(config, world_size)
    validation = {name: open_shards(place) for name, place in config.data.validation_sets.items()}
    check_selection(config.evaluation.select, list(validation))
    check_labels(config.evaluation.select, validation)
    world = World(0, world_size)
    model = new_model(config, world)
    tokenizer = caption_tokenizer(model.text_encoder.tokenizer, config.data.captions)
    stream = training_stream(config, tokenizer, model.sample_rate, world)
    read_teacher(config, stream.sources)
    steps, warmup = num_steps(config, stream)
    train = config.train
    freeze(model, train)
    total = count_parameters(model.parameters())
    groups = {name: count_parameters(p for _, p in members) for name, members in model.parameter_groups().items()}
    stage = train.zero_stage
    sizes = Parameters([[p.numel() for p in model.parameters() if p.requires_grad]], [total - sum(groups.values())])
    values = sum(sizes.states(stage, world_size).values()) + sizes.gradients(stage, world_size, train.accum_steps > 1)
    lines = [
        f"model       {total / 1e6:.2f} M parameters ({', '.join(f'{k} {n / 1e6:.2f} M' for k, n in groups.items())})",
        f"memory      {values / 2**30:.2f} GiB a rank for parameters, gradients and moments "
        f"(ZeRO {stage}, {world_size} ranks); activations come on top: `atr-scale plan` counts them",
        f"batch       {train.global_batch_size} pairs a loss, {train.global_batch_size // world_size} a rank, "
        f"{train.accum_steps} losses an update",
        f"steps       {steps} updates, {warmup} of them warm-up; an epoch is "
        f"{stream.order.epoch_batches / train.accum_steps:.1f}",
        f"precision   {train.precision}",
        *describe_layers(model, train),
    ]
    for source, shards in zip(config.data.train, stream.sources, strict=True):
        lines.append(f"train       {source.shards}: {len(shards)} clips in {len(shards.names)} shards")
    for name, shards in {**validation, **({"test": open_shards(config.data.test)} if config.data.test else {})}.items():
        lines.append(f"{name:<11} {shards.location}: {len(shards)} clips in {len(shards.names)} shards")
    return "\n".join(lines)
