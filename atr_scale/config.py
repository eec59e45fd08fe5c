"""The configuration of a run: one YAML file plus dotted overrides, checked before anything starts.

    config = load_config("configs/quickstart/pretrain.yaml", ["train.lr=1e-4"])

Unknown keys are refused with a suggestion; the resolved configuration is saved with the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from atr_scale.config_file import assemble, parse_override, read_files, resolve
from atr_scale.config_model import LEFTOVERS, ModelSection
from atr_scale.config_train import TrainSection
from atr_scale.data.options import DataSection
from atr_scale.errors import UserError
from atr_scale.losses import LOSS_TERMS, TermSection, check_loss_terms
from atr_scale.losses.targets import PositivesMean, PositivesRule
from atr_scale.losses.terms import CMSCSection, DistillationSection, IntraModalSection, NTXentSection, PMRSection
from atr_scale.plugins import import_plugins
from atr_scale.remote.places import address_of, training_folder
from atr_scale.sections import Count, Location, Positive, Section, explain


class RunSection(Section):
    dir: Location = Field(
        min_length=1,
        description="run folder: checkpoints, metrics, TensorBoard files, report; a path, or s3://bucket/prefix",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="seed of initial weights, sample order, crops, captions, augmentation, dropout"
    )
    allow_changed_data: bool = Field(
        False,
        description="resume although shards, teacher tables or other inputs have changed since the checkpoint; it is "
        "logged and recorded in changed_data.jsonl",
    )

    @field_validator("dir")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        address_of(value)  # refuses other schemes
        return value

    @property
    def folder(self) -> Path:
        """The local folder that training writes to: `dir`, or what is uploaded to it."""
        return training_folder(self.dir)


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
    monitor: list[str] = Field(
        ["tensorboard"],
        description="trackers that get the values of metrics.jsonl as well, of tensorboard, wandb and the others of "
        "accelerate; a change does not hinder a resume",
    )
    plugins: list[str] = Field([], description="plug-in modules, imported before the configuration is checked")

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


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
