"""The search page as people use it: a real server, many at once, and a real browser."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.search.serve.marks import Marks
from tests.serving import SOUNDS, WithMoments, make_index, served
from tests.tiny import WORDS

pytestmark = pytest.mark.slow

SWITCHES = (
    "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-dev-shm-usage proxy-server=http://127.0.0.1:9 proxy-bypass-list=127.0.0.1"
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("page"))


def test_fifty_at_once_a_port_in_use_and_an_end(index: Path, tmp_path: Path) -> None:
    with served(index, "--relevance", str(tmp_path / "marks.csv")) as (server, address):

        def ask(number: int) -> int:
            query = urllib.parse.urlencode({"q": f"tone number {number}"})
            with urllib.request.urlopen(f"{address}api/search?{query}", timeout=60) as answer:
                return len(json.load(answer)["results"])

        with ThreadPoolExecutor(50) as clients:
            assert list(clients.map(ask, range(50))) == [SOUNDS] * 50
        port = str(urllib.parse.urlsplit(address).port)
        again = [sys.executable, "-m", "atr_scale.cli", "serve", str(index), "--port", port]
        second = subprocess.run(again, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2 and second.stderr.count("\n") == 1 and "is in use" in second.stderr
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate(timeout=60)
        assert server.returncode == 0 and rest.startswith("ended by SIGTERM") and rest.count("\n") == 1


def test_texts_that_come_together_share_a_pass(page: tuple[WithMoments, str]) -> None:
    library, address = page
    library.batches.clear()

    def ask(number: int) -> None:
        urllib.request.urlopen(f"{address}/api/search?q=tone+{number}", timeout=60).close()

    with ThreadPoolExecutor(50) as clients:
        list(clients.map(ask, range(50)))
    assert sum(library.batches) == 50 and max(library.batches) > 1


@pytest.fixture(scope="module")
def page(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WithMoments, str]]:
    """A server in a thread, of a library with moments."""
    import uvicorn

    from atr_scale.search.serve.app import create_app

    library = WithMoments(index)
    application = create_app(library, Marks(tmp_path_factory.mktemp("marks") / "marks.csv"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield library, f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


def test_a_browser_searches_plays_and_marks(page: tuple[WithMoments, str], tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    _, address = page
    switches = [f"--{switch}" for switch in SWITCHES.split()]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=switches)
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.goto(address)
        assert tab.is_visible("text=Describe a sound")
        tab.keyboard.type("low tone")  # the field has the focus
        tab.keyboard.press("Enter")
        tab.wait_for_selector(".card")
        assert tab.locator(".card").count() == SOUNDS
        first = tab.locator(".card").first
        assert "<script>" in first.locator("h2").inner_text() and tab.title() != "owned"
        first.locator(".moments canvas").nth(1).wait_for()
        assert first.locator(".moments .name").all_inner_texts() == ["low", "tone"]
        painted = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)"
        tab.wait_for_timeout(200)
        assert first.locator("canvas.wave").evaluate(painted)
        assert first.locator(".moments canvas").first.evaluate(painted)
        assert first.locator("img.mel").evaluate("i => i.decode().then(() => i.naturalWidth)") > 50
        first.locator(".play").click()
        deadline = time.monotonic() + 30
        while first.locator("audio").evaluate("a => a.currentTime") < 0.3:
            assert time.monotonic() < deadline, "nothing was played"
            time.sleep(0.05)
        first.locator("[data-mark=right]").click()
        tab.wait_for_selector(".card.right")
        tab.reload()
        tab.wait_for_selector(".card.right")
        assert tab.locator("[data-mark=right]").first.get_attribute("aria-pressed") == "true"
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than a phone"
        tab.screenshot(path=tmp_path / "page.png")
        assert errors == []
        (tmp_path / "broken.wav").write_bytes(b"RIFF broken")
        tab.set_input_files("#file", tmp_path / "broken.wav")
        tab.wait_for_selector("#error:not([hidden])")
        assert "cannot be used" in tab.inner_text("#error") and tab.locator(".card").count() == 0
        browser.close()


def test_evaluate_counts_right_marks_only(index: Path, tmp_path: Path) -> None:
    def metrics(marks: Marks) -> str:
        command = ["evaluate", str(index.parent / "run"), "--shards", str(index.parent / "validation" / "shards")]
        given = CliRunner().invoke(app, [*command, "--relevance", str(marks.path), "--out", str(tmp_path / "out")])
        assert given.exit_code == 0, given.output
        return given.output

    (index.parent / "run" / "best" / "state.json").write_text('{"step": 3}')  # an index of it does not need one
    captions = [f"a {WORDS[number]} and {WORDS[number // 2]} tone {number}" for number in range(3)]
    marks = Marks(tmp_path / "marks.csv")
    for number, caption in enumerate(captions):
        marks.set(caption, f"tone-{number}.wav", "right")
    first = metrics(marks)
    marks.set(captions[0], "tone-7.wav", "wrong")
    marks.set("a caption of no clip", "tone-7.wav", "wrong")
    assert metrics(marks) == first and "mAP@16" in first
    marks.set(captions[0], "tone-0.wav", "wrong")
    assert metrics(marks) != first
