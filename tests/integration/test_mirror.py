"""A run folder and its copy in a bucket of a real S3 server (rclone), without a training."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atr_scale.data import storage
from atr_scale.distributed.world import World
from atr_scale.errors import Failure, UserError
from atr_scale.remote.fetch import RemoteRun, bring_files, bring_model
from atr_scale.remote.mirror import Mirror
from atr_scale.remote.nodes import SharedBy
from atr_scale.remote.objects import get_file, list_below
from atr_scale.remote.resume import _prepare
from atr_scale.run_checkpoints import Score, link, prune, seal, verify, write_score
from atr_scale.run_files import append_json_lines
from tests.faults.proxy import Answer, Fault, FaultProxy, for_all, needs_rclone, s3_behind_proxy

pytestmark = [needs_rclone, pytest.mark.slow]
LARGE = "model.safetensors"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with s3_behind_proxy(root) as proxy:
        yield proxy


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}"


def mirror(address: str, folder: Path) -> Mirror:
    world = World()
    return Mirror(address, folder, world, SharedBy.all_ranks(world), None)


def save(run: Path, step: int, score: float | None = None) -> Path:
    """A checkpoint with as many files as it needs, of some bytes each."""
    folder = run / "checkpoints" / f"step-{step}"
    (folder / "optimizer").mkdir(parents=True)
    for name in (LARGE, "config.resolved.yaml", "state.json", "optimizer/rank-0.safetensors"):
        (folder / name).write_text(f"{name} of step {step}")
    seal(folder)
    link(run, "latest", folder)
    if score is not None:
        write_score(folder, Score("mAP", score))
        link(run, "best", folder)
    return folder


def attempt(run: Path, number: int) -> None:
    append_json_lines(run / "attempts.jsonl", [{"event": "start", "attempt": number, "host": run.name}])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints, the first of which is the best one."""
    run = tmp_path / "run"
    run.mkdir()
    attempt(run, 1)
    save(run, 10, score=0.5)
    save(run, 20)
    return run


def test_the_bucket_follows_the_folder(run: Path, address: str, proxy: FaultProxy) -> None:
    uploads = mirror(address, run)
    uploads.upload()
    objects = list_below(address)
    assert {"attempts.jsonl", "latest", "best", "checkpoints/step-20/manifest.json"} < set(objects)
    written = [path for method, path, _ in proxy.requests if method == "PUT"]
    newest = [path for path in written if "step-20" in path or path.endswith("latest")]
    assert newest[-2].endswith("step-20/manifest.json") and newest[-1].endswith("latest"), "in this order"
    made = len(proxy.requests)
    uploads.upload()
    assert len(proxy.requests) == made, "nothing has changed"

    shutil.rmtree(run / "checkpoints" / "step-20")
    save(run, 30)
    (run / "checkpoints" / "step-30" / "manifest.json").rename(run / "aside")  # not yet complete
    uploads.upload()
    assert RemoteRun(address).checkpoints() == ["step-20", "step-10"], "deleted only when the newest one is there"
    other = f"{address}/checkpoints/step-40/optimizer/rank-1.safetensors"  # another node is ahead
    storage.write_bytes(other, b"of step 40")
    (run / "aside").rename(run / "checkpoints" / "step-30" / "manifest.json")
    uploads.upload()
    assert RemoteRun(address).checkpoints() == ["step-30", "step-10"]
    assert not any("step-20" in name for name in list_below(address)) and storage.exists(other)
    assert storage.read_bytes(f"{address}/latest") == b"checkpoints/step-30\n"
    assert storage.read_bytes(f"{address}/best") == b"checkpoints/step-10\n"


def test_an_interrupted_upload_goes_on(run: Path, address: str, proxy: FaultProxy) -> None:
    """Another process, which knows nothing of the first one, sends what is missing alone."""
    uploads = mirror(address, run)
    uploads.upload()
    storage.remove_file(f"{address}/checkpoints/step-20/manifest.json")
    storage.remove_file(f"{address}/checkpoints/step-20/state.json")
    storage.write_bytes(f"{address}/checkpoints/step-20/{LARGE}", b"x" * len(f"{LARGE} of step 20"))  # of another run
    proxy.requests.clear()
    again = mirror(address, run)
    again.knows(RemoteRun(address))
    again.upload()
    sent = {path.rpartition("/")[2] for method, path, _ in proxy.requests if method == "PUT" and "step-20/" in path}
    assert sent == {"state.json", LARGE, "manifest.json"}


