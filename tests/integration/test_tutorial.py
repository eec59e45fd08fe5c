"""The commands of docs/tutorial.md run as they stand there, in their order, on a small collection."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from atr_scale.cli import app
from atr_scale.encoders.pretrained.weights import FOLDER, WEIGHTS
from tests.commands import ROOT
from tests.recipes import write_original
from tests.serving import served
from tests.tiny import make_tiny_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = ROOT / "docs/tutorial.md"
# Of the environment and of the internet; test_scripts.py and test_weights.py are about them.
ELSEWHERE = ("launch/environment.sh", "source ", "atr-scale fetch-weights")
SMALLER = ("train.epochs=1", "train.global_batch_size=8", "data.workers=0")


def commands(section: str) -> list[str]:
    """The indented commands of the section whose headline begins with `section`."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}")[2].partition("\n## ")[0]
    assert text, f"no section {section}"
    lines = re.findall(r"^ {4}(\S.*)", text, re.MULTILINE)
    return [line for line in lines if line.startswith(("atr-scale ", *ELSEWHERE))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a reader who has recordings/, archive/ and the weights, at the end of section 1."""
    folder = tmp_path_factory.mktemp("tutorial")
    inputs = make_tiny_inputs(folder / "made", 20)
    audio = folder / "recordings" / "audio"
    shutil.copytree(inputs.shards.parent / "corpus", folder / "recordings")
    (audio / "tone-0.wav").rename(audio / "yard.wav")
    table = folder / "recordings" / "captions.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("tone-0.wav", "yard.wav"), encoding="utf-8")
    (folder / "archive").mkdir()
    noise = np.random.default_rng(0).normal(size=25 * 16_000) * 0.1
    soundfile.write(folder / "archive" / "day.wav", noise, 16_000)
    (folder / "sentence-transformers").mkdir()
    (folder / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(inputs.text_encoder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        FOLDER.mkdir()
        write_original("mn04", FOLDER / WEIGHTS["mn04"].file)
        yield folder


def run(command: str) -> None:
    words = shlex.split(command)[1:]
    app([*words, *SMALLER] if words[0] == "train" else words, standalone_mode=False)


def test_every_command_of_the_page_is_run() -> None:
    shown = re.findall(r"^ {4}(atr-scale .*)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    run_here = [line for section in range(1, 10) for line in commands(f"{section}. ") if line in shown]
    assert sorted(run_here) == sorted(shown)
    verbs = {"shards", "train", "evaluate", "index", "search", "serve", "embed", "export"}
    assert {line.split()[1] for line in shown} >= verbs


def test_the_page_from_recordings_to_an_archive(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(line.startswith(ELSEWHERE) for line in commands("1. "))
    for section in ("2. ", "3. ", "4. ", "5. ", "6. "):
        for command in commands(section):
            run(command)
    assert "yard.wav" in capsys.readouterr().out, "a sound finds itself"
    report = (place / "runs/own_recordings/report.md").read_text(encoding="utf-8")
    assert "R@1" in report

    serve, evaluate = commands("7. ")
    with open(place / "recordings/captions.csv", newline="", encoding="utf-8") as file:
        captions = {row["file_name"]: row["caption_1"] for row in csv.DictReader(file)}
    _, verb, index = serve.split()
    assert verb == "serve"
    with served(place / index) as (_, address):
        for name, caption in captions.items():  # some of them are of the test
            mark = {"query": caption, "id": f"recordings/{name}", "mark": "right"}
            request = urllib.request.Request(f"{address}api/mark", json.dumps(mark).encode(), method="PUT")
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.status == 204
    run(evaluate)

    for section in ("8. ", "9. "):
        for command in commands(section):
            run(command)
    lines = [json.loads(line) for line in (place / "archive.jsonl").read_text(encoding="utf-8").splitlines()]
    assert np.load(place / "archive.npy").shape == (3, 512)
    assert [line["start"] for line in lines] == [0.0, 10.0, 15.0]
    assert "license: unknown" in (place / "models/own/README.md").read_text(encoding="utf-8")
