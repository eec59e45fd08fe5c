"""Where in a clip a text is heard, by the attention of a scorer over the frames of the clip.

Shape suffixes: W words of the text, F frames of the clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    scores: float32 [F] how well each frame matches the whole text.
    spans: the parts of the clip that match the whole text, best first.
    """

    words: list[str]
    times: NDArray[np.float64]
    weights: NDArray[np.float32]
    scores: NDArray[np.float32]
    spans: list[Moment]
