"""Embeddings of sounds as files: F.npy with F.jsonl and F.json beside it, or one F.parquet.

    F.npy       float32 [n, d], unit length
    F.jsonl     one `Item` a line, in the same order
    F.json      the model (`ModelId`), the number of items, and what was embedded; written last

Shape suffixes: n items, d width of the embeddings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.checkpoint import find_checkpoint, name_of, read_state
from atr_scale.errors import UserError, one_line
from atr_scale.files import atomic_write, sha256_of
from atr_scale.inference import TrainedModel
from atr_scale.run_checkpoints import MANIFEST, STATE, WEIGHTS
from atr_scale.run_files import read_json_object

FORMAT = 1  # goes up if older versions can no longer read the files
METADATA = b"atr_scale"  # key of the JSON in the schema of a parquet file
SUFFIXES = (".npy", ".parquet")
AT_ONCE = 16_384  # items that are read or written together


@dataclass(frozen=True)
class ModelId:
    """The model that embeddings are of.

    run: folder of its checkpoint, which `atr_scale.load` takes. weights: sha256 of the weights file. dim: width of the
    embeddings. sample_rate: of its audio encoder, in Hz.
    """

    run: str
    step: int
    weights: str
    dim: int
    sample_rate: int

    @classmethod
    def of(cls, location: str | Path, model: TrainedModel) -> ModelId:
        """location: the run folder or the checkpoint that `model` was loaded from. Raises UserError if it is gone."""
        folder = find_checkpoint(location)
        manifest = read_json_object(folder / MANIFEST) or {}
        try:
            weights = str(manifest["files"][WEIGHTS]["sha256"])
        except (KeyError, TypeError):  # a checkpoint without a manifest, for example an exported one
            weights = sha256_of(folder / WEIGHTS)
        step = int(read_state(folder)["step"]) if (folder / STATE).is_file() else 0
        return cls(name_of(location, folder), step, weights, model.module.audio_projection.dim, model.sample_rate)

    def same(self, other: ModelId) -> bool:
        """Whether both are the same weights, wherever their folders are."""
        return (self.weights, self.dim) == (other.weights, other.dim)

    def __str__(self) -> str:
        return f"{self.run} (step {self.step})"


@dataclass(frozen=True, slots=True)
class Item:
    """One embedded sound.

    id: of the clip, for a window with `#t=START,STOP` behind it. path: an audio file, or SHARD#KEY for a clip of a
    shard. start and stop: of a window, in seconds; None for a whole clip.
    """

    id: str
    path: str
    start: float | None = None
    stop: float | None = None
    captions: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Item:
        """The inverse of `asdict`. Raises KeyError, TypeError or ValueError for other records."""
        start, stop = (None if record[name] is None else float(record[name]) for name in ("start", "stop"))
        return cls(str(record["id"]), str(record["path"]), start, stop, tuple(map(str, record["captions"])))

    def to_json(self) -> dict[str, Any]:
        """What `asdict` gives, which is ten times slower."""
        return {"id": self.id, "path": self.path, "start": self.start, "stop": self.stop, "captions": self.captions}


class ItemLines(Sequence[Item]):
    """The items of a .jsonl file, each parsed when it is asked for: a million of them take long, and much memory.

    Reading an item raises UserError if its line is damaged.
    """

    def __init__(self, path: Path, table: NDArray[np.uint64] | None = None) -> None:
        """table: what `table` has returned; with it the file is not read through. Raises OSError."""
        self.path, self._table = path, table
        # Slices of a plain array are faster than those of a memmap.
        self._lines = np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)
        self._ends = _line_ends(self._lines) if table is None else table[0]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        if isinstance(number, slice):
            first, stop, step = number.indices(len(self))
            return list(self._parsed(first, stop)) if step == 1 else [self[i] for i in range(first, stop, step)]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return next(self._parsed(number % len(self), number % len(self) + 1))

    def __iter__(self) -> Iterator[Item]:
        for first in range(0, len(self), AT_ONCE):
            yield from self._parsed(first, min(first + AT_ONCE, len(self)))

    def _parsed(self, first: int, stop: int) -> Iterator[Item]:
        """Items that follow each other."""
        if first >= stop:
            return
        start = int(self._ends[first - 1]) + 1 if first else 0
        lines = self._lines[start : int(self._ends[stop - 1])].tobytes().split(b"\n")
        for number, line in enumerate(lines, first + 1):
            try:
                yield Item.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}, line {number}, cannot be read ({one_line(error)}): write it with `atr-scale embed`"
                ) from None

    def table(self) -> NDArray[np.uint64]:
        """Three rows: where each line ends, the keys of the ids in ascending order, and the item of each key."""
        keys = np.fromiter((_key(item.id) for item in self), np.uint64, len(self))
        order = np.argsort(keys, kind="stable")
        return np.stack([self._ends.astype(np.uint64), keys[order], order.astype(np.uint64)])

    def find(self, id: str) -> Item | None:
        """The first item with an id. It needs a table."""
        assert self._table is not None
        _, keys, numbers = self._table
        key = _key(id)
        place = int(np.searchsorted(keys, key))
        while place < len(keys) and keys[place] == key:
            found: Item = self[int(numbers[place])]
            if found.id == id:
                return found
            place += 1
        return None


def _line_ends(lines: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where each line of a file's bytes ends, found part by part."""
    parts = range(0, len(lines), 1 << 24)
    return np.concatenate(
        [np.flatnonzero(lines[i : i + (1 << 24)] == 10) + i for i in parts] or [np.zeros(0, np.int64)]
    )


def _key(id: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()))


