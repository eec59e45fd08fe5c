"""Teacher tables: files with the embeddings or scores of a teacher for a split, from which soft labels are computed.

Source: distillation with estimated audio-caption correspondences, arXiv 2408.11641.

Shape suffixes: C captions and N clips of the table, c and n of its rows that are looked up, d width, F folds, K best.

A table on disk is mapped into memory, not read: pages that were looked up lie in the page cache of the machine, which
all of its ranks share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atr_scale.batch import on_device
from atr_scale.data import storage
from atr_scale.data.shard_reader import ShardSet
from atr_scale.errors import UserError
from atr_scale.files import give_usual_mode
from atr_scale.score_block import at_least_fp32
from atr_scale.teachers.keys import TableKeys

Direction = Literal["t2a", "a2t"]

KEYS = ("clip_ids", "caption_clip", "caption_index")
TEXT = "caption_text"
EMBEDDINGS, FOLDS, SCORES = {"text", "audio"}, {"clip_fold"}, {"scores"}
BEST = {"caption_best", "caption_scores", "caption_rest", "clip_best", "clip_scores", "clip_rest"}
LAYOUTS = (EMBEDDINGS, EMBEDDINGS | FOLDS, SCORES, SCORES | {"scores_a2t"}, BEST)
CHECKSUM = "tensors_sha256"
DTYPES = {"I64": torch.int64, "I32": torch.int32, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
BLOCK_BYTES = 1 << 20  # of a file, hashed at once
REMEDY = "run `atr-scale estimate` on the shards of data.train"


class Source(NamedTuple):
    """One shard set that a table was made from.

    clips: number of its clips in the table. dropped: rows of its samples whose audio is not in the table: it was
    unreadable, or an earlier set has the same clip. shared: number of the latter; their captions are in the table.
    """

    location: str
    sha256: str
    clips: int
    dropped: list[int]
    shared: int = 0


@dataclass(frozen=True)
class TeacherTable:
    """Embeddings or scores of one teacher for captions and clips; on disk `<name>.safetensors`.

    clip_ids:      [N] int64, `stable_id` of every clip, each once.
    caption_clip:  [C] int64, the clip id of every caption.
    caption_index: [C] int64, the index of every caption among those of its clip.
    values:        in fp16: the score of two embeddings is exact to 5e-5 for d = 1024, a stored score below 1 to 2.5e-4.
                   Of a dual encoder embeddings of unit length, "text" [C, d] and "audio" [N, d].
                   Of a pairwise scorer "scores" [C, N], or only the best: for every caption "caption_best" [C, K]
                   int32, rows of clips, "caption_scores" [C, K], and "caption_rest" [C], the mean of the other scores;
                   for every clip "clip_best", "clip_scores", "clip_rest" likewise.
                   Cross-fitted: "text" [C, F, d] and "audio" [N, F, d] of the members that left out each fold, and
                   "clip_fold" [N] int64; or "scores" for t2a and "scores_a2t" [C, N].
    metadata:      model and shards, as `atr-scale estimate` writes them.
    caption_text:  [C] int64, `stable_id` of the text of every caption; None in tables of version 0.2.
    """

    name: str
    clip_ids: Tensor
    caption_clip: Tensor
    caption_index: Tensor
    values: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    caption_text: Tensor | None = None

    @property
    def is_dual_encoder(self) -> bool:
        """Whether it holds embeddings."""
        return self.values.keys() >= EMBEDDINGS

    @property
    def differs_by_direction(self) -> bool:
        """Whether t2a and a2t have different scores."""
        return not self.values.keys() <= EMBEDDINGS | SCORES

    @cached_property
    def keys(self) -> TableKeys:
        """Finds the rows of clips and captions."""
        return TableKeys(self.clip_ids, self.caption_clip, self.caption_index, self.caption_text)

    @property
    def sources(self) -> list[Source]:
        """The shard sets that the table was made from. Tables of version 0.2 and before name one."""
        listed = self.metadata.get("sources")
        if listed is not None:
            return [Source(*source) for source in json.loads(listed)]
        return [
            Source(self.metadata.get("shards", "?"), self.metadata.get("shards_sha256", ""), len(self.clip_ids), [])
        ]

    def scores(
        self, captions: Tensor, clips: Tensor, direction: Direction = "t2a", device: torch.device | str = "cpu"
    ) -> Tensor:
        """[c, n], at least fp32: scores of the rows `captions` [c] with the rows `clips` [n], both int64."""
        if self.is_dual_encoder:
            text, audio = self.embeddings(captions, clips, direction, device)
            return text @ audio.T
        if "scores" in self.values:
            stored = self.values.get("scores_a2t" if direction == "a2t" else "scores", self.values["scores"])
            return at_least_fp32(on_device(stored[captions[:, None], clips], device))
        if direction == "t2a":
            return on_device(self._best_scores("caption", captions, clips), device)
        return on_device(self._best_scores("clip", clips, captions).T, device)

    def pairs(self, captions: Tensor, clips: Tensor) -> Tensor:
        """[p], at least fp32: t2a scores of row captions[k] with row clips[k]."""
        if self.is_dual_encoder:
            text, audio = self.embeddings(captions, clips)
            return (text * audio).sum(1)
        if "scores" in self.values:
            return at_least_fp32(self.values["scores"][captions, clips])
        best, scores, rest = (self.values[f"caption_{name}"][captions] for name in ("best", "scores", "rest"))
        hit = best == clips[:, None]
        return torch.where(hit.any(1), at_least_fp32(scores).masked_fill(~hit, 0).sum(1), at_least_fp32(rest))

    def embeddings(
        self, captions: Tensor, clips: Tensor, direction: Direction = "t2a", device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """([c, w], [n, w]), at least fp32: embeddings whose products are the scores of these rows.

        w = d; of a cross-fitted table w = F d: a query has only the embedding of the member that left out its fold,
        beside zeros, a candidate those of all members.
        """
        text, audio = (
            at_least_fp32(on_device(self.values[side][rows], device))
            for side, rows in (("text", captions), ("audio", clips))
        )
        if "clip_fold" in self.values:
            folds = self.values["clip_fold"]
            if direction == "t2a":
                text = _of_fold(text, on_device(folds[self.keys.caption_clip_row[captions]], device))
            else:
                audio = _of_fold(audio, on_device(folds[clips], device))
        return text.flatten(1), audio.flatten(1)

    def _best_scores(self, side: str, queries: Tensor, candidates: Tensor) -> Tensor:
        """[q, m]: the stored scores of the best candidates of each query, and the mean of the others for the rest."""
        best, scores, rest = (self.values[f"{side}_{name}"][queries] for name in ("best", "scores", "rest"))
        different, place = torch.unique(candidates, return_inverse=True)
        found = at_least_fp32(rest)[:, None].repeat(1, len(different))
        column = torch.searchsorted(different, best.long()).clamp(max=len(different) - 1)
        row, rank = (different[column] == best).nonzero(as_tuple=True)
        found[row, column[row, rank]] = at_least_fp32(scores[row, rank])
        return found[:, place]

    def save(self, folder: str | Path) -> Path:
        """Write `<name>.safetensors` atomically; returns its path."""
        path = Path(folder) / f"{self.name}.safetensors"
        tensors = {name: getattr(self, name) for name in KEYS} | self.values
        if self.caption_text is not None:
            tensors[TEXT] = self.caption_text
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        parts = ((name, x.dtype, list(x.shape), [x.numpy().data]) for name, x in tensors.items())
        with storage.atomic_file(str(path)) as partial:
            save_file(tensors, partial, {**self.metadata, CHECKSUM: _checksum(parts)})
            give_usual_mode(partial)
        return path

    @staticmethod
    def read(path: str | Path, verify: bool = True) -> TeacherTable:
        """Open a file that `save` wrote. Raises UserError if there is none, if it is damaged or no teacher table.

        verify: compare its checksum, which reads the whole file once; one rank of a machine does it for all.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError:
            raise UserError(f"no teacher table at {path}: {REMEDY}") from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): {REMEDY} again") from None
        if CHECKSUM not in metadata or tensors.keys() - {TEXT} not in [{*KEYS, *layout} for layout in LAYOUTS]:
            raise UserError(f"{path} is no teacher table: {REMEDY}")
        checksum = metadata.pop(CHECKSUM)
        if verify and checksum != _checksum(_stored(Path(path))):
            raise UserError(f"{path} is damaged (another checksum): {REMEDY} again")
        keys, text = {name: tensors.pop(name) for name in KEYS}, tensors.pop(TEXT, None)
        name = Path(path).name.removesuffix(".safetensors")
        return TeacherTable(name, **keys, values=tensors, metadata=metadata, caption_text=text)


