"""Evaluation over ranks: the same bits on 1, 2 and 3, uneven tails and unreadable samples included."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist

from atr_scale.batch import TokenSequence
from atr_scale.config import RunConfig
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.shard_reader import open_shards
from atr_scale.distributed.world import World
from atr_scale.evaluation import ranks as ranks_module
from atr_scale.evaluation.embed import embed
from atr_scale.evaluation.evaluate import Evaluation, evaluate
from atr_scale.evaluation.metrics import ranks
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.ranks import embedding_ranks
from atr_scale.evaluation.rerank import rerank
from atr_scale.evaluation.retrieval_scores import DualEncoderScores
from atr_scale.model import Retriever
from atr_scale.scorers import build_scorer
from tests.tiny_run import tiny_config
from tools.ranks import run_ranks

RATE = 16_000
CLIPS = 11
WORDS = ("low", "high", "soft", "loud")
LABELS = ("dog", "rain_drops", "bell")
# Batches of 4: 3 of them, the last with 3 clips. Batches of 5 on 3 ranks: one each, 11 = 5 + 5 + 1.
# The tiny configuration's scorer has vectors, "tap" scores pairs.
CASES = {
    "plain": ("plain", 4, "meanmax"),
    "one_batch": ("plain", 16, "meanmax"),
    "labelled": ("labelled", 5, "meanmax"),
    "damaged": ("damaged", 4, "meanmax"),
    "pairs": ("labelled", 4, "tap"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("evaluation")
    config = tiny_config(folder / "inputs", folder / "run")
    for name in ("plain", "labelled", "damaged"):
        write_split(folder / name, labelled=name == "labelled")
    damage(folder / "damaged" / "shards")
    config.run.dir = str(folder)
    return config


def write_split(root: Path, labelled: bool) -> None:
    """Clips of unequal length with one to three captions."""
    (root / "audio").mkdir(parents=True)
    rng = np.random.default_rng(1)
    with (root / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption_1", "caption_2", "caption_3", *(["label"] if labelled else [])])
        for n in range(CLIPS):
            time = np.arange(RATE // 2 + 1600 * (n % 4))
            sound = 0.1 * rng.standard_normal(len(time)) * np.sin(time / (3 + n))
            soundfile.write(root / "audio" / f"{n}.wav", sound, RATE)
            captions = [f"a {WORDS[(n + k) % 4]} tone {n}" if k <= n % 3 else "" for k in range(3)]
            writer.writerow([f"{n}.wav", *captions, *([LABELS[n % 3]] if labelled else [])])
    build_shards("folder", root, root / "shards", shard_size=3, encoding="pcm16", sample_rate=RATE)


def damage(shards: Path) -> None:
    """The whole of the second batch of 4 and one more sample: shards hold 3, so samples 4 to 8 of 11."""
    whole = open_shards(str(shards))
    for sample in (4, 5, 6, 7, 8):
        path = shards / whole.names[whole.shard_of[sample]]
        data = bytearray(path.read_bytes())
        data[int(whole.start[sample]) : int(whole.start[sample]) + 512] = bytes(512)
        path.write_bytes(data)


def on_rank(config: RunConfig) -> dict[str, dict[str, Any]]:
    return {
        f"{name}/{lockstep}": summary(run(config, split, batch_size, lockstep, scorer))
        for name, (split, batch_size, scorer) in CASES.items()
        for lockstep in (False, True)
    }


def run(config: RunConfig, split: str, batch_size: int, lockstep: bool, scorer: str) -> Evaluation:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    changed = config.model_copy(deep=True)
    changed.evaluation.batch_size, changed.model.scorer.name = batch_size, scorer
    model = Retriever(changed.model, changed.objective)
    model.train()
    found = evaluate(
        model,
        open_shards(f"{config.run.dir}/{split}/shards"),
        changed,
        split=split,
        step=7,
        parallel=Parallel(World.current(), lockstep=lockstep),
    )
    assert model.training, "the model is left as it was"
    return found


def summary(found: Evaluation) -> dict[str, Any]:
    embedded = found.embedded
    return {
        "text": embedded.text.pooled.numpy(),
        "audio": embedded.audio.pooled.numpy(),
        "names": (embedded.captions, embedded.owner.tolist(), embedded.clip_ids, embedded.labels, embedded.index),
        "dropped": found.dropped,
        "metrics": found.metrics,
        "splits": [result.split for result in found.results],
    }


@pytest.fixture(scope="module")
def alone(config: RunConfig) -> dict[str, dict[str, Any]]:
    return on_rank(config)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(
    config: RunConfig, alone: dict[str, dict[str, Any]], size: int
) -> None:
    for rank, cases in enumerate(run_ranks(on_rank, size, config)):
        for name, found in cases.items():
            expected = alone[name]
            for part in ("text", "audio"):
                assert np.array_equal(found[part], expected[part]), (name, part)
            for part in ("names", "dropped", "metrics"):
                assert found[part] == expected[part], (name, part)
            assert found["splits"] == (expected["splits"] if rank == 0 else []), "results are the main rank's"


def test_lockstep_changes_nothing(alone: dict[str, dict[str, Any]]) -> None:
    for name in CASES:
        free, locked = alone[f"{name}/False"], alone[f"{name}/True"]
        assert np.array_equal(free["text"], locked["text"]) and np.array_equal(free["audio"], locked["audio"])
        assert free["metrics"] == locked["metrics"]


def test_every_clip_and_caption_is_there_once_in_order(alone: dict[str, dict[str, Any]]) -> None:
    captions, owner, clips, _, index = alone["plain/False"]["names"]
    assert index == list(range(CLIPS)) and len(set(clips)) == CLIPS
    assert Counter(owner) == {k: int(clip.split("/")[1].split(".")[0]) % 3 + 1 for k, clip in enumerate(clips)}
    for caption, clip in zip(captions, owner, strict=True):
        assert clips[clip] == f"plain/{caption.split()[-1]}.wav"
    for part, count in (("text", len(captions)), ("audio", CLIPS)):
        vectors = alone["plain/False"][part]
        assert vectors.shape == (count, 16) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_batch_size_hardly_matters(alone: dict[str, dict[str, Any]]) -> None:
    """A clip's vector does not depend on its batch mates, but for rounding."""
    for part in ("text", "audio"):
        assert np.allclose(alone["plain/False"][part], alone["one_batch/False"][part], atol=1e-5)


