"""Verbs that read trained models or pretrained encoders."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from atr_scale.cli.common import Plugins, app, expanded_path, local_path
from atr_scale.errors import UserError

if TYPE_CHECKING:
    from atr_scale.precision import Products

EncoderPrecision = Annotated[
    Literal["fp32", "tf32", "bf16", "fp16"] | None,
    typer.Option("--precision", help="Precision of the encoders; by default that of the run, as in its validation."),
]


@app.command()
def evaluate(
    run: Annotated[
        str, typer.Argument(help="Run folder (its best checkpoint is used) or a checkpoints/step-N, a path or s3://.")
    ],
    shards: Annotated[str | None, typer.Option(help="Shards of the split; by default those of the run.")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split: validation, test (default), or a name for that in --shards, or for the result of --moments."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results and report.md; by default the run folder.")
    ] = None,
    class_prompt: Annotated[
        str | None,
        typer.Option(help="Caption that stands for a class of a labelled set, with {label} in the place of its name."),
    ] = None,
    relevance: Annotated[
        Path | None, typer.Option(help="Graded relevance of clips for captions: DCASE's CSV file, or an npz file.")
    ] = None,
    rerank: Annotated[
        int | None, typer.Option(min=1, help="Number of candidates per query that a pairwise scorer re-ranks.")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Run folder of the dual encoder that finds the candidates of --rerank.")
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(help="File of moments, JSON lines: measure how well the model finds them, in place of retrieval."),
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="Folder of the clips of --moments, by default that of the file; or --shards.")
    ] = None,
    precision: EncoderPrecision = None,
    plugins: Plugins = None,
) -> None:
    """Measure retrieval of a trained model on a split.

    Both directions are measured, text to audio and audio to text. On labelled sets zero-shot classification is measured
    too. With --moments it is measured instead how well the span that a model finds for a query fits the true window.

    \b
    Examples:
      atr-scale evaluate runs/quickstart
      atr-scale evaluate runs/quickstart --shards shards/test --split clotho
      atr-scale evaluate s3://bucket/runs/pretrain_wavcaps
      atr-scale evaluate runs/tap --rerank 100 --candidates runs/quickstart
      atr-scale evaluate runs/tap --moments moments.jsonl --audio recordings

    \b
    Two processes:
      torchrun --nproc-per-node 2 -m atr_scale.cli evaluate runs/quickstart
    """
    from atr_scale.distributed.start import distributed
    from atr_scale.evaluation.evaluate import evaluate_run
    from atr_scale.remote.fetch import results_of

    if moments is not None:
        given = {"class-prompt": class_prompt, "relevance": relevance, "rerank": rerank, "candidates": candidates}
        if other := next((name for name, value in given.items() if value is not None), None):
            raise UserError(f"--moments measures no retrieval, and --{other} is for retrieval: give one of them")
        _evaluate_moments(run, moments, split, audio, shards, out, precision, plugins or ())
        return
    if audio is not None:
        raise UserError("--audio is the folder of the clips of --moments: give both, or --shards alone")
    split = split or "test"
    with distributed() as (world, device), ExitStack() as held:
        folder = None if out else world.from_main(lambda: held.enter_context(results_of(run)))
        evaluation = evaluate_run(
            run,
            shards=shards and expanded_path(shards),
            split=split,
            out=out and Path(local_path(out)),
            class_prompt=class_prompt,
            relevance=relevance,
            rerank_top=rerank,
            candidates=candidates,
            precision=precision,
            plugins=plugins or (),
            world=world,
            device=device,
        )
        if world.is_main:
            if folder is not None:
                from atr_scale.training.monitor import record_evaluation

                record_evaluation(folder, evaluation.results[0].step, {split: evaluation.metrics})
            for name, value in evaluation.metrics.items():
                print(f"{name:<20} {value:.4f}")


def _evaluate_moments(
    run: str,
    file: Path,
    name: str | None,
    audio: Path | None,
    shards: str | None,
    out: Path | None,
    precision: Products | None,
    plugins: Sequence[str],
) -> None:
    from atr_scale.distributed.start import distributed
    from atr_scale.evaluation.moment_clips import evaluate_moments
    from atr_scale.inference import load_trained
    from atr_scale.remote.fetch import results_of

    if audio is not None and shards is not None:
        raise UserError("--audio and --shards both say where the clips are: give one of them")
    with distributed() as (world, device), ExitStack() as held:
        if out is None:
            world.from_main(lambda: held.enter_context(results_of(run)))
        result = evaluate_moments(
            run,
            load_trained(run, device, plugins, precision),
            expanded_path(str(file)),
            name=name,
            audio=audio and expanded_path(str(audio)),
            shards=shards and expanded_path(shards),
            out=out and Path(local_path(out)),
            world=world,
        )
        if result is not None:
            print(result.table())


@app.command("estimate")
def estimate_command(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders (their best checkpoints are used) or checkpoints/step-N.")
    ],
    shards: Annotated[
        list[str],
        typer.Option(help="Shards that the second stage trains on; once for each set, one table covers all of them."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the teacher tables, estimate.json and report.md.")],
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Number of clips embedded at once; by default evaluation.batch_size.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Scores of a pairwise scorer kept for every caption and clip; by default all."),
    ] = None,
    cross_fit: Annotated[
        bool, typer.Option("--cross-fit", help="Join runs that each left out one fold (data.folds) to one table.")
    ] = False,
    precision: EncoderPrecision = None,
    plugins: Plugins = None,
) -> None:
    """Write teacher tables for a second stage of training.

    Each model scores every caption and clip of the split. Its scores become one teacher table; the models are compared
    with each other. A table that exists already is kept.

    \b
    Examples:
      atr-scale estimate runs/a runs/b --shards shards/train --out teachers
      atr-scale estimate runs/tap --top-k 128 --shards shards/clotho/train \\
          --shards shards/audiocaps/train --out teachers
      atr-scale estimate runs/fold0 runs/fold1 --cross-fit \\
          --shards shards/train --out teachers

    \b
    Two processes:
      torchrun --nproc-per-node 2 -m atr_scale.cli estimate runs/a \\
          --shards shards/train --out teachers
    """
    from atr_scale.distributed.start import distributed
    from atr_scale.teachers.estimate import write_teacher_tables

    with distributed() as (world, device):
        comparison = write_teacher_tables(
            runs,
            shards=[expanded_path(place) for place in shards],
            out=out and Path(local_path(out)),
            batch_size=batch_size,
            top_k=top_k,
            cross_fit=cross_fit,
            precision=precision,
            plugins=plugins or (),
            world=world,
            device=device,
        )
    if comparison is not None:
        print(comparison.table())


@app.command("doctor")
def doctor_command(
    encoder: Annotated[
        str | None, typer.Option(help="Name of an audio encoder; by default the one that --checkpoint fits.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint: a name of fetch-weights, an original file or a transformers folder.")
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="Recording to tag with the classifier of the checkpoint.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes: AudioSet's class_labels_indices.csv.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the timed clips in seconds.")] = 10.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of clips timed at once.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed calls; the median is reported.")] = 3,
    json: Annotated[Path | None, typer.Option(help="JSON file for the same results; by default none.")] = None,
) -> None:
    """Check and time an audio encoder and its checkpoint.

    The report says whether the checkpoint loads, the shape of the output, and the time and memory of a forward and a
    training step on this machine. With --audio it names the most probable tags of a recording.

    \b
    Examples:
      atr-scale doctor --encoder passt_s16 --seconds 5
      atr-scale doctor --checkpoint mn04_as_mAP_432.pt --json mn04.json
      atr-scale doctor --checkpoint mn04.pt --audio dog.wav --labels labels.csv
    """
    from atr_scale.doctor import describe_facts, diagnose, write_facts

    facts = diagnose(
        encoder, checkpoint, audio=audio, labels=labels, seconds=seconds, batch_size=batch_size, repeats=repeats
    )
    for name, text in describe_facts(facts):
        print(f"{name:<20} {text}".rstrip())
    if json is not None:
        write_facts(facts, json)
