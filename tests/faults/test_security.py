"""What others have written is never executed, and secrets stay out of everything that is written."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from atr_scale.evaluation.report import _look_closer
from tests.faults.runs import TinyRuns
from tests.faults.test_data import encoded, good, tar_of, tone
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Outcome = Callable[[str], None]

# Runs `atr-scale` once for each list of arguments, in one process, and prints the exit codes.
VERBS = """
import json, sys
from atr_scale.cli import main
if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        try:
            main(arguments)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
        print(code, flush=True)
"""


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def verbs(place: Path, lines: list[list[str]]) -> tuple[list[str], list[str]]:
    """The exit code and the error of each command line."""
    command = [sys.executable, "-c", VERBS, json.dumps(lines)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.split(), errors


@pytest.fixture
def config(runs: TinyRuns) -> Path:
    path = runs.place / "run.yaml"
    path.write_text(tiny_config(runs.inputs, runs.folder(), steps=3, checkpoint_every=1, zero_stage=1).to_yaml())
    return path


@pytest.mark.fault(
    "weights that are pickles with code, and a text encoder with code of its own",
    expected="nothing is executed; one line each, exit code 2",
)
def test_pickles_in_weights(runs: TinyRuns, config: Path, outcome: Outcome) -> None:
    bomb = Bomb(runs.place / "executed")
    for name, new in (("zip.pt", True), ("legacy.pt", False)):
        torch.save({"state_dict": {"a": bomb}}, runs.place / name, _use_new_zipfile_serialization=new)
    (runs.place / "raw.pt").write_bytes(pickle.dumps(bomb))
    initial = runs.place / "initial"
    initial.mkdir()
    shutil.copy(config, initial / "config.resolved.yaml")
    (initial / "model.safetensors").write_bytes(pickle.dumps(bomb))
    text = runs.inputs / "train" / "text_encoder"
    for name in ("bin", "code"):
        shutil.copytree(text, runs.place / name)
    (runs.place / "bin" / "model.safetensors").unlink()
    torch.save({"x": bomb}, runs.place / "bin" / "pytorch_model.bin")
    own = {
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil"),
        "model_type": "evil",
    }
    settings = runs.place / "code" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
    (runs.place / "code" / "evil.py").write_text(f"open({str(bomb.path)!r}, 'w')\n")
    overrides = [
        *(["model.audio.name=mn04", f"model.audio.checkpoint={name}"] for name in ("zip.pt", "legacy.pt", "raw.pt")),
        ["train.initial_checkpoint=initial"],
        ["model.text.name=./bin"],
        ["model.text.name=./code"],
    ]
    codes, errors = verbs(runs.place, [["train", str(config), *each] for each in overrides])
    assert codes == ["2"] * len(overrides) and len(errors) == len(overrides), (codes, errors)
    assert not bomb.path.exists()
    outcome(f"{len(overrides)} kinds refused, nothing executed")


@pytest.mark.fault(
    "pickles with code as members of a shard, and in place of DeepSpeed's files in a checkpoint",
    expected="never loaded: members are not read, the checkpoint is broken by its checksums and the one before is used",
)
def test_pickles_in_shards_and_checkpoints(runs: TinyRuns, config: Path, outcome: Outcome) -> None:
    bomb = Bomb(runs.place / "executed")
    code, wav = pickle.dumps(bomb), encoded(tone(1), "WAV")
    members = [(f"good-0.{kind}", code) for kind in ("pyd", "pickle", "pth", "pt")]
    shards = runs.place / "shards"
    tar_of(shards / "0.tar", *good(range(1)), *members, *good(range(1, 16)), ("x.wav", wav), ("x.json", code))
    options = (f"data.train[0].shards={shards}", "data.validation=null")
    train: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": 3, "zero_stage": 1, "log_every": 1}
    assert runs.ended(runs.start(steps=2, overrides=options, **train)) == 0, runs.said()
    newest = (runs.folder() / "latest").resolve()
    assert newest.name == "step-2"
    states = [*newest.rglob("*.safetensors"), newest / "deepspeed" / "mp_rank_00_model_states.pt"]
    assert len(states) > 2
    states[-1].parent.mkdir()  # where checkpoints of version 0.5 and older have pickles, which are read
    for path in states:
        torch.save(bomb, path)
    assert runs.ended(runs.start(steps=3, overrides=options, **train)) == 0, runs.said()
    assert "step-2 is broken" in runs.said() and "resuming" in runs.said()
    assert not bomb.path.exists()
    outcome(f"members ignored; step-2, with {len(states)} pickles in and beside its files, was passed over for step-1")


@pytest.mark.fault(
    "a configuration with Python objects in its YAML, a misspelt key, or credentials as keys",
    expected="safe loader; one line that names the place and the nearest key, exit code 2",
)
def test_unsafe_yaml(runs: TinyRuns, config: Path, outcome: Outcome) -> None:
    touched = runs.place / "executed"
    call = f"!!python/object/apply:os.system ['touch {touched}']"
    files = {
        "whole": call,
        "value": f"run: {{dir: {call}}}",
        "typo": config.read_text().replace("log_every:", "log_evry:"),
        "credentials": config.read_text() + "\ns3: {secret_access_key: canary}\n",
    }
    lines = []
    for name, text in files.items():
        (runs.place / f"{name}.yaml").write_text(text)
        lines.append(["train", f"{name}.yaml"])
    lines += [["train", str(config), f"run.dir={call}"], ["train", str(config), "train.stepps=3"]]
    codes, errors = verbs(runs.place, lines)
    assert codes == ["2"] * len(lines) and len(errors) == len(lines), (codes, errors)
    assert "log_every" in errors[2] and "did you mean 'train.steps'?" in errors[-1]
    assert "canary" not in errors[3]
    assert not touched.exists() and not runs.folder().exists()
    outcome(f"{len(lines)} kinds refused, nothing executed")


CANARIES = {
    "AWS_ACCESS_KEY_ID": "canary-id-51f0a9",
    "AWS_SECRET_ACCESS_KEY": "canary/9Kd+72hQ=x",
    "HF_TOKEN": "canary-hub-77aa01",
    "OPENAI_API_KEY": "canary-openai-3c3c",
    "AWS_ENDPOINT_URL": "http://me:canary-password-88@host.invalid",
}
# At step 4 the process tells its environment to an error, a log line and a local variable, and fails or hangs.
TELLING = """
import logging, os, time
from atr_scale.training.loop import Training
step = Training._step
def telling(self, batches):
    if self.progress.step == 3:
        told = " ".join(os.environ[name] for name in os.environ["NAMES"].split())
        logging.getLogger("atr_scale").warning("the environment: %s", told)
        if os.environ["THEN"] == "hang":
            time.sleep(1000)
        raise RuntimeError(told)
    step(self, batches)
