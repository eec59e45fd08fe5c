"""Verbs that make and check training data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from atr_scale.cli.common import Plugins, app, expanded_path, local_path
from atr_scale.errors import UserError

shards_app = typer.Typer(help="Build and check WebDataset shards.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(shards_app, name="shards")


@shards_app.command("build")
def shards_build(
    corpus: Annotated[
        str,
        typer.Argument(
            help="Name of the corpus: audiocaps, clotho, wavcaps, folder (audio/ and captions.csv), or that of a "
            "plug-in."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder or s3://bucket/prefix for the shards of this split.")],
    root: Annotated[
        str | None,
        typer.Option(help="Folder of the corpus as it was downloaded; by default that of --captions."),
    ] = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Options of the corpus reader.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split: train, val or test, or the name that the corpus itself uses.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Number of clips in a shard.")] = 1000,
    encoding: Annotated[
        str, typer.Option(help="Format of the stored audio: flac, pcm16, or keep (the original bytes).")
    ] = "flac",
    sample_rate: Annotated[
        int, typer.Option(help="Sample rate of the stored audio in Hz; 0 keeps the rate of each clip.")
    ] = 32_000,
    workers: Annotated[int | None, typer.Option(help="Number of processes; by default one per core.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="File that lists overlapping clips to leave out; repeatable.")
    ] = None,
    keep_cut: Annotated[
        bool, typer.Option("--keep-cut", help="Keep the rest of files that are shorter than their header says.")
    ] = False,
    captions: Annotated[
        str | None, typer.Option(help="Table of the corpus folder: .csv, .tsv, .jsonl or .parquet.")
    ] = None,
    audio: Annotated[str | None, typer.Option(help="Folder with the audio files of the corpus folder.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Names of the table's columns, as file=path,caption=text.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Delimiter of the table; tab for a tab.")] = None,
    text_encoding: Annotated[str | None, typer.Option(help="Encoding of the table, as latin-1.")] = None,
    plugins: Plugins = None,
) -> None:
    """Build the shards of one split, with a manifest.

    An interrupted build continues at the shard that it was writing.

    \b
    Examples:
      atr-scale shards build clotho --root clotho --split val --out shards/val
      atr-scale shards build folder --root my_sounds --out s3://bucket/my_sounds
      atr-scale shards build folder --captions my.csv --audio wavs --out shards/my
    """
    from atr_scale.data.shard_builder import build_shards
    from atr_scale.plugins import import_plugins

    import_plugins(plugins or [])
    table = {"captions": captions, "audio": audio, "columns": columns, "delimiter": delimiter}
    given = {name: value for name, value in {**table, "encoding": text_encoding}.items() if value is not None}
    if root is None and captions is None:
        raise UserError("give the folder of the corpus with --root, or a table of your own with --captions")
    manifest = build_shards(
        corpus,
        expanded_path(root or os.path.dirname(captions or "") or "."),
        expanded_path(out),
        split=split,
        shard_size=shard_size,
        encoding=encoding,
        sample_rate=sample_rate or None,
        workers=workers,
        exclude=[expanded_path(path) for path in exclude or []],
        options={**_key_values(options or []), **given},
        keep_cut=keep_cut,
    )
    hours, dropped = manifest["seconds"] / 3600, manifest["dropped"] or "none"
    counts = f"{manifest['num_samples']} clips, {manifest['num_captions']} captions, {hours:.2f} h"
    print(f"{out}: {counts} in {len(manifest['shards'])} shards; left out: {dropped}")


def _key_values(arguments: list[str]) -> dict[str, str]:
    pairs = [argument.partition("=") for argument in arguments]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise UserError(f"unexpected argument {wrong[0]!r}: give options of the corpus as key=value")
    return {key: value for key, _, value in pairs}


@shards_app.command("check")
def shards_check(
    location: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix of the shards.")],
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every sample.")] = False,
) -> None:
    """Check shards against their manifest.

    Prints one line per problem. The exit code is 2 if there is a problem.

    \b
    Examples:
      atr-scale shards check shards/clotho/train
      atr-scale shards check s3://bucket/clotho/train --deep
    """
    from atr_scale.data.shard_check import check_shards

    problems = check_shards(expanded_path(location), deep=deep)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(2)
    print(f"{location}: no problems found")


@app.command("demo-data")
def demo_data(
    out: Annotated[Path, typer.Option(help="New folder for the corpora and the text encoder.")],
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same files.")] = 0,
    clips_scale: Annotated[float, typer.Option(min=0.001, help="Factor for the number of clips.")] = 1.0,
    sample_rate: Annotated[int, typer.Option(help="Sample rate of the audio in Hz.")] = 16_000,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; by default one per core.")] = None,
) -> None:
    """Make synthetic corpora and a small text encoder.

    The corpora have the formats of AudioCaps, Clotho and WavCaps. Beside them lie the relevance of every caption for
    every clip and the times at which the sounds are heard. Files that exist already are kept.

    \b
    Example:
      atr-scale demo-data --out demo --clips-scale 0.1
    """
    from atr_scale.demo.clips import Sizes
    from atr_scale.demo.corpora import training_captions, write_demo_corpora

    out = Path(local_path(out))
    write_demo_corpora(out, seed=seed, sample_rate=sample_rate, workers=workers, sizes=Sizes().scaled(clips_scale))
    if not (out / "text_encoder" / "model.safetensors").exists():
        from atr_scale.demo.text_encoder import build_demo_text_encoder

        build_demo_text_encoder(training_captions(out), out / "text_encoder", seed=seed)
    print(
        f"{out}: audiocaps/, clotho/, wavcaps/, text_encoder/, relevance/ and moments/; README.txt describes each file"
    )


@app.command("augment-captions")
def augment_captions(
    shards: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix of the shards of a training split.")],
    endpoint: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server; by default OPENAI_BASE_URL, else that of OpenAI."),
    ] = None,
    model: Annotated[str, typer.Option(help="Name of the chat model.")] = "gpt-4o-mini",
    text_encoder: Annotated[
        str, typer.Option(help="Transformers folder or name of the model that compares paraphrases with captions.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    paraphrases: Annotated[int, typer.Option(min=1, max=20, help="Number of paraphrases asked for per caption.")] = 5,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Number of closest paraphrases kept per caption; by default all above --threshold."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=-1, max=1, help="Least cosine similarity of a paraphrase with its caption.")
    ] = 0.7,
    requests_per_minute: Annotated[
        float, typer.Option(min=0.1, help="Most requests per minute, repeated attempts included.")
    ] = 300.0,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Number of requests at once.")] = 8,
    price_per_million_input: Annotated[
        float | None, typer.Option(min=0, help="Price of a million input tokens, for the cost estimate.")
    ] = None,
    price_per_million_output: Annotated[
        float | None, typer.Option(min=0, help="Price of a million output tokens, for the cost estimate.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most captions to ask about in this call; by default all.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Ask a chat model for paraphrases of captions.

    The paraphrases closest to their caption are stored beside the shards. Captions that have paraphrases already are
    skipped. The key of the server is read from OPENAI_API_KEY. Training uses paraphrases if data.augmented_captions is
    above 0; evaluation never does.

    \b
    Example:
      atr-scale augment-captions shards/clotho/train --limit 20
    """
    try:
        from atr_scale.data.paraphrases.ask import Prices, ask_for_paraphrases, describe_cost, unasked_captions
        from atr_scale.data.paraphrases.choose import Chooser
        from atr_scale.data.paraphrases.endpoint import Endpoint
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install openai tenacity") from None
    from atr_scale.encoders.sentence import SentenceEncoder

    server = Endpoint(model, endpoint, count=paraphrases, requests_per_minute=requests_per_minute)
    shards = expanded_path(shards)
    captions, before = unasked_captions(shards, limit)
    if not captions:
        print(f"{shards}: all {before} captions were asked before, nothing to do")
        return
    chooser = Chooser(SentenceEncoder(text_encoder), text_encoder, keep=keep or paraphrases, threshold=threshold)
    prices = None
    if price_per_million_input is not None and price_per_million_output is not None:
        prices = Prices(price_per_million_input, price_per_million_output)
    print(f"{server.url}, {model}: {describe_cost(captions, paraphrases, prices)} ({before} asked before)")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("the cost cannot be confirmed without a terminal: add --yes")
        if not typer.confirm("Ask them?"):
            return
    summary = ask_for_paraphrases(shards, captions, server, chooser, concurrency=concurrency)
    print(f"{shards}: {summary}")
    if prices is not None:
        print(f"cost: {prices.cost(summary.input_tokens, summary.output_tokens):.2f}")
