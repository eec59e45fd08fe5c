"""Targets that come from no model: grades of a file, random scores, equal scores."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from atr_scale.batch import Batch, stable_id
from atr_scale.config import RunConfig, load_config
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.errors import UserError
from atr_scale.losses.soft_labels import SoftLabels
from atr_scale.losses.terms import DistillationSection
from atr_scale.score_block import ScoreBlock
from atr_scale.teachers import sizes
from atr_scale.teachers.ensemble import TeacherEnsemble
from atr_scale.teachers.grades import GradeTable
from atr_scale.teachers.targets import Constructed, random_vectors, true_targets
from atr_scale.training.parts import read_teacher
from tests.tiny import TinyInputs, make_tiny_inputs, write_tiny_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shards(inputs: TinyInputs) -> ShardSet:
    return open_shards(str(inputs.shards))


def teacher_of(inputs: TinyInputs, folder: Path, shards: ShardSet, **options: Any) -> TeacherEnsemble | Constructed:
    overrides = [f"objective.distillation.{key}={value}" for key, value in {"weight": 1, **options}.items()]
    config: RunConfig = load_config(write_tiny_config(folder / "run.yaml", inputs, folder / "run"), overrides)
    teacher = read_teacher(config, [shards])
    assert teacher is not None
    return teacher


def batch_of(shards: ShardSet, rows: list[int], index: list[int] | None = None) -> Batch:
    """The first caption of each row; index: the numbers that their captions have instead."""
    samples = [shards.read_text(row) for row in rows]
    ids, texts = (
        torch.tensor([stable_id(x) for x in y]) for y in ([s[0] for s in samples], [s[1][0] for s in samples])
    )
    blank = torch.zeros(len(rows), 1, dtype=torch.int64)
    return Batch(blank.float(), blank[:, 0], blank, blank, ids, ids, torch.tensor(index or [0] * len(rows)), texts)


def scores_of(labels: SoftLabels[ScoreBlock]) -> torch.Tensor:
    (teacher,) = labels.teachers
    assert teacher.a2t is teacher.t2a and teacher.temperature is None
    return teacher.t2a.local()


def write_npz(path: Path, shards: ShardSet, grades: np.ndarray, clips: int = 12) -> Path:
    names = np.array([shards.read_text(row)[0] for row in range(clips)])
    np.savez_compressed(
        path, grades=grades, clip_ids=names, caption_clip=names, caption_index=np.zeros(clips, np.int64)
    )
    return path


def test_grades_of_a_file_are_scores(inputs: TinyInputs, tmp_path: Path, shards: ShardSet) -> None:
    """The caption's own clip is relevant, whatever the file says."""
    grades = np.random.default_rng(0).choice([0, 0.25, 0.5, 1], (12, 12)).astype(np.float32)
    path = write_npz(tmp_path / "grades.npz", shards, grades)
    teacher = teacher_of(inputs, tmp_path, shards, targets="true", relevance=path)
    rows = [7, 2, 11, 2]
    np.fill_diagonal(grades, 1)
    assert torch.equal(scores_of(teacher.labels(batch_of(shards, rows))), torch.from_numpy(grades[rows][:, rows]))


def test_clips_that_a_file_does_not_grade(inputs: TinyInputs, tmp_path: Path, shards: ShardSet) -> None:
    path = write_npz(tmp_path / "grades.npz", shards, np.eye(9, dtype=np.float32), 9)
    with pytest.raises(UserError, match=r"3 of 12 clips have no teacher.*grades.npz"):
        teacher_of(inputs, tmp_path, shards, targets="true", relevance=path)
    teacher = teacher_of(inputs, tmp_path, shards, targets="true", relevance=path, missing="skip")
    known = teacher.labels(batch_of(shards, [3, 10, 0])).known
    assert known is not None and known.tolist() == [True, False, True]
    with pytest.raises(UserError, match="no relevance file at nowhere"):
        teacher_of(inputs, tmp_path, shards, targets="true", relevance="nowhere.csv")


def test_a_csv_file_names_captions_by_their_text(inputs: TinyInputs, tmp_path: Path, shards: ShardSet) -> None:
    texts = [shards.read_text(row) for row in range(12)]
    with open(tmp_path / "grades.csv", "w", newline="", encoding="utf-8") as file:
        lines = [(texts[4][1][0].upper(), [Path(texts[k][0]).name for k in (4, 9)]), (texts[9][1][0], ["none.wav"])]
        csv.writer(file).writerows([("query", "audio_filenames"), *lines])
    teacher = teacher_of(inputs, tmp_path, shards, targets="true", relevance=tmp_path / "grades.csv")
    want = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(scores_of(teacher.labels(batch_of(shards, [4, 9, 1]))), want)


