"""docs/config.md: every key of a run's configuration, from the pydantic sections that check it."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr_scale.config import run_config_type
from atr_scale.data.corpora import CORPORA
from atr_scale.encoders.audio import AudioEncoderOptions
from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS, audio_encoder_options
from atr_scale.encoders.text import TextEncoderOptions
from atr_scale.encoders.text_encoders import TEXT_ENCODERS, text_encoder_options
from atr_scale.errors import UserError
from atr_scale.scorers import SCORERS, scorer_options
from atr_scale.sections import Section

HEAD = """\
<!-- written by python -m tools.write_docs: change the descriptions in the code, then run it -->
# Configuration keys

A run is one YAML file plus overrides on the command line, checked before anything starts:

    atr-scale train configs/quickstart/pretrain.yaml train.lr=1e-4 'model.scorer={name: tap}'

An unknown key is refused with a suggestion. The complete configuration of a run is saved as `config.resolved.yaml` in
its run folder.

A file can extend another one, whose path is relative to the file, and then holds only what differs:

    extends: lgmm_cmsc.yaml
    run: {dir: runs/lgmm_mean}
    model: {scorer: {name: mean}}

The mappings of both files are merged; lists and other values replace those of the extended file. Overrides are applied
after that, from left to right. An override replaces, as a whole, what it names:

| override | effect |
|-|-|
| `train.lr=1e-4` | replaces a value |
| `'model.scorer={name: tap}'` | replaces a section; keys that are not given have their defaults |
| `model.scorer.options=null` | a section, a mapping or a list gets its default |
| `'data.train[0].shards=shards/wavcaps'` | replaces a value in an item of a list; items are counted from 0 |
| `'data.train+={shards: shards/clotho/train}'` | appends to a list; the items of a list are appended one by one |
| `'~data.train[1]'`, `'~train.lr_audio'` | removes an item of a list, or a key, which then has its default |

If a file or the command line gives `model.scorer`, `model.audio` or `model.text` another `name`, what belonged to the
old name is dropped, with a line in the log: all options of a scorer, the checkpoint of an audio encoder, and options
that the new encoder does not have. What is given together with the new name is kept, in whatever order.

For other keys the value null stands for no value; the description says what happens then.

`train.initial_checkpoint` takes over weights of another run, never its settings:

    atr-scale train configs/finetune_clotho.yaml train.initial_checkpoint=runs/pretrain_wavcaps
    atr-scale train configs/papers/tap_pmr.yaml 'train.initial_checkpoint={from: runs/pooled, parts: [text_encoder]}'

Without `parts`, both encoders are taken and must fit; the projections and the scorer are taken if all their names and
shapes fit (the scorer: if it is also the same scorer) and start new otherwise. The temperature and the parameters of
loss terms are taken only if `parts` names them. A part that is named must fit. The log, the dry run and
`initial_weights.json` in the run folder say what was taken, what is new and what was left out.

