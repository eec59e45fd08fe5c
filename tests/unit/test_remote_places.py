"""Where a run on S3 lies on this machine, and what is refused as a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from atr_scale.config import load_config
from atr_scale.errors import UserError
from atr_scale.experiments.sweep import plan_sweep
from atr_scale.remote.places import address_of, copy_folder

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart" / "pretrain.yaml")


def test_addresses() -> None:
    assert address_of("runs/a") is None and address_of(Path("/runs/a:1")) is None
    assert address_of("s3://bucket/a/") == address_of(Path("s3://bucket/a")) == "s3://bucket/a"
    with pytest.raises(UserError, match="'gs:' is not supported"):
        address_of("gs://bucket/a")
    for odd in ("s3://bucket/runs/..", "s3://bucket/./a", "s3://bucket/a//b"):  # the folder would be that of other runs
        with pytest.raises(UserError, match="cannot be a part of the key of a run"):
            address_of(odd)
    with pytest.raises(UserError, match="'my bucket' is no name of a bucket"):
        address_of("s3://my bucket/a")


def test_the_local_folder_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATR_SCALE_SCRATCH", "$BASE/scratch")
    monkeypatch.setenv("BASE", str(tmp_path))
    config = load_config(CONFIG, ["run.dir=s3://bucket/runs/one"])
    folder = config.run.folder
    assert folder.name == "one" and folder.is_relative_to(tmp_path / "scratch" / "runs")
    assert "dir: s3://bucket/runs/one" in config.to_yaml(), "the run is called by its address"
    assert load_config(CONFIG, ["run.dir=s3://other/runs/one"]).run.folder != folder
    assert copy_folder("s3://bucket/runs/one") != folder, "a command that reads does not touch what training writes"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:9000")
    assert config.run.folder != folder, "it is another run on another server"
    monkeypatch.delenv("BASE")
    with pytest.raises(UserError, match=r"ATR_SCALE_SCRATCH=\$BASE/scratch: the variable \$BASE is not set"):
        _ = config.run.folder
    assert load_config(CONFIG, ["run.dir=runs/one"]).run.folder == Path("runs/one")


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="'gs:' is not supported"):
        load_config(CONFIG, ["run.dir=gs://bucket/a"])
    with pytest.raises(UserError, match="the folder of a sweep is on a disk"):
        plan_sweep(CONFIG, ["train.lr=[1e-3,1e-4]", "run.dir=s3://bucket/a"])
