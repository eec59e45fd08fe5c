"""The audio encoder of LAION-CLAP without feature fusion: the network of HTS-AT at 48 kHz, trained with captions.

Source: LAION-AI/CLAP, `htsat.py`, `model.py` and the preparation of waveforms in `hook.py` (Wu et al., ICASSP 2023,
arXiv 2211.06687).

Shape suffixes: B batch, S samples, D width, E joint width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.encoders.front_ends import DecibelMel
from atr_scale.encoders.htsat import AUDIO_MODEL, DERIVED, FUSION, MEL, SwinEncoder, original_entry, transformers_entry
from atr_scale.encoders.pretrained.layout import Entry, Layout
from atr_scale.errors import UserError

JOINT_DIM = 512
INT16 = 32_767


class ClapMel(DecibelMel):
    """`DecibelMel` of the waveform rounded to 16 bits.

    A clip below ten seconds is repeated as often as it fits into ten seconds, then padded with zeros.
    """

    def rounded(self, waveform_BS: Tensor) -> Tensor:
        """The waveform as 16-bit samples hold it, in [-1, 1]."""
        return (waveform_BS.clamp(-1, 1) * INT16).trunc() / INT16

    def prepare(self, waveform_BS: Tensor) -> Tensor:
        waveform_BS = self.rounded(waveform_BS)
        length, full = waveform_BS.shape[1], 10 * self.settings.sample_rate
        if 0 < length < full:
            waveform_BS = waveform_BS.repeat(1, full // length)
        return nn.functional.pad(waveform_BS, (0, max(0, full - waveform_BS.shape[1])))


def laion_entry(name: str) -> Entry | None:
    """The entry of LAION's file for a parameter, without the prefix "audio_"."""
    if name.startswith("audio_projection."):
        return Entry(name.removeprefix("audio_"))
    entry = original_entry(name)
    return entry and Entry("branch." + entry.key, entry.part)


def clap_model_entry(name: str) -> Entry | None:
    """The entry of a saved `ClapModel` for a parameter, without the prefix "audio_"."""
    if name.startswith("audio_projection."):
        return Entry(name.removeprefix("audio_").replace(".0.", ".linear1.").replace(".2.", ".linear2."))
    entry = transformers_entry(name)
    return entry and Entry("model.audio_encoder." + entry.key)


class CLAP(SwinEncoder):
    """The audio encoder of LAION-CLAP.

    `project` applies its projection to the joint space of audio and captions. The projection is never trained.
    """

    sample_rate = 48_000
    layouts = (
        Layout(
            "LAION-CLAP",
            container="state_dict",
            prefix="audio_",
            derived=DERIVED,
            unused=(r"audio_branch\.(head|tscam_conv)\.", r"audio_transform\.", r"text_", r"logit_scale_[at]$"),
            origin=laion_entry,
        ),
        Layout("ClapModel", prefix="audio_", derived=DERIVED, unused=(r"text_", r"logit_"), origin=clap_model_entry),
        AUDIO_MODEL,
        *(
            Layout(container=container, prefix=prefix + "patch_embed.mel_conv2d.", refusal=FUSION)
            for container, prefix in (
                ("state_dict", "audio_branch."),
                (None, "audio_model.audio_encoder."),
                (None, "audio_encoder."),
            )
        ),
    )

    def __init__(self, **network: Any) -> None:
        super().__init__(ClapMel(MEL(sample_rate=self.sample_rate, hop=480)), **network)
        self.audio_projection: Any = nn.Sequential(
            nn.Linear(self.dim, JOINT_DIM), nn.ReLU(), nn.Linear(JOINT_DIM, JOINT_DIM)
        ).requires_grad_(False)
        for parameter in self.audio_projection.parameters():
            nn.init.zeros_(parameter)  # until one is loaded

    def token_cells(self, samples: int) -> NDArray[np.float64]:
        """See `AudioEncoder`. A short clip is repeated, so its cells begin again; those of the padding are empty."""
        full = 10 * self.sample_rate
        cells_T2 = super().token_cells(max(samples, full))
        if not 0 < samples < full:
            return cells_T2
        copy_T1 = cells_T2.mean(1, keepdims=True) // samples
        cells_T2 = np.where(copy_T1 < full // samples, cells_T2 - copy_T1 * samples, samples)
        return cells_T2.clip(0, samples)

    def project(self, pooled_BD: Tensor) -> Tensor:
        """Pooled embeddings [B, D] -> [B, 512] in the joint space of audio and captions, not normalised.

        Raises UserError if the weights came without the projection.
        """
        if not self.audio_projection[0].weight.any():
            raise UserError("these weights of clap came without audio_projection: load the checkpoint of a whole CLAP")
        joint_BE: Tensor = self.audio_projection(pooled_BD)
        return joint_BE
