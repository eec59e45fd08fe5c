"""The weights table: the files of the original projects by name, with address, size, checksum and licence.

A name stands wherever a checkpoint is asked for: `model.audio.checkpoint: mn40`. `atr-scale fetch-weights NAME` puts
its file into `checkpoints/`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from atr_scale.errors import UserError

FOLDER = Path("checkpoints")


@dataclass(frozen=True)
class Project:
    """Who publishes weights. page: for people. address: of a file, with {file} or {place} in it."""

    page: str
    address: str
    licence: str


@dataclass(frozen=True)
class Weights:
    """A file of an original project, and the audio encoder that loads it.

    size: in bytes. checksum: "sha256:..." or "md5:...". Both are None if no published value is known. place: what the
    address of the project needs instead of the file's name.
    """

    encoder: str
    file: str
    project: Project
    size: int | None = None
    checksum: str | None = None
    place: str = ""

    @property
    def address(self) -> str:
        return self.project.address.format(file=quote(self.file), place=self.place)


def _release(page: str, tag: str, licence: str) -> Project:
    return Project(f"{page}/releases/tag/{tag}", f"{page}/releases/download/{tag}/{{file}}", licence)


# This form of a Google Drive address answers with the file instead of a page that asks for confirmation.
_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id={place}"
_PANNS = Project(
    "https://zenodo.org/records/3987831", "https://zenodo.org/records/3987831/files/{file}", "MIT, weights CC BY 4.0"
)
_HTSAT = Project("https://github.com/RetroCirce/HTS-Audio-Transformer", _DRIVE, "MIT")
_LAION = Project(
    "https://huggingface.co/lukewys/laion_clap",
    "https://huggingface.co/lukewys/laion_clap/resolve/main/{file}",
    "CC0-1.0",
)
_ATST = Project("https://github.com/Audio-WestlakeU/audiossl", _DRIVE, "MIT, weights CC BY 4.0")
_ATST_SED = Project("https://github.com/Audio-WestlakeU/ATST-SED", _DRIVE, "MIT, weights CC BY 4.0")
_EFFICIENTAT = _release("https://github.com/fschmid56/EfficientAT", "v0.0.1", "MIT")
_PASST, _PASST_SWA, _PASST_KD = (
    _release("https://github.com/kkoutini/PaSST", tag, "Apache-2.0")
    for tag in ("v0.0.2-audioset", "v0.0.1-audioset", "v.0.0.9")
)

WEIGHTS = {
    "cnn14": Weights(
        "cnn14",
        "Cnn14_mAP=0.431.pth",
        _PANNS,
        327_428_481,
        "sha256:0dc499e40e9761ef5ea061ffc77697697f277f6a960894903df3ada000e34b31",
    ),
    "resnet38": Weights(
        "resnet38", "ResNet38_mAP=0.434.pth", _PANNS, 299_615_982, "md5:bf12f36aaabac4e0855e22d3c3239c1b"
    ),
    "htsat": Weights("htsat", "HTSAT_AudioSet_Saved_1.ckpt", _HTSAT, place="1OK8a5XuMVLyeVKF117L8pfxeZYdfSDZv"),
    "clap": Weights(
        "clap",
        "630k-audioset-best.pt",
        _LAION,
        1_863_587_645,
        "sha256:8053c9775516af2f4902e1e8281e356cc1bf7a85e8b761908170767b77c3f037",
    ),
    "clap_base": Weights(
        "clap_base",
        "music_speech_audioset_epoch_15_esc_89.98.pt",
        _LAION,
        2_352_471_003,
        "sha256:51c68f12f9d7ea25fdaaccf741ec7f81e93ee594455410f3bca4f47f88d8e006",
    ),
    "passt_s16": Weights("passt_s16", "passt-s-f128-p16-s16-ap.468.pt", _PASST),
    "passt_s10": Weights("passt_s10", "passt-s-kd-ap.486.pt", _PASST_KD),
    "passt_s10_swa": Weights("passt_s10", "passt-s-f128-p16-s10-ap.476-swa.pt", _PASST_SWA),
    "atst_frame": Weights("atst_frame", "atst_as2M.ckpt", _ATST_SED, place="1_xb0_n3UNbUG_pH1vLHTviLfsaSfCzxz"),
    "atst_frame_ssl": Weights(
        "atst_frame",
        "atstframe_base.ckpt",
        _ATST,
        1_459_523_813,
        "sha256:9f812544983add849f45ef03c4ce10184729adee082c0bdd347764f4835bb3da",
        place="1bGJSZWlAIIJ6GL5Id5dW0PTB72DL-QDQ",
    ),
    "mn04": Weights(
        "mn04",
        "mn04_as_mAP_432.pt",
        _EFFICIENTAT,
        4_066_513,
        "sha256:899a8c6217063f6941793102a2780b3dd788ab11fce468d9cf5f0577c453321c",
    ),
    "mn10": Weights(
        "mn10",
        "mn10_as_mAP_471.pt",
        _EFFICIENTAT,
        19_708_753,
        "sha256:0bd7dc2443af498c289a2e739f02ebb515d6aa3fd3ab9db539c86123ae368a4e",
    ),
    "mn40": Weights("mn40", "mn40_as_ext_mAP_487.pt", _EFFICIENTAT),
    "mn40_as": Weights("mn40", "mn40_as_mAP_484.pt", _EFFICIENTAT),
}


def weights_by_name(name: str) -> Weights:
    """The entry of the weights table. Raises UserError with the nearest names for an unknown one."""
    if name not in WEIGHTS:
        close = difflib.get_close_matches(name, WEIGHTS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(WEIGHTS)}"
        raise UserError(f"no weights are called {name!r}: {hint}")
    return WEIGHTS[name]


def checkpoint_path(checkpoint: str | Path) -> Path:
    """The file of a checkpoint that is given by its name in the weights table, or by its path.

    Raises UserError if the file of a name is not in `checkpoints/`, or if a plain word is neither a name nor a file.
    """
    name, path = str(checkpoint), Path(checkpoint)
    if name in WEIGHTS:
        path = FOLDER / WEIGHTS[name].file
        if not path.exists():
            raise UserError(f"no {path}: run `atr-scale fetch-weights {name}`, or give the path of the file")
    elif name.isidentifier() and not path.exists():
        try:
            weights_by_name(name)
        except UserError as error:
            raise UserError(f"checkpoint {name} is no file, and {error}") from None
    return path