Training._step = telling
"""


@pytest.mark.fault(
    "secrets in the environment of a run that fails with them in its error, or hangs",
    expected="in no file of the run, no log line, no traceback, no stacks",
)
def test_secrets(runs: TinyRuns, outcome: Outcome) -> None:
    endings = {}
    for then in ("hang", "fail"):
        environment = {**CANARIES, "NAMES": " ".join(CANARIES), "THEN": then}
        process = runs.start(steps=6, log_every=1, checkpoint_every=2, hang_seconds=5.0, hooks=TELLING,
                             environment=environment)  # fmt: skip
        if then == "hang":
            runs.until(lambda: (runs.folder() / "run.lock").exists(), "the lock is there")
            lock = (runs.folder() / "run.lock").read_text()
            assert lock and "canary" not in lock
        assert runs.ended(process) == 1, runs.said()
        endings[then] = runs.said()
    assert "stacks" in endings["hang"] and "Traceback" in endings["fail"]
    files = [path for path in [runs.log, *runs.folder().rglob("*")] if path.is_file()]
    kinds = {path.name for path in files}
    assert {"attempts.jsonl", "rank-0.json", "environment.json", "config.resolved.yaml", "metrics.jsonl"} <= kinds
    assert any(name.startswith("stacks-") for name in kinds) and any("tfevents" in name for name in kinds)
    told = [path for path in files if b"canary" in path.read_bytes()]
    assert not told, [(path, re.findall(rb".*canary.*", path.read_bytes())[:2]) for path in told]
    assert "the environment: [redacted]" in runs.said() and "RuntimeError: [redacted]" in runs.said()
    outcome(f"none of {len(CANARIES)} secrets in {len(files)} files, the log and a traceback among them")


@pytest.mark.fault("TensorBoard, started as the report says", expected="it listens on 127.0.0.1 alone")
def test_tensorboard_is_local(tmp_path: Path, outcome: Outcome) -> None:
    line = next(line for line in _look_closer(tmp_path).splitlines() if line.startswith("    tensorboard "))
    command = [sys.executable, "-m", "tensorboard.main", *shlex.split(line)[1:], "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 120
            listens: list[str] = []
            while not listens and time.monotonic() < deadline:
                time.sleep(0.2)
                sockets = psutil.Process(server.pid).net_connections("inet")
                listens = [each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN]
        finally:
            server.kill()
    assert listens and set(listens) == {"127.0.0.1"}
    outcome(f"{len(listens)} socket, on 127.0.0.1")
