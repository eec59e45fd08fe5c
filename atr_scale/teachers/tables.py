"""Teacher tables: files with the embeddings or scores of teachers for a split, from which soft labels are computed.

Source: distillation with estimated audio-caption correspondences, arXiv 2408.11641.

Shape suffixes: C captions and N clips of the split, B texts of the global batch, b rows of this rank, d width.

A caption is identified by (clip id, index among the captions of the clip), never by its text, which clips may share.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atr_scale.batch import Batch, stable_id
from atr_scale.data import storage
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import ShardSet
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.score_block import EmbeddingScores, ScoreBlock, StoredScores, at_least_fp32

logger = logging.getLogger(__name__)

KEYS = ("clip_ids", "caption_clip", "caption_index")
EMBEDDINGS, SCORES = {"text", "audio"}, {"scores"}
CHECKSUM = "tensors_sha256"
SPOT_CHECKS = 64  # samples of unknown shards that are looked up before training starts
REMEDY = "run `atr-scale estimate` on the shards of data.train"


@dataclass(frozen=True)
class TeacherTable:
    """Embeddings or scores of one teacher for the captions and clips of a split; on disk `<name>.safetensors`.

    clip_ids:      [N] int64, `stable_id` of every clip, each once.
    caption_clip:  [C] int64, the clip id of every caption.
    caption_index: [C] int64, the index of every caption among the captions of its clip.
    values:        of a dual encoder embeddings of unit length, "text" [C, d] and "audio" [N, d]; of a pairwise scorer
                   "scores" [C, N]. fp16: the score of two embeddings is exact to 5e-5 for d = 1024, a stored score
                   below 1 to 2.5e-4.
    metadata:      model and shards, as `atr-scale estimate` writes them.
    """

    name: str
    clip_ids: Tensor
    caption_clip: Tensor
    caption_index: Tensor
    values: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_dual_encoder(self) -> bool:
        """Whether it holds embeddings."""
        return self.values.keys() == EMBEDDINGS

    def scores(self, captions: Tensor, clips: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """[c, n], at least fp32: scores of the rows `captions` [c] with the rows `clips` [n], both int64."""
        if self.is_dual_encoder:
            text, audio = self.embeddings("text", captions, device), self.embeddings("audio", clips, device)
            return text @ audio.T
        return at_least_fp32(self.values["scores"][captions[:, None], clips].to(device))

    def pairs(self, captions: Tensor, clips: Tensor) -> Tensor:
        """[p], at least fp32: scores of row captions[k] with row clips[k]."""
        if self.is_dual_encoder:
            return (self.embeddings("text", captions) * self.embeddings("audio", clips)).sum(1)
        return at_least_fp32(self.values["scores"][captions, clips])

    def embeddings(self, side: str, rows: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """[c, d], at least fp32: embeddings of these rows; side: "text" or "audio"."""
        return at_least_fp32(self.values[side][rows].to(device))

    def save(self, folder: str | Path) -> Path:
        """Write `<name>.safetensors` atomically; returns its path."""
        path = Path(folder) / f"{self.name}.safetensors"
        tensors = {name: getattr(self, name) for name in KEYS} | self.values
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with storage.atomic_file(str(path)) as partial:
            save_file(tensors, partial, {**self.metadata, CHECKSUM: _checksum(tensors)})
        return path

    @staticmethod
    def read(path: str | Path) -> TeacherTable:
        """Read a file that `save` wrote. Raises UserError if there is none, if it is damaged or no teacher table."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError:
            raise UserError(f"no teacher table at {path}: {REMEDY}") from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): {REMEDY} again") from None
        if CHECKSUM not in metadata or set(tensors) not in ({*KEYS, *EMBEDDINGS}, {*KEYS, *SCORES}):
            raise UserError(f"{path} is no teacher table: {REMEDY}")
        if metadata.pop(CHECKSUM) != _checksum(tensors):
            raise UserError(f"{path} is damaged (another checksum): {REMEDY} again")
        keys = {name: tensors.pop(name) for name in KEYS}
        return TeacherTable(Path(path).name.removesuffix(".safetensors"), **keys, values=tensors, metadata=metadata)


