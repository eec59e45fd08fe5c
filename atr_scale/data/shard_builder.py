"""Build shards from a corpus: tars (`shard_writer`), and a manifest.json beside them.

Each shard is one task of a process pool and leaves a record when it is written, so that an interrupted build continues
with the missing shards. Clips are ordered by a hash of their ids, which mixes them over the shards. The same input
gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atr_scale.data import storage
from atr_scale.data.audio_source import MAX_RATE, MIN_RATE
from atr_scale.data.corpora import Clip, Corpus, open_corpus
from atr_scale.data.dropped import DropLog, DroppedClip, write_dropped
from atr_scale.data.exclusions import ExclusionList, read_exclusions
from atr_scale.data.manifest import FORMAT, MANIFEST, read_manifest
from atr_scale.data.shard_writer import ENCODINGS, RECORDS, Task, finished_shards, record_path, write_shard
from atr_scale.data.values import valid_unicode
from atr_scale.distributed.lifeline import end_with
from atr_scale.errors import UserError
from atr_scale.files import full_disk_in_one_line
from atr_scale.locks import hold
from atr_scale.version import __version__

logger = logging.getLogger(__name__)

LOCK_FILE = ".build.lock"
SHARD_SIZE = 1000
SAMPLE_RATE = 32_000
# Starting a worker process takes as long as encoding about this many clips.
MIN_CLIPS_PER_WORKER = 200


@dataclass(frozen=True)
class BuildPlan:
    """Content of a build: clips with audio in their final order, what is left out and why, exclusion lists applied."""

    corpus: str
    split: str
    licence: str
    options: dict[str, Any]
    clips: list[Clip]
    dropped: list[DroppedClip]
    exclusions: list[dict[str, Any]]


def build_shards(
    corpus: str,
    root: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    shard_size: int = SHARD_SIZE,
    encoding: str = "flac",
    sample_rate: int | None = SAMPLE_RATE,
    workers: int | None = None,
    exclude: Sequence[str | Path] = (),
    options: Mapping[str, Any] | None = None,
    keep_cut: bool = False,
) -> dict[str, Any]:
    """Build the shards of one split of the corpus in `root` into the folder or s3:// prefix `out`.

    `shard_size`: clips in a shard. `encoding`: flac (16 bit), pcm16 (headerless little-endian int16), or keep (the
    original bytes at their own rate). `sample_rate` in Hz, None for each clip's own; flac and pcm16 are mono.
    `workers`: processes, by default one for each core. `exclude`: exclusion lists in addition to the corpus's own.
    `options`: options of the corpus's reader. `keep_cut`: keep files that are shorter than their header says.

    Returns the manifest. Rows and audio that cannot be used are left out, counted by reason and named in dropped.jsonl.
    Finished shards of an interrupted build are kept. Raises UserError for every mistake that the user can mend, also if
    `out` has a build with other settings.
    """
    reader = open_corpus(corpus, root, options)
    _check_settings(encoding, shard_size, sample_rate)
    location = str(out)
    storage.is_remote(location)  # refuses other schemes before any work
    sample_rate = None if encoding == "keep" else sample_rate
    plan = plan_build(reader, split, [Path(path) for path in exclude])
    settings = {
        "corpus": plan.corpus,
        "split": plan.split,
        "encoding": encoding,
        "sample_rate": sample_rate,
        "shard_size": shard_size,
        "exclusions": plan.exclusions,
        "options": plan.options or None,
        "keep_cut": keep_cut or None,
        "clips_sha256": _digest(plan.clips, reader.root),
    }
    storage.make_folder(location)
    with _only_build(location):
        finished = _finished(location, settings)
        if finished is not None:
            logger.info("%s is complete: nothing to do", location)
            return finished
        tasks = [
            Task(f"shard-{n:06d}.tar", location, plan.corpus, encoding, sample_rate, first, chunk, keep_cut)
            for n, first in enumerate(range(0, len(plan.clips), shard_size))
            if (chunk := plan.clips[first : first + shard_size])
        ]
        log = DropLog()
        log.add(plan.dropped)
        records = _run(tasks, location, workers or len(os.sched_getaffinity(0)), log)
        dropped = [*plan.dropped, *(DroppedClip(**clip) for record in records for clip in record["dropped"])]
        manifest = _manifest(plan, settings, records, dropped)
        write_dropped(location, dropped)
        storage.write_bytes(storage.join(location, MANIFEST), json.dumps(manifest, ensure_ascii=False).encode())
        _clean_up(location)
        return manifest


@contextmanager
def _only_build(location: str) -> Iterator[None]:
    """Two builds would write the same shards. On S3 there is no lock: they write equal objects, one after the other."""
    if storage.is_remote(location):
        yield
        return
    with full_disk_in_one_line(Path(location)), hold(Path(location) / LOCK_FILE, f"the folder {location}"):
        yield


def _check_settings(encoding: str, shard_size: int, sample_rate: int | None) -> None:
    if encoding not in ENCODINGS:
        raise UserError(f"unknown encoding '{encoding}': choose one of {', '.join(ENCODINGS)}")
    if shard_size < 1:
        raise UserError(f"shard size {shard_size}: give at least 1")
    if sample_rate is not None and not MIN_RATE <= sample_rate <= MAX_RATE:
        raise UserError(f"sample rate {sample_rate} Hz: give {MIN_RATE} to {MAX_RATE}, or 0 for each clip's own")


def plan_build(corpus: Corpus, split: str | None, exclude: Sequence[Path]) -> BuildPlan:
    """Read the metadata, apply the exclusion lists, find the audio. Raises UserError if no clip is left."""
    name, root, split = corpus.name, corpus.root, corpus.choose_split(split)
    rows = [_with_valid_texts(clip) for clip in corpus.read_clips(split)]
    dropped = [DroppedClip("", place, "bad_row", detail) for place, detail in corpus.bad_rows.items()]
    given = [read_exclusions(path) for path in exclude]
    for entry in given:
        _check_it_can_cover(entry, corpus, rows)
    lists = [*corpus.own_exclusions(), *given]
    exclusions = [_applied(entry, rows) for entry in lists]
    kept = [clip for clip in rows if not any(entry.covers(clip.meta) for entry in lists)]
    if not kept:
        raise UserError(f"the exclusion lists leave none of the {len(rows)} clips of {name} {split}: drop --exclude")
    paths = corpus.find_audio(split, kept)
    if not any(paths):
        wanted, tried = kept[0].clip_id, corpus.missing.get(kept[0].clip_id, "")
        example = f"e.g. {wanted}{f', {tried}' if tried else ''}"
        raise UserError(f"no audio for any of the {len(kept)} clips in {root} ({example}): is it downloaded there?")
    clips = []
    users: dict[str, list[str]] = {}
    for clip, path in zip(kept, paths, strict=True):
        users.setdefault(path, []).append(clip.clip_id)
    for clip, path in zip(kept, paths, strict=True):
        if not path:
            dropped.append(DroppedClip(clip.clip_id, "", "missing_audio", corpus.missing.get(clip.clip_id, "")))
        elif not clip.captions:
            dropped.append(DroppedClip(clip.clip_id, path, "no_caption", ""))
        elif len(users[path]) > 1:
            others = ", ".join(name for name in users[path] if name != clip.clip_id)
            dropped.append(DroppedClip(clip.clip_id, path, "shared_audio", f"the file is found for {others} too"))
        else:
            clips.append(replace(clip, path=path))
    if dropped:
        counts = dict(Counter(clip.reason for clip in dropped))
        logger.warning("%s %s: %d of %d clips left out: %s", name, split, len(kept) - len(clips), len(kept), counts)
    clips.sort(key=lambda clip: hashlib.blake2b(clip.clip_id.encode(), digest_size=8).digest())
    options = corpus.options.model_dump(mode="json", exclude_defaults=True)
    return BuildPlan(name, split, corpus.licence, options, clips, dropped, exclusions)


def _check_it_can_cover(entry: ExclusionList, corpus: Corpus, rows: list[Clip]) -> None:
    """UserError if no clip has ids of the list's kind; a warning if it covers none of the clips."""
    kinds = [kind for kind, ids in (("youtube_id", entry.youtube_ids), ("sound_id", entry.sound_ids)) if ids]
    if not any(clip.meta.get(kind) for clip in rows for kind in kinds):
        raise UserError(
            f"the exclusion list {entry.name} cannot exclude anything: no clip of {corpus.name} in {corpus.root} has "
            f"a {' or '.join(kinds)}; add the metadata that has it, name its column so, or drop --exclude"
        )
    if not any(entry.covers(clip.meta) for clip in rows):
        logger.warning("the exclusion list %s covers none of the %d clips of %s", entry.name, len(rows), corpus.name)


