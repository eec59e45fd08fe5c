"""Values that a run can be made with, although hardly anybody means them: a warning each at the start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from atr_scale.config import RunConfig
from atr_scale.data.shard_reader import ShardSet


def unlikely_values(config: RunConfig, sources: Sequence[ShardSet], sample_rate: int) -> Iterator[str]:
    """One line for each. sources: the shards of data.train; sample_rate: of the audio encoder, in Hz."""
    batch, clips = config.train.global_batch_size, sum(map(len, sources))
    if batch == 1:
        yield "train.global_batch_size = 1: a pair alone has no negatives, and contrastive losses are 0"
    if batch > clips:
        yield (
            f"train.global_batch_size = {batch} is more than the {clips} clips of data.train: each batch holds clips "
            "several times, which are positives of each other"
        )
    for number, shards in enumerate(sources):
        stored = shards.manifest.get("sample_rate")
        if isinstance(stored, int) and stored < sample_rate:
            yield (
                f"data.train[{number}] {shards.location} is stored at {stored} Hz, but model.audio.name = "
                f"{config.model.audio.name} reads {sample_rate} Hz: above {stored // 2} Hz there is silence; rebuild "
                f"the shards with --sample-rate {sample_rate} if the recordings have more"
            )
