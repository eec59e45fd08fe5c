"""Ensembles by configuration, pairs without a teacher, look-ups, and the memory of a table."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atr_scale.batch import Batch, stable_id
from atr_scale.config import RunConfig, load_config
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.errors import UserError
from atr_scale.losses.terms import DistillationSection
from atr_scale.teachers.ensemble import TeacherEnsemble
from atr_scale.teachers.keys import UNKNOWN, TableKeys
from atr_scale.teachers.tables import CHECKSUM, TeacherTable, shards_checksum
from atr_scale.training.parts import read_teacher
from tests.losses import unit
from tests.tiny import TinyInputs, make_tiny_inputs, write_tiny_config

CLIPS, EACH = 5, 2
ID = torch.arange(CLIPS) * 1_000_003 + 11


def table(name: str, seed: int, width: int = 6) -> TeacherTable:
    """In float64; clip ids are not in order."""
    ids = ID.flip(0)
    values = {"text": unit(CLIPS * EACH, width, seed), "audio": unit(CLIPS, width, seed + 1)}
    return TeacherTable(name, ids, ids.repeat_interleave(EACH), torch.arange(EACH).repeat(CLIPS), values)


def batch_of(clip_ids: Tensor, index: Tensor) -> Batch:
    blank = torch.zeros(len(clip_ids), 1, dtype=torch.int64)
    return Batch(blank.float(), blank[:, 0], blank, blank, clip_ids, clip_ids, index, index)


DRAWN = batch_of(ID[[3, 0, 4, 3]], torch.tensor([1, 0, 1, 0]))
ROWS, COLUMNS = torch.tensor([3, 8, 1, 2]), torch.tensor([1, 4, 0, 1])  # of the table, whose clips are in reverse


def cosines(of: TeacherTable) -> Tensor:
    return (of.values["text"] @ of.values["audio"].T)[ROWS][:, COLUMNS]


def labels_of(tmp_path: Path, **options: Any) -> tuple[Tensor, Tensor]:
    """The targets of t2a and of a2t that a configuration gives, at the student's temperature 0.07."""
    entries = [{"path": str(one.save(tmp_path)), **more} for one, more in options.pop("tables")]
    section = DistillationSection(weight=1.0, tables=entries, **options)
    found = TeacherEnsemble.read(section).labels(DRAWN)
    t2a, a2t = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for teacher in found.teachers:
        tau = teacher.temperature_or(section.temperature or 0.07)
        t2a += teacher.weight * (teacher.t2a.local() / tau).softmax(1)
        a2t += teacher.weight * (teacher.a2t.local() / tau).softmax(0)
    return t2a, a2t


def test_cosines_have_weights_and_temperatures(tmp_path: Path) -> None:
    one, other = table("one", 1), table("other", 5)
    for options, logits in (
        (({}, {}), (cosines(one) + cosines(other)) / 2 / 0.07),
        (({"weight": 3.0}, {"weight": 1.0}), (3 * cosines(one) + cosines(other)) / 4 / 0.07),
        (({"temperature": 0.2}, {"temperature": 0.2}), (cosines(one) + cosines(other)) / 2 / 0.2),
        (
            ({"temperature": 0.1}, {"temperature": 0.5, "weight": 4.0}),
            0.2 * cosines(one) / 0.1 + 0.8 * cosines(other) / 0.5,
        ),
    ):
        t2a, a2t = labels_of(tmp_path, tables=list(zip((one, other), options, strict=True)))
        torch.testing.assert_close(t2a, logits.softmax(1), rtol=0, atol=1e-13)
        torch.testing.assert_close(a2t, logits.softmax(0), rtol=0, atol=1e-13)


def test_probabilities_are_averaged_after_the_softmax(tmp_path: Path) -> None:
    one, other = table("one", 1), table("other", 5)
    tables = [(one, {"temperature": 0.1}), (other, {"weight": 3.0})]
    t2a, a2t = labels_of(tmp_path, tables=tables, ensemble="probabilities", temperature=0.3)
    for found, dim in ((t2a, 1), (a2t, 0)):
        want = 0.25 * (cosines(one) / 0.1).softmax(dim) + 0.75 * (cosines(other) / 0.3).softmax(dim)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-13)


