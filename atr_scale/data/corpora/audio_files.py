"""The search for the audio files of clips, whose names metadata and file systems write differently."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# The first one is taken if a clip has several files. After the common ones come the others that libsndfile opens
# without parameters, and then those that only torchcodec can decode.
SOURCE_EXTENSIONS = (
    ".flac", ".wav", ".ogg", ".mp3", ".opus", ".m4a",
    ".wave", ".aiff", ".aif", ".aifc", ".oga", ".au", ".snd", ".w64", ".rf64", ".caf", ".avr", ".htk", ".svx", ".8svx",
    ".iff", ".mat", ".mpc", ".mp1", ".mp2", ".paf", ".fap", ".pvf", ".sd2", ".sds", ".sf", ".ircam", ".voc", ".nist",
    ".sph", ".wve", ".xi",
    ".mp4", ".webm", ".weba", ".aac", ".mka", ".mkv", ".mov", ".wma",
)  # fmt: skip
SHOWN_FILES = 3  # files named in the explanation of an ambiguous name


def walk_files(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """(path relative to its folder, full path) of every file below the folders that exist, in a fixed order.

    Links are followed, unless they lead to a folder that they lie in.
    """
    found = []
    for folder in folders:
        for parent, names, files in os.walk(folder, followlinks=True):
            names[:] = sorted(name for name in names if not _leads_up(os.path.join(parent, name)))
            for name in sorted(files):
                if not name.startswith("."):
                    path = os.path.join(parent, name)
                    found.append((os.path.relpath(path, folder), path))
    return found


def _leads_up(path: str) -> bool:
    """Whether a path is a link to a folder that it lies in: the walk through it would not end."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return any(os.path.commonpath([target, os.path.realpath(parent)]) == target for parent in Path(path).parents)


def walk_audio(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """As `walk_files`, but only files with the extension of an audio file."""
    return [(name, path) for name, path in walk_files(folders) if without_extension(name) != name]


def without_extension(name: str) -> str:
    """`name` without the extension of an audio file, if it has one: `a.b_70.000` is whole."""
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in SOURCE_EXTENSIONS else name


def audio_stem(name: str) -> str:
    """The last part of a path, without the extension of an audio file."""
    return without_extension(posixpath.basename(name))


def normal_name(name: str) -> str:
    """A file name for comparisons: in NFC, as file systems differ in this, and without white space at its ends."""
    return unicodedata.normalize("NFC", name).strip()


class AudioFiles:
    """Audio files by a part of their relative path: its stem, for example.

    files: (relative path, full path). key: the part of a relative path that names are compared with. ignore_case:
    names in another letter case fit too, if no file has the exact name and the files that fit have one name.
    """

    def __init__(
        self, files: Iterable[tuple[str, str]], key: Callable[[str], str] = audio_stem, ignore_case: bool = True
    ) -> None:
        best: dict[str, tuple[int, str]] = {}
        for name, path in files:
            extension = os.path.splitext(name)[1].lower()
            known = extension in SOURCE_EXTENSIONS
            rank = SOURCE_EXTENSIONS.index(extension) if known else len(SOURCE_EXTENSIONS)
            own = normal_name(key(name))
            if own not in best or rank < best[own][0]:
                best[own] = (rank, path)
        self._exact = {name: path for name, (_, path) in best.items()}
        self._folded: dict[str, list[str]] = {}
        for name in self._exact if ignore_case else ():
            self._folded.setdefault(name.casefold(), []).append(name)

    def find(self, names: Sequence[str]) -> str:
        """The path of the file with the first of `names` that fits, most exact name first; "" if none does."""
        normal = [normal_name(name) for name in names]
        for name in normal:
            if name in self._exact:
                return self._exact[name]
        for name in normal:
            similar = self._folded.get(name.casefold(), [])
            if len(similar) == 1:
                return self._exact[similar[0]]
        return ""

    def explain(self, names: Sequence[str]) -> str:
        """Why none of `names` was found: the names, and the files among which none is the only one that fits."""
        similar = [file for name in names for file in self._folded.get(normal_name(name).casefold(), [])]
        several = f"; several files fit: {', '.join(similar[:SHOWN_FILES])}" if similar else ""
        return f"tried {', '.join(dict.fromkeys(names))}{several}"
