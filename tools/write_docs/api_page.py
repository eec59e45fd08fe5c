"""docs/api.md: signatures and docstrings of the functions and classes that people call from Python."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from atr_scale.errors import UserError

HEAD = """\
<!-- written by python -m tools.write_docs: change the docstrings, then run it -->
# Python interface

The functions and classes that are meant to be called from Python. Shapes: B texts of the global batch, b audios of this
rank, T tokens, D channels. A mistake of the caller raises `UserError`, a `ValueError` whose message is one line.
"""
# Public names by heading, as module:name; a class is followed by its methods that are meant to be called.
NAMES: dict[str, tuple[str, ...]] = {
    "A trained model": (
        "atr_scale:load",
        "atr_scale.inference:TrainedModel",
        "atr_scale.inference:TrainedModel.embed_text",
        "atr_scale.inference:TrainedModel.embed_audio",
        "atr_scale.inference:TrainedModel.similarity",
        "atr_scale.inference:TrainedModel.moments",
        "atr_scale.inference:TrainedModel.locate",
        "atr_scale.moments:Moments",
        "atr_scale.moments:Moment",
    ),
    "Encoders": (
        "atr_scale.encoders:build_audio_encoder",
        "atr_scale.encoders:build_text_encoder",
        "atr_scale.encoders:TokenSequence",
    ),
    "Scorers": (
        "atr_scale.scorers:build_scorer",
        "atr_scale.scorers.scorer:Scorer.scores",
        "atr_scale.scorers.scorer:Scorer.block",
        "atr_scale.scorers.scorer:Scorer.attention",
    ),
    "Losses on whole matrices": tuple(
        f"atr_scale.losses.dense:{name}" for name in ("nt_xent", "pmr", "cmsc", "intra_modal", "distillation")
    ),
    "Losses over ranks, in tiles": (
        *(f"atr_scale.losses.tiled:{name}" for name in ("nt_xent", "pmr", "cmsc", "intra_modal", "distillation")),
        "atr_scale.score_block:EmbeddingScores",
        "atr_scale.score_block:StoredScores",
    ),
    "Metrics": tuple(f"atr_scale.evaluation.metrics:{name}" for name in ("retrieval_metrics", "bootstrap", "graded")),
    "Corpora and shards": (
        "atr_scale.data.corpora:open_corpus",
        "atr_scale.data.shard_builder:build_shards",
        "atr_scale.data.shard_reader:open_shards",
    ),
    "Configuration": ("atr_scale.config:load_config", "atr_scale.config:parse_config"),
}
ARGUMENTS = re.compile(r"`?[a-z]\w*`?(, `?[a-z]\w*`?)*: ")
LINE = 100  # characters of a signature on one line


def api_page() -> str:
    """The text of docs/api.md. Raises UserError for a name that is gone or has no docstring."""
    lines = [HEAD]
    for heading, names in NAMES.items():
        lines += [f"## {heading}", ""]
        for name in names:
            lines += [f"### `{_title(name)}`", "", "```python", _signature(name), "```", "", _docstring(name), ""]
    return "\n".join(lines).rstrip() + "\n"


def _title(name: str) -> str:
    module, _, path = name.partition(":")
    return f"{module}.{path}"


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        if not hasattr(found, part):
            raise UserError(f"{_title(name)} is gone: correct NAMES in tools/write_docs/api_page.py")
        found = getattr(found, part)
    return found


def _docstring(name: str) -> str:
    text = inspect.getdoc(_find(name))
    if not text:
        raise UserError(f"{_title(name)} has no docstring: docs/api.md needs one")
    return "\n".join(_as_list(text.replace("<", "&lt;").splitlines()))


def _as_list(lines: Sequence[str]) -> Iterator[str]:
    """Lines that begin with the names of arguments become items of a list, and "Raises" begins a paragraph."""
    before, in_item = "", False
    for line in lines:
        begins = ARGUMENTS.match(line) is not None
        in_item = begins or (in_item and line != "" and not line.startswith("Raises "))
        if before and (line.startswith("Raises ") or (begins and not before.startswith(("- ", "  ")))):
            yield ""
        before = f"- {line}" if begins else f"  {line}" if in_item else line
        yield before


class _AsWritten(str):
    """An annotation that a signature shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str) -> str:
    found = _find(name)
    signature = inspect.signature(found)
    parameters = [p.replace(annotation=_as_written(p.annotation)) for p in signature.parameters.values()]
    signature = signature.replace(parameters=[p for p in parameters if p.name != "self"])
    result = inspect.Signature.empty if inspect.isclass(found) else _as_written(signature.return_annotation)
    signature = signature.replace(return_annotation=result)
    short = name.partition(":")[2]
    whole = f"{short}{signature}"
    if len(whole) <= LINE:
        return whole
    arrow = "" if result is inspect.Signature.empty else f" -> {result!r}"
    return "\n".join([f"{short}(", *(f"    {p}," for p in _shown(signature)), f"){arrow}"])


def _shown(signature: inspect.Signature) -> list[str]:
    """The parameters as they are written, with the mark before those that are given by name alone."""
    shown: list[str] = []
    marked = False
    for parameter in signature.parameters.values():
        marked = marked or parameter.kind is inspect.Parameter.VAR_POSITIONAL
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not marked:
            shown, marked = [*shown, "*"], True
        shown.append(str(parameter))
    return shown


def _as_written(annotation: Any) -> Any:
    text = getattr(annotation, "__forward_arg__", annotation)
    return _AsWritten(text) if isinstance(text, str) else annotation