def exchanged(config: RunConfig) -> list[int]:
    """Clips in every object that a rank gives to the others while it embeds a split and its frames, in batches of 2."""
    clips: list[int] = []
    give = dist.all_gather_object

    def counted(out: list[Any], value: Any, **options: Any) -> None:
        clips.append(sum(len(part.clip_ids) for part in value))
        give(out, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", counted)
        changed = config.model_copy(deep=True)
        changed.evaluation.batch_size, changed.model.scorer.name = 2, "tap"
        shards = open_shards(f"{config.run.dir}/plain/shards")
        embed(Retriever(changed.model, changed.objective), shards, changed, Parallel(World.current()))
    return clips


@pytest.mark.slow
def test_embedded_batches_travel_one_by_one(config: RunConfig) -> None:
    """Not the whole share of a rank as one object, of which every rank would hold all at once."""
    assert run_ranks(exchanged, 2, config) == [[2, 2, 2], [2, 2, 1]]


def test_unreadable_samples_are_counted_and_left_out(alone: dict[str, dict[str, Any]]) -> None:
    found = alone["damaged/False"]
    assert found["dropped"] == {"cut_shard": 5}
    assert found["names"][4] == [0, 1, 2, 3, 9, 10] and len(found["audio"]) == 6
    # The folder's name is part of a clip's id, and the ids decide the order in the shards.
    plain = alone["plain/False"]
    vectors = {clip.split("/")[1]: vector for clip, vector in zip(plain["names"][2], plain["audio"], strict=True)}
    for clip, vector in zip(found["names"][2], found["audio"], strict=True):
        assert np.allclose(vector, vectors[clip.split("/")[1]], atol=1e-5)


def test_labelled_clips_give_zero_shot_metrics(alone: dict[str, dict[str, Any]]) -> None:
    plain, labelled = alone["plain/False"], alone["labelled/False"]
    assert plain["splits"] == ["plain"] and labelled["splits"] == ["labelled", "labelled/classes"]
    assert 0 <= labelled["metrics"]["zero_shot/accuracy"] <= 1
    assert not any(name.startswith("zero_shot") for name in plain["metrics"])
    assert {"t2a/R@1", "t2a/mAP@10", "a2t/R@10"} <= plain["metrics"].keys()


def count_ranks() -> list[np.ndarray]:
    """Several stripes for every rank and many equal scores; on the vectors of one seed."""
    rng = np.random.default_rng(0)
    text, audio = (torch.from_numpy(rng.integers(-700, 701, (n, 4)).astype(np.float32)) for n in (150, 90))
    text[::3], audio[::4] = text[0], audio[0]
    owner = np.sort(rng.integers(0, 90, 150))
    wanted = ranks(text @ audio.T, owner, np.arange(90))
    differences = []
    for few in (2, 128):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("ROWS", 16), ("COLUMNS", 32), ("FEW", few)):
                patch.setattr(ranks_module, name, value)
            found = embedding_ranks(text, audio, owner, np.arange(90), World.current())
        differences += [found.t2a - wanted.t2a, found.a2t - wanted.a2t]
    return differences


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_counted_by_several_processes(size: int) -> None:
    for found in run_ranks(count_ranks, size):
        assert not any(difference.any() for difference in found)


def rerank_queries() -> list[np.ndarray]:
    """7 captions and 2 clips: a rank of three has no clip of its own."""
    generator = torch.Generator().manual_seed(0)
    text, audio = (torch.randn(n, 5, 8, generator=generator) for n in (7, 2))
    left, right = (TokenSequence(x, torch.ones(x.shape[:2], dtype=torch.bool), x.mean(1)) for x in (text, audio))
    torch.manual_seed(0)
    scorer, first = build_scorer("tap", dim=8).eval(), DualEncoderScores(left.pooled, right.pooled)
    world, owner = World.current(), np.arange(7) % 2
    found = rerank(scorer, left, right, first, 2, Parallel(world))
    table = found.ranks(owner, np.arange(2), world)
    everything = scorer.scores(left, right).detach()
    wanted = ranks(everything, owner, np.arange(2))
    best_texts = first.T.lists(2).sort(1).values
    return [
        table.t2a - wanted.t2a,
        found.by_text[1].numpy() - everything.numpy(),
        found.by_audio[1].numpy() - everything.T.gather(1, best_texts).numpy(),
    ]


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_queries_reranked_by_several_processes(size: int) -> None:
    for found in run_ranks(rerank_queries, size):
        assert all(np.allclose(difference, 0, atol=1e-6) for difference in found)