@dataclass
class Vectors:
    """Embeddings float32 [n, d] with their items; both stay in their files if they come from F.npy.

    about: what was embedded: source, windows, counts of clips and of those that were left out.
    """

    vectors: NDArray[np.float32]
    items: Sequence[Item]
    model: ModelId
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Vectors:
        """Read F.npy or F.parquet. Raises UserError if it is missing, damaged, or not written by `atr-scale embed`.

        A damaged line of F.jsonl is found when its item is read.
        """
        path = checked_suffix(path)
        try:
            if path.suffix == ".parquet":
                return cls._from_parquet(path)
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
            found = cls(vectors, ItemLines(items_file(path)), *_parse_about(about_file(path).read_bytes()))
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read ({one_line(error)}): write it with `atr-scale embed`") from None
        shape = (len(found.items), found.model.dim)
        if found.vectors.shape != shape or found.vectors.dtype != np.float32:
            raise UserError(
                f"{path} holds {found.vectors.dtype} {list(found.vectors.shape)}, but {items_file(path)} and "
                f"{about_file(path)} say float32 {list(shape)}: write them together with `atr-scale embed`"
            )
        return found

    def write(self, path: str | Path) -> None:
        """Write F.npy with its two files, or F.parquet."""
        starts = range(0, len(self.items), AT_ONCE)
        parts = ((self.vectors[i : i + AT_ONCE], self.items[i : i + AT_ONCE]) for i in starts)
        write_vectors(path, parts, len(self.items), self.model, self.about)

    @classmethod
    def _from_parquet(cls, path: Path) -> Vectors:
        pa, parquet = _pyarrow()
        try:
            table = parquet.read_table(path)
            model, about = _parse_about((table.schema.metadata or {})[METADATA])
            columns = [table.column(name).to_pylist() for name in ("id", "path", "start", "stop", "captions")]
            flat = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise UserError(f"{path} is no parquet file ({one_line(error)}): write it again") from None
        items = [Item(id, name, a, b, tuple(texts)) for id, name, a, b, texts in zip(*columns, strict=True)]
        return cls(flat.astype(np.float32, copy=False).reshape(len(items), model.dim), items, model, about)


def checked_suffix(path: str | Path) -> Path:
    """`path` as a Path. Raises UserError unless it ends in .npy or .parquet."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: give a name that ends in .npy (with .jsonl and .json beside it) or .parquet")
    return path


def items_file(path: Path) -> Path:
    """The file of the items beside F.npy."""
    return path.with_suffix(".jsonl")


def about_file(path: Path) -> Path:
    """The file that tells the model and the source, beside F.npy."""
    return path.with_suffix(".json")


def read_about(path: str | Path) -> tuple[ModelId, dict[str, Any]] | None:
    """The model and the source of the embeddings in F.npy or F.parquet; None if there are none that are complete."""
    path = checked_suffix(path)
    try:
        if path.suffix == ".npy":
            return _parse_about(about_file(path).read_bytes()) if path.is_file() else None
        return _parse_about((_pyarrow()[1].read_schema(path).metadata or {})[METADATA]) if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


Batches = Iterable[tuple[NDArray[np.float32], Sequence[Item]]]  # vectors [k, d] and their k items


def write_vectors(path: str | Path, batches: Batches, count: int, model: ModelId, about: dict[str, Any]) -> None:
    """Write F.npy or F.parquet of `count` items, batch by batch. A file is there completely or not at all."""
    path = checked_suffix(path)
    document = json.dumps({"format": FORMAT, "model": asdict(model), "count": count, **about}, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        with atomic_write(path) as temporary:
            _write_parquet(temporary, batches, model.dim, document)
        return
    about_file(path).unlink(missing_ok=True)  # until the end the files are not complete
    with (
        atomic_write(path) as array,
        atomic_write(items_file(path)) as lines,
        array.open("wb") as vectors_out,
        lines.open("w", encoding="utf-8") as items_out,
    ):
        _write_npy(vectors_out, items_out, batches, (count, model.dim))
    with atomic_write(about_file(path)) as temporary:
        temporary.write_text(document + "\n", encoding="utf-8")


def _write_npy(vectors_out: IO[bytes], items_out: IO[str], batches: Batches, shape: tuple[int, int]) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(vectors_out, header)
    for vectors, items in batches:
        vectors_out.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        items_out.writelines(json.dumps(item.to_json(), ensure_ascii=False) + "\n" for item in items)


def _write_parquet(path: Path, batches: Batches, dim: int, document: str) -> None:
    pa, parquet = _pyarrow()
    fields = [
        ("id", pa.string()),
        ("path", pa.string()),
        ("start", pa.float64()),
        ("stop", pa.float64()),
        ("captions", pa.list_(pa.string())),
        ("vector", pa.list_(pa.float32(), dim)),
    ]
    schema = pa.schema(fields, metadata={METADATA: document.encode()})
    with parquet.ParquetWriter(path, schema) as writer:
        for vectors, items in batches:
            flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
            columns = [[getattr(item, name) for item in items] for name in ("id", "path", "start", "stop")]
            captions = [list(item.captions) for item in items]
            arrays = [pa.array(c, f.type) for c, f in zip([*columns, captions], list(schema)[:-1], strict=True)]
            vector = pa.FixedSizeListArray.from_arrays(flat, dim)
            writer.write_table(pa.Table.from_arrays([*arrays, vector], schema=schema))


def _parse_about(document: bytes) -> tuple[ModelId, dict[str, Any]]:
    """Raises ValueError, KeyError or TypeError if it is not the description of embeddings."""
    found: Any = json.loads(document)
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']}, this version reads {FORMAT}")
    model = ModelId(**found.pop("model"))
    return model, {name: value for name, value in found.items() if name not in ("format", "count")}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError('.parquet needs pyarrow: pip install "atr-scale[search]", or give a .npy file') from None
    return pyarrow, parquet
