"""The verbs of `atr-scale`. Each imports what it needs when it is called, so that --help is instant.

A verb's function is called after it, `<verb>_command` if the plain name belongs to what does the work.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from atr_scale.errors import UserError
from atr_scale.version import __version__

app = typer.Typer(
    name="atr-scale",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"atr-scale {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Distributed large-scale pretraining for audio-text retrieval."""


shards_app = typer.Typer(help="Build and check WebDataset shards.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(shards_app, name="shards")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key.sub=value", help="values in the place of the file's")
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="module to import first: losses, scorers, encoders or a corpus; repeatable"),
]


class TakesOverrides(TyperCommand):
    """A verb with overrides: to who writes one like an option it says how it is written."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        for argument in args:
            key, _, value = argument.removeprefix("--").partition("=")
            if argument.startswith("--") and "." in key:
                raise UserError(
                    f"no option --{key}: an override has no dashes before it, write {key}={value or 'VALUE'}"
                )
        return super().parse_args(ctx, args)  # type: ignore[arg-type]


@shards_app.command("build")
def shards_build(
    corpus: Annotated[
        str, typer.Argument(help="audiocaps, clotho, wavcaps, folder (audio/ and captions.csv), or a plug-in's")
    ],
    root: Annotated[str, typer.Option(help="folder of the corpus as it was downloaded")],
    out: Annotated[str, typer.Option(help="folder or s3://bucket/prefix for the shards of this split")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="what the corpus's reader can be told")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, val or test, or the corpus's own name of a split")] = None,
    shard_size: Annotated[int, typer.Option(help="clips a shard")] = 1000,
    encoding: Annotated[str, typer.Option(help="flac, pcm16, or keep (the original bytes)")] = "flac",
    sample_rate: Annotated[int, typer.Option(help="Hz; 0 keeps each clip's own rate")] = 32_000,
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="list of overlapping clips to leave out; repeatable")
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Build the shards of one split of a corpus, with a manifest. An interrupted build goes on where it stopped.

    Example: atr-scale shards build clotho --root ~/clotho --split development --out shards/clotho/train
    """
    from atr_scale.data.shard_builder import build_shards
    from atr_scale.plugins import import_plugins

    import_plugins(plugins or [])
    manifest = build_shards(
        corpus,
        root,
        out,
        split=split,
        shard_size=shard_size,
        encoding=encoding,
        sample_rate=sample_rate or None,
        workers=workers,
        exclude=exclude or [],
        options=_key_values(options or []),
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
    location: Annotated[str, typer.Argument(help="folder or s3://bucket/prefix of shards")],
    deep: Annotated[bool, typer.Option("--deep", help="also decode every sample")] = False,
) -> None:
    """Check shards against their manifest; prints each problem on a line and exits with 2 where there is one.

    Example: atr-scale shards check shards/clotho/train
    """
    from atr_scale.data.shard_check import check_shards

    problems = check_shards(location, deep=deep)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(2)
    print(f"{location}: all is well")


@app.command("demo-data")
def demo_data(
    out: Annotated[Path, typer.Option(help="new folder for the corpora and the demo's text encoder")],
    seed: Annotated[int, typer.Option(help="the same seed gives the same files")] = 0,
    clips_scale: Annotated[float, typer.Option(min=0.001, help="all sizes times this")] = 1.0,
    sample_rate: Annotated[int, typer.Option(help="Hz")] = 16_000,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: one a core")] = None,
) -> None:
    """Make synthetic corpora in the formats of AudioCaps, Clotho and WavCaps, how true each caption is of each clip,
    and a small text encoder. What is there already is kept.

    Example: atr-scale demo-data --out demo --clips-scale 0.1
    """
    from atr_scale.demo.clips import Sizes
    from atr_scale.demo.corpora import training_captions, write_demo_corpora

    write_demo_corpora(out, seed=seed, sample_rate=sample_rate, workers=workers, sizes=Sizes().scaled(clips_scale))
    if not (out / "text_encoder" / "model.safetensors").exists():
        from atr_scale.demo.text_encoder import build_demo_text_encoder

        build_demo_text_encoder(training_captions(out), out / "text_encoder", seed=seed)
    print(f"{out}: audiocaps/, clotho/, wavcaps/, text_encoder/ and relevance/; README.txt says what each file is")


