"""Run configuration: one YAML file plus dotted overrides, checked before anything starts.

    config = load_config("configs/quickstart/pretrain.yaml", ["train.lr=1e-4"])

Unknown keys are refused with a suggestion; the resolved configuration is saved with the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from atr_scale.data.options import DataSection
from atr_scale.encoders.audio import AudioEncoderOptions
from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS, audio_encoder_options
from atr_scale.encoders.text import TextEncoderOptions
from atr_scale.encoders.text_encoders import text_encoder_options
from atr_scale.errors import UserError
from atr_scale.losses import LOSS_TERMS, TermSection, check_loss_terms
from atr_scale.losses.terms import CMSCSection, DistillationSection, IntraModalSection, NTXentSection, PMRSection
from atr_scale.plugins import import_plugins
from atr_scale.scorers import SCORERS, scorer_options
from atr_scale.sections import Count, NonNegative, Positive, Section, Share, explain


class RunSection(Section):
    dir: str = Field(description="run folder: checkpoints, metrics, TensorBoard, report")
    seed: int = 0


class AudioEncoderSection(AudioEncoderOptions):
    """With the fields of the encoder's own options, if it has any: see `encoder_section`."""

    name: str
    checkpoint: str | None = Field(None, description="the original project's checkpoint file")

    @field_validator("name")
    @classmethod
    def is_known(cls, name: str) -> str:
        if name not in AUDIO_ENCODERS:
            raise ValueError(f"unknown audio encoder: known are {', '.join(AUDIO_ENCODERS)}")
        return name


class TextEncoderSection(TextEncoderOptions):
    """With the fields of the encoder's own options, if it has any: see `encoder_section`."""

    name: str = Field(description="an entry of TEXT_ENCODERS, else a transformers model's name or folder")


@cache
def encoder_section(common: type[Section], options: type[Section]) -> type[Section]:
    """`common` with the fields that `options`, an encoder's own section, adds to those of all encoders."""
    return common if issubclass(common, options) else create_model(common.__name__, __base__=(options, common))


class ProjectionSection(Section):
    kind: Literal["none", "linear", "mlp"] = "linear"
    dim: Count = 512


class ScorerSection(Section):
    name: str = "pooled"
    options: dict[str, Any] = Field({}, description="what the scorer can be told, by its own names")

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

    @field_validator("options")
    @classmethod
    def are_of_the_scorer(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """With its defaults filled in."""
        if "name" not in info.data:  # it was refused
            return options
        return scorer_options(info.data["name"]).model_validate(options).model_dump()


class ModelSection(Section):
    audio: SerializeAsAny[AudioEncoderSection]
    text: SerializeAsAny[TextEncoderSection]
    projection: ProjectionSection = ProjectionSection()
    scorer: ScorerSection = ScorerSection()

    @classmethod
    def part(cls, key: str, values: Any) -> Any:
        if key == "audio":
            return encoder_section(AudioEncoderSection, audio_encoder_options(_name_in(values[key])))
        if key == "text":
            return encoder_section(TextEncoderSection, text_encoder_options(_name_in(values[key])))
        return super().part(key, values)

    @field_validator("audio", "text", mode="before")
    @classmethod
    def with_own_options(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        return cls.part(str(info.field_name), {info.field_name: value}).model_validate(value)


def _name_in(values: Any) -> str:
    """The name of what a section chooses, as far as there is one."""
    name = values.get("name", "") if isinstance(values, dict) else ""
    return name if isinstance(name, str) else ""


class TemperatureSection(Section):
    initial: Positive = 0.07
    minimum: Positive = 0.01
    maximum: Positive = 1.0
    learnable: bool = True

    @model_validator(mode="after")
    def ordered(self) -> TemperatureSection:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"need minimum <= initial <= maximum, got {self.minimum}, {self.initial}, {self.maximum}")
        return self


class ObjectiveSection(Section):
    nt_xent: NTXentSection = NTXentSection()
    pmr: PMRSection = PMRSection()
    cmsc: CMSCSection = CMSCSection()
    intra_modal: IntraModalSection = IntraModalSection()
    distillation: DistillationSection = DistillationSection()
    temperature: TemperatureSection = TemperatureSection()

    @property
    def terms(self) -> dict[str, TermSection]:
        """The loss terms by name, those of plug-ins too."""
        return {name: value for name, value in self if isinstance(value, TermSection)}

    @model_validator(mode="after")
    def has_a_term(self) -> ObjectiveSection:
        if not any(term.weight > 0 for term in self.terms.values()):
            raise ValueError(f"no loss term has a positive weight: give one to {', '.join(self.terms)}")
        return self


class TrainSection(Section):
    steps: Count | None = Field(None, description="updates in all; or give epochs")
    epochs: Positive | None = None
    global_batch_size: Count = Field(64, description="pairs inside one loss, over all ranks")
    micro_batch_size: Count | None = Field(
        None, description="pairs in one forward; default: a rank's share. A smaller one (GradCache) needs less memory"
    )
    kept_chunks: Annotated[int, Field(ge=0)] = Field(
        0, description="of a rank's forwards of micro_batch_size, how many keep their graphs and need no second forward"
    )
    accum_steps: Count = Field(1, description="losses averaged per update")
    lr: Positive = 1e-4
    lr_audio: NonNegative | None = Field(None, description="default: lr; 0 freezes the audio encoder")
    lr_text: NonNegative | None = Field(None, description="default: lr; 0 freezes the text encoder")
    lr_heads: NonNegative | None = Field(None, description="projections, scorer, temperature; default: lr")
    lr_floor: Annotated[float, Field(ge=0, le=1)] = Field(0.01, description="last learning rate as a share of lr")
    layer_decay_audio: Share = Field(1.0, description="learning rate of each layer as a share of the one above it")
    layer_decay_text: Share = Field(1.0, description="the same in the text encoder")
    frozen_layers_audio: Annotated[int, Field(ge=0)] = Field(0, description="lowest layers that are not trained")
    frozen_layers_text: Annotated[int, Field(ge=0)] = Field(0, description="the same in the text encoder")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="default: 5 % of all steps")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    gradient_clipping: NonNegative = Field(1.0, description="largest global norm; 0 switches it off")
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    initial_checkpoint: str | None = Field(None, description="run folder or checkpoint whose weights start this run")
    evaluate_every: Count | None = Field(None, description="steps between validations; default: once an epoch")
    checkpoint_every: Count | None = Field(None, description="steps between checkpoints; default: with each validation")
    keep_checkpoints: Count = Field(2, description="newest checkpoints kept, beside the best one")
    log_every: Count = 10
    max_bad_steps: Count = Field(3, description="non-finite updates in a row after which the run stops")

    @model_validator(mode="after")
    def one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class EvaluationSection(Section):
    batch_size: Count = 32
    class_prompt: str = Field("the sound of {label}", description="caption of a class, for labelled sets")
    select: str | None = Field(
        None,
        description="metric that makes a checkpoint the best, SET/METRIC if data.validation names several sets; "
        "default: t2a/mAP@10 of the first set, class/mAP@10 if it is labelled",
    )

    @model_validator(mode="before")
    @classmethod
    def without_precision(cls, values: Any) -> Any:
        """Run folders of version 0.1 hold evaluation.precision, which changed no result."""
        return {key: values[key] for key in values if key != "precision"} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def prompt_names_label(self) -> EvaluationSection:
        if "{label}" not in self.class_prompt:
            raise ValueError("class_prompt must contain {label}")
        return self


