"""An index of tones for tests of the search page, and its server."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from atr_scale.inference import load_trained
from atr_scale.search.index import build_index
from atr_scale.search.query import Searcher
from atr_scale.search.serve.answers import WordMoments
from atr_scale.search.serve.library import IndexLibrary
from atr_scale.search.vectors import Item, ModelId, Vectors
from tests.tiny_run import save_run, tiny_config

EVIL = "<script>document.title='owned'</script> a dog barks"
SOUNDS = 6


def make_index(folder: Path) -> Path:
    """An index of six tones of two seconds; the last one is a window of its file."""
    run = save_run(tiny_config(folder, folder / "unused"), folder / "run", seed=0)
    model = load_trained(run)
    items, waves = [], []
    for number in range(SOUNDS):
        path = folder / f"tone-{number}.wav"
        tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * number) * np.arange(32_000) / 16_000).astype(np.float32)
        soundfile.write(path, np.concatenate([np.zeros(16_000, np.float32), tone]) if number == 5 else tone, 16_000)
        captions = (EVIL, f"tone {number}")
        whole = Item(path.name, str(path), captions=captions)
        items.append(whole if number < 5 else Item(f"{path.name}#t=1,3", str(path), 1.0, 3.0, captions))
        waves.append(tone)
    Vectors(model.embed_audio(waves, 16_000), items, ModelId.of(run, model)).write(folder / "v.npy")
    build_index(run, folder / "v.npy", folder / "index")
    return folder / "index"


class WithMoments(IndexLibrary):
    """Every word is heard at a place of its own. `batches`: the numbers of texts that were embedded together."""

    def __init__(self, index: Path) -> None:
        super().__init__(Searcher(index))
        self.has_moments = True
        self.batches: list[int] = []

    def by_text(self, queries, top, captions):  # type: ignore[no-untyped-def]
        self.batches.append(len(queries))
        return super().by_text(queries, top, captions)

    def moments(self, text: str, waveform: NDArray[np.float32], rate: int) -> WordMoments:
        words = text.split()
        edges = np.linspace(0, len(waveform) / rate, len(words) + 1)
        return WordMoments(
            words=words,
            times=list(pairwise(edges.tolist())),
            weights=np.eye(len(words)).tolist(),
            spans=[{"start": 0.5, "stop": 1.0, "score": 0.9}],
        )


@contextlib.contextmanager
def served(index: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`atr-scale serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "atr_scale.cli", "serve", str(index), "--port", "0", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        told: list[str] = []
        for line in server.stdout:
            told.append(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise AssertionError("".join(told))
        yield server, found[0]
    finally:
        server.kill()
        server.wait()