class TeacherEnsemble:
    """The mean of the scores of several teacher tables of one split, as soft labels of a batch.

    Raises UserError if the tables are of different splits.
    """

    def __init__(self, tables: Sequence[TeacherTable]) -> None:
        first, *others = tables
        for other in others:
            if not all(torch.equal(getattr(first, key), getattr(other, key)) for key in KEYS):
                raise UserError(
                    f"the teacher tables {first.name} and {other.name} are of different splits: "
                    "write both with one `atr-scale estimate`"
                )
        self.tables = tables
        self._clips = {clip: row for row, clip in enumerate(first.clip_ids.tolist())}
        keys = zip(first.caption_clip.tolist(), first.caption_index.tolist(), strict=True)
        self._captions = {key: row for row, key in enumerate(keys)}

    @staticmethod
    def read(paths: Sequence[str | Path]) -> TeacherEnsemble:
        """The ensemble of these files. Raises UserError like `TeacherTable.read`."""
        return TeacherEnsemble([TeacherTable.read(path) for path in paths])

    def check(self, shards: ShardSet) -> None:
        """Raises UserError if the tables were made from other clips than those of `shards`.

        Shards with the same manifest as those of the tables hold the same samples. Of other shards a few samples are
        read, because only samples hold clip ids. If they miss an unknown caption, `block` reports it once it is in a
        batch.
        """
        if shards_checksum(shards) == self.tables[0].metadata.get("shards_sha256"):
            return
        made_from = self.tables[0].metadata.get("shards")
        logger.info(
            "%s: its teacher tables are of other shards (%s), clips are matched by their ids",
            shards.location,
            made_from,
        )
        for row in np.unique(np.linspace(0, len(shards) - 1, SPOT_CHECKS).astype(int)).tolist():
            try:
                clip_id, captions, _ = shards.read_text(row)
            except BadSample:  # training drops it too
                continue
            for index in range(len(captions)):
                if (stable_id(clip_id), index) not in self._captions:
                    raise self._unknown(f"caption {index} of {clip_id} in {shards.location}")

    def block(self, batch: Batch, world: World | None = None) -> ScoreBlock:
        """Scores [B, b] of all captions of the global batch with this rank's clips; all ranks call this.

        They are the mean of the teachers' scores, before temperature and softmax. If all tables hold embeddings, the
        block holds the embeddings of all teachers, concatenated. Raises UserError on every rank if a caption of any
        rank is unknown.
        """
        world = world or World.current()
        keys = torch.stack([batch.clip_ids, batch.caption_index], 1).tolist()
        own = [self._captions.get((clip, index), -1) for clip, index in keys]
        captions = world.gather(torch.tensor(own, device=batch.clip_ids.device)).cpu()
        if (captions < 0).any():
            lost = own.index(-1) if -1 in own else None
            raise self._unknown("a caption of another rank" if lost is None else _describe(batch, lost))
        clips = torch.tensor([self._clips[clip] for clip, _ in keys])
        device, members = batch.clip_ids.device, len(self.tables)
        if all(table.is_dual_encoder for table in self.tables):
            text, audio = joined_embeddings(self.tables, captions, clips, device)
            return EmbeddingScores(text / members, audio, world)
        total = sum(table.scores(captions, clips, device) for table in self.tables)
        assert isinstance(total, Tensor)
        return StoredScores(total / members, world)

    def _unknown(self, what: str) -> UserError:
        names = ", ".join(table.name for table in self.tables)
        return UserError(f"{what} is not in the teacher tables ({names}): {REMEDY}")


def joined_embeddings(
    tables: Sequence[TeacherTable], captions: Tensor, clips: Tensor, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """([c, d], [n, d]): embeddings of all tables, concatenated. Their products are the sums of the tables' scores."""
    text = torch.cat([table.embeddings("text", captions, device) for table in tables], 1)
    return text, torch.cat([table.embeddings("audio", clips, device) for table in tables], 1)


def shards_checksum(shards: ShardSet) -> str:
    """sha256 of the manifest of the shards, or of their index if they have no manifest."""
    index = {"names": shards.names, "keys": shards.keys, "stop": shards.stop.tolist()}
    return hashlib.sha256(json.dumps(shards.manifest or index, sort_keys=True).encode()).hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _describe(batch: Batch, row: int) -> str:
    place = batch.keys[row] if batch.keys else f"clip {int(batch.clip_ids[row])}"
    return f"caption {int(batch.caption_index[row])} of {place}"
