"""Folds of the training clips, teachers that are cross-fitted over them, tables of the best pairs, and sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from atr_scale.batch import TokenSequence, stable_id
from atr_scale.config import RunConfig, load_config
from atr_scale.data.folds import fold_of, without_fold
from atr_scale.data.options import FoldsSection
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.stream import read_batches
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.encoders.text_encoders import build_text_encoder
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import Embedded
from atr_scale.evaluation.parallel import Parallel
from atr_scale.planner.dry_run import dry_run
from atr_scale.scorers import build_scorer
from atr_scale.teachers import sizes
from atr_scale.teachers.cross_fit import by_fold, cross_fitted
from atr_scale.teachers.estimate import TableRows
from atr_scale.teachers.keys import UNKNOWN, TableKeys
from atr_scale.teachers.tables import Direction, TeacherTable
from atr_scale.teachers.top_k import best_scores
from atr_scale.training.parts import training_stream
from tests.losses import unit
from tests.sequences import random_sequence
from tests.tiny import TinyInputs, make_tiny_inputs, write_tiny_config

FOLDS, CLIPS, EACH = 3, 12, 2
IDS = torch.arange(CLIPS) * 5 + 3
DROPPED = [4]  # a sample that could not be read


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("tiny"), CLIPS + len(DROPPED))


@pytest.fixture(scope="module")
def shards(inputs: TinyInputs) -> ShardSet:
    return open_shards(str(inputs.shards))


def config_of(inputs: TinyInputs, folder: Path, *overrides: str) -> RunConfig:
    return load_config(write_tiny_config(folder / "run.yaml", inputs, folder / "run"), overrides)


def test_training_leaves_out_the_clips_of_one_fold(inputs: TinyInputs, tmp_path: Path, shards: ShardSet) -> None:
    """Each fold by the keys of the index; over all held-out folds every clip is left out once."""
    left_out: list[str] = []
    for held_out in range(FOLDS):
        folds = f"data.folds={{count: {FOLDS}, held_out: {held_out}}}"
        config = config_of(inputs, tmp_path, folds, "train.global_batch_size=1")
        tokenizer = caption_tokenizer(build_text_encoder(str(inputs.text_encoder)).tokenizer, config.data.captions)
        stream = training_stream(config, tokenizer, 16_000, World())
        size = len(stream.sources[0])
        assert stream.order.sizes == [size] and size < len(shards)
        seen = {batch.keys[0].rsplit("/", 1)[-1] for batch in read_batches(stream.between(0, 2 * size), 0)}
        missing = set(shards.keys) - seen
        assert missing == {key for key in shards.keys if stable_id(key) % FOLDS == held_out}
        left_out += missing
    assert sorted(left_out) == sorted(shards.keys)
    numbered = replace(shards, captions=np.arange(len(shards), dtype=np.int32))
    kept = [row for row, key in enumerate(shards.keys) if stable_id(key) % FOLDS != 0]
    assert without_fold(numbered, FOLDS, 0).num_captions == sum(kept)
    assert f"{size} clips in 3 shards, without fold 2 of 3" in dry_run(config, 1)
    with pytest.raises(UserError, match=r"data.folds.*held_out must be below count = 3"):
        config_of(inputs, tmp_path, f"data.folds={{count: {FOLDS}, held_out: 3}}")


def members(kind: str, shards: ShardSet) -> list[TeacherTable]:
    """One table for each fold, of all readable clips; the second dual encoder is narrower."""
    about = {"sources": json.dumps([(shards.location, "sum", CLIPS, DROPPED)]), "weights_sha256": "w"}
    keys = IDS, IDS.repeat_interleave(EACH), torch.arange(EACH).repeat(CLIPS)
    made = []
    for number in range(FOLDS):
        width = 4 if number == 1 else 6
        text, audio = unit(CLIPS * EACH, width, 10 * number), unit(CLIPS, width, 10 * number + 1)
        values = {"text": text, "audio": audio} if kind == "embeddings" else {"scores": text @ audio.T}
        if kind == "best":
            values = best_of(values["scores"], 5)
        made.append(TeacherTable(f"fold{number}", *keys, values, about))
    return made


def best_of(scores: Tensor, k: int) -> dict[str, Tensor]:
    """By hand: the k best of every row and column, and the mean of the others."""
    found = {}
    for side, matrix in (("caption", scores), ("clip", scores.T)):
        order = matrix.argsort(1, descending=True)
        found[f"{side}_best"] = order[:, :k].int()
        found[f"{side}_scores"] = matrix.gather(1, order[:, :k])
        found[f"{side}_rest"] = matrix.gather(1, order[:, k:]).mean(1)
    return found


@pytest.mark.parametrize("kind", ["embeddings", "scores", "best"])
def test_every_query_has_the_scores_of_the_member_that_left_it_out(kind: str, shards: ShardSet, tmp_path: Path) -> None:
    """Both directions, written, read, and looked up in a batch; the candidates are of all folds."""
    tables, every_caption, every_clip = members(kind, shards), torch.arange(CLIPS * EACH), torch.arange(CLIPS)
    kept = np.setdiff1d(np.arange(len(shards)), DROPPED)
    fold = fold_of([shards.keys[row] for row in kept], FOLDS)
    assert len(set(fold)) == FOLDS
    table = TeacherTable.read(cross_fitted(tables, [shards]).save(tmp_path))
    assert table.name == "cross_fit" and table.differs_by_direction
    directions: tuple[Direction, Direction] = ("t2a", "a2t")
    for direction in directions:
        own = [member.scores(every_caption, every_clip, direction) for member in tables]
        t2a = torch.stack([own[fold[row // EACH]][row] for row in range(CLIPS * EACH)])
        a2t = torch.stack([own[fold[column]][:, column] for column in range(CLIPS)], 1)
        want = t2a if direction == "t2a" else a2t
        torch.testing.assert_close(table.scores(every_caption, every_clip, direction), want, rtol=0, atol=1e-12)
    assert (t2a - a2t).abs().max() > 0.1
    rows, columns = torch.tensor([1, 22, 7, 0]), torch.tensor([0, 11, 3, 0])
    pairs = table.pairs(rows, columns)
    torch.testing.assert_close(pairs, table.scores(rows, columns).diagonal(), rtol=0, atol=1e-12)


def test_folds_that_do_not_complement_each_other(
    inputs: TinyInputs, tmp_path: Path, shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    plain = config_of(inputs, tmp_path)

    def leaving_out(count: int, held_out: int) -> RunConfig:
        config = plain.model_copy(deep=True)
        config.data.folds = FoldsSection(count=count, held_out=held_out)
        return config

    one, other = leaving_out(2, 1), leaving_out(2, 0)
    assert list(by_fold({"b": one, "a": other})) == ["a", "b"]
    for configs, words in (
        ({"a": one, "b": plain}, "b was trained on all clips"),
        ({"a": one, "b": one}, r"the folds of the runs do not complement each other .*'held_out': 1"),
        ({"a": one}, "do not complement"),
        ({"a": one, "b": leaving_out(3, 0)}, "do not complement"),
    ):
        with pytest.raises(UserError, match=words) as error:
            by_fold(configs)
        assert "\n" not in str(error.value)
    started = other.model_copy(update={"train": other.train.model_copy(update={"initial_checkpoint": "runs/x"})})
    by_fold({"a": started, "b": one})
    assert "a started from train.initial_checkpoint=runs/x" in caplog.text
    mixed = [members("embeddings", shards)[0], *members("scores", shards)[1:]]
    with pytest.raises(UserError, match="needs members of one kind"):
        cross_fitted(mixed, [shards])


def scored(k: int) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    scorer = build_scorer("lgmm", dim=8)
    text, audio = random_sequence([3] * 24, 8, 1), random_sequence([4] * 12, 8, 2)
    text, audio = (TokenSequence(x.tokens.float(), x.mask, x.pooled.float()) for x in (text, audio))
    with torch.no_grad():
        whole = scorer.scores(text, audio)
    return best_scores(scorer, text, audio, k, batch_size=5, parallel=Parallel()), whole


def test_the_best_pairs_are_found_batch_by_batch() -> None:
    found, whole = scored(4)
    for name, want in best_of(whole, 4).items():
        torch.testing.assert_close(found[name], want, rtol=0, atol=1e-6)


def test_a_table_of_the_best_pairs_gives_exact_scores_and_means() -> None:
    """A clip that is drawn twice is found twice; with all pairs kept the table is the matrix."""
    keys = IDS, IDS.repeat_interleave(EACH), torch.arange(EACH).repeat(CLIPS)
    captions, clips = torch.tensor([3, 0, 23, 3]), torch.tensor([11, 2, 2, 5])
    for k in (4, 100):
        values, whole = scored(k)
        table = TeacherTable("best", *keys, values)
        for direction, matrix in (("t2a", whole), ("a2t", whole.T)):
            place = matrix.argsort(1, descending=True).argsort(1)
            others = matrix.masked_fill(place < k, 0).sum(1, keepdim=True) / max(1, matrix.shape[1] - k)
            kept = torch.where(place < k, matrix, others)
            want = (kept if direction == "t2a" else kept.T)[captions][:, clips]
            torch.testing.assert_close(table.scores(captions, clips, direction), want, rtol=0, atol=1e-6)  # type: ignore[arg-type]


def test_sizes_are_checked_before_anything_is_embedded(
    inputs: TinyInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: ShardSet
) -> None:
    """AudioCaps' 49,838 pairs: 9.9 GB for scores in fp32, as much again for both copies in fp16."""
    audiocaps = replace(shards, keys=["x"] * 49_838, captions=np.ones(49_838, np.int32))
    dual, pairwise = config_of(inputs, tmp_path), config_of(inputs, tmp_path, "model.scorer.name=tap")
    size = sizes.table_size(pairwise, 49_838, 49_838, None)
    assert (size.disk, size.memory) == (2 * 49_838**2, 6 * 49_838**2)
    assert sizes.table_size(dual, 49_838, 49_838, None).disk == 2 * 2 * 49_838 * 512
    assert sizes.table_size(pairwise, 49_838, 49_838, 128).memory < size.memory / 20

    def check(config: RunConfig, top_k: int | None = None, memory: float = 1e12) -> None:
        monkeypatch.setattr(sizes, "free_memory", lambda: int(memory))
        sizes.check_sizes({"tap": config}, [audiocaps], tmp_path, top_k, 0, World())

    small = r"give --top-k 128, which needs 0\.4 GB of memory"
    with pytest.raises(UserError, match=rf"table of tap for 49838 captions and 49838 clips needs 14\.9 GB .*: {small}"):
        check(pairwise, memory=8e9)
    check(pairwise, 128, memory=8e9)
    check(dual, memory=8e9)
    with pytest.raises(UserError, match="more memory for each rank"):
        check(dual, memory=1e8)
    usage: Callable[[Path], object] = lambda _: type("Usage", (), {"free": int(3e9)})  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(UserError, match=r"to 5\.0 GB, 3\.0 GB of the disk are free: give --top-k 128"):
        check(pairwise)
    check(pairwise, 128)


