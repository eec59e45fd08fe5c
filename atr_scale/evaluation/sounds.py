"""Clips of a split as short MP3 files, which every browser plays: for TensorBoard's players and for reports."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from atr_scale.data.decode import Crop, decode
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import ShardSet
from atr_scale.errors import one_line
from atr_scale.evaluation.result import EvaluationResult, file_stem

logger = logging.getLogger(__name__)

SOUND_RATE, SOUND_SECONDS = 16_000, 10.0  # Hz; of a longer clip the beginning
COMPRESSION = 0.9  # of MP3 at a variable rate: 20 to 30 KB for 10 s
SPLIT_BYTES = 2_500_000  # of all files of a split in a run folder
FOLDER = "audio"
LOUDEST = 0.8


class Sounds:
    """The audio of a split's clips by their index among the evaluated ones. rows: of the clips in the shard set."""

    def __init__(self, shards: ShardSet, rows: Sequence[int]) -> None:
        self._shards, self._rows = shards, rows
        self._kept: dict[int, bytes] = {}

    def mp3(self, clip: int) -> bytes:
        """At most SOUND_SECONDS of a clip as MP3; nothing if it cannot be read any more, which ends no training.

        It is kept, for a clip is retrieved more than once.
        """
        if clip not in self._kept:
            try:
                self._kept[clip] = encode_mp3(self._waveform(clip), SOUND_RATE)
            except (OSError, BadSample, soundfile.LibsndfileError) as error:
                logger.warning("the sound of %s is left out: %s", self._shards.keys[self._rows[clip]], one_line(error))
                self._kept[clip] = b""
        return self._kept[clip]

    def _waveform(self, clip: int) -> NDArray[np.float32]:
        sample, crop = self._shards.read(self._rows[clip]), Crop(0.0, SOUND_SECONDS)
        return decode(sample.audio, sample.extension, SOUND_RATE, pcm_rate=sample.sample_rate, crop=crop)

    def save(self, run_dir: Path, result: EvaluationResult) -> None:
        """Write the clips of the result's misses and examples to `sound_path`, as many as SPLIT_BYTES hold."""
        folder = sound_path(run_dir, result.split, 0).parent
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        spent = 0
        for clip in dict.fromkeys(clip for shown in (*result.misses, *result.examples) for clip in shown.clips):
            sound = self.mp3(clip)
            spent += len(sound)
            if spent > SPLIT_BYTES:
                return
            if sound:
                sound_path(run_dir, result.split, clip).write_bytes(sound)


def sound_path(run_dir: Path, split: str, clip: int) -> Path:
    """Where the sound of a clip of an evaluated split is written. clip: its index among the evaluated ones."""
    return run_dir / FOLDER / file_stem(split) / f"{clip}.mp3"


def encode_mp3(waveform: NDArray[np.floating], rate: int) -> bytes:
    """MP3 of float [samples]. Loud audio is made softer, because MP3 overshoots."""
    loudest = max(1.0, float(np.abs(waveform).max(initial=0)) / LOUDEST)
    file = io.BytesIO()
    soundfile.write(
        file, waveform / loudest, rate, format="MP3", bitrate_mode="VARIABLE", compression_level=COMPRESSION
    )
    return file.getvalue()