class RunConfig(Section):
    """Everything one training run depends on."""

    run: RunSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    train: TrainSection
    evaluation: EvaluationSection = EvaluationSection()
    plugins: list[str] = Field([], description="modules that add losses and more; imported before anything is checked")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), plugins: Sequence[str] = (), trusted: bool = True
) -> RunConfig:
    """The configuration in `path` with dotted `overrides` such as "train.lr=1e-4" applied; otherwise `parse_config`.

    Raises UserError: missing file, YAML that does not parse, an unknown key (with a suggestion), a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no configuration file at {path}: give the path of a YAML file, for example configs/*.yaml")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} does not parse as YAML: {_one_line(error)}") from None
    for override in overrides:
        _apply(loaded, override)
    try:
        values = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path} does not resolve with its overrides: {_one_line(error)}") from None
    return parse_config(values, str(path), plugins, trusted)


def _apply(loaded: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise UserError(f"override {override!r} is not of the form key.sub=value, for example train.lr=1e-4")
    try:
        # Parsed as OmegaConf parses a file: 1e-4 is a number, [a, b] a list.
        parsed = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
        OmegaConf.update(loaded, key, parsed["value"], force_add=True)  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, LookupError, TypeError, ValueError) as error:
        raise UserError(f"override {override!r} cannot be applied: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def parse_config(values: Any, place: str, plugins: Sequence[str] = (), trusted: bool = True) -> RunConfig:
    """`values` (nested dicts) as a checked configuration; `place` is named in errors.

    plugins: modules that are imported first, beside those that the configuration names. trusted: whether the latter may
    be imported; otherwise one that is not among `plugins` is a UserError.
    """
    if not isinstance(values, dict):
        raise UserError(f"{place} holds no configuration: expected the sections {', '.join(RunConfig.model_fields)}")
    named = values.get("plugins")
    named = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []  # else refused below
    missing = [name for name in named if name not in plugins]
    if missing and not trusted:
        raise UserError(
            f"{place} needs the plug-ins {', '.join(missing)}: if you trust them, give plugins={missing}, "
            f"on the command line {' '.join(f'--plugins {name}' for name in missing)}"
        )
    import_plugins(plugins)
    import_plugins(missing)
    kind = _with_added_terms()
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{place}: {explain(error, kind, values)}") from None


def _with_added_terms() -> type[RunConfig]:
    """RunConfig, its objective with a section for every loss term that plug-ins have added or replaced."""
    fields = ObjectiveSection.model_fields
    added: dict[str, Any] = {}
    check_loss_terms()
    for name, term in LOSS_TERMS.items():
        if name in fields and name not in ObjectiveSection().terms:
            raise UserError(f"a loss term cannot be called {name!r}: objective.{name} is something else")
        if name not in fields and hasattr(ObjectiveSection, name):
            raise UserError(f"a loss term cannot be called {name!r}, which is a method of sections: rename it")
        if name not in fields or fields[name].annotation is not term.Section:
            added[name] = (term.Section, {})  # checked when it is used: a section may need values
    if not added:
        return RunConfig
    objective = create_model("ObjectiveSection", __base__=ObjectiveSection, **added)
    return create_model("RunConfig", __base__=RunConfig, objective=(objective, {}))
