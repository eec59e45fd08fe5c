"""Where in a clip a text is heard: by the scores of single frames, and for its words by the attention of a scorer.

Shape suffixes: W words of the text, L its tokens, F frames of the clip, T tokens of the audio encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.data.tokenizer import ReadWord


@dataclass(frozen=True)
class Moment:
    """A part of a clip that matches a text: start and stop in seconds from the start of the clip, and its score."""

    start: float
    stop: float
    score: float


@dataclass(frozen=True)
class Moments:
    """Where the words of a text are heard in a clip; `TrainedModel.moments` returns it.

    words: [W] the words of the text as it was given.
    times: float64 [F, 2] start and stop of each frame in seconds from the start of the clip, in order of time.
    weights: float32 [W, F] attention of each word over the frames, from 0 to 1; the largest of a word is 1.
    scores: float32 [F] score of the whole text with each frame, as if the clip were this frame alone.
    spans: the parts of the clip that match the whole text, best first.
    """

    words: list[str]
    times: NDArray[np.float64]
    weights: NDArray[np.float32]
    scores: NDArray[np.float32]
    spans: list[Moment]


def moments_of(
    attention_LT: Tensor,
    scores_T: Tensor,
    words: Sequence[ReadWord],
    mask_T: Tensor,
    times_T2: NDArray[np.float64],
) -> Moments:
    """The moments of one text in one clip.

    attention: `Scorer.attention`; that of a word is the mean over its tokens. scores: `Scorer.scores_of_frames`. mask:
    which tokens of the clip are real. times: of all of them, as `AudioEncoder.token_times` gives them; tokens without
    audio are left out.
    """
    words_LT = attention_LT.float().cpu().numpy()
    rows_RT = np.stack([scores_T.float().cpu().numpy(), *(words_LT[word.tokens].mean(0) for word in words)])
    heard_T = mask_T.cpu().numpy() & (times_T2[:, 1] > times_T2[:, 0])
    times_F2, rows_RF = in_order_of_time(times_T2[heard_T], rows_RT[:, heard_T])
    scores_F, weights_WF = rows_RF[0], rows_RF[1:]
    weights_WF = weights_WF / np.maximum(weights_WF.max(1, keepdims=True), np.finfo(np.float32).tiny)
    spans = spans_of(scores_F, times_F2)
    return Moments([word.text for word in words], times_F2, weights_WF, scores_F, spans)


def in_order_of_time(
    times_T2: NDArray[np.float64], values_RT: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Times [F, 2] that ascend without overlaps, and values [R, F]: the mean over the tokens that share a time.

    Tokens share a time if windows overlap, or if the encoder repeats a short clip. Then all starts and stops are
    borders. Times are cut to microseconds, so that borders that are equal but for rounding are one.
    """
    borders, places = np.unique(np.floor(times_T2 * 1e6 + 1e-3) / 1e6, return_inverse=True)
    first_T, stop_T = places.reshape(times_T2.shape).T
    counts_T = stop_T - first_T
    token_P = np.repeat(np.arange(len(times_T2)), counts_T)  # pairs of a token and a time that it covers
    time_P = np.arange(len(token_P)) - np.repeat(counts_T.cumsum() - counts_T, counts_T) + first_T[token_P]
    tokens_F = np.bincount(time_P, minlength=len(borders) - 1)
    sums_RF = np.stack([np.bincount(time_P, row[token_P], len(borders) - 1) for row in values_RT])
    covered_F = tokens_F > 0
    times_F2 = np.stack([borders[:-1], borders[1:]], 1)[covered_F]
    return times_F2, (sums_RF[:, covered_F] / tokens_F[covered_F]).astype(np.float32)


def spans_of(scores_F: NDArray[np.float32], times_F2: NDArray[np.float64]) -> list[Moment]:
    """The parts of a clip whose frames score at least half way from its lowest to its highest score, best first.

    Neighbouring frames are one part. Its score is the mean of its frames, each weighted by its length.
    """
    above_F = scores_F >= (float(scores_F.min()) + float(scores_F.max())) / 2
    edges = np.flatnonzero(np.diff(above_F, prepend=False, append=False))
    spans = []
    for first, stop in edges.reshape(-1, 2):
        lengths = times_F2[first:stop, 1] - times_F2[first:stop, 0]
        score = float(np.average(scores_F[first:stop], weights=lengths))
        spans.append(Moment(float(times_F2[first, 0]), float(times_F2[stop - 1, 1]), score))
    return sorted(spans, key=lambda span: -span.score)
