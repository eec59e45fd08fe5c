"""metrics.jsonl and TensorBoard files, read back."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import math
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.audio import metadata

from atr_scale.evaluation.sounds import encode_mp3
from atr_scale.training import media_budget
from atr_scale.training.monitor import Monitor
from atr_scale.training.players import Player, RetrievedClips


def read(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def log_steps(monitor: Monitor, steps: range) -> None:
    for step in steps:
        monitor.train(step, {"loss": 1 / step, "lr/audio": 1e-4 * step, "dropped/silent_audio": step // 2})
        if step % 5 == 0:
            monitor.evaluation(step, "validation", {"t2a/R@1": step / 100, "a2t/R@1": step / 50})


def test_lines_and_tags(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, True)
    log_steps(monitor, range(1, 6))
    assert len(read(tmp_path)) == 6, "lines must be on the disk before the run ends"
    monitor.close()
    assert read(tmp_path)[1] == {
        "kind": "train",
        "step": 2,
        "loss": 0.5,
        "lr/audio": 2e-4,
        "dropped/silent_audio": 1,
    }
    assert read(tmp_path)[-1] == {
        "kind": "evaluation",
        "step": 5,
        "split": "validation",
        "t2a/R@1": 0.05,
        "a2t/R@1": 0.1,
    }
    board = events(tmp_path)
    wanted = {"train/loss", "train/lr/audio", "train/dropped/silent_audio", "validation/t2a/R@1", "validation/a2t/R@1"}
    assert set(board.Tags()["scalars"]) == wanted
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 6)
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "run", False)
    log_steps(monitor, range(1, 6))
    monitor.heatmap(1, torch.zeros(2, 2))
    monitor.retrieved(1, [])
    monitor.text("config", "a: 1")
    monitor.flush()
    monitor.close()
    assert not (tmp_path / "run").exists()


def test_nonfinite_values_are_null_and_flagged(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, True)
    monitor.train(1, {"loss": math.nan, "grad_norm": math.inf, "temperature": 0.07})
    monitor.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (line,) = read(tmp_path)
    assert line["loss"] is None and line["grad_norm"] is None and line["temperature"] == 0.07
    assert line["nonfinite"] == ["loss", "grad_norm"]


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Monitor(tmp_path / "whole", True)
    log_steps(whole, range(1, 21))
    whole.close()

    run = tmp_path / "killed"
    first = Monitor(run, True)
    log_steps(first, range(1, 14))
    first.flush()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 1')  # what a kill leaves of a line
    second = Monitor(run, True, resume_step=10)
    log_steps(second, range(11, 21))
    second.close()
    first.close()

    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert not list(run.glob("*.tmp"))
    steps = [event.step for event in events(run).Scalars("train/loss")]
    assert steps == list(range(1, 21))


def test_a_last_line_without_its_end_is_not_glued_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}')
    monitor = Monitor(tmp_path, True, resume_step=2)
    monitor.train(3, {"loss": 1.0})
    monitor.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_a_new_run_in_an_old_folder_starts_anew(tmp_path: Path) -> None:
    for last in (9, 4):
        monitor = Monitor(tmp_path, True)
        log_steps(monitor, range(1, last))
        monitor.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [1, 2, 3]


def test_pictures_text_and_players(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, True)
    monitor.heatmap(5, torch.randn(4, 4, dtype=torch.bfloat16), names=["a", "b $x", "c", "d"])
    tone = encode_mp3(3 * np.sin(np.arange(16000) * 0.2), 16000)
    clips = [Player("demo/1", 1, 0.5, False, lambda: tone), Player("demo/2", 14, 0.25, True, lambda: tone)]
    monitor.retrieved(5, [RetrievedClips("a dog barks", 14, clips)])
    odd = [Player("a|b ![x](http://y)", 1, 0.5, True, lambda: tone)]
    monitor.retrieved(5, [RetrievedClips("**a** | <b>\n\n# [c](d)", 1, odd)], split="odd/set")
    monitor.text("configuration", "lr: 0.1")
    monitor.close()
    board = events(tmp_path)
    assert board.Tags()["images"] == ["validation/similarity"]
    assert board.Images("validation/similarity")[0].width > 300
    players = board.PluginTagToContent("audio")
    first, missed = (f"validation at step 5/query-0/{place}" for place in ("1", "right"))
    assert set(players) == {first, missed, "odd-set at step 5/query-0/1"}
    assert metadata.parse_plugin_metadata(players[first]).encoding == metadata.Encoding.Value("UNKNOWN")
    about = board.SummaryMetadata(missed)
    assert about.display_name == "rank 14, right | query: a dog barks | clip: demo/2"
    assert "**Query:** a dog barks" in about.summary_description
    assert "**Rank 14** (the right clip, missed), score 0.250" in about.summary_description
    assert "(wrong)" in board.SummaryMetadata(first).summary_description
    sound, rate = soundfile.read(io.BytesIO(board.Tensors(missed)[0].tensor_proto.string_val[0]))
    assert rate == 16000 and 0.7 < np.abs(sound).max() <= 1  # scaled, not cut off
    np.testing.assert_allclose(np.abs(sound[4000:12000]).mean(), 0.8 * 2 / np.pi, atol=0.03)
    tags = board.PluginTagToContent("text")
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags}
    assert "\\*\\*a\\*\\* \\| &lt;b> # \\[c](d)" in texts["odd/set/retrieved-0/text_summary"]
    assert "| 1 | ✓ | a\\|b !\\[x](http://y) | 0.500 |" in texts["odd/set/retrieved-0/text_summary"]
    assert "a dog barks" in texts["validation/retrieved-0/text_summary"]
    assert "| 14 | ✓ | demo/2 | 0.250 |" in texts["validation/retrieved-0/text_summary"]
    assert texts["configuration/text_summary"] == "lr: 0.1"


def test_pictures_and_sounds_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first steps and the last one are kept, also over a resumption; what is left out is told once."""
    monkeypatch.setattr(media_budget, "MEDIA_BYTES", 60_000)

    def validate(monitor: Monitor, step: int) -> None:
        clips = [Player("demo/1", 1, 0.5, True, lambda: bytes(9_000))] * 2
        monitor.retrieved(step, [RetrievedClips("a dog barks", 1, clips)])

    with caplog.at_level(logging.INFO):
        monitor = Monitor(tmp_path, True, total_steps=60)
        for step in (10, 20, 30, 40):
            validate(monitor, step)
        monitor.close()
        assert caplog.text.count("have reached their limit of 0.06 MB; from step 30 on") == 1
        monitor = Monitor(tmp_path, True, resume_step=40, total_steps=60)
        for step in (50, 60):
            validate(monitor, step)
        monitor.close()
    kept = {tag.split("/")[0] for tag in events(tmp_path).PluginTagToContent("audio")}
    assert kept == {f"validation at step {step}" for step in (10, 20, 60)}
    assert sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir()) < 65_000


