"""The clips of the demo corpora with their scenes and captions, drawn before any audio is rendered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import numpy as np

from atr_scale.data.corpora.audiocaps import AudioCaps
from atr_scale.data.corpora.clotho import Clotho
from atr_scale.data.corpora.files import audioset_clip_id
from atr_scale.data.splits import is_held_out
from atr_scale.demo.captions import DemoCaption, write_captions
from atr_scale.demo.scenes import Scene, draw_scene

WAVCAPS_SOURCES = {
    # folder -> (name in clip ids, fraction of the corpus, shortest and longest clip in seconds)
    "AudioSet_SL": ("audioset", 0.35, 10.0, 10.0),
    "BBC_Sound_Effects": ("bbc", 0.15, 8.0, 25.0),
    "FreeSound": ("freesound", 0.40, 5.0, 20.0),
    "SoundBible": ("soundbible", 0.10, 3.5, 9.0),
}
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@dataclass(frozen=True)
class Sizes:
    """Clips in each split. With the default a pretraining run takes minutes on two cores."""

    audiocaps_train: int = 1200
    audiocaps_val: int = 100
    audiocaps_test: int = 250
    clotho_development: int = 200
    clotho_validation: int = 40
    clotho_evaluation: int = 60
    wavcaps_train: int = 800
    shared: int = 8  # clips of each split of AudioCaps and Clotho that are in WavCaps too

    def scaled(self, factor: float) -> Sizes:
        """All sizes times `factor`, at least 4 clips in a split and one shared."""
        return Sizes(**{name: max(1 if name == "shared" else 4, round(n * factor)) for name, n in asdict(self).items()})


@dataclass(frozen=True)
class DemoClip:
    """One clip.

    native_id: YouTube id, Clotho file name, or WavCaps id. path: audio file relative to the folder of all corpora.
    """

    corpus: str
    split: str
    clip_id: str
    native_id: str
    path: PurePosixPath
    scene: Scene
    captions: tuple[DemoCaption, ...]
    start_time: int = 0  # AudioCaps: seconds into the video
    sound_id: str = ""  # Clotho: the Freesound id
    source: str = ""  # WavCaps: the source's folder

    @property
    def name(self) -> str:
        """<corpus>/<split>"""
        return f"{self.corpus}/{self.split}"


def plan_clips(seed: int, sizes: Sizes) -> list[DemoClip]:
    """All clips of the three corpora. No two have the same content, except the `shared` ones of WavCaps."""
    planner = _Planner(seed)
    counts = asdict(sizes)
    clips = [
        planner.audiocaps(split, i, num_captions=5 if is_held_out(split) else 1)
        for split in AudioCaps.splits
        for i in range(counts[f"audiocaps_{split}"])
    ]
    clips += [planner.clotho(split, i) for split in Clotho.splits for i in range(counts[f"clotho_{split}"])]
    twins: dict[str, list[DemoClip]] = {"AudioSet_SL": [], "FreeSound": []}
    for name in dict.fromkeys(clip.name for clip in clips):
        members = [clip for clip in clips if clip.name == name][: sizes.shared]
        twins["AudioSet_SL" if name.startswith("audiocaps") else "FreeSound"] += members
    for source, (_, fraction, *_) in WAVCAPS_SOURCES.items():
        own = max(1, round(sizes.wavcaps_train * fraction) - len(twins.get(source, [])))
        clips += [planner.wavcaps(source, i, twin=None) for i in range(own)]
        clips += [planner.wavcaps(source, own + i, twin) for i, twin in enumerate(twins.get(source, []))]
    return clips


class _Planner:
    """Draws clips one by one. Each has its own generator, so that the clips of a split do not depend on other sizes."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.signatures: set[str] = set()
        self.ids: set[str] = set()

    def audiocaps(self, split: str, i: int, num_captions: int) -> DemoClip:
        rng = self._rng("audiocaps", split, i)
        youtube_id = self._fresh(lambda: _draw_youtube_id(rng))
        scene = self._scene(rng, 10.0)
        start = 10 * int(rng.integers(30))
        return DemoClip(
            "audiocaps",
            split,
            audioset_clip_id(youtube_id),
            youtube_id,
            PurePosixPath("audiocaps", "audio", split, f"Y{youtube_id}.wav"),
            scene,
            tuple(write_captions(rng, scene, num_captions)),
            start_time=start,
        )

    def clotho(self, split: str, i: int) -> DemoClip:
        rng = self._rng("clotho", split, i)
        sound_id = self._fresh(lambda: str(rng.integers(1000, 700_000)))
        scene = self._scene(rng, float(rng.integers(150, 301)) / 10)
        file_name = f"field recording {split[:3]}.{i + 1:04d}.wav"
        return DemoClip(
            "clotho",
            split,
            f"clotho/{file_name}",
            file_name,
            PurePosixPath("clotho", split, file_name),
            scene,
            tuple(write_captions(rng, scene, 5)),
            sound_id=sound_id,
        )

    def wavcaps(self, source: str, i: int, twin: DemoClip | None) -> DemoClip:
        rng = self._rng("wavcaps", source, i)
        name, _, shortest, longest = WAVCAPS_SOURCES[source]
        if twin is not None:
            scene = twin.scene
            native_id = f"Y{twin.native_id}.wav" if source == "AudioSet_SL" else twin.sound_id
        else:
            scene = self._scene(rng, round(float(rng.uniform(shortest, longest)), 1))
            if source == "AudioSet_SL":
                native_id = f"Y{self._fresh(lambda: _draw_youtube_id(rng))}.wav"
            elif source == "BBC_Sound_Effects":
                native_id = f"07{i:06d}"
            else:
                native_id = self._fresh(lambda: str(rng.integers(1000, 700_000)))
        stem = native_id.removesuffix(".wav")
        return DemoClip(
            "wavcaps",
            "train",
            audioset_clip_id(stem.removeprefix("Y")) if source == "AudioSet_SL" else f"wavcaps/{name}/{stem}",
            native_id,
            PurePosixPath("wavcaps", "Waveforms", source, f"{stem}.flac"),
            scene,
            tuple(write_captions(rng, scene, 1)),
            source=source,
        )

    def _rng(self, *names: str | int) -> np.random.Generator:
        words = [int.from_bytes(str(name).encode(), "big") % 2**63 for name in names]
        return np.random.default_rng([self.seed, *words])

    def _scene(self, rng: np.random.Generator, seconds: float) -> Scene:
        scene = draw_scene(rng, seconds)
        while scene.signature in self.signatures:
            scene = draw_scene(rng, seconds)
        self.signatures.add(scene.signature)
        return scene

    def _fresh(self, draw: Callable[[], str]) -> str:
        new = draw()
        while new in self.ids:
            new = draw()
        self.ids.add(new)
        return new


def _draw_youtube_id(rng: np.random.Generator) -> str:
    return "".join(_ALPHABET[k] for k in rng.integers(len(_ALPHABET), size=11))
