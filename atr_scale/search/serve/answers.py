"""What the page's requests and answers hold; FastAPI writes their JSON schemas into /openapi.json."""

from __future__ import annotations

from pydantic import BaseModel, Field

from atr_scale.search.serve.marks import Mark
from atr_scale.search.serve.sounds import MAX_UPLOAD_BYTES, MAX_UPLOAD_SECONDS, UPLOAD_TYPES

MAX_QUERY = 500  # characters


class Result(BaseModel):
    """One result of a search."""

    id: str
    score: float
    path: str
    start: float | None = Field(description="of a window in its clip, in seconds; null for a whole clip")
    stop: float | None
    caption: str | None
    mark: Mark | None = Field(None, description="as the clip was marked for this query")


class Results(BaseModel):
    """The results of a search, best first."""

    query: str
    results: list[Result]


class NewMark(BaseModel):
    """A mark of a clip for a query; null removes it."""

    query: str = Field(max_length=MAX_QUERY)
    id: str
    mark: Mark | None


class MatchingPart(BaseModel):
    """A part of a sound, in seconds from its start."""

    start: float
    stop: float
    score: float


class WordMoments(BaseModel):
    """Where the words of a query are heard in a sound. F frames."""

    words: list[str]
    times: list[tuple[float, float]] = Field(description="start and stop of each frame in seconds, [F]")
    weights: list[list[float]] = Field(description="attention of each word, 0 to 1, [words, F]")
    spans: list[MatchingPart] = Field(description="the parts that match the whole query, best first")


class Shape(BaseModel):
    """What is drawn of a sound."""

    seconds: float
    start: float = Field(description="of this part in its clip, in seconds")
    peaks: list[tuple[float, float]] = Field(description="lowest and highest sample of parts of equal length")


class About(BaseModel):
    """What is served, and the limits of requests."""

    name: str
    version: str
    sounds: int
    has_captions: bool
    has_moments: bool
    marks_file: str
    examples: list[str] = Field(description="captions of the index, to begin with")
    max_query: int = MAX_QUERY
    max_upload_bytes: int = MAX_UPLOAD_BYTES
    max_upload_seconds: float = MAX_UPLOAD_SECONDS
    upload_types: tuple[str, ...] = UPLOAD_TYPES
