"""The configuration of a run: one YAML file plus dotted overrides, checked before anything starts.

    config = load_config("configs/quickstart/pretrain.yaml", ["train.lr=1e-4"])

Unknown keys are refused with a suggestion; the resolved configuration is saved with the run.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from atr_scale.config_file import Leftovers, assemble, parse_override, read_files, resolve
from atr_scale.data.options import DataSection
from atr_scale.encoders.audio import AudioEncoderOptions
from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS, audio_encoder_keys, audio_encoder_options
from atr_scale.encoders.text import TextEncoderOptions
from atr_scale.encoders.text_encoders import text_encoder_keys, text_encoder_options
from atr_scale.errors import UserError
from atr_scale.losses import LOSS_TERMS, TermSection, check_loss_terms
from atr_scale.losses.targets import PositivesMean, PositivesRule
from atr_scale.losses.terms import CMSCSection, DistillationSection, IntraModalSection, NTXentSection, PMRSection
from atr_scale.plugins import import_plugins
from atr_scale.scorers import SCORERS, scorer_options
from atr_scale.sections import Count, NonNegative, Positive, Section, Share, explain


class RunSection(Section):
    dir: str = Field(min_length=1, description="run folder: checkpoints, metrics, TensorBoard files, report")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="seed of initial weights, sample order, crops, captions, augmentation, dropout"
    )


class AudioEncoderSection(AudioEncoderOptions):
    """Options of all audio encoders; `encoder_section` adds those of the chosen one."""

    name: str = Field(description="an audio encoder of docs/encoders.md, or one that a plug-in adds")
    checkpoint: str | None = Field(
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

    name: str = Field(description="hub name or folder of a transformers model, or a text encoder of a plug-in")

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


class TemperatureSection(Section):
    initial: Positive = Field(0.07, description="value at the first optimizer step; scores are divided by it")
    minimum: Positive = Field(0.01, description="a learned temperature is clamped to at least this")
    maximum: Positive = Field(1.0, description="a learned temperature is clamped to at most this")
    learnable: bool = Field(True, description="train the temperature with the group heads; false: keep it fixed")

    @model_validator(mode="after")
    def ordered(self) -> TemperatureSection:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"need minimum <= initial <= maximum, got {self.minimum}, {self.initial}, {self.maximum}")
        return self


class ObjectiveSection(Section):
    nt_xent: NTXentSection = Field(NTXentSection(), description="NT-Xent (InfoNCE), with several positives")
    pmr: PMRSection = Field(PMRSection(), description="prior-matrix-revised loss (arXiv 2303.05681)")
    cmsc: CMSCSection = Field(CMSCSection(), description="joint soft supervision of LGMM (arXiv 2403.10146)")
    intra_modal: IntraModalSection = Field(
        IntraModalSection(), description="contrast inside each modality (arXiv 2403.10146)"
    )
    distillation: DistillationSection = Field(
        DistillationSection(), description="soft labels from teacher tables (arXiv 2408.11641)"
    )
    temperature: TemperatureSection = Field(TemperatureSection(), description="temperature that all loss terms share")
    positives: PositivesRule = Field(
        "clip_and_text",
        description="positive pairs: clip (of one clip), clip_and_text (also of equal captions after cleaning)",
    )
    positives_mean: PositivesMean = Field(
        "queries",
        description="mean of nt_xent and pmr with several positives: over queries (their positives have equal shares) "
        "or over all positive pairs",
    )

    @property
    def terms(self) -> dict[str, TermSection]:
        """The loss terms by name, including those of plug-ins."""
        return {name: value for name, value in self if isinstance(value, TermSection)}

    @model_validator(mode="after")
    def has_a_term(self) -> ObjectiveSection:
        if not any(term.weight > 0 for term in self.terms.values()):
            raise ValueError(f"no loss term has a positive weight: give one to {', '.join(self.terms)}")
        return self


ModelPart = Literal[
    "audio_encoder", "text_encoder", "audio_projection", "text_projection", "scorer", "temperature", "objective"
]
MODEL_PARTS: tuple[ModelPart, ...] = typing.get_args(ModelPart)


class InitialCheckpoint(Section):
    from_: str = Field(alias="from", min_length=1, description="run folder or checkpoint whose weights start this run")
    parts: Annotated[list[ModelPart], Field(min_length=1)] | None = Field(
        None,
        description="parts of the model whose weights are taken, each of which must fit; "
        "default: both encoders, and whichever of the projections and the scorer fits",
    )

    @model_serializer
    def _by_key(self) -> dict[str, Any]:
        return {"from": self.from_, "parts": self.parts}


class TrainSection(Section):
    steps: Count | None = Field(None, description="length of the run in optimizer steps; give this or epochs")
    epochs: Positive | None = Field(None, description="length of the run in epochs of the training data; see epoch_of")
    epoch_of: Literal["clips", "captions"] = Field(
        "clips",
        description="what an epoch counts: it has as many visits to clips as the training data has clips, or captions; "
        "the sample order is the same",
    )
    global_batch_size: Count = Field(64, description="text-audio pairs inside one loss, over all ranks")
    micro_batch_size: Count | None = Field(
        None, description="pairs in one forward pass; below the local batch, GradCache runs; default: the local batch"
    )
    kept_chunks: Annotated[int, Field(ge=0)] = Field(
        0, description="GradCache: chunks of the local batch that keep their activations and need no second forward"
    )
    accum_steps: Count = Field(1, description="losses of global_batch_size pairs averaged in one optimizer step")
    lr: Positive = Field(1e-4, description="peak learning rate of AdamW, for every group without a rate of its own")
    lr_audio: NonNegative | None = Field(
        None, description="peak learning rate of the audio encoder; 0 freezes it; default: lr"
    )
    lr_text: NonNegative | None = Field(
        None, description="peak learning rate of the text encoder; 0 freezes it; default: lr"
    )
    lr_heads: NonNegative | None = Field(
        None, description="peak learning rate of projections, scorer, temperature and loss parameters; default: lr"
    )
    lr_floor: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="learning rate at the end of the cosine or of the cool-down, as a fraction of the peak"
    )
    layer_decay_audio: Share = Field(
        1.0, description="learning rate of an audio encoder layer, as a fraction of that of the layer above"
    )
    layer_decay_text: Share = Field(
        1.0, description="learning rate of a text encoder layer, as a fraction of that of the layer above"
    )
    frozen_layers_audio: Annotated[int, Field(ge=0)] = Field(
        0, description="lowest layers of the audio encoder that are not trained"
    )
    frozen_layers_text: Annotated[int, Field(ge=0)] = Field(
        0, description="lowest layers of the text encoder that are not trained"
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up: a cosine to lr_floor, or constant until the cool-down"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="optimizer steps over which the learning rate rises from 0; default: 5 % of all"
    )
    warmup_epochs: NonNegative | None = Field(
        None, description="length of the warm-up in epochs, instead of warmup_steps"
    )
    decay_steps: Count | None = Field(
        None, description="optimizer steps from the first on after which the cosine ends; default: the end of the run"
    )
    decay_epochs: Positive | None = Field(None, description="end of the cosine in epochs, instead of decay_steps")
    cooldown_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="last optimizer steps of a constant schedule, in which the rate falls linearly; default: none"
    )
    cooldown_epochs: NonNegative | None = Field(
        None, description="length of the cool-down in epochs, instead of cooldown_steps"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of AdamW's two moments")
    eps: Positive = Field(1e-8, description="epsilon in AdamW's denominator")
    weight_decay: NonNegative = Field(0.01, description="decoupled weight decay of AdamW")
    gradient_clipping: NonNegative = Field(1.0, description="largest global gradient norm; 0: no clipping")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="dtype of autocast; parameters, scores and losses stay fp32; fp16 scales the loss"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    initial_checkpoint: InitialCheckpoint | None = Field(
        None, description="weights of another run that start this one, never its settings; a text alone is `from`"
    )
    evaluate_every: Count | None = Field(None, description="optimizer steps between validations; default: one epoch")
    checkpoint_every: Count | None = Field(
        None, description="optimizer steps between checkpoints; default: evaluate_every"
    )
    keep_checkpoints: Count = Field(2, description="newest checkpoints that are kept, besides the best one")
    log_every: Count = Field(10, description="optimizer steps between log lines")
    max_bad_steps: Count = Field(
        3, description="optimizer steps in a row with a non-finite loss or gradient after which the run stops"
    )

    @field_validator("initial_checkpoint", mode="before")
    @classmethod
    def text_is_from(cls, value: Any) -> Any:
        return {"from": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and null for the other one")
        return self

    @model_validator(mode="after")
    def one_schedule(self) -> TrainSection:
        for name in ("warmup", "decay", "cooldown"):
            given = [getattr(self, f"{name}_{unit}") is not None for unit in ("steps", "epochs")]
            if all(given):
                raise ValueError(f"give {name}_steps or {name}_epochs, and null for the other one")
            wanted = {"decay": "cosine", "cooldown": "constant"}.get(name, self.schedule)
            if any(given) and self.schedule != wanted:
                raise ValueError(
                    f"{name} belongs to schedule {wanted}, but schedule is {self.schedule}: drop one of both"
                )
        return self


class EvaluationSection(Section):
    batch_size: Count = Field(32, description="clips and captions encoded at once on each rank")
    class_prompt: str = Field("the sound of {label}", description="caption of a class in a labelled set")
    select: str | None = Field(
        None,
        description="metric that chooses the best checkpoint, or a sum such as t2a/R@1 + a2t/R@1; SET/METRIC if "
        "data.validation names several sets; "
        "default: t2a/mAP@10 of the first set, class/mAP@10 if it is labelled",
    )

    @model_validator(mode="before")
    @classmethod
    def without_precision(cls, values: Any) -> Any:
        """Run folders of version 0.1 hold evaluation.precision, which changed no result."""
        if isinstance(values, dict) and values.get("precision") in ("fp32", "bf16"):  # its values; others are mistakes
            return {key: values[key] for key in values if key != "precision"}
        return values

    @model_validator(mode="after")
    def prompt_names_label(self) -> EvaluationSection:
        if "{label}" not in self.class_prompt:
            raise ValueError("class_prompt must contain {label}")
        return self


class RunConfig(Section):
    """Everything one training run depends on."""

    run: RunSection = Field(description="run folder and seed")
    data: DataSection = Field(description="shards and how they are read")
    model: ModelSection = Field(description="encoders, projection and scorer")
    objective: ObjectiveSection = Field(ObjectiveSection(), description="loss terms; the loss is their weighted sum")
    train: TrainSection = Field(description="batch, optimizer, schedule, precision, checkpoints")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="evaluation during and after training")
    plugins: list[str] = Field([], description="plug-in modules, imported before the configuration is checked")

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


# Sections whose name decides which other keys they have.
LEFTOVERS: Leftovers = {
    ("model", "audio"): AudioEncoderSection.leftovers,
    ("model", "text"): TextEncoderSection.leftovers,
    ("model", "scorer"): ScorerSection.leftovers,
}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), plugins: Sequence[str] = (), trusted: bool = True
) -> RunConfig:
    """Reads and checks the configuration of a run.

    path: a YAML file; the file that its key `extends` names, relative to it, gives the values that it leaves out.
    overrides: changes in the order of their application. "key.sub=value" replaces a value, a list or a whole section,
    "key[0].sub=value" a value in a list; "key+=value" appends to a list, "~key" removes a key, "~key[0]" a list's item.
    plugins, trusted: see `parse_config`.
    Raises UserError for a missing file, YAML that does not parse, an override that cannot be applied, an unknown key
    (with a suggestion), a wrong value.
    """
    files = read_files(Path(path))
    changes = [parse_override(override) for override in overrides]
    # The plug-ins come first: they may add the encoder that a name stands for.
    _import_plugins(resolve(assemble(files, changes), str(path)), str(path), plugins, trusted)
    return parse_config(resolve(assemble(files, changes, LEFTOVERS), str(path)), str(path), plugins, trusted)


def parse_config(values: Any, place: str, plugins: Sequence[str] = (), trusted: bool = True) -> RunConfig:
    """Checks nested dicts as the configuration of a run.

    values: the sections by name. place: what error messages call the source of the values. plugins: modules to import
    before the check, besides those that the configuration names. trusted: if False, a module that the configuration
    names and that is not among `plugins` is not imported, which is an error.
    Raises UserError for an unknown key (with a suggestion), a wrong value, or a plug-in that cannot be imported.
    """
    _import_plugins(values, place, plugins, trusted)
    kind = run_config_type()
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{place}: {explain(error, kind, values)}") from None


def _import_plugins(values: Any, place: str, plugins: Sequence[str], trusted: bool) -> None:
    """Imports `plugins` and, if trusted, those that the configuration names; see `parse_config`."""
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


def run_config_type() -> type[RunConfig]:
    """RunConfig, extended by a section of the objective for every further entry of LOSS_TERMS.

    Raises UserError for an entry that is no loss term, or whose name a section of the objective cannot have.
    """
    fields = ObjectiveSection.model_fields
    added: dict[str, Any] = {}
    check_loss_terms()
    for name, term in LOSS_TERMS.items():
        if name in fields and name not in ObjectiveSection().terms:
            raise UserError(f"a loss term cannot be called {name!r}: objective.{name} is something else")
        if name not in fields and hasattr(ObjectiveSection, name):
            raise UserError(f"a loss term cannot be called {name!r}, which is a method of sections: rename it")
        if name not in fields or fields[name].annotation is not term.Section:
            # The empty default is checked when it is used, because a section may need values.
            added[name] = (term.Section, Field({}, description=(term.__doc__ or "").partition("\n")[0]))
    if not added:
        return RunConfig
    objective = create_model("ObjectiveSection", __base__=ObjectiveSection, **added)
    description = RunConfig.model_fields["objective"].description
    return create_model("RunConfig", __base__=RunConfig, objective=(objective, Field({}, description=description)))
