"""An index of sounds and their captions: a folder that does not depend on its place.

vectors.npy, .jsonl, .json      the embeddings of the sounds, as `Vectors.write` writes them
captions.npy, .jsonl, .json     those of their captions, each text once, with the first sound that has it
vectors.table.npy               where the lines of the .jsonl end, and which one has an id; the same for captions
vectors.ivf.0, .1, ...           inverted lists of more than FLAT_MAX vectors; the same for captions
index.json                      the model, the kind of search and its recall; written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.errors import UserError, one_line
from atr_scale.files import atomic_write
from atr_scale.inference import TrainedModel, load_trained
from atr_scale.locks import hold
from atr_scale.run_checkpoints import rename
from atr_scale.search.embed import embed_files, need_embeddings, on_disk
from atr_scale.search.nearest import BLOCK, FLAT_MAX, Lists, build_ivf, import_faiss
from atr_scale.search.vectors import (
    SUFFIXES,
    Item,
    ItemLines,
    ModelId,
    Vectors,
    items_file,
    read_about,
    write_vectors,
)

VERSION = 1  # goes up if older versions can no longer read an index
SOUNDS, CAPTIONS = "vectors", "captions"  # names of the two sets of vectors
ABOUT = "index.json"


def table_file(path: Path) -> Path:
    """The file with the `ItemLines.table` of the items beside F.npy."""
    return path.with_suffix(".table.npy")


@dataclass(frozen=True)
class IndexedSet:
    """One set of vectors of an index. lists: None if it is searched flat."""

    count: int
    lists: Lists | None

    def __str__(self) -> str:
        if self.lists is None:
            return f"{self.count} vectors, flat search"
        recall = ", ".join(f"{value:.3f} by {name}" for name, value in self.lists.recall.items())
        lists = f"{self.lists.nprobe} of {self.lists.nlist} lists a query"
        return f"{self.count} vectors, IVF with {lists}; recall@10 {recall}"


@dataclass(frozen=True)
class IndexInfo:
    """What index.json says. sets: "vectors" and, if there are captions, "captions"."""

    model: ModelId
    sets: dict[str, IndexedSet]
    about: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> IndexInfo:
        """Raises UserError if the folder is no index."""
        path = Path(folder) / ABOUT
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']}, this program reads {VERSION}")
            sets = {
                name: IndexedSet(one["count"], Lists(**one["lists"]) if one["lists"] else None)
                for name, one in found["sets"].items()
            }
            return cls(ModelId(**found["model"]), sets, found["about"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is no index ({one_line(error)}): build one with `atr-scale index RUN SOURCE --out {folder}`"
            ) from None

    def write(self, folder: Path) -> None:
        """Write index.json."""
        with atomic_write(folder / ABOUT) as temporary:
            temporary.write_text(
                json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )


def build_index(
    run: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    windows: float | None = None,
    device: str | None = None,
    plugins: Sequence[str] = (),
    flat_max: int = FLAT_MAX,
) -> IndexInfo:
    """Build the index `out` of a source of sounds with the model of `run`.

    source: what `embed_files` takes, or F.npy or F.parquet that `atr-scale embed` wrote. windows: seconds of the
    windows that recordings are cut into, by default whole clips. flat_max: number of vectors up to which all of them
    are compared. An older index at `out` is replaced when the new one is complete; a build that was killed goes on
    with the sounds that are not embedded yet. Raises UserError if the vectors are of another model, if one is not
    finite, or if `out` is something else than an index.
    """
    import_faiss()
    out = Path(os.path.abspath(out))
    if out.exists() and not (out / ABOUT).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no index: choose another --out, or remove it")
    vectors = Vectors.read(source) if is_vectors(source) else None
    if vectors is not None and windows is not None:
        raise UserError(f"{source} holds vectors already: give the windows to `atr-scale embed`, which wrote it")
    model = load_trained(run, device, plugins)
    need_embeddings(model, run)
    identity = ModelId.of(run, model)
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {partial} ({error.strerror}): choose another --out") from None
    with on_disk(out), hold(out.with_name(f".{out.name}.lock"), f"the index {out}"):
        if vectors is None:
            _embed(model, run, source, partial, windows)
        else:
            refuse_other_model(vectors.model, identity, f"{source} holds vectors", "embed the source with this run")
            vectors.write(partial / f"{SOUNDS}.npy")
        info = _build(model, identity, partial, flat_max)
        for path in out.glob("*") if out.is_dir() else ():
            if path.is_file() and not path.name.startswith((f"{SOUNDS}.", f"{CAPTIONS}.", ABOUT)):
                shutil.copy2(path, partial)  # for example the marks that were made on the page
        rename(partial, out)
    return info


def is_vectors(source: str | Path) -> bool:
    """Whether a source is a file that `atr-scale embed` wrote. A .parquet without its metadata is a table."""
    return Path(source).suffix in SUFFIXES and (Path(source).suffix == ".npy" or read_about(source) is not None)


def _embed(model: TrainedModel, run: str | Path, source: str | Path, folder: Path, windows: float | None) -> None:
    """Embed a source into `folder`, where parts of the same embedding may be. Those of another one are removed."""
    vectors = folder / f"{SOUNDS}.npy"
    try:
        embed_files(model, run, source, vectors, windows=windows)
    except UserError:
        if not vectors.exists():
            raise
        shutil.rmtree(folder)
        folder.mkdir()
        embed_files(model, run, source, vectors, windows=windows)


def refuse_other_model(found: ModelId, wanted: ModelId, what: str, remedy: str) -> None:
    """Raises UserError if both are not the same weights. what: what is of `found`. remedy: what to do about it."""
    if not found.same(wanted):
        raise UserError(
            f"{what} of the model {found}, weights {found.weights[:8]}, not of {wanted}, weights "
            f"{wanted.weights[:8]}: {remedy}"
        )


def _build(model: TrainedModel, identity: ModelId, folder: Path, flat_max: int) -> IndexInfo:
    """Everything beside the vectors of the sounds, which are there."""
    sounds = Vectors.read(folder / f"{SOUNDS}.npy")
    if not sounds.items:
        raise UserError("there are no sounds to index")
    for start in range(0, len(sounds.items), BLOCK):
        bad = np.flatnonzero(~np.isfinite(sounds.vectors[start : start + BLOCK]).all(1))
        if len(bad):
            raise UserError(f"the vector of {sounds.items[start + bad[0]].id} is not finite: embed the source again")
    for old in (*folder.glob("*.ivf.*"), *folder.glob(f"{CAPTIONS}.*")):  # of a build that was killed
        old.unlink()
    texts = _captions(sounds.items)
    if texts:
        batches = _embedded(model, texts)
        write_vectors(folder / f"{CAPTIONS}.npy", batches, len(texts), identity, {"source": "captions"})
    stored = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (SOUNDS, *([CAPTIONS] if texts else []))}
    sets = {}
    for name, vectors in stored.items():
        path = folder / f"{name}.npy"
        np.save(table_file(path), ItemLines(items_file(path)).table())
        other = stored.get(CAPTIONS) if name == SOUNDS else None
        large = len(vectors) > flat_max
        sets[name] = IndexedSet(len(vectors), build_ivf(vectors, folder / f"{name}.ivf", other) if large else None)
    info = IndexInfo(identity, sets, sounds.about)
    info.write(folder)
    return info


def _captions(items: Sequence[Item]) -> list[Item]:
    """Every caption text once, with the first sound that has it, in the order of the sounds."""
    first: dict[str, Item] = {}
    for item in items:
        for text in item.captions:
            if text.strip():
                first.setdefault(text, Item(item.id, item.path, item.start, item.stop, (text,)))
    return list(first.values())


def _embedded(model: TrainedModel, texts: list[Item]) -> Iterator[tuple[NDArray[np.float32], list[Item]]]:
    for start in range(0, len(texts), 4096):
        some = texts[start : start + 4096]
        yield model.embed_text([item.captions[0] for item in some]), some
