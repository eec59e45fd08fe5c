"""The addresses of the search page: the page itself, searches, sounds and their pictures, moments, and marks.

A client names clips by their ids in the index. No path of a request is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from atr_scale.data.sample import BadSample, clean_caption, is_visible
from atr_scale.errors import OneLineError, one_line
from atr_scale.search.serve.answers import MAX_QUERY, About, NewMark, Result, Results, Shape, WordMoments
from atr_scale.search.serve.batching import Batcher, Busy
from atr_scale.search.serve.guard import Guard
from atr_scale.search.serve.marks import Mark, Marks
from atr_scale.search.serve.sounds import (
    MAX_UPLOAD_BYTES,
    PlayedPart,
    Refused,
    byte_range,
    check_type,
    decode_upload,
)
from atr_scale.search.vectors import Item
from atr_scale.version import __version__

PAGES = Path(__file__).parent / "pages"
MAX_TOP = 100
EXAMPLES, SHORT = 4, 60  # examples of queries, and their characters at most
SOUNDS = 32  # that are kept decoded
RETRY_S = 1


class Library(Protocol):
    """What is served: the sounds of an index, and the models that search them."""

    name: str
    items: Sequence[Item]
    has_captions: bool
    has_moments: bool
    sample_rate: int

    def item(self, id: str) -> Item | None: ...

    def by_text(self, queries: list[str], top: int, captions: bool) -> list[list[Result]]: ...

    def by_audio(self, waveforms: list[NDArray[np.float32]], top: int, captions: bool) -> list[list[Result]]: ...

    def audio(self, item: Item) -> tuple[NDArray[np.float32], int]: ...

    def moments(self, text: str, waveform: NDArray[np.float32], rate: int) -> WordMoments: ...


Text = Annotated[str, Query(max_length=MAX_QUERY, description="the query")]
Id = Annotated[str, Query(description="id of a result")]
Top = Annotated[int, Query(ge=1, le=MAX_TOP, description="number of results")]
InCaptions = Annotated[bool, Query(description="search the captions of the index in place of its sounds")]


@dataclass(frozen=True)
class _Search:
    """Key of requests that share a forward pass."""

    by_text: bool
    top: int
    captions: bool


def create_app(library: Library, marks: Marks, token: str | None = None, batcher: Batcher | None = None) -> FastAPI:
    """The application. token: what every request must bring; None if only this machine can reach it."""
    batches = batcher or Batcher(lambda key, arguments: _answer(library, key, arguments))

    @contextlib.asynccontextmanager
    async def work(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batches.run())
        yield
        worker.cancel()

    app = FastAPI(
        title="atr-scale serve",
        description="Search sounds by text or by sound.",
        version=__version__,
        docs_url=None,  # FastAPI's pages load scripts from the internet
        redoc_url=None,
        lifespan=work,
    )
    app.add_middleware(Guard, token=token)
    _add_error_answers(app)

    def item_of(id: str) -> Item:
        if (item := library.item(id)) is None:
            raise HTTPException(404, f"there is no sound {id!r} in the index")
        return item

    @lru_cache(SOUNDS)
    def sound_of(id: str) -> PlayedPart:
        item = item_of(id)
        try:
            return PlayedPart.of(*library.audio(item), item.start or 0.0)
        except (BadSample, OneLineError) as error:
            raise HTTPException(410, f"the sound cannot be read any more: {one_line(error)}") from None

    def results(query: str, hits: list[Result], found: dict[str, Mark]) -> Results:
        marked = [hit.model_copy(update={"mark": found.get(clip_id(hit))}) for hit in hits]
        return Results(query=query, results=marked)

    @app.get("/api/about")
    def about() -> About:
        """What is served, and the limits of requests."""
        return About(
            name=library.name,
            version=__version__,
            sounds=len(library.items),
            has_captions=library.has_captions,
            has_moments=library.has_moments,
            marks_file=str(marks.path),
            examples=_examples(library.items),
        )

    @app.get("/api/search")
    async def search(q: Text, top: Top = 10, captions: InCaptions = False) -> Results:
        """Search by text."""
        query = _checked(q)
        _check_captions(library, captions)
        hits = await batches.ask(_Search(True, top, captions), query)
        return results(query, hits, marks.of(query))

    upload = {"requestBody": {"required": True, "content": {"audio/*": {"schema": {"format": "binary"}}}}}

    @app.post("/api/search/audio", openapi_extra=upload)
    async def search_by_sound(
        request: Request,
        name: Annotated[str, Query(max_length=300, description="file name of the sound; its ending is its type")] = "",
        top: Top = 10,
        captions: InCaptions = False,
    ) -> Results:
        """Search by a sound: the body of the request is an audio file."""
        _check_captions(library, captions)
        extension = check_type(name, request.headers.get("content-type", ""))
        contents = await _body(request)
        waveform = await asyncio.to_thread(decode_upload, contents, extension, library.sample_rate)
        hits = await batches.ask(_Search(False, top, captions), waveform)
        return results(name, hits, {})

    @app.get("/api/sound")
    def sound(id: Id) -> Shape:
        """Length and waveform of a result."""
        found = sound_of(id)
        return Shape(seconds=found.seconds, start=found.start, peaks=found.peaks())

    @app.get(
        "/api/sound.wav", response_class=Response, responses={206: {"description": "the range of bytes asked for"}}
    )
    def wav(request: Request, id: Id) -> Response:
        """A result as 16-bit WAV; ranges of bytes are answered."""
        contents = sound_of(id).wav
        headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}
        try:
            part = byte_range(request.headers.get("range"), len(contents))
        except Refused as refused:
            raise HTTPException(416, refused.detail, {"Content-Range": f"bytes */{len(contents)}"}) from None
        if part is None:
            return Response(contents, 200, headers, "audio/wav")
        headers["Content-Range"] = f"bytes {part[0]}-{part[1] - 1}/{len(contents)}"
        return Response(contents[slice(*part)], 206, headers, "audio/wav")

    @app.get("/api/spectrogram.png", response_class=Response)
    def spectrogram(id: Id) -> Response:
        """The mel spectrogram of a result: time from left to right, the loudest 70 dB."""
        return Response(sound_of(id).spectrogram(), 200, {"Cache-Control": "private, max-age=3600"}, "image/png")

    @app.get("/api/moments")
    async def moments(q: Text, id: Id) -> WordMoments:
        """Where the words of a query are heard in a result, if the model has attention over frames."""
        if not library.has_moments:
            raise HTTPException(404, "the model has no attention over frames")
        found: WordMoments = await batches.ask("moments", (_checked(q), await asyncio.to_thread(sound_of, id)))
        return found

    @app.put("/api/mark", status_code=204)
    def mark(new: NewMark) -> None:
        """Mark a result as right or wrong for a query, or remove its mark. The answer comes when it is saved."""
        query, clip = _checked(new.query), clip_id(item_of(new.id))
        try:
            marks.set(query, clip, new.mark)
        except OSError as error:
            raise HTTPException(507, f"the mark cannot be saved in {marks.path}: {error.strerror}") from None

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGES / "index.html")

    @app.get("/docs", include_in_schema=False)
    def docs() -> FileResponse:
        return FileResponse(PAGES / "docs.html")

    app.mount("/pages", StaticFiles(directory=PAGES))
    return app


def clip_id(item: Item | Result) -> str:
    """The id of the clip that an item or a result is, or is a window of."""
    return item.id if item.start is None else item.id.rpartition("#t=")[0] or item.id


def _examples(items: Sequence[Item]) -> list[str]:
    """Short captions from different places of the index."""
    spread = (items[k * len(items) // (8 * EXAMPLES)] for k in range(8 * EXAMPLES))
    texts = dict.fromkeys(min(item.captions, key=len) for item in spread if item.captions)
    return [text for text in texts if len(text) <= SHORT][:EXAMPLES]


def _answer(library: Library, key: Any, arguments: list[Any]) -> Sequence[Any]:
    if isinstance(key, _Search):
        search = library.by_text if key.by_text else library.by_audio
        return search(arguments, key.top, key.captions)
    return [library.moments(text, sound.waveform, sound.rate) for text, sound in arguments]


def _checked(query: str) -> str:
    query = clean_caption(query)
    if not is_visible(query):
        raise HTTPException(422, "the query is empty: type what you want to hear")
    return query


def _check_captions(library: Library, captions: bool) -> None:
    if captions and not library.has_captions:
        raise HTTPException(422, "the index has no captions: search its sounds")


async def _body(request: Request) -> bytes:
    """The body of a request. Raises Refused as soon as it is longer than an upload may be."""
    too_long = Refused(413, f"the file is too large: give at most {MAX_UPLOAD_BYTES >> 20} MiB")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_UPLOAD_BYTES:
        raise too_long
    contents = bytearray()
    async for part in request.stream():
        contents += part
        if len(contents) > MAX_UPLOAD_BYTES:
            raise too_long
    return bytes(contents)


def _add_error_answers(app: FastAPI) -> None:
    """Every error is {"detail": one sentence}."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _error(error.status, error.detail)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return _error(503, "too many requests wait: try again in a second", {"Retry-After": str(RETRY_S)})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _error(422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(OneLineError)
    @app.exception_handler(BadSample)
    async def unusable(request: Request, error: Exception) -> Response:
        return _error(422, one_line(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return _error(400, "the upload was broken off")


def _error(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status, headers)
