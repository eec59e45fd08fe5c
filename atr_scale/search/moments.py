"""The moments of a text in the sounds that a search has found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from atr_scale.errors import UserError
from atr_scale.inference import TrainedModel
from atr_scale.moments import Moment
from atr_scale.search.query import Hit, Searcher
from atr_scale.search.sources import item_audio
from atr_scale.search.vectors import Item

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocatedHit:
    """A hit whose start and stop are those of its best moment, and all of its moments, best first.

    Seconds count from the begin of the recording. A hit whose audio is gone has no moments, and stays as it was.
    """

    hit: Hit
    moments: list[Moment]


def needed_locator(searcher: Searcher) -> TrainedModel:
    """`Searcher.locator`. Raises UserError if there is none."""
    if searcher.locator is not None:
        return searcher.locator
    names = " and ".join(model.config.model.scorer.name for model in searcher.models)
    raise UserError(
        f"moments: the scorer {names} of this search has no attention over frames: re-rank with a run that has "
        "the scorer tap, lgmm or coattention (--rerank RUN)"
    )


def locate_hits(searcher: Searcher, text: str, hits: Sequence[Hit]) -> list[LocatedHit]:
    """The hits with the moments at which the text is heard in each, inside its window if it has one.

    Raises UserError like `needed_locator`.
    """
    model = needed_locator(searcher)
    found, gone = [], []
    for hit in hits:
        try:
            waveform, rate = item_audio(Item(hit.id, hit.path, hit.start, hit.stop))
        except UserError as error:
            gone.append(str(error))
            found.append(LocatedHit(hit, []))
            continue
        if hit.start is None:  # as much as was embedded
            waveform = waveform[: round(model.config.data.evaluation_seconds * rate)]
        first = hit.start or 0.0
        spans = model.moments(text, waveform, rate, len(waveform) / rate).spans
        moments = [Moment(round(first + span.start, 6), round(first + span.stop, 6), span.score) for span in spans]
        best = replace(hit, start=moments[0].start, stop=moments[0].stop) if moments else hit
        found.append(LocatedHit(best, moments))
    if gone:
        logger.warning("%d of %d results have no moments: %s", len(gone), len(hits), gone[0])
    return found