def _with_valid_texts(clip: Clip) -> Clip:
    """The clip without lone surrogates, which a JSON file may have as escapes and no shard can hold."""
    meta: dict[str, Any] = valid_unicode(clip.meta)
    return replace(clip, clip_id=valid_unicode(clip.clip_id), label=valid_unicode(clip.label), meta=meta)


def _applied(entry: ExclusionList, rows: list[Clip]) -> dict[str, Any]:
    excluded = sum(entry.covers(clip.meta) for clip in rows)
    logger.info("exclusion list %s: %d of %d clips left out", entry.name, excluded, len(rows))
    return {"name": entry.name, "sha256": entry.sha256, "entries": entry.entries, "excluded": excluded}


def _digest(clips: list[Clip], root: Path) -> str:
    """Identity of the planned clips. Paths count relative to root, so that a moved corpus is still the same."""
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(json.dumps({**asdict(clip), "path": os.path.relpath(clip.path, root)}).encode())
    return digest.hexdigest()


def _finished(location: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same build if it is complete; otherwise None, and `settings` are stored for the next call.

    Raises UserError if the location has shards of another build.
    """
    settings_path = record_path(location, "settings")
    files = storage.list_files(location)
    manifest = read_manifest(location) if MANIFEST in files else None
    if manifest is not None:
        found = {**manifest.get("build", {}), **{name: manifest.get(name) for name in settings if name in manifest}}
    elif storage.exists(settings_path):
        found = json.loads(storage.read_bytes(settings_path))
    elif any(name.endswith(".tar") for name in files):
        raise UserError(f"{location} has shards that `atr-scale shards build` did not write: choose an empty --out")
    else:
        if not storage.is_remote(location):
            storage.make_folder(storage.join(location, RECORDS))
        storage.write_bytes(settings_path, json.dumps(settings).encode())
        return None
    changed = [name.removesuffix("_sha256") for name, value in settings.items() if found.get(name) != value]
    if changed:
        raise UserError(
            f"{location} was begun with other settings ({', '.join(changed)} differ): "
            "choose another --out or delete that folder"
        )
    return manifest


def _run(tasks: list[Task], location: str, workers: int, log: DropLog) -> list[dict[str, Any]]:
    """The records of all shards in order; missing shards are built."""
    done = finished_shards(location)
    todo = [task for task in tasks if task.name not in done]
    if done:
        logger.info("%s: %d of %d shards are already there", location, len(done), len(tasks))
    total, left = (sum(len(task.clips) for task in some) for some in (tasks, todo))
    workers = min(workers, len(todo), left // MIN_CLIPS_PER_WORKER)
    with tqdm(desc="building shards", total=total, initial=total - left, unit=" clips", disable=None) as progress:
        for task, record in _results(todo, workers):
            done[task.name] = record
            log.add(DroppedClip(**clip) for clip in record["dropped"])
            progress.update(len(task.clips))
            progress.set_postfix(seconds=round(sum(r["seconds"] for r in done.values())), refresh=False)
    return [done[task.name] for task in tasks]


def _results(tasks: list[Task], workers: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    if workers <= 1:
        yield from ((task, write_shard(task)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=end_with, initargs=(os.getpid(),)) as pool:
        futures = {pool.submit(write_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a build worker died (out of memory?); the same command continues with the missing shards"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _manifest(
    plan: BuildPlan, settings: dict[str, Any], records: list[dict[str, Any]], left_out: list[DroppedClip]
) -> dict[str, Any]:
    dropped = Counter(clip.reason for clip in left_out)
    shards = [record["shard"] for record in records]
    num_samples = sum(shard["samples"] for shard in shards)
    scaled = [clip_id for record in records for clip_id in record.get("scaled", [])]
    if scaled:
        logger.warning("%d clips have float samples beyond 1 and are scaled: %s", len(scaled), ", ".join(scaled[:5]))
    if num_samples == 0:
        raise UserError(f"none of the {len(plan.clips)} clips of {plan.corpus} can be used: {dict(dropped)}")
    return {
        "format": FORMAT,
        "tool_version": __version__,
        "corpus": plan.corpus,
        "split": plan.split,
        "licence": plan.licence,
        "encoding": settings["encoding"],
        "sample_rate": settings["sample_rate"],
        "exclusions": plan.exclusions,
        **({"options": plan.options} if plan.options else {}),
        **({"keep_cut": True} if settings["keep_cut"] else {}),
        "num_samples": num_samples,
        "num_captions": sum(record["captions"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "dropped": dict(sorted(dropped.items())),
        **({"scaled": len(scaled)} if scaled else {}),
        "build": {"shard_size": settings["shard_size"], "clips_sha256": settings["clips_sha256"]},
        "shards": shards,
    }


def _clean_up(location: str) -> None:
    """Remove the records of the build, and temporary files that an interrupted one left."""
    storage.remove_folder(storage.join(location, RECORDS))
    for name in storage.list_files(location):
        if name.startswith(".") and name.endswith(".tmp"):
            storage.remove_file(storage.join(location, name))
