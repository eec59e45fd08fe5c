"""Tables of teacher scores and what they give a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.batch import Batch, caption_id, stable_id
from atr_scale.config import RunConfig, load_config
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.stream import read_batches
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.metrics import retrieval_metrics
from atr_scale.losses import dense
from atr_scale.model import Retriever, StepContext
from atr_scale.score_block import EmbeddingScores, StoredScores
from atr_scale.teachers.comparison import compare_teachers
from atr_scale.teachers.ensemble import TeacherEnsemble
from atr_scale.teachers.tables import TeacherTable, shards_checksum
from atr_scale.training.parts import read_teacher, training_stream
from tests.losses import unit
from tests.tiny import TinyInputs, make_tiny_inputs, write_tiny_config
from tools.bench.measure import peak_mib

# Three clips with two, one and three captions; clip ids neither sorted nor small.
CLIPS = torch.tensor([stable_id(name) for name in ("dog", "rain", "bell")])
OWNER = torch.tensor([0, 0, 1, 2, 2, 2])
INDEX = torch.tensor([0, 1, 0, 0, 1, 2])
TEXT = torch.tensor([stable_id(text) for text in ("it barks", "a dog", "it falls", "a bell", "it rings", "it barks")])


def vectors(name: str, width: int, seed: int, dtype: torch.dtype = torch.float64) -> TeacherTable:
    values = {"text": unit(6, width, seed).to(dtype), "audio": unit(3, width, seed + 50).to(dtype)}
    return TeacherTable(name, CLIPS, CLIPS[OWNER], INDEX, values)


def pairwise(name: str, seed: int, dtype: torch.dtype = torch.float64) -> TeacherTable:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return TeacherTable(name, CLIPS, CLIPS[OWNER], INDEX, {"scores": scores})


def rows_of(captions: list[int], keys: list[str] | None = None) -> Batch:
    """A batch that drew these captions (rows of the tables)."""
    rows = torch.tensor(captions)
    blank = torch.zeros(len(rows), 1, dtype=torch.int64)
    return Batch(
        waveform=blank.float(),
        lengths=blank[:, 0],
        input_ids=blank,
        attention_mask=blank,
        clip_ids=CLIPS[OWNER[rows]],
        caption_ids=torch.full((len(rows),), caption_id("the same words")),
        caption_index=INDEX[rows],
        stored_ids=TEXT[rows],
        keys=keys or [],
    )


def mean_scores(tables: list[TeacherTable], captions: list[int]) -> Tensor:
    """By hand: scores [C, N] of each table, their mean, the batch's rows and columns."""
    whole = [t.values["text"] @ t.values["audio"].T if t.is_dual_encoder else t.values["scores"] for t in tables]
    return torch.stack(whole).mean(0)[captions][:, OWNER[captions]]


DRAWN = [5, 0, 2, 3, 1]  # clip 0 twice and clip 2 twice, with different captions


def test_the_teacher_is_the_mean_of_cosines() -> None:
    tables = [vectors("a", 4, 1), vectors("b", 7, 2), vectors("c", 3, 3)]
    block = TeacherEnsemble.of(*tables).labels(rows_of(DRAWN)).teachers[0].t2a
    assert isinstance(block, EmbeddingScores), "vectors stay vectors: no matrix of the batch is kept"
    assert block.tensors[0].shape == (5, 14) and block.tensors[1].shape == (5, 14)
    torch.testing.assert_close(block.stripe(slice(0, 5)), mean_scores(tables, DRAWN), rtol=0, atol=1e-14)
    assert not any(tensor.requires_grad for tensor in block.tensors)


def test_a_member_that_scores_pairs_joins_the_mean() -> None:
    for tables in ([vectors("a", 4, 1), pairwise("b", 2)], [pairwise("a", 1)], [pairwise("a", 1), pairwise("b", 2)]):
        block = TeacherEnsemble.of(*tables).labels(rows_of(DRAWN)).teachers[0].t2a
        assert isinstance(block, StoredScores)
        torch.testing.assert_close(block.stripe(slice(0, 5)), mean_scores(tables, DRAWN), rtol=0, atol=1e-14)


