"""The parts of a model card that say where the model comes from: data, licences, how to train it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from shlex import quote

from atr_scale.encoders.pretrained.weights import WEIGHTS as PUBLISHED
from atr_scale.encoders.text_encoders import TEXT_ENCODERS
from atr_scale.export.origin import Origin, ShardFacts
from atr_scale.export.places import NOT_EXPORTED, OWN_TEXT_ENCODER

TITLES = {"audiocaps": "AudioCaps", "clotho": "Clotho", "wavcaps": "WavCaps"}
CODE_LICENCE = "Apache-2.0"
_COLUMNS = "| corpus | split | clips | captions | hours | lists of excluded clips (clips left out) |"


def markdown_table(head: str, rows: Sequence[tuple[str, ...]]) -> str:
    """head: the line of titles; with fewer columns than the rows it is replaced by an empty one."""
    columns = max(len(row) for row in rows)
    head = head if head.count("|") == columns + 1 else "| " * columns + "|"
    return "\n".join([head, "|-" * columns + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def hub_name(text_encoder: str) -> str | None:
    """The name of the text encoder's model on a hub, None if it is of no hub."""
    return None if text_encoder == OWN_TEXT_ENCODER or text_encoder in TEXT_ENCODERS else text_encoder


def data_section(origin: Origin) -> Iterator[str]:
    """Paragraphs and tables about the data of all stages of training."""
    yield _data_table([facts for facts in origin.data if facts.use == "training"])
    if others := [facts for facts in origin.data if facts.use != "training"]:
        yield "For validation and test:"
        yield _data_table(others, uses=True)
    for stage in origin.earlier:
        if stage is None:
            yield "The first weights are those of another run, whose data are not known here."
        else:
            yield "The first weights are those of another run, which was trained on:"
            yield _data_table(stage)
    data, distillation = origin.config.data, origin.config.objective.distillation
    if distillation.weight > 0:
        yield f"Teacher tables for soft labels: {len(distillation.tables)}. Their models are not described here."
    if data.folds:
        yield f"Training left out the clips of fold {data.folds.held_out} of {data.folds.count}."
    if data.augmented_captions:
        yield f"Captions replaced by stored paraphrases: {100 * data.augmented_captions:g} %, if a clip has any."
    yield (
        "Names, numbers and licences are those that the shards state. A part of a corpus, and other recordings in its "
        "layout, have its name too: look at the number of clips."
    )


def _data_table(data: list[ShardFacts], uses: bool = False) -> str:
    rows = [(*((facts.use,) if uses else ()), *_data_row(facts)) for facts in data]
    return markdown_table(f"| use {_COLUMNS}" if uses else _COLUMNS, rows)


def _data_row(facts: ShardFacts) -> tuple[str, ...]:
    if facts.corpus is None:
        return ("not known: the shards could not be read at the export", *[""] * 5)
    return (
        TITLES.get(facts.corpus, facts.corpus),
        facts.split or "",
        _number(facts.clips),
        _number(facts.captions),
        "not known" if facts.hours is None else f"{facts.hours:.1f}",
        ", ".join(facts.exclusions) or "none",
    )


def _number(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def licence_section(origin: Origin) -> Iterator[str]:
    """The licences of code, pretrained weights and training data."""
    config, names = origin.config, origin.names
    rows = [("code of atr_scale", CODE_LICENCE)]
    audio = names.audio_checkpoint(config.model.audio.checkpoint)
    if audio == NOT_EXPORTED:
        rows.append(("first weights of the audio encoder", "not known: a file on the training machine"))
    elif audio is not None:
        project = PUBLISHED[audio].project
        rows.append((f"first weights of the audio encoder: [{audio}]({project.page})", project.licence))
    text = names.text_encoder(config.model.text.name)
    if hub := hub_name(text):
        rows.append((f"first weights of the text encoder: `{hub}`", f"see [its page](https://huggingface.co/{hub})"))
    elif text == OWN_TEXT_ENCODER:
        rows.append(("first weights of the text encoder", "not known: a folder on the training machine"))
    for facts in {facts.label: facts for facts in origin.training_data}.values():
        title = TITLES.get(facts.corpus or "", facts.corpus or "")
        rows.append((f"data: {title} {facts.split or ''}".rstrip(": "), facts.licence or "not known"))
    yield markdown_table("| part | licence |", rows)
    yield (
        "No licence has been chosen for this model (`license: unknown` above). Its publisher chooses one that these "
        "parts allow, and writes it there."
    )


def reproduction_section(origin: Origin) -> Iterator[str]:
    """Versions, settings, the command, and what to fill in."""
    config, environment, names = origin.config, origin.environment, origin.names
    git, packages = environment.get("git") or {}, environment.get("packages") or {}
    changed = " with changes that were not committed" if git.get("dirty") else ""
    world = origin.state.get("world_size") or environment.get("world_size")
    rows = {
        "atr_scale": environment.get("atr_scale"),
        "git revision": f"`{git['revision']}`{changed}" if git.get("revision") else None,
        "Python": environment.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        "processes": world,
        "seed": config.run.seed,
        "precision": config.train.precision,
        "global batch": f"{config.train.global_batch_size:,} pairs",
    }
    yield markdown_table(
        "", [(name, "not known" if value in (None, "") else str(value)) for name, value in rows.items()]
    )
    start = f"torchrun --nproc-per-node {world} -m atr_scale.train" if world and world > 1 else "atr-scale train"
    yield f"    {start} {quote(names.model + '/config.resolved.yaml')} run.dir=runs/again"
    yield (
        "`config.resolved.yaml` is the whole configuration. Names such as "
        f"`{origin.data[0].label}`, `{OWN_TEXT_ENCODER}` and `{NOT_EXPORTED}` in it stand for files and folders of the "
        "training machine: put yours there. `state.json` has fingerprints of the data."
    )
