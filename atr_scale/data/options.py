"""The section `data` of a run's configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from atr_scale.sections import Count, Location, Positive, Section

# Names of the other splits, and first parts of metrics' names: t2a/R@1 cannot be a metric of a set t2a.
TAKEN = ("train", "test", "t2a", "a2t", "class", "zero_shot")


class TrainingSource(Section):
    """One corpus of the training mixture."""

    shards: Location = Field(description="folder or s3:// prefix with the shards of one split of a corpus")
    weight: Positive | None = Field(
        None, description="relative frequency of this corpus in the mixture; default: its number of samples"
    )


class CaptionSection(Section):
    """How captions become token ids."""

    cleaning: Literal["none", "wavcaps", "lower_no_punctuation"] = Field(
        "none",
        description="text cleaning before the tokenizer: none; wavcaps (lower case, most punctuation replaced by "
        "spaces); lower_no_punctuation (lower case, all punctuation removed)",
    )
    max_tokens: Annotated[int, Field(ge=4)] | None = Field(
        64,
        description="longer captions are cut to this many tokens, special tokens included; null: only to the text "
        "encoder's own limit, which always holds",
    )


class FoldsSection(Section):
    """Clips that training leaves out, for which a model is then an unbiased teacher."""

    count: Annotated[int, Field(ge=2)] = Field(description="number of folds, into which the keys of samples are hashed")
    held_out: Annotated[int, Field(ge=0)] = Field(description="fold that training leaves out, from 0 to count - 1")

    @model_validator(mode="after")
    def is_a_fold(self) -> FoldsSection:
        if self.held_out >= self.count:
            raise ValueError(f"held_out must be below count = {self.count}, got {self.held_out}")
        return self


class DataSection(Section):
    """Training mixture, validation and test shards, and how clips and captions are taken from them."""

    train: list[TrainingSource] = Field(min_length=1, description="corpora of the training mixture")
    validation: Location | dict[str, Location] | None = Field(
        None, description="shards of the validation set, or of several sets by name; training is measured on them"
    )
    test: Location | None = Field(None, description="shards of the test set, for `atr-scale evaluate`")
    crop_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        10.0, description="length of training crops in seconds; longer clips are cut at a seeded random place"
    )
    crop_quantum: Positive = Field(
        0.5,
        description="training crops are cut to a multiple of this many seconds, so that clips of equal length are "
        "encoded together",
    )
    evaluation_seconds: Positive = Field(
        30.0, description="evaluation encodes at most this many seconds from the start of a clip"
    )
    shuffle_window: Count = Field(4096, description="samples that are shuffled with each other after the block shuffle")
    shuffle_block: Count = Field(64, description="neighbouring samples that the block shuffle moves together")
    workers: Annotated[int, Field(ge=0)] = Field(
        2, description="processes per rank that read batches ahead; 0 reads in the training process"
    )
    buffer_gb: Positive | None = Field(
        None,
        description="gigabytes of shared memory (/dev/shm) that the buffers of a rank's workers may take; null: half "
        "of what is free on the machine, divided by its ranks",
    )
    max_drop_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="training stops if more than this fraction of its samples is unreadable"
    )
    outage_seconds: Annotated[float, Field(ge=0)] = Field(
        600.0,
        description="training waits at most this many seconds for an object store that does not answer, and then ends "
        "with exit code 1; a single object that cannot be read is skipped",
    )
    folds: FoldsSection | None = Field(
        None, description="train without the clips of one fold, as a member of cross-fitted teachers; null: on all"
    )
    captions: CaptionSection = Field(CaptionSection(), description="how captions become token ids")
    augmented_captions: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="fraction of training visits that replace the drawn caption by one of its stored paraphrases, "
        "if it has any",
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
