"""What one machine of launch/cloud.sh makes of a first machine that does not answer, and of how its ranks end."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from atr_scale import machine_ranks
from atr_scale.machine_ranks import NOT_MET, _listens, _tell


def test_the_first_machine_is_looked_for(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Without torch, which tells of each attempt in a C++ stack, and hears no signal meanwhile."""
    answers: list[Any] = [ConnectionRefusedError(), socket.socket()]

    def connect(*_: Any, **__: Any) -> socket.socket:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, socket.socket)
        return answer

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert _listens("10.1.2.3:29500") and not answers
    monkeypatch.setattr(machine_ranks, "REACH_S", 0.0)
    answers = [TimeoutError()]
    assert not _listens("10.1.2.3:29500")
    assert _listens("localhost:29500"), "this machine listens itself, a moment later"
    answers = [socket.gaierror(socket.EAI_NONAME, "Name or service not known")]
    with pytest.raises(SystemExit, match="2"):
        _listens("mistyped:29500")
    assert capfd.readouterr().err == "error: no machine is called mistyped: give an address that all machines reach\n"


def test_a_rank_that_was_told_before_it_could_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = {0: ProcessFailure(0, 4711, -15, "")}
    assert _tell(killed) == 1
    monkeypatch.setattr(machine_ranks, "_handed_on", {15})
    assert _tell(killed) == NOT_MET