def test_a_resume_from_the_bucket_alone(run: Path, address: str, tmp_path: Path, proxy: FaultProxy) -> None:
    mirror(address, run).upload()
    storage.write_bytes(f"{address}/checkpoints/step-30/{LARGE}", b"without a manifest")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert _prepare(address, elsewhere, mirror(address, elsewhere)) == "step-20"
    assert verify(elsewhere / "checkpoints" / "step-20") == []
    assert [path.name for path in (elsewhere / "checkpoints" / "step-10").iterdir()] == ["score.json"]
    assert (elsewhere / "attempts.jsonl").read_bytes() == (run / "attempts.jsonl").read_bytes()

    storage.write_bytes(f"{address}/checkpoints/step-20/{LARGE}", b"damaged")
    other = tmp_path / "other"
    other.mkdir()
    assert _prepare(address, other, mirror(address, other)) == "step-10"


def test_what_a_machine_has_left_counts_unless_the_run_went_on_elsewhere(
    run: Path, address: str, tmp_path: Path, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    mirror(address, run).upload()
    save(run, 30)
    assert _prepare(address, run, mirror(address, run)) == "step-30", "it is uploaded"
    assert RemoteRun(address).checkpoints()[0] == "step-30"
    (run / "checkpoints" / "step-30" / LARGE).unlink()  # another node's ranks had written it
    assert _prepare(address, run, mirror(address, run)) == "step-30" and "broken" not in caplog.text

    attempt(run, 2)
    save(run, 40)  # its process ends before it is uploaded
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert _prepare(address, elsewhere, mirror(address, elsewhere)) == "step-30"
    attempt(elsewhere, 2)
    mirror(address, elsewhere).upload()
    assert _prepare(address, run, mirror(address, run)) == "step-30"
    assert not (run / "checkpoints" / "step-40").exists()
    assert [json.loads(line)["host"] for line in (run / "attempts.jsonl").read_text().splitlines()] == [
        "run",
        "elsewhere",
    ]


def test_what_was_never_uploaded_is_kept(run: Path, address: str, proxy: FaultProxy) -> None:
    """The store has been away since the start. What has no manifest is of a node whose others had not uploaded."""
    save(run, 30)
    (run / "checkpoints" / "step-30" / "manifest.json").unlink()
    assert _prepare(address, run, mirror(address, run)) == "step-20"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-20"]
    assert RemoteRun(address).checkpoints() == ["step-20", "step-10"]
    for name in list_below(address):
        storage.remove_file(f"{address}/{name}")
    assert _prepare(address, run, mirror(address, run)) is None, "the user has deleted the run"
    assert not (run / "checkpoints").exists()


def test_the_marker_of_a_preemption_goes_with_the_next_start(run: Path, address: str, proxy: FaultProxy) -> None:
    (run / "preempted").write_text("SIGTERM")
    uploads = mirror(address, run)
    uploads.upload()
    assert "preempted" in list_below(address)
    (run / "preempted").unlink()
    uploads.upload()
    assert "preempted" not in list_below(address)


def test_a_checkpoint_stays_while_it_is_uploaded(run: Path, address: str, proxy: FaultProxy) -> None:
    uploads = mirror(address, run)
    seen: list[Path | None] = []

    def of_saves(method: str, path: str) -> None:
        if method == "PUT" and "/step-20/" in path and not seen:
            seen.append(uploads.uploading)
            save(run, 30)
            prune(run, 1, uploads.uploading)

    proxy.fault = of_saves
    uploads.upload()
    proxy.fault = for_all(None)
    assert seen == [run / "checkpoints" / "step-20"] and uploads.uploading is None
    assert "step-20" in RemoteRun(address).checkpoints()


def test_a_prefix_that_is_no_run(address: str, tmp_path: Path, proxy: FaultProxy) -> None:
    """Nothing of it is downloaded: it may be a terabyte of shards."""
    storage.write_bytes(f"{address}/shard-000000.tar", b"x")
    with pytest.raises(UserError, match=rf"no run at {address}: it has none of attempts.jsonl, "):
        bring_files(address)
    assert _prepare(address, tmp_path, mirror(address, tmp_path)) is None and not list(tmp_path.iterdir())


def refused(name: str) -> Callable[[str, str], Fault | None]:
    return lambda method, path: Answer(403) if method == "GET" and path.endswith(name) else None


def test_downloads_that_fail_are_one_line(
    run: Path, address: str, tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATR_SCALE_SCRATCH", str(tmp_path / "scratch"))
    mirror(address, run).upload()
    for name, bring in (("attempts.jsonl", bring_files), (LARGE, bring_model)):
        proxy.fault = refused(name)
        with pytest.raises(UserError, match=r"cannot be read \(injected\): check the bucket and its permissions"):
            bring(address)
    proxy.fault = for_all(None)

    def on_a_full_disk(*_: Any, **__: Any) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("atr_scale.remote.fetch.get_file", on_a_full_disk)
    for bring in (bring_files, bring_model):
        with pytest.raises(Failure, match=r"the disk .* is full: make space there"):
            bring(address)


def test_a_model_that_is_pruned_meanwhile(
    run: Path, address: str, tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on and has removed the checkpoint: the next one is taken."""
    monkeypatch.setenv("ATR_SCALE_SCRATCH", str(tmp_path / "scratch"))
    mirror(address, run).upload()

    def while_training_prunes(place: str, *rest: Any, **more: Any) -> bool:
        if "/step-10/" in place:
            for name in ("manifest.json", LARGE):
                storage.remove_file(f"{address}/checkpoints/step-10/{name}")
        return get_file(place, *rest, **more)

    monkeypatch.setattr("atr_scale.remote.fetch.get_file", while_training_prunes)
    assert bring_model(address).name == "step-20"


def test_what_evaluate_has_uploaded_is_not_lost(run: Path, address: str, proxy: FaultProxy) -> None:
    """The same machine prolongs the run: what it has of the results is older. Its records are its own."""
    for name in ("results.json", "metrics.jsonl"):
        (run / name).write_text("of training")
    mirror(address, run).upload()
    for name in ("results.json", "metrics.jsonl"):
        storage.write_bytes(f"{address}/{name}", b"of evaluate, later")
        os.utime(run / name, (0, 0))
    _prepare(address, run, mirror(address, run))
    assert (run / "results.json").read_text() == "of evaluate, later"
    assert (run / "metrics.jsonl").read_text() == "of training"


def test_a_model_is_brought_once_and_checked(
    run: Path, address: str, tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATR_SCALE_SCRATCH", str(tmp_path / "scratch"))
    mirror(address, run).upload()
    best = bring_model(address)
    assert best.name == "step-10" and not (best / "optimizer").exists()
    assert bring_model(f"{address}/latest").name == bring_model(f"{address}/checkpoints/step-20").name == "step-20"
    proxy.requests.clear()
    assert bring_model(address) == best
    assert not any(path.endswith(LARGE) and method == "GET" for method, path, _ in proxy.requests)
    (best / LARGE).write_text("damaged on this machine")
    bring_model(address)
    assert (best / LARGE).read_text() == f"{LARGE} of step 10"
    storage.write_bytes(f"{address}/checkpoints/step-20/{LARGE}", b"damaged")
    with pytest.raises(UserError, match=rf"step-20 is damaged \({LARGE} has another checksum\)"):
        shutil.rmtree(tmp_path / "scratch")
        bring_model(f"{address}/checkpoints/step-20")
    storage.remove_file(f"{address}/checkpoints/step-20/manifest.json")
    assert bring_model(f"{address}/latest").name == "step-10", "a checkpoint without a manifest is none"
    with pytest.raises(UserError, match="no checkpoint at s3://bucket/nothing"):
        bring_model("s3://bucket/nothing")
