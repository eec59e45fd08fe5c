"""augment-captions against a local server with the same API, through the openai client that users have."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from atr_scale import cli
from atr_scale.data import storage
from atr_scale.data.paraphrases import endpoint
from atr_scale.data.paraphrases.stored import FILE, Paraphrases
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.stream import read_batches
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.encoders.sentence import SentenceEncoder
from atr_scale.training.parts import training_stream
from tests.integration.test_s3 import BUCKET, server  # noqa: F401
from tests.tiny import TinyInputs, make_tiny_inputs
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CLIPS = 12
KEY = "sk-secret-word"
OVERLOADED = (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}})
FAULTS = (OVERLOADED, (500, {"error": {"message": "oops"}}), (503, "<html>busy</html>"), "drop", "hang", "prose", "cut")


class ChatServer(ThreadingHTTPServer):
    """Answers each request with paraphrases of its caption, or with the next of `faults`.

    A fault is (status, body), `drop` (no answer), `hang` (an answer too late), `prose` or `cut` (an answer that cannot
    be parsed). `gate` (number of requests so far, caption) may return one too.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.lock = threading.Lock()
        self.faults: deque = deque()
        self.gate: Callable[[int, str], object] = lambda number, caption: None
        self.requests: list[tuple[float, str, dict, str]] = []  # time, path, body, authorization

    @property
    def asked(self) -> Counter[str]:
        """How often each caption was asked about."""
        return Counter(json.loads(body["messages"][-1]["content"]) for _, _, body, _ in self.requests)

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the tests."""


class ChatHandler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        caption = json.loads(body["messages"][-1]["content"])
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((time.monotonic(), self.path, body, self.headers["Authorization"]))
            fault = self.server.faults.popleft() if self.server.faults else self.server.gate(number, caption)
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "hang":
            time.sleep(3.5)
        if isinstance(fault, tuple):
            self.reply(*fault)
            return
        texts = [f"one can hear {caption}", f"{caption} is heard", f"{caption} 999", caption.upper()]
        content = json.dumps({"paraphrases": texts})
        odd = {"prose": "I would rather not.", "cut": content[:20]}
        content = odd.get(str(fault), f"Sure!\n```json\n{content}\n```")
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        self.reply(200, {**about, "choices": [choice], "usage": usage})

    def reply(self, status: int, body: object) -> None:
        payload = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """A server, its key in the environment, and a client with short pauses and time limits."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(endpoint, "Endpoint", partial(endpoint.Endpoint, first_pause_s=0.001, timeout_s=3.0))
    with ChatServer() as chat:
        threading.Thread(target=partial(chat.serve_forever, poll_interval=0.01), daemon=True).start()
        yield chat
        chat.shutdown()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("augment"), CLIPS)


@pytest.fixture
def inputs(built: TinyInputs, tmp_path: Path) -> TinyInputs:
    """New shards for each test."""
    return TinyInputs(copy_shards(built.shards, tmp_path / "shards"), built.text_encoder)


def copy_shards(source: Path, to: Path, **manifest: str) -> Path:
    to.mkdir()
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    changed = {**json.loads((to / "manifest.json").read_text()), **manifest}
    (to / "manifest.json").write_text(json.dumps(changed))
    return to