def _of_fold(embeddings: Tensor, folds: Tensor) -> Tensor:
    """[n, F, d] with zeros for all members except the one of each row's fold."""
    chosen = torch.nn.functional.one_hot(folds, embeddings.shape[1]).to(embeddings)
    return embeddings * chosen[:, :, None]


def shards_checksum(shards: ShardSet) -> str:
    """sha256 of the manifest of the shards, or of their index if they have no manifest."""
    index = {"names": shards.names, "keys": shards.keys, "stop": shards.stop.tolist()}
    return hashlib.sha256(json.dumps(shards.manifest or index, sort_keys=True).encode()).hexdigest()


def same_keys(tables: Sequence[TeacherTable]) -> None:
    """Raises UserError if the tables do not have the same captions and clips in the same order."""
    first, *others = tables
    for other in others:
        if not all(torch.equal(getattr(first, key), getattr(other, key)) for key in KEYS):
            raise UserError(
                f"the teacher tables {first.name} and {other.name} are of different splits: "
                "write both with one `atr-scale estimate`"
            )


Part = tuple[str, torch.dtype, list[int], Any]  # name, dtype, shape, blocks of bytes


def _checksum(parts: Any) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, blocks in sorted(parts, key=lambda part: part[0]):
        digest.update(f"{name} {dtype} {shape}".encode())
        for block in blocks:
            digest.update(block)
    return digest.hexdigest()


def _stored(path: Path) -> Iterator[Part]:
    """The tensors of a safetensors file, read with ordinary reads: mapped pages would count as memory of this rank."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            yield name, DTYPES[entry["dtype"]], entry["shape"], _blocks(path, start, stop)


def _blocks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        for first in range(start, stop, BLOCK_BYTES):
            yield file.read(min(BLOCK_BYTES, stop - first))
