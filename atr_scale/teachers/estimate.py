"""What trained models say of a split, one table a model, and how they compare: the teachers of a second stage.

Shape suffixes: C captions, N clips, M models, P pairs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from atr_scale import plots
from atr_scale.batch import stable_id
from atr_scale.checkpoint import WEIGHTS, find_checkpoint, load_retriever
from atr_scale.data import storage
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import embed
from atr_scale.evaluation.rank_counts import MatrixScores, VectorScores
from atr_scale.evaluation.score import score
from atr_scale.teachers.tables import Correspondences, Table, joined_vectors, shards_checksum
from atr_scale.version import __version__

logger = logging.getLogger(__name__)

IDENTITY = ("config", "weights_sha256", "shards_sha256")  # a table that has these is this model's on this split
NUM_CLIPS = 4096  # clips that retrieval is measured on, drawn where the split has more
NUM_PAIRS = 250_000  # pairs that scores are correlated over: a standard error of 0.002
SEED = 0
SHOWN = ("t2a/R@1", "t2a/R@5", "t2a/R@10", "t2a/mAP@10", "a2t/R@1", "a2t/R@10")
Metrics = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """How the models of an ensemble do on a split, and how much they agree.

    models, ensemble, without: retrieval of each model, of all together, and of all but the one named (of two or more).
    correlation: Pearson, [M, M] in the models' order, over a sample of pairs; unmatched: without the captions' own
    clips.
    """

    split: str
    num_clips: int
    measured_clips: int
    models: dict[str, Metrics]
    ensemble: Metrics
    without: dict[str, Metrics]
    correlation: list[list[float]]
    unmatched: list[list[float]]
    num_pairs: int

    def table(self) -> str:
        """Figures of all models and ensembles, in Markdown."""
        rows = [(name, metrics) for name, metrics in self.models.items()]
        if self.without:
            rows.append(("**all**", self.ensemble))
            rows += [(f"all but {name}", metrics) for name, metrics in self.without.items()]
        width = max(len(name) for name, _ in rows)
        rule = "|".join("-" * len(key) + "-:" for key in SHOWN)
        lines = [f"| {'scores of':<{width}} | {' | '.join(SHOWN)} |", f"|:-{'-' * width}|{rule}|"]
        for name, metrics in rows:
            cells = (f"{100 * metrics[key]:.2f} %".rjust(len(key)) for key in SHOWN)
            lines.append(f"| {name:<{width}} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write estimate.json (with `about` in it) and report.md with its picture."""
        text = json.dumps({**about, **asdict(self)}, indent=2, ensure_ascii=False)
        (folder / "estimate.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text("\n\n".join(self._report(folder)) + "\n", encoding="utf-8")

    def _report(self, folder: Path) -> list[str]:
        drawn = "" if self.measured_clips == self.num_clips else f"{self.measured_clips} of "
        parts = [
            f"# Estimated correspondences of {self.split}",
            self.table(),
            f"Retrieval inside the split ({drawn}{self.num_clips} clips), on which the models may have been trained: "
            "it says how sharp the targets are, not how good the models are on anything new. The score of several is "
            "the mean of their scores.",
        ]
        if not self.without:
            return parts
        rows = [
            f"| {name} | {100 * (self.ensemble['t2a/mAP@10'] - metrics['t2a/mAP@10']):+.2f} "
            f"| {100 * (self.ensemble['a2t/R@1'] - metrics['a2t/R@1']):+.2f} |"
            for name, metrics in self.without.items()
        ]
        head = ["| model | t2a/mAP@10 | a2t/R@1 |", "|:-|-:|-:|"]
        parts += ["## What each model adds to the others, percentage points", "\n".join([*head, *rows])]
        names = list(self.models)
        values = np.array(self.unmatched, dtype=np.float32)
        (folder / "figures").mkdir(exist_ok=True)
        figure = plots.heatmap(values, "correlation of scores, without matched pairs", "", "model", names)
        figure.savefig(folder / "figures" / "correlation.png")
        rows = [
            f"| {one} | {other} | {self.correlation[i][j]:.4f} | {self.unmatched[i][j]:.4f} |"
            for i, one in enumerate(names)
            for j, other in enumerate(names)
            if i < j
        ]
        head = ["| model | model | all pairs | without matched pairs |", "|:-|:-|-:|-:|"]
        return [
            *parts,
            f"## Correlation of scores over {self.num_pairs} pairs",
            "\n".join([*head, *rows]),
            "![correlation of scores](figures/correlation.png)",
        ]


def estimate(
    runs: Sequence[str], *, shards: str, out: Path, batch_size: int | None, world: World, device: torch.device
) -> Comparison | None:
    """Write one table of correspondences a run into `out`, then compare them; all ranks call this.

    runs: run folders or checkpoints. shards: the split. batch_size: clips embedded at once, default each run's own.
    A table that is there is kept where it is of the same weights and shards. Returns the comparison on the main rank.
    Raises UserError where a model or the shards are not there, or where two models would have one name.
    """
    folders = _by_name(runs)
    opened = open_shards(shards)
    storage.make_folder(str(out))
    say = logger.info if world.is_main else logger.debug
    paths: list[Path] = []
    spent = 0.0
    for number, (name, folder) in enumerate(folders.items()):
        start = time.monotonic()
        paths.append(out / f"{name}.safetensors")
        metadata = _metadata(folder, opened)
        if world.gather_objects(world.is_main and _is_current(paths[-1], metadata))[0]:
            say("%s is there and is kept", paths[-1])
            continue
        say("model %d of %d: %s", number + 1, len(folders), name)
        table = _table(name, folder, opened, metadata, batch_size, world, device)
        if world.is_main:
            table.save(out)
        spent += time.monotonic() - start
        left = tqdm.format_interval(spent / len(paths) * (len(folders) - len(paths)))
        say("%s written, ETA of the others %s", paths[-1], left)
    if not world.is_main:
        return None
    tables = Correspondences.read(paths).tables
    comparison = compare(tables, f"{opened.corpus} {opened.split}".rstrip())
    about = {path.stem: {"run": run, **table.metadata} for path, run, table in zip(paths, runs, tables, strict=True)}
    for metadata in about.values():
        del metadata["config"]
    comparison.save(out, {"tables": about})
    return comparison


def compare(tables: Sequence[Table], split: str) -> Comparison:
    """Retrieval of each table, of their mean and of what is left without each; correlation of their scores.

    Draws are seeded. Vectors are ranked without a score matrix; where a table holds scores, in memory: two matrices of
    NUM_CLIPS clips and their captions.
    """
    first, rng = tables[0], np.random.default_rng(SEED)
    num_clips, num_captions = len(first.clip_ids), len(first.caption_clip)
    drawn = np.sort(rng.permutation(num_clips)[:NUM_CLIPS])
    clips = torch.from_numpy(drawn)
    captions = torch.isin(first.caption_clip, first.clip_ids[clips]).nonzero().squeeze(1)

    def retrieval(members: Sequence[Table]) -> Metrics:
        """Of the sum of the members' scores, which ranks as their mean."""
        scores: VectorScores | MatrixScores
        if all(table.factorised for table in members):
            scores = VectorScores(*joined_vectors(members, captions, clips))
        else:
            total = members[0].scores(captions, clips)
            for table in members[1:]:
                total += table.scores(captions, clips)
            scores = MatrixScores(total)
        return scores.ranks(first.caption_clip[captions], first.clip_ids[clips]).metrics()

    models = {
        table.name: retrieval([table]) for table in tqdm(tables, desc="comparing models", unit="model", disable=None)
    }
    several = len(tables) > 1
    without = {
        table.name: retrieval([other for other in tables if other is not table])
        for table in tqdm(tables if several else [], desc="leaving one out", unit="model", disable=None)
    }
    count = num_captions * num_clips
    pairs = np.arange(count) if count <= NUM_PAIRS else rng.integers(0, count, NUM_PAIRS)
    rows, columns = torch.from_numpy(pairs // num_clips), torch.from_numpy(pairs % num_clips)
    values = np.stack([_pairs(table, rows, columns) for table in tables])
    matched = (first.caption_clip[rows] == first.clip_ids[columns]).numpy()
    return Comparison(
        split=split,
        num_clips=num_clips,
        measured_clips=len(clips),
        models=models,
        ensemble=retrieval(tables) if several else models[first.name],
        without=without,
        correlation=np.atleast_2d(np.corrcoef(values)).tolist(),
        unmatched=np.atleast_2d(np.corrcoef(values[:, ~matched])).tolist(),
        num_pairs=len(pairs),
    )


def _pairs(table: Table, rows: Tensor, columns: Tensor) -> np.ndarray:
    parts = zip(rows.split(8192), columns.split(8192), strict=True)
    return torch.cat([table.pairs(*part) for part in parts]).double().numpy()


def _by_name(runs: Sequence[str]) -> dict[str, Path]:
    """The checkpoint folder of each run, by the name of its run folder. UserError where two have the same name."""
    found: dict[str, Path] = {}
    for run in runs:
        folder = find_checkpoint(run)
        name = folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
        if name in found:
            raise UserError(
                f"{run} and {found[name]} would both be the table {name}: give models of different runs, or --out each"
            )
        found[name] = folder
    return found


def _metadata(folder: Path, shards: ShardSet) -> dict[str, str]:
    config = folder / "config.resolved.yaml"
    if not config.is_file():
        raise UserError(f"{folder} has no config.resolved.yaml: give a run folder or one of its checkpoints/step-N")
    with open(folder / WEIGHTS, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "config": config.read_text(encoding="utf-8"),
        "weights_sha256": weights,
        "shards": shards.location,
        "shards_sha256": shards_checksum(shards),
        "atr_scale": __version__,
    }


def _is_current(path: Path, metadata: dict[str, str]) -> bool:
    if not path.exists():
        return False
    try:
        found = Table.read(path).metadata
    except UserError as error:
        logger.warning("%s is written anew: %s", path, error)
        return False
    return all(found.get(key) == metadata[key] for key in IDENTITY)


def _table(
    name: str,
    folder: Path,
    shards: ShardSet,
    metadata: dict[str, str],
    batch_size: int | None,
    world: World,
    device: torch.device,
) -> Table:
    """What the model in `folder` says of a split, on every rank."""
    model, config, _ = load_retriever(folder)
    model.to(device).eval()
    batch_size = batch_size or config.evaluation.batch_size
    embedded = embed(
        model,
        shards,
        caption_tokenizer(config.model.text.name, config.data.captions),
        batch_size=batch_size,
        seconds=config.data.evaluation_seconds,
        world=world,
        device=device,
    )
    if embedded.dropped:
        logger.warning("%s: unreadable and left out: %s", shards.location, dict(embedded.dropped))
    if model.scorer.factorised:
        values = {"text": embedded.text.pooled, "audio": embedded.audio.pooled}
    else:
        scores = score(model.scorer, embedded.text, embedded.audio, batch_size=batch_size, world=world, device=device)
        values = {"scores": scores}
    values = {key: value.half() for key, value in values.items()}
    if not all(value.isfinite().all() for value in values.values()):
        raise UserError(f"{folder} gives values that are not finite, for it has diverged: give another checkpoint")
    ids = torch.tensor([stable_id(clip) for clip in embedded.clip_ids])
    if len(ids.unique()) < len(ids):
        raise UserError(f"{shards.location} holds a clip twice: build its shards with one sample a clip")
    owner = torch.from_numpy(embedded.owner)
    first = torch.searchsorted(owner, torch.arange(len(ids)))
    index = torch.arange(len(owner)) - first[owner]
    return Table(name, ids, ids[owner], index, values, {**metadata, "scorer": config.model.scorer.name})
