"""The HPARAMS tab of TensorBoard, asked through TensorBoard's own plug-in: a row for each run of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from atr_scale.training.monitor import Monitor, record_evaluation


def write_run(run: Path, lr: float, scorer: str) -> None:
    monitor = Monitor(run, True)
    monitor.hyperparameters(
        {
            "run": {"dir": str(run), "seed": 0},
            "data": {"train": [{"shards": "s3://user:password@host/x", "weight": 1.0}], "test": None},
            "model": {"scorer": {"name": scorer, "options": {}}},
            "train": {"lr": lr, "betas": [0.9, 0.98], "learnable": True},
        }
    )
    for step in (10, 20):
        monitor.train(step, {"loss": 1 / step})
        monitor.evaluation(step, "validation", {"t2a/mAP@10": lr * step})
    monitor.close()
    record_evaluation(run, 20, {"test": {"t2a/mAP@10": 0.5}})


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """(the experiment, its rows) as the tab's requests return them."""
    folder = tmp_path_factory.mktemp("sweep")
    write_run(folder / "lr=0.01", 0.01, "mean")
    write_run(folder / "lr=0.02", 0.02, "tap")
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    backend = backend_context.Context(TBContext(logdir=str(folder), data_provider=provider))
    request = context.RequestContext()
    content = backend.hparams_metadata(request, "")
    experiment = backend.experiment_from_metadata(request, "", True, content, [])
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_FAILURE]
    wanted = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=statuses, include_metrics=True
    )
    handler = list_session_groups.Handler(request, backend, "", wanted)
    return experiment, list(handler.run().session_groups)


def test_every_run_is_a_row_with_its_last_metrics(asked: tuple[Any, list[Any]]) -> None:
    _, rows = asked
    found = {}
    for row in rows:
        (session,) = row.sessions
        metrics = {(value.name.group, value.name.tag): value.value for value in session.metric_values}
        found[session.name] = (row.hparams["train.lr"].number_value, row.hparams["model.scorer.name"].string_value)
        lr = row.hparams["train.lr"].number_value
        assert metrics["", "validation/t2a/mAP@10"] == pytest.approx(20 * lr), "the last value"
        assert metrics["", "test/t2a/mAP@10"] == pytest.approx(0.5)
    assert found == {"lr=0.01/tensorboard": (0.01, "mean"), "lr=0.02/tensorboard": (0.02, "tap")}


def test_what_differs_is_marked_and_nothing_secret_is_told(asked: tuple[Any, list[Any]]) -> None:
    experiment, rows = asked
    infos = {info.name: info for info in experiment.hparam_infos}
    assert {name for name, info in infos.items() if info.differs} == {"train.lr", "model.scorer.name"}
    assert "run.dir" not in infos and "data.test" not in infos and "run.seed" in infos
    texts = {name: value.string_value for name, value in rows[0].hparams.items()}
    assert texts["train.betas"] == "[0.9, 0.98]" and texts["train.learnable"] == "True"
    assert texts["data.train.0.shards"] == "s3://[redacted]@host/x"