def test_mistakes_in_the_section() -> None:
    two: list[Any] = [{"path": "a", "temperature": 0.1}, "b"]
    with pytest.raises(ValueError, match="some tables have a temperature and others the model's"):
        DistillationSection(weight=1.0, tables=two)
    assert DistillationSection(weight=1.0, tables=two, temperature=0.1).tables[1].path == "b"
    with pytest.raises(ValueError, match="targets: true reads grades: give their file in relevance"):
        DistillationSection(weight=1.0, targets="true")
    with pytest.raises(ValueError, match="distillation needs teachers"):
        DistillationSection(weight=1.0, targets="estimated")
    DistillationSection(weight=1.0, targets="random")


def test_rows_are_found_by_search() -> None:
    """Against a dict, for captions in any order, with indices beyond those of the table; also by text."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.randperm(50, generator=generator) * 7 - 100
    owner = torch.randint(0, 50, (300,), generator=generator)
    index = torch.tensor([int((owner[:row] == owner[row]).sum()) for row in range(300)])
    keys = TableKeys(clips, clips[owner], index, None)
    known = {key: row for row, key in enumerate(zip(clips[owner].tolist(), index.tolist(), strict=True))}
    wanted = torch.cartesian_prod(torch.arange(-110, 260), torch.arange(20))
    nothing = torch.zeros(len(wanted), dtype=torch.int64)
    by_text = TableKeys(clips, clips[owner], torch.zeros_like(index), index)
    clip, number = wanted.T
    for found in (keys.captions(clip, number, nothing), by_text.captions(clip, nothing, number)):
        assert found.tolist() == [known.get((c, k), UNKNOWN) for c, k in wanted.tolist()]
    rows = {clip: row for row, clip in enumerate(clips.tolist())}
    assert keys.clips(wanted[:, 0]).tolist() == [rows.get(clip, UNKNOWN) for clip in wanted[:, 0].tolist()]
    assert torch.equal(keys.caption_clip_row, owner)


def test_pairs_without_a_teacher_are_marked(tmp_path: Path) -> None:
    """An unknown clip, and an unknown caption of a known clip; the others keep their scores."""
    clips = torch.tensor([int(ID[3]), 7, int(ID[4]), int(ID[3])])
    batch = batch_of(clips, torch.tensor([1, 0, 1, 5]))
    one = table("one", 1)
    with pytest.raises(UserError, match=r"caption 0 of clip 7 is not in the teacher tables \(one\).*missing=skip"):
        TeacherEnsemble.of(one).labels(batch)
    section = DistillationSection(weight=1.0, tables=[str(one.save(tmp_path))], missing="skip")
    labels = TeacherEnsemble.read(section).labels(batch)
    assert labels.known is not None and labels.known.tolist() == [True, False, True, False]
    assert labels.share(4) == 0.5 and labels.rows is not None and labels.rows.tolist() == [0, 2]
    want = cosines(one)[[0, 2]][:, [0, 2]]
    torch.testing.assert_close(labels.block(labels.teachers[0].t2a).local(), want, rtol=0, atol=1e-13)
    scores = labels.whole().mean_scores()
    assert scores[[1, 3]].abs().max() == 0 and scores[:, [1, 3]].abs().max() == 0 and scores[0, 2] == want[0, 1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("tiny"))


def of_shards(shards: ShardSet, clips: int) -> TeacherTable:
    ids = torch.tensor([stable_id(shards.read_text(row)[0]) for row in range(clips)])
    values = {"text": unit(clips, 4, 1), "audio": unit(clips, 4, 2)}
    return TeacherTable("tiny", ids, ids.clone(), torch.zeros_like(ids), values)


def distilling(inputs: TinyInputs, folder: Path, missing: str) -> RunConfig:
    overrides = ("objective.distillation.weight=1", f"objective.distillation.tables=[{folder}/tiny.safetensors]")
    path = write_tiny_config(folder / "run.yaml", inputs, folder / "run")
    return load_config(path, [*overrides, f"objective.distillation.missing={missing}"])


def test_a_run_counts_the_clips_without_a_teacher_before_it_starts(
    inputs: TinyInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = open_shards(str(inputs.shards))
    of_shards(shards, 9).save(tmp_path)
    count = "3 of 12 clips have no teacher"
    with pytest.raises(UserError, match=f"{count}; caption 0 of .* in {inputs.shards} is not in the teacher tables"):
        read_teacher(distilling(inputs, tmp_path, "refuse"), [shards])
    with caplog.at_level(logging.INFO):
        teacher = read_teacher(distilling(inputs, tmp_path, "skip"), [shards])
    assert f"{inputs.shards}: {count}, their pairs are left out of distillation" in caplog.text
    assert teacher is not None and [found.missing for found in teacher.coverage] == [3]
    table("tiny", 1).save(tmp_path)
    with pytest.raises(UserError, match=f"no clip of {inputs.shards} is in the teacher tables"):
        read_teacher(distilling(inputs, tmp_path, "skip"), [shards])
    sources = json.dumps([("elsewhere", shards_checksum(shards), 12, [])])
    replace(table("tiny", 1), metadata={"sources": sources}).save(tmp_path)
    known = read_teacher(distilling(inputs, tmp_path, "refuse"), [shards])
    assert known is not None and known.coverage[0].describe() == "all 12 clips have a teacher"


def test_tables_of_earlier_versions_load(tmp_path: Path) -> None:
    """They name one shard set, in two entries of their metadata."""
    written = table("old", 1)
    path = replace(written, metadata={"shards": "shards/clotho", "shards_sha256": "abc", "config": "x"}).save(tmp_path)
    found = TeacherTable.read(path)
    assert found.sources == [("shards/clotho", "abc", CLIPS, [], 0)]
    assert torch.equal(found.values["text"], written.values["text"])


def megabytes(kind: str) -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is counted on Linux")
@pytest.mark.parametrize("first", [True, False])
def test_a_table_takes_no_memory_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """Neither the rank that verifies the checksum nor the others hold the 48 MB of embeddings."""
    monkeypatch.setenv("LOCAL_RANK", "0" if first else "1")
    count = 24_000
    ids = torch.randperm(count, generator=torch.Generator().manual_seed(0)) * 3
    values = {side: torch.rand(count, 512).half() for side in ("text", "audio")}
    path = TeacherTable("big", ids, ids.clone(), torch.zeros_like(ids), values).save(tmp_path)
    section = DistillationSection(weight=1.0, tables=[str(path)])
    TeacherTable.read(table("small", 1).save(tmp_path))  # whatever a first read imports
    before = {kind: megabytes(kind) for kind in ("Rss", "Anonymous")}
    teacher = TeacherEnsemble.read(section)
    drawn = batch_of(ids[:64], torch.zeros(64, dtype=torch.int64))
    block = teacher.labels(drawn).teachers[0].t2a
    assert torch.equal(block.tensors[0], values["text"][:64].float())
    assert megabytes("Rss") - before["Rss"] < 15 and megabytes("Anonymous") - before["Anonymous"] < 5


def test_only_the_first_rank_of_a_machine_reads_a_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table("one", 1).save(tmp_path)
    save_file(load_file(path), path, {CHECKSUM: "of another file"})
    section = DistillationSection(weight=1.0, tables=[str(path)])
    monkeypatch.setenv("LOCAL_RANK", "3")
    TeacherEnsemble.read(section)
    for name in ("0", None):
        monkeypatch.setenv("LOCAL_RANK", name) if name else monkeypatch.delenv("LOCAL_RANK")
        with pytest.raises(UserError, match=r"is damaged \(another checksum\)"):
            TeacherEnsemble.read(section)
