"""A chat model that writes paraphrases: any server with OpenAI's chat completions API.

The key comes from the environment variable OPENAI_API_KEY only, and is never shown.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import openai
import tenacity

from atr_scale.data.paraphrases.choose import MAX_WORDS
from atr_scale.errors import UserError, one_line

logger = logging.getLogger(__name__)

PROMPT_VERSION = 1
PROMPT = (
    "You reword captions of sound recordings. You get one caption as a JSON string. Write {count} different captions "
    f"that mean exactly the same, in the caption's language, each a single sentence of at most {MAX_WORDS} words. Keep "
    "every sound event and their order. Vary the wording and the structure of the sentence. Do not add events, places, "
    'numbers or names that the caption lacks. Answer with JSON alone, in this form: {{"paraphrases": ["...", "..."]}}'
)
CHARS_PER_TOKEN = 4
ATTEMPTS = 6
LONGEST_PAUSE_S = 60.0
BAD_ANSWERS = 3  # attempts for an answer that can be parsed


class Unanswered(Exception):
    """There are no paraphrases of this caption; other captions may still get some."""


@dataclass(frozen=True)
class Answer:
    """The model's paraphrases, unchanged, and the tokens of all attempts, as far as the server reports them."""

    texts: list[str]
    input_tokens: int
    output_tokens: int


def estimate_tokens(caption: str, count: int) -> tuple[int, int]:
    """Estimated (input, output) tokens of the request for `count` paraphrases of a caption, from its characters."""
    prompt = PROMPT.format(count=count)
    return (len(prompt) + len(caption)) // CHARS_PER_TOKEN + 10, count * (len(caption) // CHARS_PER_TOKEN + 4) + 10


def parse_answer(content: str | None) -> list[str]:
    """The paraphrases in a model's answer: its last JSON list of texts, or JSON object with such a list.

    Text around it is ignored (prose, a code fence, a model's reasoning). Raises Unanswered if there is no such list.
    """
    found: list[str] = []
    decoder, content, at = json.JSONDecoder(), content or "", 0
    while at < len(content):
        if content[at] in "[{":
            try:
                value, stop = decoder.raw_decode(content, at)
            except (ValueError, RecursionError):
                at += 1
                continue
            found, at = _texts(value) or found, stop
        else:
            at += 1
    if not found:
        raise Unanswered(f"no list of paraphrases in the answer {one_line(content, 80)!r}")
    return found


def _texts(value: Any) -> list[str]:
    lists = value.values() if isinstance(value, dict) else [value]
    return next((texts for v in lists if isinstance(v, list) and (texts := [t for t in v if isinstance(t, str)])), [])


class Endpoint:
    """A chat model at a URL, with a limited request rate and retries. Several threads may call `ask` at once.

    url: None for OPENAI_BASE_URL or OpenAI's own. count: paraphrases asked for. requests_per_minute: repeated attempts
    count too. timeout_s: seconds for one attempt. first_pause_s: seconds after the first failed attempt, then doubled.
    Raises UserError without a key, or if the URL is not one of http or https.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        *,
        count: int = 5,
        requests_per_minute: float = 300.0,
        timeout_s: float = 60.0,
        first_pause_s: float = 1.0,
    ) -> None:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key:
            raise UserError("OPENAI_API_KEY is not set: export your key (any word for a server that asks for none)")
        url = url or os.environ.get("OPENAI_BASE_URL") or None
        if url is not None and not url.startswith(("http://", "https://")):
            raise UserError(
                f"{url!r} is not an endpoint: give a URL like https://host/v1 (--endpoint, OPENAI_BASE_URL)"
            )
        self.model, self.count = model, count
        self._client = openai.OpenAI(api_key=key, base_url=url, max_retries=0, timeout=timeout_s)
        self.url = str(self._client.base_url).rstrip("/")
        self._interval, self._next_slot, self._lock = 60.0 / requests_per_minute, 0.0, threading.Lock()
        self._stopped = threading.Event()
        self._backoff = tenacity.wait_random_exponential(multiplier=first_pause_s, max=LONGEST_PAUSE_S)
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=self._pause,
            stop=tenacity.stop_any(tenacity.stop_after_attempt(ATTEMPTS), tenacity.stop_when_event_set(self._stopped)),
            sleep=tenacity.sleep_using_event(self._stopped),
            before_sleep=_log_pause,
            reraise=True,
        )

    def ask(self, caption: str) -> Answer:
        """Paraphrases of one caption. Raises Unanswered if this one gets none, UserError if no caption will get any."""
        tokens = [0, 0]
        for attempt in range(1, BAD_ANSWERS + 1):
            try:
                response = self._retrying(self._request, caption)
                usage = getattr(response, "usage", None)
                tokens[0] += getattr(usage, "prompt_tokens", 0) or 0
                tokens[1] += getattr(usage, "completion_tokens", 0) or 0
                choices = getattr(response, "choices", None)
                return Answer(parse_answer(choices[0].message.content if choices else None), tokens[0], tokens[1])
            except (Unanswered, json.JSONDecodeError, openai.APIResponseValidationError) as error:
                if attempt == BAD_ANSWERS:
                    raise Unanswered(str(error)) from None
            except openai.APIError as error:
                raise self._explain(error) from None
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End all waiting and open requests."""
        self._stopped.set()
        self._client.close()

    def _request(self, caption: str) -> Any:
        with self._lock:
            now = time.monotonic()
            slot = max(now, self._next_slot)
            self._next_slot = slot + self._interval
        self._stopped.wait(slot - now)
        return self._client.chat.completions.create(
            model=self.model,
            messages=[
                {"role": "system", "content": PROMPT.format(count=self.count)},
                {"role": "user", "content": json.dumps(caption, ensure_ascii=False)},
            ],
        )

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt: exponential with jitter, or the server's Retry-After if that is longer."""
        error = state.outcome.exception() if state.outcome else None
        stated = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
        asked = float(stated) if stated.isdecimal() else 0.0
        return max(self._backoff(state), min(asked, LONGEST_PAUSE_S))

    def _explain(self, error: openai.APIError) -> Exception:
        """UserError if no repetition can help. The server's message is quoted only if it cannot contain the key."""
        if _may_pass(error) or error.code == "content_filter":
            return Unanswered(_reason(error))
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            return UserError(f"{self.url} refuses the key (HTTP {status}): set OPENAI_API_KEY to one that may use it")
        if error.code == "insufficient_quota":
            return UserError(f"the account at {self.url} has no credit left: add some, then run the same command again")
        if status == 404:
            return UserError(
                f"{self.url} knows no model {self.model!r}, or the URL is wrong: check --model and --endpoint"
            )
        return UserError(f"{self.url} refuses the request ({_reason(error)}): check --model and --endpoint")


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, openai.APIStatusError):
        return error.code != "insufficient_quota" and (error.status_code in (408, 409, 429) or error.status_code >= 500)
    return isinstance(error, openai.APIConnectionError)  # its subclasses include timeouts


def _reason(error: openai.APIError) -> str:
    cause = f": {error.__cause__}" if isinstance(error, openai.APIConnectionError) and error.__cause__ else ""
    return one_line(f"{error}{cause}", 200)


def _log_pause(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    pause = state.next_action.sleep if state.next_action else 0.0
    reason = _reason(error) if isinstance(error, openai.APIError) else repr(error)
    logger.info("%s; attempt %d of %d in %.1f s", reason, state.attempt_number + 1, ATTEMPTS, pause)
