"""The search page's addresses: answers, limits, and who is refused."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from atr_scale.errors import UserError
from atr_scale.evaluation.relevance import Texts, pairs_of_csv
from atr_scale.inference import load_trained
from atr_scale.search.query import Searcher
from atr_scale.search.serve.app import create_app
from atr_scale.search.serve.batching import Batcher
from atr_scale.search.serve.guard import is_loopback
from atr_scale.search.serve.library import IndexLibrary
from atr_scale.search.serve.marks import Marks
from atr_scale.search.serve.sounds import Refused, byte_range
from atr_scale.search.sources import item_audio
from tests.serving import EVIL, SOUNDS, WithMoments, make_index
from tests.tiny_run import save_run, tiny_config

testing = pytest.importorskip("fastapi.testclient")
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> WithMoments:
    return WithMoments(make_index(tmp_path_factory.mktemp("serve")))


@pytest.fixture
def client(library: WithMoments, tmp_path: Path) -> Iterator[Any]:
    with testing.TestClient(create_app(library, Marks(tmp_path / "marks.csv")), base_url=HERE) as client:
        yield client


def wav(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(np.arange(int(8000 * seconds)) * 0.3), 8000, format="WAV")
    return file.getvalue()


def test_a_text_and_a_sound_find_sounds(client: Any) -> None:
    found = client.get("/api/search", params={"q": "a dog  barks", "top": 4}).json()
    assert found["query"] == "a dog barks" and len(found["results"]) == 4
    scores = [result["score"] for result in found["results"]]
    assert scores == sorted(scores, reverse=True) and found["results"][0]["caption"] == EVIL
    same = client.post("/api/search/audio", params={"name": "a.wav"}, content=wav(1)).json()
    assert len(same["results"]) == SOUNDS and same["query"] == "a.wav"
    captions = client.get("/api/search", params={"q": "tone 3", "captions": True}).json()["results"]
    assert captions[0]["caption"] == "tone 3"


def test_a_result_is_heard_and_drawn(client: Any) -> None:
    ask = {"id": "tone-5.wav#t=1,3"}
    whole = client.get("/api/sound.wav", params=ask)
    samples, rate = soundfile.read(io.BytesIO(whole.content))
    assert (len(samples), rate) == (32_000, 16_000) and np.abs(samples[:800]).max() > 0.2, "the window alone"
    part = client.get("/api/sound.wav", params=ask, headers={"Range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == whole.content[100:200]
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole.content)}"
    beyond = client.get("/api/sound.wav", params=ask, headers={"Range": "bytes=9999999-"})
    assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    shape = client.get("/api/sound", params=ask).json()
    assert shape["seconds"] == 2 and shape["start"] == 1 and len(shape["peaks"]) == 480
    assert client.get("/api/spectrogram.png", params=ask).content[:4] == b"\x89PNG"
    moments = client.get("/api/moments", params={"q": "low tone", **ask}).json()
    assert moments["words"] == ["low", "tone"] and moments["times"][1] == [1, 2]


def test_the_page_draws_the_attention_of_a_model(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    lgmm = save_run(tiny_config(tmp_path, tmp_path / "unused"), tmp_path / "lgmm", 0, "lgmm")
    library = IndexLibrary(Searcher(index, rerank=lgmm))
    with testing.TestClient(create_app(library, Marks(tmp_path / "marks.csv")), base_url=HERE) as client:
        assert client.get("/api/about").json()["has_moments"]
        found = client.get("/api/moments", params={"q": "A low tone", "id": "tone-5.wav#t=1,3"}).json()
    samples, rate = item_audio(library.items[5])
    expected = load_trained(lgmm).moments("A low tone", samples, rate)
    assert found["words"] == ["A", "low", "tone"] and found["times"][-1][1] == 2
    np.testing.assert_allclose(found["weights"], expected.weights, atol=1e-4)
    assert [part["start"] for part in found["spans"]] == [span.start for span in expected.spans]
    assert not IndexLibrary(Searcher(index)).has_moments


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, None), ("bytes=0-", (0, 10)), ("bytes=-3", (7, 10)), ("bytes=2-50", (2, 10)), ("bytes=1-2,4-5", None)],
)
def test_ranges(header: str | None, expected: tuple[int, int] | None) -> None:
    assert byte_range(header, 10) == expected
    with pytest.raises(Refused):
        byte_range("bytes=10-", 10)


@pytest.mark.parametrize(
    ("name", "content", "status", "words"),
    [
        ("a.exe", b"MZ", 415, "no audio file of a known type"),
        ("a.wav", b"RIFF broken", 422, "cannot be used"),
        ("a.wav", b"", 422, "no bytes"),
        ("a.flac", bytes(200), 422, "cannot be used"),
        ("a.wav", wav(61), 413, "lasts 61 s: give at most 60 s"),
        ("a.wav", bytes((20 << 20) + 1), 413, "too large: give at most 20 MiB"),
    ],
)
def test_uploads_have_limits(client: Any, name: str, content: bytes, status: int, words: str) -> None:
    answer = client.post("/api/search/audio", params={"name": name}, content=content)
    assert answer.status_code == status and words in answer.json()["detail"]


def test_an_upload_without_a_length_is_cut_off(client: Any) -> None:
    parts = (bytes(1 << 20) for _ in range(30))
    assert client.post("/api/search/audio", params={"name": "a.wav"}, content=parts).status_code == 413


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/search?q=%20", 422),
        ("/api/search", 422),
        ("/api/search?q=a&top=0", 422),
        (f"/api/search?q={'a' * 501}", 422),
        ("/api/sound?id=/etc/passwd", 404),
        ("/api/sound.wav?id=..%2Ftone-0.wav", 404),
        ("/pages/..%2Fapp.py", 404),
        ("/pages/../app.py", 404),
    ],
)
def test_bad_requests_are_one_sentence(client: Any, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status and isinstance(answer.json()["detail"], str)


def test_marks_are_kept_and_evaluate_reads_the_right_ones(client: Any, library: WithMoments, tmp_path: Path) -> None:
    def mark(id: str, value: str | None) -> int:
        return client.put("/api/mark", json={"query": "Tone 3", "id": id, "mark": value}).status_code

    given = {"tone-3.wav": "right", "tone-1.wav": "wrong", "tone-5.wav#t=1,3": "right", "tone-2.wav": "right"}
    with ThreadPoolExecutor(8) as tabs:
        assert list(tabs.map(mark, given, given.values())) == [204] * 4
    assert mark("tone-2.wav", None) == 204
    assert mark("nothing.wav", "right") == 404
    path = tmp_path / "marks.csv"
    assert Marks(path).of("tone 3") == {"tone-3.wav": "right", "tone-1.wav": "wrong", "tone-5.wav": "right"}
    shown = client.get("/api/search", params={"q": "tone  3"}).json()["results"]
    assert {r["id"]: r["mark"] for r in shown if r["mark"]} == {k: v for k, v in given.items() if k != "tone-2.wav"}
    texts = Texts(["a dog", "tone 3"], [f"tone-{number}" for number in range(SOUNDS)])
    assert sorted(pairs_of_csv(path, texts)) == [(1, 3), (1, 5)], "wrong marks do not count"


def test_a_file_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("file_name,caption\na.wav,a dog\n")
    with pytest.raises(UserError, match="has the columns"):
        Marks(path)
    marks = Marks(tmp_path / "new.csv")
    marks.set('with "quotes", and\ncommas', "a;b.wav", "right")
    assert Marks(marks.path).of('with "quotes", and\ncommas') == {"a;b.wav": "right"}
    marks.set('with "quotes", and\ncommas', "a;b.wav", None)
    assert Marks(marks.path).of("with") == {} and len(list(csv.reader(marks.path.open()))) == 1


def test_other_names_of_this_machine_and_other_pages_are_refused(client: Any) -> None:
    assert client.get("/", headers={"Host": "evil.example:8000"}).status_code == 421
    assert client.get("/", headers={"Host": "localhost:8000"}).status_code == 200
    body = {"query": "a", "id": "tone-1.wav", "mark": "right"}
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        assert client.put("/api/mark", json=body, headers={"Origin": origin}).status_code == 403
    assert client.put("/api/mark", json=body, headers={"Origin": HERE}).status_code == 204
    answer = client.get("/", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "a.localhost.evil")] == [
        *[True] * 3, *[False] * 2,
    ]  # fmt: skip


def test_a_token_is_needed_and_becomes_a_cookie(library: WithMoments, tmp_path: Path) -> None:
    app = create_app(library, Marks(tmp_path / "m.csv"), "s" * 20)
    with testing.TestClient(app, base_url="http://sounds.lan:8000") as client:
        for path in ("/", "/api/about", "/pages/app.js", "/openapi.json", "/?token=wrong", "/?token=%ff"):
            assert client.get(path).status_code == 401
        assert client.get("/api/about", headers={"Authorization": f"Bearer {'s' * 20}"}).status_code == 200
        first = client.get(f"/?token={'s' * 20}&q=dog", follow_redirects=False)
        assert first.status_code == 303 and first.headers["location"] == "/?q=dog"
        assert "HttpOnly" in first.headers["set-cookie"] and "SameSite=strict" in first.headers["set-cookie"]
        assert client.get("/api/about").status_code == 200


def test_too_many_requests_are_told_to_come_again(library: WithMoments, tmp_path: Path) -> None:
    full = Batcher(lambda key, arguments: arguments, limit=1)
    full._jobs.put_nowait(None)  # type: ignore[arg-type]

    async def never() -> None:
        return None

    full.run = never  # type: ignore[method-assign]
    with testing.TestClient(create_app(library, Marks(tmp_path / "m"), batcher=full), base_url=HERE) as client:
        answer = client.get("/api/search?q=dog")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_documents_need_no_internet(client: Any) -> None:
    assert "/api/search/audio" in client.get("/openapi.json").json()["paths"]
    pages = [client.get(path).text for path in ("/", "/docs", "/pages/app.js", "/pages/app.css", "/pages/docs.js")]
    assert not any("https://" in page or "http://" in page for page in pages)
