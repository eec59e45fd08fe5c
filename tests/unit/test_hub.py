"""A model's name, and no hub that could be asked: one whole line, without a retry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from atr_scale.encoders import build_text_encoder
try:
    build_text_encoder("no-such/model")
except ValueError as error:
    print(type(error).__name__, error)
"""
NO_HUB = "http://127.0.0.1:9"  # nobody listens at this port


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": ":".join(sys.path), "HF_HOME": str(tmp_path), "HF_ENDPOINT": NO_HUB}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    kind, message = done.stdout.split(" ", 1)
    assert kind == "UserError" and message.count("\n") == 1
    assert f"no model 'no-such/model' in the cache, and {NO_HUB} cannot be asked for it (" in message
    assert message.endswith("or the name of a model on a hub that can be reached\n")
    assert "Retry" not in done.stderr


@pytest.mark.slow
def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    snapshot = tmp_path / "hub" / "models--no-such--model" / "snapshots" / "abc"
    code = f"""
from pathlib import Path
from atr_scale.demo.text_encoder import build_demo_text_encoder
build_demo_text_encoder(["a dog barks"], Path({str(snapshot)!r}), layers=1, dim=8, heads=1)
{CODE}
print(build_text_encoder("no-such/model").dim)
"""
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    environment = {"PYTHONPATH": ":".join(sys.path), "HF_HOME": str(tmp_path), "HF_ENDPOINT": NO_HUB}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "8\n" and "Retry" not in done.stderr
