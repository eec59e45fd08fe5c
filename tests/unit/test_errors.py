"""A mistake on one rank or on many: who reports it, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atr_scale import errors
from atr_scale.cli import common, main
from atr_scale.errors import Failure, OneLineError, UserError, exit_with_line

LINE = "error: no shards in nowhere"
VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that no launcher has started, with the signal handler of before put back."""
    for name in (*VARIABLES, "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(errors, "GRACE_S", 0.2)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def stderr_of(message: str, capsys: pytest.CaptureFixture[str], error: type[OneLineError] = UserError) -> str:
    """What a rank prints about its error; asserts the exit code."""
    with pytest.raises(SystemExit) as left:
        exit_with_line(error(message))
    assert left.value.code == (2 if error is UserError else 1)
    return capsys.readouterr().err


def stop_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM arrives while the rank waits, long before the wait would end by itself."""
    monkeypatch.setattr(errors, "GRACE_S", 60.0)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}, {"RANK": "0", "SLURM_PROCID": "3"}, {"SLURM_PROCID": "0"}])
def test_the_first_rank_prints_at_once(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the first rank waits"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert stderr_of("no shards in nowhere", capsys) == LINE + "\n"


def test_another_rank_is_silent_if_the_launcher_stops_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    stop_soon(monkeypatch)
    assert stderr_of("no shards in nowhere", capsys) == ""
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "a second signal would change the exit code"


def test_a_mistake_of_one_rank_alone_is_printed_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert stderr_of("no shards in nowhere", capsys) == LINE + "\n"


def elastic(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch, attempt: int = 0, most: int = 0) -> Path:
    """The variables that torchrun sets; returns the rank's error file."""
    file = folder / f"attempt_{attempt}" / str(rank) / "error.json"
    file.parent.mkdir(parents=True)
    for name, value in zip(
        (*VARIABLES, "TORCHELASTIC_MAX_RESTARTS"), (rank, rank, 0, file, attempt, most), strict=True
    ):
        monkeypatch.setenv(name, str(value))
    return file


def reported(file: Path) -> str:
    message = json.loads(file.read_text())["message"]
    assert message["message"] == message["extraInfo"]["py_callstack"] and int(message["extraInfo"]["timestamp"]) > 0
    return str(message["message"])


def test_a_launcher_with_a_report_gets_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rank hands it over; another one with the same mistake adds nothing, one with its own adds it."""
    first = elastic(tmp_path, 0, monkeypatch)
    assert stderr_of("no shards in nowhere", capsys) == "" and reported(first) == LINE
    second = elastic(tmp_path, 1, monkeypatch)
    stop_soon(monkeypatch)
    assert stderr_of("no shards in nowhere", capsys) == "" and not second.exists()
    monkeypatch.setattr(errors, "GRACE_S", 0.2)
    assert stderr_of("another mistake", capsys) == "" and reported(second) == "error: another mistake"


def test_an_attempt_without_a_report_prints_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elastic(tmp_path, 0, monkeypatch, attempt=0, most=1)
    assert stderr_of("no shards in nowhere", capsys) == LINE + "\n"
    elastic(tmp_path, 0, monkeypatch, attempt=1, most=1)
    assert stderr_of("no shards in nowhere", capsys) == ""


def test_a_rank_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the process group is still open, and not again when the command ends."""
    monkeypatch.setenv("RANK", "1")
    error = UserError("no shards in nowhere")
    errors.defer_to_first_rank(error)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits again"))
    errors.defer_to_first_rank(error)


def test_a_launcher_that_has_gone_does_not_hide_the_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert stderr_of("no shards in nowhere", capsys) == LINE + "\n"


def test_an_interrupt_while_waiting_does_not_hide_the_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    monkeypatch.setenv("RANK", "1")
    assert stderr_of("no shards in nowhere", capsys) == LINE + "\n"


def test_a_failure_is_one_line_with_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job script starts again after code 1. Of several ranks the first reports it, as it does a mistake."""
    assert stderr_of("the store is away", capsys, Failure) == "error: the store is away\n"
    file = elastic(tmp_path, 0, monkeypatch)
    assert stderr_of("the store is away", capsys, Failure) == "" and reported(file) == "error: the store is away"
    elastic(tmp_path, 1, monkeypatch)
    stop_soon(monkeypatch)
    assert stderr_of("the store is away", capsys, Failure) == ""


def test_a_failure_of_any_verb_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Failure("the store is away")

    monkeypatch.setattr(common, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        main(["evaluate", "runs/one"])
    assert capsys.readouterr().err == "error: the store is away\n"


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def write(*_: object, **__: object) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setattr(common, "app", write)
    with pytest.raises(SystemExit, match="1"):
        main(["evaluate", "runs/one"])
    said = capsys.readouterr().err
    assert said == "error: no space is left on the disk for what the command writes: make space, and start it again\n"


def test_an_unexpected_error_of_any_verb_is_a_traceback_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher's report ends with it."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of order at canary-5f81")

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-5f81")
    monkeypatch.setattr(common, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        main(["evaluate", "runs/one"])
    for said in (file.read_text(), capsys.readouterr().err):
        assert "Traceback" in said and "RuntimeError: out of order at [redacted]" in said and "canary" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        "embed run sounds --out s3://bucket/v.npy",
        "index run sounds --out=s3://bucket/sounds.index",
        "export run --out s3://bucket/model",
        "evaluate run --out s3://bucket/results",
        "estimate run --shards shards --out s3://bucket/tables",
        "demo-data --out s3://bucket/demo",
        "init s3://bucket/project",
    ],
)
def test_a_result_that_must_be_local_is_not_written_into_a_folder_s3(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert "/bucket/" in (said := capsys.readouterr().err) and "is not a local path" in said
    assert not list(tmp_path.iterdir())
