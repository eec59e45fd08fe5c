"""What a run would be, without starting it."""

from __future__ import annotations

from atr_scale.config import RunConfig
from atr_scale.data.index import open_shards
from atr_scale.data.text import caption_tokenizer
from atr_scale.model import Retriever, count_parameters
from atr_scale.parallel.world import World
from atr_scale.training.layers import describe_layers, freeze
from atr_scale.training.setup import check_batch_size, num_steps, training_stream

BYTES = 4  # parameters, gradients and both moments are fp32


def plan(config: RunConfig, world_size: int) -> str:
    """Model size, memory for states, steps and shards, as lines of text. Raises UserError as the run itself would."""
    check_batch_size(config, world_size)
    model = Retriever(config.model, config.objective)
    stream = training_stream(config, caption_tokenizer(config), model.sample_rate, World(0, world_size))
    steps, warmup = num_steps(config, stream)
    train = config.train
    freeze(model, train)
    total = count_parameters(model.parameters())
    groups = {name: count_parameters(p for _, p in members) for name, members in model.parameter_groups().items()}
    learned = sum(groups.values())
    # ZeRO 1 splits the two moments over the ranks, 2 the gradients too, 3 the parameters too.
    parts = (2 * learned, learned, total)
    values = sum(n / world_size if train.zero_stage > k else n for k, n in enumerate(parts))
    lines = [
        f"model       {total / 1e6:.2f} M parameters ({', '.join(f'{k} {n / 1e6:.2f} M' for k, n in groups.items())})",
        f"memory      {BYTES * values / 2**30:.2f} GiB a rank for parameters, gradients and moments "
        f"(ZeRO {train.zero_stage}, {world_size} ranks); activations come on top",
        f"batch       {train.global_batch_size} pairs a loss, {train.global_batch_size // world_size} a rank, "
        f"{train.accum_steps} losses an update",
        f"steps       {steps} updates, {warmup} of them warm-up; an epoch is "
        f"{stream.plan.epoch_batches / train.accum_steps:.1f}",
        f"precision   {train.precision}",
        *describe_layers(model, train),
    ]
    for source, shards in zip(config.data.train, stream.sources, strict=True):
        lines.append(f"train       {source.shards}: {len(shards)} clips in {len(shards.names)} shards")
    for name, place in (("validation", config.data.validation), ("test", config.data.test)):
        if place:
            shards = open_shards(place)
            lines.append(f"{name:<11} {place}: {len(shards)} clips in {len(shards.names)} shards")
    return "\n".join(lines)