@app.command("augment-captions")
def augment_captions(
    shards: Annotated[str, typer.Argument(help="folder or s3://bucket/prefix of a training split's shards")],
    endpoint: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server; default: OPENAI_BASE_URL, or OpenAI's own")
    ] = None,
    model: Annotated[str, typer.Option(help="chat model to ask")] = "gpt-4o-mini",
    text_encoder: Annotated[
        str, typer.Option(help="transformers folder or name that compares paraphrases with captions")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    paraphrases: Annotated[int, typer.Option(min=1, max=20, help="asked of each caption")] = 5,
    keep: Annotated[int | None, typer.Option(min=1, help="closest ones kept; default: all above the threshold")] = None,
    threshold: Annotated[float, typer.Option(min=-1, max=1, help="least cosine with the caption")] = 0.7,
    requests_per_minute: Annotated[float, typer.Option(min=0.1, help="repeated attempts count too")] = 300.0,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="requests at once")] = 8,
    price_per_million_input: Annotated[float | None, typer.Option(min=0, help="of tokens, for the estimate")] = None,
    price_per_million_output: Annotated[float | None, typer.Option(min=0, help="of tokens, for the estimate")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="ask for so many captions only")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask for confirmation")] = False,
) -> None:
    """Ask a chat model for paraphrases of training captions, keep the closest, store them beside the shards. The key
    is read from OPENAI_API_KEY. What is stored already is not asked again. Training draws paraphrases where
    data.augmented_captions is above 0; evaluation never does.

    Example: atr-scale augment-captions shards/clotho/train --model gpt-4o-mini --limit 20
    """
    try:
        from atr_scale.data.paraphrases.ask import Prices, ask_for_paraphrases, describe_cost, unasked_captions
        from atr_scale.data.paraphrases.endpoint import Endpoint
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'atr-scale[augment]'") from None
    from atr_scale.encoders.sentence import SentenceEncoder

    server = Endpoint(model, endpoint, count=paraphrases, requests_per_minute=requests_per_minute)
    captions, before = unasked_captions(shards, limit)
    if not captions:
        print(f"{shards}: all {before} captions were asked before, nothing to do")
        return
    embed = SentenceEncoder(text_encoder)
    prices = None
    if price_per_million_input is not None and price_per_million_output is not None:
        prices = Prices(price_per_million_input, price_per_million_output)
    print(f"{server.url}, {model}: {describe_cost(captions, paraphrases, prices)} ({before} asked before)")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nobody is there to confirm the cost: add --yes")
        if not typer.confirm("Ask them?"):
            return
    summary = ask_for_paraphrases(
        shards,
        captions,
        server,
        embed,
        keep=keep or paraphrases,
        threshold=threshold,
        concurrency=concurrency,
        text_encoder=text_encoder,
    )
    print(f"{shards}: {summary}")
    if prices is not None:
        print(f"cost: {prices.cost(summary.input_tokens, summary.output_tokens):.2f}")


@app.command("train", cls=TakesOverrides)
def train_command(
    config: Annotated[str, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="print model size, memory, steps and shards; train nothing")
    ] = False,
    world_size: Annotated[int, typer.Option(help="ranks to plan for with --dry-run")] = 1,
    plugins: Plugins = None,
) -> None:
    """Train a retriever; a run folder that holds a checkpoint is continued. This is one process: several start with
    `accelerate launch -m atr_scale.train` or torchrun and the same arguments.

    Example: atr-scale train configs/quickstart/pretrain.yaml train.lr=1e-4
    """
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: give at least 1")
    from atr_scale.config import load_config

    resolved = load_config(config, overrides or (), plugins or ())
    if dry:
        from atr_scale.planner.dry_run import dry_run

        print(dry_run(resolved, world_size))
        return
    from atr_scale.training.loop import train

    try:
        train(resolved)
    except BrokenPipeError as error:
        # typer takes it for a reader that has gone and ends without a word; here a worker or a store has gone.
        raise RuntimeError("a pipe or connection of training broke") from error


