"""The section `model` of a configuration: encoders, projection and scorer, with the options of the chosen ones."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from atr_scale.config_file import Leftovers
from atr_scale.encoders.audio import AudioEncoderOptions
from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS, audio_encoder_keys, audio_encoder_options
from atr_scale.encoders.text import TextEncoderOptions
from atr_scale.encoders.text_encoders import text_encoder_keys, text_encoder_options
from atr_scale.scorers import SCORERS, scorer_options
from atr_scale.sections import Count, Location, Section


class AudioEncoderSection(AudioEncoderOptions):
    """Options of all audio encoders; `encoder_section` adds those of the chosen one."""

    name: str = Field(description="an audio encoder of docs/encoders.md, or one that a plug-in adds")
    checkpoint: Location | None = Field(
        None,
        description="original weights: a name that `atr-scale fetch-weights --list` shows, or a file; null: random",
    )

    @field_validator("name")
    @classmethod
    def is_known(cls, name: str) -> str:
        if name not in AUDIO_ENCODERS:
            raise ValueError(f"unknown audio encoder: known are {', '.join(AUDIO_ENCODERS)}")
        return name

    @classmethod
    def leftovers(cls, values: dict[str, Any]) -> list[tuple[str, ...]]:
        """The keys of another encoder in `values`: its checkpoint, and options that the named encoder does not have."""
        kept = {"name", *audio_encoder_keys(_name_in(values))}
        return [(key,) for key, value in values.items() if key not in kept and value is not None]


class TextEncoderSection(TextEncoderOptions):
    """Options of all text encoders; `encoder_section` adds those of the chosen one."""

    name: Location = Field(description="hub name or folder of a transformers model, or a text encoder of a plug-in")

    @classmethod
    def leftovers(cls, values: dict[str, Any]) -> list[tuple[str, ...]]:
        """The options in `values` that the named encoder does not have."""
        kept = {"name", *text_encoder_keys(_name_in(values))}
        return [(key,) for key in values if key not in kept]


@cache
def encoder_section(common: type[Section], options: type[Section]) -> type[Section]:
    """The section `common`, extended by the fields that the encoder's own section `options` adds."""
    return common if issubclass(common, options) else create_model(common.__name__, __base__=(options, common))


class ProjectionSection(Section):
    kind: Literal["none", "linear", "mlp"] = Field(
        "linear", description="none (both encoders need one width), linear (one layer) or mlp (two with a ReLU)"
    )
    dim: Count = Field(512, description="width of what the scorer compares; unused with kind none")
    hidden_dim: Count | None = Field(None, description="width of the hidden layer of an mlp; default: dim")

    @model_validator(mode="after")
    def hidden_layer_has_its_mlp(self) -> ProjectionSection:
        if self.hidden_dim is not None and self.kind != "mlp":
            raise ValueError(f"hidden_dim is of kind mlp, and kind is {self.kind}: set it to null, or kind to mlp")
        return self


class ScorerSection(Section):
    name: str = Field("pooled", description="a scorer of docs/scorers.md, or one that a plug-in adds")
    options: dict[str, Any] = Field({}, description="options of the chosen scorer; other names are refused")

    @classmethod
    def part(cls, key: str, values: Any) -> Any:
        if key != "options":
            return super().part(key, values)
        return scorer_options(_name_in(values) or cls.model_fields["name"].default)

    @field_validator("name")
    @classmethod
    def is_known(cls, name: str) -> str:
        if name not in SCORERS:
            raise ValueError(f"unknown scorer: known are {', '.join(SCORERS)}")
        return name

    @classmethod
    def leftovers(cls, values: dict[str, Any]) -> list[tuple[str, ...]]:
        """The options in `values`, which are those of another scorer."""
        options = values.get("options")
        return [("options", key) for key in options] if isinstance(options, dict) else []

    @field_validator("options")
    @classmethod
    def are_of_the_scorer(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """The given options, completed by the scorer's defaults."""
        if "name" not in info.data:  # it was refused
            return options
        return scorer_options(info.data["name"]).model_validate(options).model_dump()


class ModelSection(Section):
    audio: SerializeAsAny[AudioEncoderSection] = Field(description="audio encoder and its options")
    text: SerializeAsAny[TextEncoderSection] = Field(description="text encoder and its options")
    projection: ProjectionSection = Field(ProjectionSection(), description="layers between encoders and scorer")
    scorer: ScorerSection = Field(ScorerSection(), description="scorer and its options")

    @classmethod
    def part(cls, key: str, values: Any) -> Any:
        name = _name_in(values.get(key)) if isinstance(values, dict) else ""
        if key == "audio":
            return encoder_section(AudioEncoderSection, audio_encoder_options(name))
        if key == "text":
            return encoder_section(TextEncoderSection, text_encoder_options(name))
        return super().part(key, values)

    @field_validator("audio", "text", mode="before")
    @classmethod
    def with_own_options(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        return cls.part(str(info.field_name), {info.field_name: value}).model_validate(value)


def _name_in(values: Any) -> str:
    """The value of the key `name`; empty if `values` has no such string."""
    name = values.get("name", "") if isinstance(values, dict) else ""
    return name if isinstance(name, str) else ""


# Sections whose name decides which other keys they have.
LEFTOVERS: Leftovers = {
    ("model", "audio"): AudioEncoderSection.leftovers,
    ("model", "text"): TextEncoderSection.leftovers,
    ("model", "scorer"): ScorerSection.leftovers,
}
