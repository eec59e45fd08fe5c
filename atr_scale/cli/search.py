"""Verbs that build an index of sounds and search it."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atr_scale.cli.common import Plugins, app, expanded_path, local_path

if TYPE_CHECKING:
    from atr_scale.search.query import Hit


@app.command("index")
def index_command(
    run: Annotated[str, typer.Argument(help="Run folder (its best checkpoint is used) or a checkpoints/step-N.")],
    source: Annotated[str, typer.Argument(help="Folder of audio, shards, a table, or F.npy or F.parquet of `embed`.")],
    out: Annotated[Path, typer.Option(help="Folder of the index; an older index there is replaced.")],
    windows: Annotated[
        float | None, typer.Option(help="Seconds of the windows that recordings are cut into; by default whole clips.")
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Build an index of sounds for `atr-scale search`.

    Captions of the sounds are embedded too. Up to 100,000 sounds all are compared with a query. Above, a query reads a
    part of them, and the recall@10 against the full comparison is printed.

    \b
    Examples:
      atr-scale index runs/quickstart recordings --out clips.index --windows 10
      atr-scale index runs/quickstart s3://bucket/shards/test --out test.index
      atr-scale index runs/quickstart clips.npy --out clips.index
    """
    from atr_scale.search.index import build_index

    info = build_index(run, expanded_path(source), local_path(out), windows=windows, plugins=plugins or ())
    for name, one in info.sets.items():
        print(f"{'sounds' if name == 'vectors' else name:<10} {one}")


@app.command("search")
def search_command(
    index: Annotated[str, typer.Argument(help="Folder that `atr-scale index` wrote.")],
    text: Annotated[str | None, typer.Argument(help="Description of the sound that is looked for.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Audio file to search by, in place of a text.")] = None,
    captions: Annotated[bool, typer.Option("--captions", help="Find captions of the index, not sounds.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Number of results.")] = 10,
    all_windows: Annotated[
        bool, typer.Option("--all-windows", help="Show every window of a recording; by default its best one.")
    ] = False,
    run: Annotated[
        str | None, typer.Option(help="Run or checkpoint of the index, if it is no longer where it was.")
    ] = None,
    rerank: Annotated[
        str | None, typer.Option(help="Run that scores the best candidates again, mostly one with a pairwise scorer.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Number of candidates that --rerank scores.")] = 50,
    moments: Annotated[
        bool,
        typer.Option(
            "--moments", help="Tell when the text is heard in each result; needs a run with tap, lgmm or coattention."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugins: Plugins = None,
) -> None:
    """Find sounds by a text or by a sound.

    With --captions it finds captions of the index in place of its sounds. A recording that was cut into windows is
    found once, by its best window. Scores are cosines, or with --rerank those of that run. With --moments the times
    are those of the best moment, which is found by the run of --rerank: its scorer is tap, lgmm or coattention.

    \b
    Examples:
      atr-scale search clips.index "a dog barks in the rain"
      atr-scale search clips.index --audio clip.wav --top 5
      atr-scale search clips.index --audio clip.wav --captions --json
      atr-scale search clips.index "rain on a roof" --rerank runs/tap --moments
    """
    from atr_scale.errors import UserError
    from atr_scale.search.moments import locate_hits, needed_locator
    from atr_scale.search.query import Searcher

    if (text is None) == (audio is None):
        raise UserError("give one query: a text, or --audio FILE")
    if moments and (text is None or captions):
        raise UserError("--moments tells when a text is heard in sounds: give a text, without --captions")
    searcher = Searcher(expanded_path(index), run, rerank, candidates, plugins=plugins or ())
    located = None
    if moments:
        needed_locator(searcher)  # before a long search
    if text is not None:
        hits = searcher.by_text([text], top, captions, all_windows)[0]
        if moments:
            located = locate_hits(searcher, text, hits)
            hits = [one.hit for one in located]
    else:
        hits = searcher.by_audio([expanded_path(str(audio))], top, None, captions, all_windows)[0]
    if json:
        query = text if text is not None else str(audio)
        results = [asdict(hit) for hit in hits]
        for result, one in zip(results, located or (), strict=False):
            result["moments"] = [asdict(moment) for moment in one.moments]
        print(json_module.dumps({"query": query, "results": results}, ensure_ascii=False))
    else:
        print(_table(hits))


def _table(hits: list[Hit]) -> str:
    """A line a hit: rank, score, time, path and caption."""
    times = ["" if hit.start is None or hit.stop is None else f"{_time(hit.start)}-{_time(hit.stop)}" for hit in hits]
    width = max(4 if any(times) else 0, *map(len, times))
    paths = max(4, *(len(hit.path) for hit in hits))
    lines = [f"{'rank':>4}  {'score':>7}  {'time' * bool(width):<{width}}  {'path':<{paths}}  caption"]
    for rank, (hit, time) in enumerate(zip(hits, times, strict=True), 1):
        lines.append(f"{rank:>4}  {hit.score:>7.4f}  {time:<{width}}  {hit.path:<{paths}}  {hit.caption or ''}")
    return "\n".join(line.rstrip() for line in lines)


def _time(seconds: float) -> str:
    """1:02:03.5 for 3723.5 s."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{f'{hours}:{minutes:02d}' if hours else minutes}:{f'{rest:04.1f}'.removesuffix('.0')}"