@app.command("plan", cls=TakesOverrides)
def plan_command(
    config: Annotated[str, typer.Argument(help="YAML file of a run")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="H200, H100, A100-80, A100-40, L40S, A10, L4, V100 or RTX4090")] = "H100",
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    price: Annotated[float | None, typer.Option(min=0, help="USD a GPU hour; default: the table's")] = None,
    clips: Annotated[int, typer.Option(min=1, help="of the training set; default: WavCaps")] = 403_050,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="word pieces a caption; default: data.captions.max_tokens")
    ] = None,
    decode_ms: Annotated[
        float, typer.Option(min=0, help="of one core for 10 s of audio: 4.5 for flac, 0.11 for pcm16")
    ] = 4.5,
    out: Annotated[Path | None, typer.Option(help="folder for plan.json and plan.png")] = None,
    plugins: Plugins = None,
) -> None:
    """Say what a run will take before it starts: memory, network, time and cost, for this cluster and for 1 to 1024
    GPUs. Neither data nor weights nor a GPU are needed.

    Example: atr-scale plan configs/pretrain_wavcaps.yaml train.global_batch_size=4096 --gpu H100 --nodes 2
    """
    from atr_scale.config import load_config
    from atr_scale.planner.gpus import find_gpu
    from atr_scale.planner.planner import plan_run
    from atr_scale.planner.report import describe_plan, write_plan

    plan = plan_run(
        load_config(config, overrides or (), plugins or ()),
        find_gpu(gpu).with_price(price),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        clips=clips,
        tokens=tokens,
        decode_s=decode_ms / 1e4,
    )
    print(describe_plan(plan))
    for path in write_plan(plan, out) if out else ():
        print(path)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="run folder (its best checkpoint) or a checkpoints/step-N")],
    shards: Annotated[str | None, typer.Option(help="shards of the split; default: the run's own")] = None,
    split: Annotated[str, typer.Option(help="validation, test, or a name of your own for --shards")] = "test",
    out: Annotated[Path | None, typer.Option(help="where results and report.md go; default: the run folder")] = None,
    class_prompt: Annotated[
        str | None, typer.Option(help="caption of a class for labelled sets, with {label} in it")
    ] = None,
    relevance: Annotated[
        Path | None, typer.Option(help="which clips fit which caption: DCASE's CSV, or an npz file of grades")
    ] = None,
    rerank: Annotated[
        int | None, typer.Option(min=1, help="score only so many candidates a query, for scorers of pairs")
    ] = None,
    candidates: Annotated[str | None, typer.Option(help="run whose vectors choose the candidates of --rerank")] = None,
    plugins: Plugins = None,
) -> None:
    """Measure a trained model on a split: retrieval both ways, for labelled sets also zero-shot classification.

    Example: atr-scale evaluate runs/quickstart --split test
    Several ranks: torchrun --nproc-per-node 2 -m atr_scale.cli evaluate runs/quickstart
    """
    from atr_scale.distributed.start import distributed
    from atr_scale.evaluation.evaluate import evaluate_run

    with distributed() as (world, device):
        evaluation = evaluate_run(
            run,
            shards=shards,
            split=split,
            out=out,
            class_prompt=class_prompt,
            relevance=relevance,
            rerank_top=rerank,
            candidates=candidates,
            plugins=plugins or (),
            world=world,
            device=device,
        )
        if world.is_main:
            for name, value in evaluation.metrics.items():
                print(f"{name:<20} {value:.4f}")


@app.command("estimate")
def estimate_command(
    runs: Annotated[list[str], typer.Argument(help="run folders (their best checkpoints) or checkpoints/step-N")],
    shards: Annotated[str, typer.Option(help="shards of the split that a second stage trains on")],
    out: Annotated[Path, typer.Option(help="folder for the tables, estimate.json and report.md")],
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="clips embedded at once; default: the run's own evaluation.batch_size")
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Write the teacher scores of a second stage of training: one table a model, of every caption and clip of a split,
    and a comparison of the models. A table that is there already is kept.

    Example: atr-scale estimate runs/one runs/other --shards shards/clotho/train --out correspondences

    Several ranks: torchrun --nproc-per-node 2 -m atr_scale.cli estimate ...
    """
    from atr_scale.distributed.start import distributed
    from atr_scale.teachers.estimate import write_teacher_tables

    with distributed() as (world, device):
        comparison = write_teacher_tables(
            runs, shards=shards, out=out, batch_size=batch_size, plugins=plugins or (), world=world, device=device
        )
    if comparison is not None:
        print(comparison.table())


@app.command("doctor")
def doctor_command(
    encoder: Annotated[str | None, typer.Option(help="name of an audio encoder; default: the checkpoint's")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="original file, or transformers folder, to load")] = None,
    audio: Annotated[Path | None, typer.Option(help="recording to tag with the checkpoint's classifier")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="names of the classes: AudioSet's class_labels_indices.csv")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="length of the clips that are timed")] = 10.0,
    batch_size: Annotated[int, typer.Option(min=1, help="clips that are timed at once")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="timed calls, of which the median counts")] = 3,
    json: Annotated[Path | None, typer.Option(help="file for the same facts")] = None,
) -> None:
    """Examine an audio encoder and its checkpoint: does it load, what does it give, what does it cost here.

    Example: atr-scale doctor --checkpoint mn04_as_mAP_432.pt --audio dog.wav --labels class_labels_indices.csv
    """
    from atr_scale.doctor import describe_facts, diagnose, write_facts

    facts = diagnose(
        encoder, checkpoint, audio=audio, labels=labels, seconds=seconds, batch_size=batch_size, repeats=repeats
    )
    for name, text in describe_facts(facts):
        print(f"{name:<20} {text}".rstrip())
    if json is not None:
        write_facts(facts, json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the console script. Exit codes: 0 done, 2 the user's mistake (one line), 1 a failure of ours.

    arguments: default, those of the command line.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(arguments, prog_name="atr-scale")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
