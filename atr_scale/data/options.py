"""What the data room can be told: the section `data` of a run's configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from atr_scale.sections import Count, Positive, Section

# Other splits, and what metrics begin with: t2a/R@1 is no metric of a set t2a.
TAKEN = ("train", "test", "t2a", "a2t", "class", "zero_shot")


class TrainingSource(Section):
    shards: str = Field(description="folder or s3:// prefix of one corpus split")
    weight: Positive | None = Field(None, description="share in the mixture; default: the corpus' sample count")


class CaptionSection(Section):
    cleaning: Literal["none", "wavcaps", "lower_no_punctuation"] = "none"
    max_tokens: Annotated[int, Field(ge=4, le=512)] = 64


class DataSection(Section):
    train: list[TrainingSource] = Field(min_length=1)
    validation: str | dict[str, str] | None = Field(
        None, description="shards that training is measured on: one place, or several by name"
    )
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

    @field_validator("validation")
    @classmethod
    def names_of_validation(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for name in value if isinstance(value, dict) else ():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in TAKEN:
                raise ValueError(
                    f"{name!r} cannot name a validation set: use letters, digits, _ and -, and none of "
                    f"{', '.join(TAKEN)}"
                )
        return value

    @property
    def validation_sets(self) -> dict[str, str]:
        """Shards by the name of the validation set; a single place is called `validation`."""
        if isinstance(self.validation, dict):
            return self.validation
        return {"validation": self.validation} if self.validation else {}
