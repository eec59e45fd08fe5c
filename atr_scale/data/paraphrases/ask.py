"""Paraphrases of a training split: find the captions not asked about yet, ask, choose, store."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from tqdm import tqdm

from atr_scale.data import storage
from atr_scale.data.paraphrases.choose import Chooser
from atr_scale.data.paraphrases.endpoint import PROMPT_VERSION, Answer, Endpoint, Unanswered, estimate_tokens
from atr_scale.data.paraphrases.stored import Appender, caption_key, make_record, read_records, refuse_evaluation_split
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import open_shards
from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

READ_THREADS = 16
GIVE_UP_AFTER = 5  # captions in a row without an answer


@dataclass(frozen=True)
class ClipCaption:
    """Caption number `index` of a clip."""

    clip_id: str
    index: int
    text: str


@dataclass(frozen=True)
class Prices:
    """Prices of a million input and output tokens, in the currency of the endpoint's provider."""

    input: float
    output: float

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """The price of this many tokens."""
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


@dataclass
class Summary:
    """Counts of a run.

    asked and unanswered: captions. cosines: one for each kept paraphrase. rejected: the other paraphrases by reason.
    """

    asked: int = 0
    unanswered: int = 0
    cosines: list[float] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0

    def __str__(self) -> str:
        mean = f", mean cosine {sum(self.cosines) / len(self.cosines):.3f}" if self.cosines else ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.most_common())
        return (
            f"{self.asked} captions asked ({self.unanswered} without an answer); {len(self.cosines)} paraphrases kept"
            f"{mean}; {self.rejected.total()} rejected{f' ({reasons})' if reasons else ''}; "
            f"{self.input_tokens} tokens in, {self.output_tokens} out"
        )


def unasked_captions(location: str, limit: int | None = None) -> tuple[list[ClipCaption], int]:
    """(captions of the shards at `location` not asked about yet, at most `limit`; number of those asked about before).

    Raises UserError if the shards, or any clip in them, belong to a validation or test split.
    """
    shards = open_shards(location)
    refuse_evaluation_split(location, shards.split)
    asked = {key for key, _ in read_records(location)}
    captions: list[ClipCaption] = []
    unreadable: Counter[str] = Counter()
    before = 0

    def read(i: int) -> tuple[str, list[str], str] | BadSample:
        try:
            clip_id, texts, meta = shards.read_text(i)
        except BadSample as error:
            return error
        return clip_id, texts, str(meta.get("split", ""))

    with ThreadPoolExecutor(READ_THREADS if storage.is_remote(location) else 1) as pool:
        found = pool.map(read, range(len(shards)))
        for clip in tqdm(found, "reading captions", len(shards), unit=" clips", disable=None):
            if isinstance(clip, BadSample):
                unreadable[clip.reason] += 1
                continue
            clip_id, texts, split = clip
            refuse_evaluation_split(f"{location} (clip {clip_id})", split)
            new = [
                ClipCaption(clip_id, k, text)
                for k, text in enumerate(texts)
                if caption_key(clip_id, k, text) not in asked
            ]
            captions += new
            before += len(texts) - len(new)
    if unreadable:
        logger.warning("%s: unreadable samples left out: %s", location, dict(unreadable))
    return captions[:limit], before


def describe_cost(captions: Sequence[ClipCaption], count: int, prices: Prices | None) -> str:
    """One line with the estimated tokens and cost of asking for `count` paraphrases of each of `captions`."""
    tokens = [estimate_tokens(caption.text, count) for caption in captions]
    total = sum(t[0] for t in tokens), sum(t[1] for t in tokens)
    cost = f"about {prices.cost(*total):.2f} at the given prices" if prices else "cost unknown without the prices"
    return f"{len(captions)} captions to ask: about {total[0]} tokens in, {total[1]} out; {cost}"


def ask_for_paraphrases(
    location: str,
    captions: Sequence[ClipCaption],
    endpoint: Endpoint,
    chooser: Chooser,
    *,
    concurrency: int,
) -> Summary:
    """Ask for paraphrases of `captions` and store the chosen ones beside the shards at `location`.

    `concurrency`: requests at once. Stored paraphrases stay if the run is interrupted; the next run asks again about
    captions without an answer. Raises UserError if the endpoint refuses requests, or stops answering.
    """
    summary = Summary()
    origin = {"model": endpoint.model, "text_encoder": chooser.text_encoder, "prompt_version": PROMPT_VERSION}
    failed_in_a_row = 0
    with Appender(location) as store, tqdm(total=len(captions), unit=" captions", disable=None) as progress:
        for caption, future in _answers(endpoint, captions, concurrency):
            progress.update()
            summary.asked += 1
            try:
                answer = future.result()
            except Unanswered as error:
                logger.warning("%s, caption %d: %s", caption.clip_id, caption.index, error)
                summary.unanswered += 1
                failed_in_a_row += 1
                if failed_in_a_row == GIVE_UP_AFTER:
                    raise UserError(
                        f"{endpoint.url} left {GIVE_UP_AFTER} captions in a row without an answer ({error}): "
                        "check it, then run the same command again to continue"
                    ) from None
                continue
            failed_in_a_row = 0
            kept, rejected = chooser.choose(caption.text, answer.texts)
            store.append(make_record(caption.clip_id, caption.index, caption.text, kept, **origin))
            summary.cosines += [cosine for _, cosine in kept]
            summary.rejected += rejected
            summary.input_tokens += answer.input_tokens
            summary.output_tokens += answer.output_tokens
            progress.set_postfix(kept=len(summary.cosines), unanswered=summary.unanswered, refresh=False)
    return summary


def _answers(
    endpoint: Endpoint, captions: Sequence[ClipCaption], concurrency: int
) -> Iterator[tuple[ClipCaption, Future[Answer]]]:
    """Each caption with its answer, in the order of the answers."""
    pool = ThreadPoolExecutor(concurrency)
    queue = iter(captions)
    running: dict[Future[Answer], ClipCaption] = {}
    try:
        while True:
            # A second request waits behind each running one, so that no thread idles while an answer is processed.
            for caption in itertools.islice(queue, 2 * concurrency - len(running)):
                running[pool.submit(endpoint.ask, caption.text)] = caption
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future
    finally:
        endpoint.stop()
        pool.shutdown(wait=False, cancel_futures=True)