def test_half_precision_tables_give_fp32_scores() -> None:
    exact = [vectors("a", 64, 1), pairwise("b", 2)]
    for number, make in enumerate((vectors("a", 64, 1, torch.float16), pairwise("b", 2, torch.float16))):
        found = TeacherEnsemble.of(make).labels(rows_of(DRAWN)).teachers[0].t2a.stripe(slice(0, 5))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), mean_scores([exact[number]], DRAWN), rtol=1e-3, atol=1e-3)
        by_hand = mean_scores([replace(make, values={k: v.float() for k, v in make.values.items()})], DRAWN)
        torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-6)


def test_captions_that_read_the_same_are_told_apart() -> None:
    """All captions of these batches share their text's id: only clip and index say which vector is theirs."""
    teacher = TeacherEnsemble.of(vectors("a", 4, 1))
    texts = {tuple(teacher.labels(rows_of([row])).teachers[0].t2a.tensors[0][0].tolist()) for row in range(6)}
    assert len(texts) == 6


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    for table in (replace(vectors("a", 4, 1, torch.float16), metadata={"scorer": "mean"}), pairwise("b", 2)):
        found = TeacherTable.read(table.save(tmp_path))
        assert (found.name, found.metadata) == (table.name, table.metadata)
        for name in ("clip_ids", "caption_clip", "caption_index"):
            assert torch.equal(getattr(found, name), getattr(table, name))
        assert found.values.keys() == table.values.keys()
        assert all(torch.equal(found.values[name], value) for name, value in table.values.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_missing_damaged_and_other_files(tmp_path: Path) -> None:
    path = vectors("a", 4, 1).save(tmp_path)
    with pytest.raises(UserError, match=r"no teacher table at .*b.safetensors: run `atr-scale estimate`"):
        TeacherTable.read(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="no teacher table"):
        TeacherTable.read(tmp_path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.safetensors is damaged") as error:
            TeacherTable.read(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(UserError, match=r"damaged \(another checksum\)"):
        TeacherTable.read(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is no teacher table"):
        TeacherTable.read(path)
    path.write_bytes(whole)
    TeacherTable.read(path)


def test_tables_of_different_splits() -> None:
    other = replace(vectors("b", 4, 1), caption_index=INDEX.flip(0))
    with pytest.raises(UserError, match="a and b are of different splits"):
        TeacherEnsemble.of(vectors("a", 4, 1), other)


def test_an_unknown_caption_is_named() -> None:
    teacher = TeacherEnsemble.of(vectors("a", 4, 1), vectors("b", 4, 2))
    batch = rows_of([0, 5], ["sounds/0.tar/dog", "sounds/0.tar/bell"])
    batch = replace(batch, caption_index=torch.tensor([0, 3]))
    line = r"caption 3 of sounds/0.tar/bell is not in the teacher tables \(a, b\): run `atr-scale estimate`"
    with pytest.raises(UserError, match=line):
        teacher.labels(batch)
    with pytest.raises(UserError, match="caption 0 of clip 7 is not"):
        teacher.labels(replace(rows_of([0]), clip_ids=torch.tensor([7])))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("tiny"))


def distilling(inputs: TinyInputs, folder: Path, *tables: Path) -> RunConfig:
    listed = ",".join(map(str, tables))
    return load_config(
        write_tiny_config(folder / "run.yaml", inputs, folder / "run"),
        ["model.projection.dim=8", "objective.distillation.weight=1", f"objective.distillation.tables=[{listed}]"],
    )


def of_shards(inputs: TinyInputs, clips: int = 12, checksum: str = "") -> TeacherTable:
    """A table of the first clips of the tiny shards, which have one caption each."""
    shards = open_shards(str(inputs.shards))
    ids = torch.tensor([stable_id(shards.read(row).clip_id) for row in range(clips)])
    values = {"text": unit(clips, 4, 1), "audio": unit(clips, 4, 2)}
    return TeacherTable("tiny", ids, ids, torch.zeros_like(ids), values, {"shards_sha256": checksum})


def test_foreign_tables_are_refused_before_training_starts(inputs: TinyInputs, tmp_path: Path) -> None:
    """By the samples themselves where the manifest is another; and a run says so before it makes anything."""
    shards = open_shards(str(inputs.shards))
    TeacherEnsemble.of(of_shards(inputs)).check([shards])
    with pytest.raises(UserError, match=r"caption 0 of corpus/tone-\d+.wav in .*shards is not in the teacher tables"):
        TeacherEnsemble.of(of_shards(inputs, clips=11)).check([shards])
    TeacherEnsemble.of(of_shards(inputs, 11, shards_checksum(shards))).check(
        [shards]
    )  # not read: the manifest is known
    foreign = distilling(inputs, tmp_path, vectors("foreign", 4, 1).save(tmp_path))
    with pytest.raises(UserError, match=r"not in the teacher tables \(foreign\)"):
        read_teacher(foreign, [shards])
    with pytest.raises(UserError, match="no teacher table at"):
        read_teacher(distilling(inputs, tmp_path, tmp_path / "none.safetensors"), [shards])
    assert read_teacher(tiny_without(inputs, tmp_path), [shards]) is None


def tiny_without(inputs: TinyInputs, folder: Path) -> RunConfig:
    config = distilling(inputs, folder, folder / "none.safetensors")
    config.objective.distillation.weight = 0.0
    return config


def converted(model: Retriever, config: RunConfig, count: int) -> tuple[Retriever, Batch]:
    """The model and a batch of its run in float64."""
    stream = training_stream(
        config, caption_tokenizer(model.text_encoder.tokenizer, config.data.captions), model.sample_rate, World()
    )
    (batch,) = read_batches(stream.between(0, 1), 0)
    assert isinstance(batch, Batch)
    return model.double(), replace(batch, waveform=batch.waveform.double())


def test_a_student_that_is_its_teacher_learns_nothing(inputs: TinyInputs, tmp_path: Path) -> None:
    """The soft cross-entropy's minimum: no gradient anywhere, at the value of the targets' entropy."""
    config = distilling(inputs, tmp_path, tmp_path / "unread.safetensors")
    config.objective.nt_xent.weight = 0.0
    torch.manual_seed(0)
    model, batch = converted(Retriever(config.model, config.objective).eval(), config, 4)
    with torch.no_grad():
        text = model.scorer.embed_text(model.encode_text(batch.input_ids, batch.attention_mask))
        audio = model.scorer.embed_audio(model.encode_audio(batch.waveform, batch.lengths))
    table = TeacherTable("itself", batch.clip_ids, batch.clip_ids, batch.caption_index, {"text": text, "audio": audio})
    shifted = replace(table, values={"text": text, "audio": audio.roll(1, 0)})
    norms = []
    for teacher in (table, shifted):
        model.zero_grad()
        terms = model(batch, StepContext(teacher=TeacherEnsemble.of(teacher).labels))
        terms["loss"].backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(max(float(gradient.abs().max()) for gradient in gradients))
        want = dense.distillation(text @ audio.T, text @ teacher.values["audio"].T, model.temperature())
        assert terms["distillation"].item() == pytest.approx(want.item(), abs=1e-12)
    assert norms[0] < 1e-12 < 1e-4 < norms[1]


def test_retrieval_of_vectors_needs_no_score_matrix() -> None:
    """A member of pairs makes one; the figures are those of the mean of the scores in both cases."""
    num = 3000
    keys = (torch.arange(num) * 3, torch.arange(num) * 3, torch.zeros(num, dtype=torch.int64))
    generator = torch.Generator().manual_seed(0)

    def member(name: str, noise: float) -> TeacherTable:
        audio = torch.randn(num, 16, generator=generator)
        text = audio + noise * torch.randn(num, 16, generator=generator)
        values = {"text": normalize(text, dim=1).half(), "audio": normalize(audio, dim=1).half()}
        return TeacherTable(name, *keys, values=values)

    tables, found = [member("one", 0.9), member("other", 1.2)], []
    assert peak_mib(lambda: found.append(compare_teachers(tables, "split"))) < num * num * 4 / 2**20
    everything = torch.arange(num)
    scores = [table.scores(everything, everything) for table in tables]
    for metrics, matrix in ((found[0].ensemble, scores[0] + scores[1]), (found[0].models["one"], scores[0])):
        assert metrics == pytest.approx(retrieval_metrics(matrix, keys[0], keys[0]), abs=1e-3)
    pairwise = TeacherTable("other", *keys, values={"scores": scores[1]})
    mixed = compare_teachers([tables[0], pairwise], "split")
    assert mixed.ensemble == pytest.approx(found[0].ensemble, abs=1e-3)
    assert mixed.without["one"] == pytest.approx(found[0].models["other"], abs=1e-3)