def test_a_csv_file_and_a_clip_that_is_in_two_sets(tmp_path: Path, inputs: TinyInputs, shards: ShardSet) -> None:
    """Each sample has its own captions, of which a file may grade one."""

    class Other:
        location = "other"

        def __len__(self) -> int:
            return 1

        def read_text(self, row: int) -> tuple[str, list[str], None]:
            return shards.read_text(4)[0], ["another caption"], None

    other = cast(ShardSet, Other())
    names = [Path(shards.read_text(row)[0]).name for row in (4, 9)]
    (tmp_path / "grades.csv").write_text(f"query,audio_filenames\nanother caption,{';'.join(names)}\n")
    section = DistillationSection(weight=1, targets="true", relevance=str(tmp_path / "grades.csv"))
    labels = true_targets(section, [shards, other])
    found = [scores_of(labels.labels(batch_of(shards, [9, 4]))), scores_of(labels.labels(batch_of(other, [0])))]
    assert torch.equal(found[0], torch.eye(2)) and torch.equal(found[1], torch.ones(1, 1))
    (table,) = labels.tables
    assert len(table.clip_ids) == 12 and len(table.caption_clip) == 13
    assert table.scores(torch.tensor([12]), torch.tensor([4, 9, 0])).tolist() == [[1, 1, 0]]


def test_a_csv_file_of_other_captions_is_refused(inputs: TinyInputs, tmp_path: Path, shards: ShardSet) -> None:
    """Only the captions' own clips would be left, which are hard labels."""
    (tmp_path / "grades.csv").write_text("query,audio_filenames\na dog barks,['dog.wav']\n")
    with pytest.raises(UserError, match=r"grades\.csv grades no caption and clip of .*shards: give the file of these"):
        teacher_of(inputs, tmp_path, shards, targets="true", relevance=tmp_path / "grades.csv")


def test_only_positive_grades_are_kept(tmp_path: Path) -> None:
    """For 200,000 captions and clips, all scores would take 80 GB. Clips may occur several times in a batch."""
    size, rng = 200_000, np.random.default_rng(0)
    caption, clip = np.divmod(np.unique(rng.integers(0, size * size, 3 * size)), size)
    grade = rng.uniform(0.1, 1, len(caption)).astype(np.float32)
    ids = torch.arange(size)
    table = GradeTable.of(tmp_path / "some.csv", ids, ids, torch.zeros(size).long(), [(caption, clip, grade)])
    assert sum(value.nbytes for value in table.values.values()) < 8 * (4 * size + 1)
    chosen = np.concatenate([np.flatnonzero(caption < 20), np.arange(5)])
    rows, columns = caption[chosen], np.concatenate([clip[chosen], clip[chosen][:9]])
    known = {(i, j): g for i, j, g in zip(caption.tolist(), clip.tolist(), grade.tolist(), strict=True)}
    want = [[known.get((i, j), 0.0) for j in columns.tolist()] for i in rows.tolist()]
    assert torch.equal(table.scores(torch.from_numpy(rows), torch.from_numpy(columns)), torch.tensor(want))
    assert not table.differs_by_direction and not table.is_dual_encoder


def test_grades_that_do_not_fit_into_memory(
    inputs: TinyInputs, tmp_path: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_npz(tmp_path / "grades.npz", shards, np.eye(12, dtype=np.float32))
    monkeypatch.setattr(sizes, "free_memory", lambda: 500)
    with pytest.raises(UserError, match=r"grades\.npz take .* MB of memory on each rank .* give a CSV file"):
        teacher_of(inputs, tmp_path, shards, targets="true", relevance=path)


def test_uniform_targets(inputs: TinyInputs, tmp_path: Path, shards: ShardSet) -> None:
    teacher = teacher_of(inputs, tmp_path, shards, targets="uniform")
    assert torch.equal(scores_of(teacher.labels(batch_of(shards, [4, 9, 1]))), torch.zeros(3, 3))
    assert list(teacher.coverage) == []


def test_random_targets_belong_to_the_pair(inputs: TinyInputs, tmp_path: Path, shards: ShardSet) -> None:
    """The same in any batch and order, others with another seed; captions of one clip and the clip itself differ."""
    teacher = teacher_of(inputs, tmp_path, shards, targets="random")
    one = scores_of(teacher.labels(batch_of(shards, [4, 9, 1])))
    other = scores_of(teacher.labels(batch_of(shards, [1, 6, 9, 4])))
    torch.testing.assert_close(one, other[[3, 2, 0]][:, [3, 2, 0]], rtol=0, atol=1e-6)
    two = scores_of(teacher.labels(batch_of(shards, [4, 4], [0, 1])))
    assert (two[0] - two[1]).abs().min() > 1e-3 and two.abs().max() < 0.6
    assert not torch.equal(random_vectors(torch.tensor([[5, 0]]), 0), random_vectors(torch.tensor([[5, 0]]), 1))
    many = random_vectors(torch.stack([torch.arange(400), torch.zeros(400, dtype=torch.int64)], 1), 3)
    off = (many @ many.T)[~torch.eye(400, dtype=torch.bool)]
    assert abs(off.mean()) < 0.005 and off.std().item() == pytest.approx(1 / 8, rel=0.05)
