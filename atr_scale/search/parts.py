"""The parts of an embedding: which there are, their files, and what is written of them at the end.

The clips are divided into parts, which depend on the source and the model alone. A rank takes one part after the other
and writes each as a file into F.npy.parts/; then the main rank joins them. So content and order do not depend on the
ranks, and a job that was killed goes on with the parts that are missing. The name of a part has a digest of the model,
of the settings and of its clips with their sizes and versions: a part of another model, or of files that have changed,
is not taken.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.data.dropped import DroppedClip, write_dropped
from atr_scale.distributed.world import World
from atr_scale.errors import Failure, UserError
from atr_scale.files import atomic_write
from atr_scale.inference import TrainedModel
from atr_scale.precision import Precision
from atr_scale.search.sources import ListedClip, SoundSource
from atr_scale.search.vectors import Item, ModelId, write_vectors

logger = logging.getLogger(__name__)

PARTS = 64  # of a source, unless they would be too large or smaller than a batch
MAX_PART_CLIPS, MAX_PART_BYTES = 1024, 256 << 20


@dataclass(frozen=True)
class Plan:
    """What is embedded, how, and into which parts, the same on all ranks. windows: seconds, None for whole clips."""

    model: ModelId
    source: SoundSource
    windows: float | None
    settings: dict[str, Any]
    parts: list[range]
    digests: list[str]

    @classmethod
    def of(cls, model: TrainedModel, model_id: ModelId, source: SoundSource, windows: float | None) -> Plan:
        config, module = model.config, model.module
        settings = {
            "windows": windows,
            "seconds": config.data.evaluation_seconds,
            "batch_size": config.evaluation.batch_size,
            "precision": Precision(module.precision, module.tf32).products(model.device),
        }
        parts = divide(source.entries, config.evaluation.batch_size)
        common = json.dumps([model_id.weights, model_id.sample_rate, settings])
        digests = [_digest(common, [source.entries[i] for i in part]) for part in parts]
        return cls(model_id, source, windows, settings, parts, digests)

    @property
    def digest(self) -> str:
        """Of everything that the result depends on."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def file(self, folder: Path, number: int) -> Path:
        """The file of part `number`."""
        return folder / f"{number:06d}-{self.digests[number][:16]}.npz"


def divide(entries: list[ListedClip], batch_size: int) -> list[range]:
    """Parts of a source: whole batches of clips, fewer if they are large."""
    wanted = -(-len(entries) // PARTS)
    most = min(max(1, -(-wanted // batch_size)) * batch_size, max(batch_size, MAX_PART_CLIPS))
    parts, first, size = [], 0, 0
    for i, entry in enumerate(entries):
        if i > first and (i - first == most or size + entry.size > MAX_PART_BYTES):
            parts.append(range(first, i))
            first, size = i, 0
        size += entry.size
    return [*parts, range(first, len(entries))]


def _digest(common: str, entries: list[ListedClip]) -> str:
    digest = hashlib.sha256(common.encode())
    for entry in entries:
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def missing_parts(plan: Plan, folder: Path) -> list[int]:
    """The parts that are not there. Files of other parts are removed."""
    files = [plan.file(folder, number) for number in range(len(plan.parts))]
    there = {path.name for path in folder.iterdir() if path.suffix == ".npz"}
    odd = there - {path.name for path in files}
    for name in odd:
        (folder / name).unlink()
    if odd:
        logger.warning(
            "%s: %d parts are of another model, other settings or files that have changed: embedded anew",
            folder,
            len(odd),
        )
    if len(there) > len(odd):
        logger.info("%s: %d of %d parts are there already", folder, len(there) - len(odd), len(files))
    return [number for number, path in enumerate(files) if path.name not in there]


def taken_parts(todo: list[int], digest: str, world: World) -> Iterator[int]:
    """The parts that this rank takes: each the next one that no rank has taken."""
    if world.size == 1:
        yield from todo
        return
    while (place := int(world.store.add(f"parts taken of {digest}", 1)) - 1) < len(todo):
        yield todo[place]


@dataclass(frozen=True)
class PartResult:
    """What a part gives. vectors: float32 [n, d]. cut: clips of which only the beginning was read."""

    vectors: NDArray[np.float32]
    items: list[Item]
    dropped: list[DroppedClip]
    cut: int


def write_part(path: Path, part: PartResult) -> None:
    """Write the file of a part."""
    items, dropped = (_bytes(json.dumps([asdict(one) for one in ones])) for ones in (part.items, part.dropped))
    counts = np.array([len(part.items), part.cut])
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, vectors=part.vectors, counts=counts, items=items, dropped=dropped)


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def _json(array: NDArray[np.uint8]) -> Any:
    return json.load(io.BytesIO(array.tobytes()))


def join_parts(plan: Plan, folder: Path, out: Path) -> None:
    """Write `out` of all parts, and remove them."""
    files = [plan.file(folder, number) for number in range(len(plan.parts))]
    absent = [path for path in files if not path.is_file()]
    if absent:
        raise Failure(
            f"{len(absent)} of {len(files)} parts are missing in {folder}: all ranks must see the folder of --out; "
            "start the same command again"
        )
    count = cut = 0
    dropped = list(plan.source.dropped)
    for path in files:
        with np.load(path) as part:
            count, cut = count + int(part["counts"][0]), cut + int(part["counts"][1])
            dropped += [DroppedClip(**clip) for clip in _json(part["dropped"])]
    reasons = dict(sorted(Counter(clip.reason for clip in dropped).items()))
    named = dropped_file(out)
    write_dropped(str(named.parent), dropped, named.name)
    if not count:
        raise UserError(f"nothing in {plan.source.location} can be embedded ({reasons}): {named} names the clips")
    if dropped:
        logger.warning("%d clips or windows are left out: %s; %s names them", len(dropped), reasons, named)
    if cut:
        logger.warning(
            "only the first %g s of %d longer clips were embedded: windows (--windows SECONDS) cover whole recordings",
            plan.settings["seconds"], cut,
        )  # fmt: skip
    about = {
        "source": plan.source.location,
        **plan.settings,
        "clips": len(plan.source.entries),
        "dropped": reasons,
        "cut": cut,
        "digest": plan.digest,
    }
    write_vectors(out, _batches(files), count, plan.model, about)
    shutil.rmtree(folder, ignore_errors=True)
    logger.info("%s: %d embeddings of %d clips", out, count, len(plan.source.entries))


def _batches(files: Iterable[Path]) -> Iterator[tuple[NDArray[np.float32], list[Item]]]:
    """The content of the parts, with distinct ids: of clips with one id, all but the first get a number."""
    seen: Counter[str] = Counter()
    repeated = 0
    for path in files:
        with np.load(path) as part:
            items = [Item.from_json(record) for record in _json(part["items"])]
            vectors = part["vectors"]
        for place, item in enumerate(items):
            seen[item.id] += 1
            if seen[item.id] > 1:
                repeated += 1
                items[place] = Item(f"{item.id} ({seen[item.id]})", item.path, item.start, item.stop, item.captions)
        yield vectors, items
    if repeated:
        logger.warning("%d clips have the id of another one: a number was added to it", repeated)


def dropped_file(out: Path) -> Path:
    """The file that names what was left out."""
    return out.with_name(f"{out.stem}.dropped.jsonl")