def test_the_curves_of_a_long_run_are_small(tmp_path: Path) -> None:
    """9,153 steps, those of configs/pretrain_wavcaps.yaml: with the limit of pictures and sounds at most 5 MB."""
    keys = "loss loss/nt_xent loss/nt_xent/t2a loss/nt_xent/a2t lr/audio lr/text lr/heads temperature grad_norm"
    keys += (
        " grad_norm/audio grad_norm/text grad_norm/heads samples_per_s audio_s_per_s data_wait data_wait/mean saving_s"
    )
    keys += " duplicates/clips duplicates/captions memory_gb samples_seen epoch skipped_steps fp16_overflows"
    keys += " dropped/silent_audio dropped/broken_audio"
    monitor = Monitor(tmp_path, True)
    for step in range(0, 9153, 10):
        monitor.train(step, dict.fromkeys(keys.split(), 0.123))
    monitor.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert 300_000 < file.stat().st_size < 5_000_000 - media_budget.MEDIA_BYTES
    board = events(tmp_path)
    assert len(board.Tags()["scalars"]) == len(keys.split()) and len(board.Scalars("train/grad_norm/heads")) == 916


def test_no_secret_reaches_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-3f9a71c2d4"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canary)
    monitor = Monitor(tmp_path, True)
    monitor.text("configuration", f"endpoint: http://me:{canary}@host\nother: {canary}")
    monitor.retrieved(1, [RetrievedClips(canary, 1, [])])
    monitor.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not [path for path in files if canary.encode() in path.read_bytes()]


def test_progress_is_logged_with_an_end_where_there_is_no_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="atr_scale.training.monitor"):
        monitor = Monitor(tmp_path, True, resume_step=10, total_steps=30)
        monitor.train(20, {"loss": 1.25, "samples_per_s": 80.04})
        monitor.close()
    assert "step 20/30, loss 1.25, samples_per_s 80.04, ETA 00:00" in caplog.messages
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_speed_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monitor = Monitor(tmp_path, True, resume_step=10, total_steps=40)
    monitor.train(20, {"loss": 1.25, "samples_per_s": 80.04})
    monitor.close()
    assert "20/40" in terminal.getvalue() and "loss=1.25, samples_per_s=80.04" in terminal.getvalue()


LOGS_BESIDE_A_BAR = """
import logging, sys
from pathlib import Path
from atr_scale.console import ConsoleHandler
from atr_scale.training.monitor import Monitor

logging.basicConfig(level=logging.INFO, format="LOG %(message)s", handlers=[ConsoleHandler()])
monitor = Monitor(Path(sys.argv[1]), True, total_steps=3)
for step in (1, 2):
    logging.info("before step %d", step)
    monitor.train(step, {"loss": 1.25, "samples_per_s": 80.0})
monitor.close()
"""


def test_log_lines_on_a_terminal_stand_apart_from_the_bar(tmp_path: Path) -> None:
    """Each one begins at the left edge of a cleared line; the bar is drawn again below it."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", LOGS_BESIDE_A_BAR, str(tmp_path)])
    written = b""
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # a terminal ends so
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, written
    screen = written.decode()
    for step in (1, 2):
        before, line, after = screen.partition(f"LOG before step {step}\r\n")
        assert line and "training:" in before and "training:" in after
        assert before.endswith((" \r", "\n")), f"not on a cleared line: {before[-30:]!r}"


def test_a_full_disk_delays_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lines are written when there is room again; one line in the log tells it, and training goes on."""
    monitor = Monitor(tmp_path, True)
    monitor.train(1, {"loss": 3.0})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("atr_scale.training.monitor.append_json_lines", full)
        for step in (2, 3):
            monitor.train(step, {"loss": 2.0})
            monitor.flush()
    assert caplog.text.count("cannot be written to (No space left on device)") == 1
    assert monitor.lost is None
    monitor.train(4, {"loss": 1.0})
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_folder_that_is_gone_is_lost(tmp_path: Path) -> None:
    """TensorBoard's thread ends with the folder; no call raises, and the folder is not made again."""
    run = tmp_path / "run"
    monitor = Monitor(run, True)
    monitor.train(1, {"loss": 3.0})
    monitor.flush()
    run.rename(tmp_path / "elsewhere")
    monitor.train(2, {"loss": 3.0})
    assert "run cannot be written to (it is gone): mend that" in str(monitor.lost)
    monitor.text("some", "text")
    monitor.heatmap(2, torch.zeros(2, 2))
    monitor.close()