def embedded(captions: list[str], owner: list[int], clip_ids: list[str]) -> Embedded:
    nothing = TokenSequence(torch.zeros(0, 0, 1), torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, 1))
    count = len(clip_ids)
    labels: list[str | None] = [None] * count
    return Embedded(nothing, nothing, captions, np.array(owner), clip_ids, labels, list(range(count)), [{}] * count)


def test_a_clip_of_two_shard_sets_has_one_audio_and_the_captions_of_both(shards: ShardSet) -> None:
    """As in AudioCaps and WavCaps: both number the captions of the clip from 0."""
    one = embedded(["it barks", "a dog", "rain"], [0, 0, 1], ["a", "b"])
    other = embedded(["wind", "one dog", "it barks"], [0, 1, 2], ["c", "a", "b"])
    rows = TableRows.of([one, other], [shards, shards])
    assert rows.audio.tolist() == [0, 1, 2] and rows.clip_ids.tolist() == [stable_id(name) for name in "abc"]
    assert rows.caption_clip.tolist() == [stable_id(name) for name in "aabcab"]
    assert rows.caption_index.tolist() == [0, 1, 0, 0, 2, 1]
    assert [(source.clips, source.shared, len(source.dropped)) for source in rows.sources] == [
        (2, 0, len(shards) - 2), (1, 2, len(shards) - 1),
    ]  # fmt: skip
    keys = TableKeys(rows.clip_ids, rows.caption_clip, rows.caption_index, rows.caption_text)
    clips = torch.tensor([stable_id(name) for name in "aabbac"])
    wanted = ["one dog", "a dog", "it barks", "rain", "rain", "it barks"]
    texts = torch.tensor([stable_id(text) for text in wanted])
    assert keys.captions(clips, torch.zeros_like(clips), texts).tolist() == [4, 1, 5, 2, UNKNOWN, UNKNOWN]
    with pytest.raises(UserError, match="holds the clip c twice"):
        TableRows.of([one, embedded(["x", "y"], [0, 1], ["c", "c"])], [shards, shards])


def test_sets_with_common_clips_are_not_cross_fitted(shards: ShardSet) -> None:
    rows = TableRows.of([embedded(["x"], [0], ["a"]), embedded(["y"], [0], ["a"])], [shards, shards])
    values = {"text": unit(2, 4, 0), "audio": unit(1, 4, 1)}
    about = {"sources": json.dumps(rows.sources)}
    table = TeacherTable("one", rows.clip_ids, rows.caption_clip, rows.caption_index, values, about, rows.caption_text)
    with pytest.raises(UserError, match="shares 1 clips with the shards before it"):
        cross_fitted([table, table], [shards, shards])
