"""environment.json, and secrets that must not reach any file."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from atr_scale.redaction import REDACTED, is_secret_name, redact
from atr_scale.training import run_info
from atr_scale.training.run_info import describe_environment, write_environment

CANARY = "canary/9Kd+72hQ=x"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "token",
        "OPENAI_API_KEY",
        "apikey",
        "DB_PASSWORD",
        "client_secret",
        "github_token",
        "MY_CREDENTIALS",
        "SSH_PRIVATE_KEY",
    ],
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)
    assert redact(f"x {CANARY} y", {name: CANARY}) == f"x {REDACTED} y"


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "max_tokens", "tokenizer", "key", "keys", "PATH", "monkey", "GOOGLE_CREDENTIALS_FILE"],
)
def test_names_that_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)
    line = f"{name}: something/longer"
    assert redact(line, {name: "something/longer"}) == line


@pytest.mark.parametrize(
    "text",
    [
        f"aws_secret_access_key: {CANARY}",
        f"secret={CANARY}",
        f'{{"api_key": "{CANARY}", "lr": 1}}',
        f"storage.password: '{CANARY} with blanks'",
        f"HF_TOKEN={CANARY} python train.py",
        f"https://user:{CANARY.replace('/', '')}@host/x",
        f"https://host/x?X-Amz-Signature={'ab' * 32}&X-Amz-Security-Token={CANARY}",
        f"Authorization: Basic {CANARY}",
        f"{{'Authorization': 'AWS4-HMAC-SHA256 Credential={CANARY}, Signature={'ab' * 32}', 'Date': 'x'}}",
        f"refused: Bearer {CANARY}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n{'ab' * 32}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_values_beside_secret_names_are_removed(text: str) -> None:
    clean = redact(text, {})
    assert CANARY not in clean and CANARY.replace("/", "") not in clean and "ab" * 32 not in clean
    assert "with blanks" not in clean
    assert REDACTED in clean


def test_tokens_of_known_form_are_removed() -> None:
    text = f"{'AKIA' + 'A1' * 8} {'hf_' + 'a' * 30} {'ghp_' + 'a' * 36}"
    assert redact(text, {}) == " ".join([REDACTED] * 3)


def test_a_secret_inside_another_leaves_no_rest() -> None:
    assert redact("abcdefgh12345678", {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh12345678"}) == REDACTED


def test_ordinary_text_is_kept() -> None:
    text = (
        "train:\n  lr: 0.0001\n  temperature: 0.07\ntext:\n  tokenizer: bert\n  max_tokens: 64\n"
        "git: 88ac05c1c2b0d9a9f7e6d5c4b3a29180706f5e4d\ntoken: null\ns3://bucket/key@v2/clotho\nhttp://127.0.0.1:6006"
        "\nBasic education, the bearer of news\na dog barks: authorization of the owner"
    )
    assert redact(text, {"A_SECRET": "1", "DEBUG_TOKEN": "true"}) == text


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(st.characters(codec="ascii", exclude_characters="[redact]"), min_size=8))
def test_a_secret_never_stays(text: str, secret: str) -> None:
    assert secret not in redact(text + secret + text, {"SERVICE_TOKEN": secret})


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("NCCL_DEBUG", f"file-{CANARY}")
    monkeypatch.setattr(sys, "argv", ["train.py", "config.yaml", f"data.path=s3://{CANARY}"])
    path = write_environment(tmp_path, world_size=2)
    text = path.read_text(encoding="utf-8")
    table = json.loads(text)
    assert table["world_size"] == 2 and table["python"] == platform.python_version()
    assert table["packages"]["torch"] and set(table["packages"]) == set(run_info.PACKAGES)
    assert table["devices"] and all(table["devices"])
    assert CANARY not in text and table["variables"]["NCCL_DEBUG"] == f"file-{REDACTED}"
    assert table["command"].startswith("train.py config.yaml")
    assert platform.node() not in text


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_revision_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "package" / "module.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    monkeypatch.setattr(run_info, "__file__", str(source))
    assert describe_environment(1)["git"] is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "zero")
    assert describe_environment(1)["git"] is None, "a copy that the checkout does not track has no revision"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert describe_environment(1)["git"] == {"revision": revision, "dirty": False}
    source.write_text("a = 2\n")
    assert describe_environment(1)["git"] == {"revision": revision, "dirty": True}