A run can be made longer: start it again with larger `train.steps` or `train.epochs`, whether it has ended or not. The
schedule is then that of the new length, from the step at which the run goes on; steps already made keep the rates that
they had. The length may not fall below the steps already made. What else may change when a run goes on are places,
evaluation, checkpoints, log and memory; any other difference is refused.
"""
# Units of the keys that hold numbers, by the last part of the key; "" for a number without a unit. By the end of a
# name first: window_seconds is in seconds.
ENDINGS = {
    "_seconds": "s",
    "_steps": "optimizer steps",
    "_epochs": "epochs",
    "_tokens": "tokens",
    "_every": "optimizer steps",
}
UNITS = {
    **dict.fromkeys(("seed", "weight", "omega", "beta", "lambda1", "lambda2", "heads", "depth"), ""),
    **dict.fromkeys(("initial", "minimum", "maximum", "temperature", "target_temperature"), ""),
    **dict.fromkeys(("lr", "lr_audio", "lr_text", "lr_heads", "betas", "eps", "weight_decay", "gradient_clipping"), ""),
    **dict.fromkeys(("max_drop_rate", "augmented_captions", "dropout", "lr_floor", "t2a_share"), "fraction"),
    **dict.fromkeys(("layer_decay_audio", "layer_decay_text"), "fraction"),
    **dict.fromkeys(("dim", "width", "ffn_width", "pool_width", "joint", "attention_dim", "hidden_dim"), "channels"),
    **dict.fromkeys(("frozen_layers_audio", "frozen_layers_text"), "layers"),
    **dict.fromkeys(("fmin_aug_range", "fmax_aug_range"), "Hz"),
    **dict.fromkeys(("global_batch_size", "micro_batch_size", "pairs_per_tile"), "pairs"),
    **dict.fromkeys(("shuffle_window", "shuffle_block"), "samples"),
    **dict.fromkeys(("time_stripes_num", "freq_stripes_num"), "stripes"),
    "accum_steps": "losses",
    "batch_size": "clips",
    "buffer_gb": "GB",
    "count": "folds",
    "crop_quantum": "s",
    "epochs": "epochs",
    "freq_drop_width": "mel bands",
    "keep_checkpoints": "checkpoints",
    "held_out": "",
    "kept_chunks": "chunks",
    "num_clusters": "clusters",
    "s_patchout_f": "rows",
    "s_patchout_t": "columns",
    "start": "optimizer steps",
    "steps": "optimizer steps",
    "time_drop_width": "mel frames",
    "workers": "processes",
    "zero_stage": "",
}


def config_page() -> str:
    """The text of docs/config.md. Raises UserError for a key without a description or a number without a unit."""
    lines, run_config = [HEAD], run_config_type()
    for key, section, description in _sections(run_config, ""):
        lines += [f"{'###' if '.' in key else '##'} `{key}`", "", _sentence(description, section), ""]
        lines += _table(section, f"{key}.")
    lines += ["## Keys outside of sections", "", *_table(run_config, "")]
    lines += [
        *_options(
            "## Options of scorers",
            "`model.scorer.name` decides which of these keys there are.",
            {name: (scorer_options(name), Section) for name in SCORERS},
            "model.scorer.options.",
        ),
        *_options(
            "## Options of single audio encoders",
            "Keys that `model.audio.name` adds to those of all audio encoders.",
            {name: (audio_encoder_options(name), AudioEncoderOptions) for name in AUDIO_ENCODERS},
            "model.audio.",
        ),
        *_options(
            "## Options of single text encoders",
            "Keys that `model.text.name` adds to those of all text encoders.",
            {name: (text_encoder_options(name), TextEncoderOptions) for name in TEXT_ENCODERS},
            "model.text.",
        ),
        *_options(
            "## Options of corpora",
            "Arguments of `atr-scale shards build CORPUS key=value`.",
            {name: (corpus.Options, Section) for name, corpus in CORPORA.items()},
            "",
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _sections(kind: type[Section], prefix: str) -> Iterator[tuple[str, type[Section], str]]:
    """Every section below `kind`, outer ones first: dotted key, type, description."""
    for name, field in kind.model_fields.items():
        section = _section_in(field.annotation)
        if section is not None:
            key = f"{prefix}{name}{'[N]' if typing.get_origin(field.annotation) is list else ''}"
            yield key, section, _description(kind, prefix, name)
            yield from _sections(section, f"{key}.")


def _section_in(annotation: Any) -> type[Section] | None:
    """The section in an annotation such as `list[S]` or `S | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, typing.get_args(annotation))), None)


def _options(title: str, note: str, kinds: dict[str, tuple[type[Section], type[Section]]], prefix: str) -> list[str]:
    """A table for every section in `kinds` that adds keys to the section it is paired with."""
    lines, none = [title, "", note, ""], []
    for name, (kind, common) in kinds.items():
        names = [key for key in kind.model_fields if key not in common.model_fields]
        if names:
            lines += [f"### `{name}`", "", _sentence("", kind), "", *_table(kind, prefix, names)]
        else:
            none.append(f"`{name}`")
    return [*lines, f"Without keys of their own: {', '.join(none) or 'all'}.", ""]


def _table(kind: type[Section], prefix: str, names: Iterable[str] = ()) -> list[str]:
    """A row for every key of `kind` that is no section, `name` first; no lines if there is none. names: only these."""
    schemas = kind.model_json_schema()["properties"]
    rows = []
    for name in sorted(names or kind.model_fields, key=lambda key: key != "name"):
        field = kind.model_fields[name]
        if _section_in(field.annotation) is None:
            key, default = field.alias or name, "required" if field.is_required() else f"`{_value(field.default)}`"
            cells = (f"`{prefix}{key}`", _type(schemas[key]), default, _unit(schemas[key], prefix, key))
            rows.append(f"| {' | '.join(cells)} | {_description(kind, prefix, name)} |")
    return ["| key | type | default | unit | meaning |", "|-|-|-|-|-|", *rows, ""] if rows else []


def _description(kind: type[Section], prefix: str, name: str) -> str:
    description = kind.model_fields[name].description
    if not description:
        raise UserError(f"{prefix}{name} has no description: give Field(description=...) in {_files_of(kind)}")
    words = description.removesuffix(".").replace("|", "\\|")
    # A description that begins with a value of the key keeps the spelling of the value.
    values = typing.get_args(kind.model_fields[name].annotation)
    first = words.split()[0].rstrip(":,")
    return f"{words}." if first in values else f"{words[0].upper()}{words[1:]}."


def _sentence(description: str, kind: type[Section]) -> str:
    return f"{description} Defined in {_files_of(kind)}.".strip()


def _files_of(kind: type[Section]) -> str:
    """The files of the classes that `kind` has its keys from."""
    modules = [base.__module__ for base in kind.__mro__ if issubclass(base, Section) and base is not Section]
    return ", ".join(f"`{module.replace('.', '/')}.py`" for module in dict.fromkeys(modules))


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words, such as "int >= 1 or null"."""
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{_value(value)}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])} {_type(schema['prefixItems'][0])}"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object":
        return "mapping"
    name = {"integer": "int", "number": "float", "boolean": "bool", "string": "text", "null": "null"}[schema["type"]]
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " ".join([name, *(f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema)])


def _value(value: Any) -> str:
    return json.dumps(value).strip('"')


def _unit(schema: Mapping[str, Any], prefix: str, name: str) -> str:
    kinds = {part.get("type") for part in [schema, *schema.get("anyOf", ()), *schema.get("prefixItems", ())]}
    if not kinds & {"integer", "number"}:
        return ""
    if name in UNITS:
        return UNITS[name]
    for ending, unit in ENDINGS.items():
        if name.endswith(ending):
            return unit
    raise UserError(f"{prefix}{name} is a number without a unit: add it to UNITS in tools/write_docs/config_page.py")
