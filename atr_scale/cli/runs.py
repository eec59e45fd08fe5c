"""Verbs that read the configuration of a run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from atr_scale.cli.common import Overrides, Plugins, TakesOverrides, app
from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

ConfigFile = Annotated[str, typer.Argument(help="YAML file with the configuration of a run.")]


@app.command("train", cls=TakesOverrides)
def train_command(
    config: ConfigFile,
    overrides: Overrides = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Print model size, memory, steps and shards; train nothing.")
    ] = False,
    world_size: Annotated[int, typer.Option(help="Number of ranks that --dry-run plans for.")] = 1,
    plugins: Plugins = None,
) -> None:
    """Train a retriever, or continue a run.

    Training continues from the newest checkpoint of the run folder if there is one. This verb starts one process. To
    start several, give the same arguments to torchrun or to `accelerate launch -m atr_scale.train`. A larger
    train.steps or train.epochs prolongs a run, also after its end. docs/config.md explains overrides.

    \b
    Examples:
      atr-scale train configs/quickstart/pretrain.yaml train.lr=1e-4
      atr-scale train configs/papers/lgmm_cmsc.yaml model.scorer.name=mean
      atr-scale train run.yaml 'data.train+={shards: more}' '~data.train[0]'
      atr-scale train configs/quickstart/pretrain.yaml --dry-run --world-size 8

    \b
    Two processes:
      torchrun --nproc-per-node 2 -m atr_scale.train configs/pretrain_wavcaps.yaml
    """
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: give at least 1")
    logger.info("loading PyTorch, transformers and DeepSpeed")
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
        # typer would take it for a closed standard output and exit silently; here a worker or a store has gone.
        raise RuntimeError("a pipe or connection of training broke") from error


@app.command("plan", cls=TakesOverrides)
def plan_command(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="GPU model: H200, H100, A100-80, A100-40, L40S, A10, L4, V100 or RTX4090.")
    ] = "H100",
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Number of GPUs in a node.")] = 8,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU hour in USD; by default that of the built-in table.")
    ] = None,
    clips: Annotated[
        int,
        typer.Option(min=1, help="Number of clips (train.epoch_of: captions) in the training set; by default WavCaps."),
    ] = 403_050,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Number of tokens in a caption; by default data.captions.max_tokens, or 64."),
    ] = None,
    decode_ms: Annotated[
        float,
        typer.Option(
            min=0, help="Time of one core to decode 10 s of audio, in ms: about 4.5 for flac, 0.11 for pcm16."
        ),
    ] = 4.5,
    network: Annotated[
        float | None,
        typer.Option(help="Gbit/s between nodes for one ring over all GPUs; by default that of the table."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Report gpu_check.json of `python -m tools.gpu_check`, whose rates are used.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for plan.json and plan.png; by default none.")] = None,
    plugins: Plugins = None,
) -> None:
    """Estimate memory, time and cost of a run.

    The estimate covers memory, network traffic, time and cost on this cluster and on 1 to 1024 GPUs. It needs no data,
    no weights and no GPU.

    \b
    Examples:
      atr-scale plan configs/pretrain_wavcaps.yaml --gpu H100 --nodes 2
      atr-scale plan configs/papers/tap_pmr.yaml train.global_batch_size=8192
    """
    from atr_scale.config import load_config
    from atr_scale.planner.gpus import find_gpu
    from atr_scale.planner.planner import plan_run
    from atr_scale.planner.report import describe_plan, write_plan

    plan = plan_run(
        load_config(config, overrides or (), plugins or ()),
        find_gpu(gpu).with_price(price).with_network(network).with_measured(measured),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        clips=clips,
        tokens=tokens,
        decode_s=decode_ms / 1e4,
    )
    print(describe_plan(plan))
    for path in write_plan(plan, out) if out else ():
        print(path)


@app.command("status")
def status_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, also on S3.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: an object for one run, a list for several.")
    ] = False,
) -> None:
    """Tell how runs go, and why they ended.

    State, progress, attempts, lost time, checkpoints, dropped samples and silent ranks come from the files of the run
    folders alone, while the runs train or after their end, on any machine that sees the folders. Of a run on S3 the
    files of the last seconds may be missing.
    docs/operations.md explains the states and the JSON.

    \b
    Examples:
      atr-scale status runs/pretrain_wavcaps
      atr-scale status runs/*
      atr-scale status runs/pretrain_wavcaps --json
      atr-scale status s3://bucket/runs/pretrain_wavcaps
    """
    from atr_scale.remote.fetch import bring_files
    from atr_scale.remote.places import address_of
    from atr_scale.status import is_run, read_status
    from atr_scale.status_text import status_page, status_table

    folders = {run: bring_files(address) if (address := address_of(run)) else Path(run) for run in runs}
    if len(runs) > 1 and any(map(is_run, folders.values())):
        folders = {run: folder for run, folder in folders.items() if is_run(folder)}  # a pattern meets other folders
    found = [replace(read_status(folder), run=address_of(run) or folder) for run, folder in folders.items()]
    if as_json:
        values = [status.as_json() for status in found]
        print(json.dumps(values[0] if len(values) == 1 else values, indent=1))
    else:
        print(status_page(found[0]) if len(found) == 1 else status_table(found))
