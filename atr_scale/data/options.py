"""What the data room can be told: the section `data` of a run's configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atr_scale.sections import Count, Positive, Section


class Source(Section):
    shards: str = Field(description="folder or s3:// prefix of one corpus split")
    weight: Positive | None = Field(None, description="share in the mixture; default: the corpus' sample count")


class CaptionSection(Section):
    cleaning: Literal["none", "wavcaps", "lower_no_punctuation"] = "none"
    max_tokens: Annotated[int, Field(ge=4, le=512)] = 64


class DataSection(Section):
    train: list[Source] = Field(min_length=1)
    validation: str | None = None
    test: str | None = None
    crop_seconds: Positive = Field(10.0, description="training crop; longer clips are cut at a seeded place")
    crop_quantum: Positive = Field(
        0.5, description="training lengths are cut to multiples of this, so that clips of equal length run together"
    )
    evaluation_seconds: Positive = Field(30.0, description="evaluation hears at most this much of a clip's start")
    shuffle_window: Count = Field(4096, description="samples that mix with each other between two block reads")
    shuffle_block: Count = Field(64, description="neighbouring samples that move together in the coarse shuffle")
    workers: Annotated[int, Field(ge=0)] = 2
    max_drop_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    captions: CaptionSection = CaptionSection()
    augmented_captions: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of training visits that take a paraphrase of the drawn caption, where it has any"
    )