class Called:
    """One call of the command line in this process: exit code, both outputs."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def mistake(self) -> str:
        """The one line on standard error, after exit code 2."""
        lines = self.err.strip().splitlines()
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (self.code, self.out, self.err)
        assert KEY not in self.err
        return lines[0]


Call = Callable[..., Called]


@pytest.fixture
def call(
    chat: ChatServer, inputs: TinyInputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    def run(*options: object, shards: object = None, url: str | None = chat.url, yes: bool = True) -> Called:
        words = ["atr-scale", "augment-captions", shards or inputs.shards, "--text-encoder", inputs.text_encoder]
        words += [*(["--endpoint", url] if url else []), *(["--yes"] if yes else []), *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Called(int(ended.value.code or 0), *capsys.readouterr())

    return run


def stored(shards: Path) -> list[dict]:
    return [json.loads(line) for line in (shards / FILE).read_text().splitlines()]


def captions_of(shards: object) -> dict[str, str]:
    """The caption of each clip."""
    opened = open_shards(str(shards))
    return {opened.read(i).clip_id: opened.read(i).captions[0] for i in range(len(opened))}


def test_paraphrases_are_asked_chosen_stored_and_not_asked_again(
    call: Call, chat: ChatServer, inputs: TinyInputs
) -> None:
    prices = ("--price-per-million-input", 1000, "--price-per-million-output", 10_000)
    done = call("--model", "small", "--threshold", -1, *prices)
    assert done.code == 0, done.err
    captions = captions_of(inputs.shards)
    assert chat.asked == Counter(captions.values())
    for _, path, body, authorization in chat.requests:
        assert (path, body["model"], authorization) == ("/v1/chat/completions", "small", f"Bearer {KEY}")
        assert "Write 5 different captions" in body["messages"][0]["content"]
    embed = SentenceEncoder(str(inputs.text_encoder))
    cosines: list[float] = []
    records = stored(inputs.shards)
    assert {r["clip_id"]: r["caption"] for r in records} == captions and len(records) == CLIPS
    for record in records:
        origin = [record[name] for name in ("caption_index", "model", "text_encoder", "prompt_version")]
        assert origin == [0, "small", str(inputs.text_encoder), endpoint.PROMPT_VERSION]
        texts, values = zip(*((p["text"], p["cosine"]) for p in record["paraphrases"]), strict=True)
        assert sorted(texts) == sorted([f"one can hear {record['caption']}", f"{record['caption']} is heard"])
        vectors = embed([record["caption"], *texts])
        assert values == pytest.approx((vectors[1:] @ vectors[0]).tolist(), abs=1e-4)
        assert list(values) == sorted(values, reverse=True)
        cosines += values
    estimate, summary, cost = done.out.splitlines()
    assert chat.url in estimate and f"{CLIPS} captions to ask: about " in estimate and "at the given prices" in estimate
    assert f"{CLIPS} captions asked (0 without an answer); {2 * CLIPS} paraphrases kept" in summary
    assert f"mean cosine {sum(cosines) / len(cosines):.3f}" in summary
    assert f"{2 * CLIPS} rejected (new_number {CLIPS}, copy {CLIPS})" in summary
    assert f"{100 * CLIPS} tokens in, {10 * CLIPS} out" in summary
    assert cost == f"cost: {0.1 * CLIPS + 0.1 * CLIPS:.2f}"
    again = call("--model", "small")
    assert again.code == 0 and "nothing to do" in again.out and len(chat.requests) == CLIPS


def test_sentence_vectors_are_means_over_attended_tokens(inputs: TinyInputs) -> None:
    from transformers import AutoModel

    texts = ["a low and soft tone 1", "a tone", "high"]
    tokenizer = AutoTokenizer.from_pretrained(inputs.text_encoder)
    model = AutoModel.from_pretrained(inputs.text_encoder).eval()
    with torch.inference_mode():
        alone = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    expected = torch.nn.functional.normalize(torch.stack(alone), dim=-1)
    assert torch.allclose(SentenceEncoder(str(inputs.text_encoder))(texts), expected, atol=1e-5)


def test_the_threshold_and_keep_decide(call: Call, inputs: TinyInputs) -> None:
    done = call("--threshold", 1)
    assert " 0 paraphrases kept; " in done.out and f"too_far {2 * CLIPS}" in done.out
    assert [record["paraphrases"] for record in stored(inputs.shards)] == [[]] * CLIPS
    assert "nothing to do" in call().out, "a caption of which nothing was kept is not asked again"
    (inputs.shards / FILE).unlink()
    call("--threshold", -1, "--keep", 1)
    assert [len(record["paraphrases"]) for record in stored(inputs.shards)] == [1] * CLIPS


@pytest.mark.parametrize("concurrency", [1, 4])
def test_faults_on_the_way_are_overcome(call: Call, chat: ChatServer, inputs: TinyInputs, concurrency: int) -> None:
    chat.faults.extend(FAULTS)
    done = call("--threshold", -1, "--concurrency", concurrency)
    assert done.code == 0 and "(0 without an answer)" in done.out
    assert {record["clip_id"]: record["caption"] for record in stored(inputs.shards)} == captions_of(inputs.shards)
    assert len(chat.requests) == CLIPS + len(FAULTS)


def test_a_caption_without_a_readable_answer_is_left_for_the_next_run(
    call: Call, chat: ChatServer, inputs: TinyInputs
) -> None:
    odd = min(captions_of(inputs.shards).values())
    chat.gate = lambda number, caption: "prose" if caption == odd else None
    done = call()
    assert done.code == 0 and f"{CLIPS} captions asked (1 without an answer)" in done.out
    assert chat.asked[odd] == endpoint.BAD_ANSWERS and len(stored(inputs.shards)) == CLIPS - 1
    chat.gate = lambda number, caption: None
    assert "1 captions asked (0 without" in call().out and len(stored(inputs.shards)) == CLIPS


QUOTA = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "refuses the key.*OPENAI_API_KEY"),
        (403, {"error": {"message": KEY}}, "refuses the key"),
        (404, {"error": {"message": "no such model"}}, "knows no model 'gpt-4o-mini'.*--model"),
        (404, "<html>not here</html>", "the URL is wrong.*--endpoint"),
        (429, QUOTA, "no credit left"),
        (400, {"error": {"message": "bad\nfield"}}, "refuses the request .*bad field"),
    ],
)
def test_what_repeating_does_not_mend_stops_at_once(
    call: Call, chat: ChatServer, status: int, body: object, words: str
) -> None:
    chat.gate = lambda number, caption: (status, body)
    assert re.search(words, call("--concurrency", 1).mistake)
    assert len(chat.requests) <= 2


def test_a_server_that_goes_away_leaves_what_was_answered(call: Call, chat: ChatServer, inputs: TinyInputs) -> None:
    chat.gate = lambda number, caption: None if number < 5 else (503, {"error": {"message": "down"}})
    done = call("--concurrency", 1)
    assert done.code == 2 and "5 captions in a row without an answer" in done.err.splitlines()[-1]
    answered = [record["caption"] for record in stored(inputs.shards)]
    assert len(answered) == 5 and len(chat.requests) == 5 + 5 * endpoint.ATTEMPTS
    chat.requests.clear()
    chat.gate = lambda number, caption: None
    assert f"{CLIPS - 5} captions asked" in call().out
    assert chat.asked == Counter(set(captions_of(inputs.shards).values()) - set(answered))
    assert len(stored(inputs.shards)) == CLIPS


def test_a_url_where_nobody_listens(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "ATTEMPTS", 2)
    done = call(url="http://127.0.0.1:9/v1")
    assert done.code == 2 and "http://127.0.0.1:9/v1 left 5 captions" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_requests_keep_their_pace(call: Call, chat: ChatServer) -> None:
    """Repeated attempts count too."""
    chat.faults.extend([OVERLOADED] * 2)
    call("--requests-per-minute", 1200, "--limit", 6)
    times = [request[0] for request in chat.requests]
    assert len(times) == 8 and times[-1] - times[0] > 0.9 * 7 * 60 / 1200


def test_a_limit_and_the_servers_url_from_the_environment(
    call: Call, chat: ChatServer, inputs: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", chat.url)
    assert "5 captions asked" in call("--limit", 5, url=None).out
    assert "(5 asked before)" in call("--limit", 4, url=None).out
    assert len(stored(inputs.shards)) == len(chat.requests) == 9


@pytest.mark.parametrize("split", ["val", "validation", "Test", "evaluation"])
def test_evaluation_splits_are_refused(
    call: Call, chat: ChatServer, built: TinyInputs, tmp_path: Path, split: str
) -> None:
    place = copy_shards(built.shards, tmp_path / "elsewhere", split=split)
    assert f"of the split '{split}': paraphrases are for training captions only" in call(shards=place).mistake
    assert not chat.requests and not (place / FILE).exists()


def test_one_evaluation_clip_among_training_clips_is_refused(call: Call, chat: ChatServer, inputs: TinyInputs) -> None:
    """For example of a folder corpus that was built with all its splits."""
    shard = inputs.shards / "shard-000001.tar"
    before, after = b'"split": "", "captions": ', b'"split":"val","captions":'
    shard.write_bytes(shard.read_bytes().replace(before, after, 1))
    assert "of the split 'val'" in call().mistake and not chat.requests


def test_nothing_is_asked_without_a_yes(call: Call, chat: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--yes" in call(yes=False).mistake
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: False)
    declined = call(yes=False)
    assert declined.code == 0 and "cost unknown" in declined.out and not chat.requests
    monkeypatch.setattr("typer.confirm", lambda question: True)
    assert f"{CLIPS} captions asked" in call(yes=False).out


def test_mistakes_before_anything_is_asked(
    call: Call, chat: ChatServer, inputs: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "'ftp://x' is not an endpoint" in call(url="ftp://x").mistake
    assert "no shards in" in call(shards="/nowhere").mistake
    assert "no text encoder at" in call("--text-encoder", "/nowhere").mistake
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "atr_scale.data.paraphrases.ask", raising=False)
    monkeypatch.delitem(sys.modules, "atr_scale.data.paraphrases.endpoint")
    monkeypatch.delattr("atr_scale.data.paraphrases.ask", raising=False)
    monkeypatch.delattr("atr_scale.data.paraphrases.endpoint")
    assert "pip install openai tenacity" in call().mistake
    monkeypatch.undo()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert not chat.requests and not (inputs.shards / FILE).exists()


def test_a_missing_key(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert "OPENAI_API_KEY is not set" in call().mistake


def test_training_reads_what_was_stored(call: Call, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", tmp_path / "out")
    call("--threshold", -1, shards=tmp_path / "run" / "train" / "shards")
    config.data.augmented_captions = 1.0
    tokenizer = caption_tokenizer(AutoTokenizer.from_pretrained(config.model.text.name), config.data.captions)
    stream = training_stream(config, tokenizer, 16_000, World())
    paraphrases = Paraphrases(config.data.train[0].shards)
    opened = stream.sources[0]
    samples = [opened.read(i) for i in range(40)]
    reworded = {sample.key: paraphrases.of(sample.clip_id, 0, sample.captions[0]) for sample in samples}
    for batch in read_batches(stream.between(0, 3), 0):
        for row, place in enumerate(batch.keys):
            own = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
            assert own in [tokenizer([text])[0][0].tolist() for text in reworded[place.rsplit("/", 1)[1]]]


def test_a_killed_run_goes_on_where_it_was(chat: ChatServer, inputs: TinyInputs, call: Call) -> None:
    """Every answer received is on disk when the process dies."""
    wanted = threading.Event()
    chat.gate = lambda number, caption: wanted.set() or "hang" if number >= 6 else None
    command = [sys.executable, "-m", "atr_scale.cli", "augment-captions", str(inputs.shards), "--endpoint", chat.url]
    command += ["--text-encoder", str(inputs.text_encoder), "--yes", "--concurrency", "1", "--threshold", "-1"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as process:
        assert wanted.wait(200)
        deadline = time.monotonic() + 60
        while len(stored(inputs.shards)) < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = stored(inputs.shards)
    assert len(before) >= 6
    chat.gate = lambda number, caption: None
    call("--threshold", -1)
    after = stored(inputs.shards)
    assert after[: len(before)] == before and len(after) == CLIPS == len({record["clip_id"] for record in after})


def test_shards_on_s3(server: str, call: Call, chat: ChatServer, inputs: TinyInputs) -> None:  # noqa: F811
    """Answers received before a failure are stored, and not asked for again."""
    place = f"s3://{BUCKET}/augment/train"
    for path in inputs.shards.iterdir():
        storage.write_bytes(storage.join(place, path.name), path.read_bytes())
    chat.gate = lambda number, caption: None if number < 5 else (401, {"error": {"message": "no"}})
    assert "refuses the key" in call("--threshold", -1, "--concurrency", 1, shards=place).mistake
    assert len(Paraphrases(place)) == 5
    chat.gate = lambda number, caption: None
    assert f"{CLIPS - 5} captions asked" in call("--threshold", -1, shards=place).out
    found = Paraphrases(place)
    assert len(found) == CLIPS and all(len(found.of(c, 0, text)) == 2 for c, text in captions_of(place).items())
