"""A place in which every shipped recipe finds all that it names, in small: corpora, weights, runs, teacher tables.

The recipes run there as they stand, without an override. The encoders keep their names, options and file layouts; only
their networks are small.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atr_scale.cli import app
from atr_scale.config import RunConfig, load_config
from atr_scale.data.paraphrases.stored import Appender
from atr_scale.data.shard_reader import open_shards
from atr_scale.encoders import AUDIO_ENCODERS, build_audio_encoder
from atr_scale.encoders.mobilenet import MobileNet
from atr_scale.encoders.pretrained.weights import FOLDER, WEIGHTS
from tests.commands import ROOT
from tests.tiny import make_tiny_inputs
from tests.tiny_run import save_run

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TEXT_ENCODERS = (
    "bert-base-uncased",
    "roberta-base",
    "roberta-large",
    "sentence-transformers/all-MiniLM-L6-v2",
    "demo/corpora/text_encoder",
)
SMALL = {
    "cnn14": "tiny_cnn14",
    "resnet38": "tiny_resnet38",
    "htsat": "tiny_htsat",
    "clap": "tiny_clap",
    "passt_s16": "tiny_passt",
    "atst_frame": "tiny_atst",
}
# The first stage of launch/two_stage_demo.sh.
MEMBERS = ("meanmax", "attention", "tap")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def configurations() -> dict[str, RunConfig]:
    """Every shipped configuration by its path below the repository's root."""
    return {name(path): load_config(path) for path in CONFIGS}


@contextmanager
def small_encoders() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for original, small in SMALL.items():
            patch.setitem(AUDIO_ENCODERS, original, AUDIO_ENCODERS[small])
        for original in ("mn04", "mn10", "mn40"):
            patch.setitem(AUDIO_ENCODERS, original, partial(MobileNet, width=0.1))
        yield


@contextmanager
def small_world(folder: Path) -> Iterator[Path]:
    """`folder` as the current folder, with all that the recipes name; encoders are small until the end."""
    with small_encoders(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not Path("shards").exists():
            _fill()
        yield folder


def _fill() -> None:
    """Put what the recipes name into the current folder."""
    one, five = (make_tiny_inputs(Path(f"inputs-{n}").absolute(), captions=n) for n in (1, 5))
    for place in TEXT_ENCODERS:
        _link(place, one.text_encoder)
    for place in sorted({place for config in configurations().values() for place in _shards(config)}):
        _link(place, five.shards if "clotho" in place else one.shards)
    for inputs in (one, five):
        _write_paraphrases(inputs.shards)
    _write_relevance(five.shards, Path("relevance.csv"))
    FOLDER.mkdir()
    for weights in WEIGHTS.values():
        if weights.encoder in SMALL or weights.encoder.startswith("mn"):
            write_original(weights.encoder, FOLDER / weights.file)
    _write_runs_and_tables()


def _shards(config: RunConfig) -> Iterable[str]:
    yield from (source.shards for source in config.data.train)
    yield from config.data.validation_sets.values()
    if config.data.test:
        yield config.data.test


def _link(place: str, target: Path) -> None:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).symlink_to(target)


def _write_paraphrases(shards: Path) -> None:
    opened = open_shards(str(shards))
    with Appender(str(shards)) as file:
        for row in range(len(opened)):
            clip_id, captions, _ = opened.read_text(row)
            record = {"clip_id": clip_id, "caption_index": 0, "caption": captions[0]}
            file.append({**record, "paraphrases": [{"text": f"{captions[0]} indeed"}]})


def _write_relevance(shards: Path, path: Path) -> None:
    """Every caption's own clip and the next one are relevant for it."""
    opened = open_shards(str(shards))
    samples = [opened.read_text(row) for row in range(len(opened))]
    lines = ["query,audio_filenames"]
    for (clip_id, captions, _), (other, _, _) in zip(samples, samples[1:] + samples[:1], strict=True):
        lines += [f"{caption},{Path(clip_id).name};{Path(other).name}" for caption in captions]
    path.write_text("\n".join(lines))


def write_original(encoder: str, path: Path) -> None:
    """Random weights of an audio encoder in a file as its original project writes it."""
    torch.manual_seed(0)
    module = build_audio_encoder(encoder)
    layout = module.layouts[0]
    parts: dict[str, list[Tensor]] = {}
    for own, key, _ in layout.sources(module, {}):
        parts.setdefault(key, []).append(own)  # thirds of an entry come in its order
    entries = {key: torch.cat(values) if len(values) > 1 else values[0] for key, values in parts.items()}
    torch.save(entries if layout.container is None else {layout.container: entries}, path)


def _write_runs_and_tables() -> None:
    """The runs that recipes start from or take teacher tables of, untrained, and these tables."""
    places: dict[str, tuple[str, list[str]]] = {config.run.dir: (path, []) for path, config in configurations().items()}
    for member in MEMBERS:
        overrides = [f"run.dir=runs/two_stage/{member}", f"model.scorer.name={member}"]
        places[f"runs/two_stage/{member}"] = ("configs/quickstart/pretrain.yaml", overrides)
    by_name = {Path(run).name: run for run in places}
    wanted: dict[str, tuple[str, set[str]]] = {}
    for config in configurations().values():
        if start := config.train.initial_checkpoint:
            _save(start.from_.removesuffix("/best"), places)
        for table in (Path(table.path) for table in config.objective.distillation.tables):
            _, members = wanted.setdefault(str(table.parent), (config.data.train[0].shards, set()))
            members.add(by_name[table.stem])
    for folder, (shards, runs) in wanted.items():
        for run in runs:
            _save(run, places)
        app(["estimate", *sorted(runs), "--shards", shards, "--out", folder], standalone_mode=False)


def _save(run: str, places: dict[str, tuple[str, list[str]]]) -> None:
    if not Path(run).exists():
        path, overrides = places[run]
        config = load_config(ROOT / path, overrides)
        save_run(config, Path(run), seed=0, scorer=config.model.scorer.name)
