"""The base class of the audio encoders: windows, buckets, options, augmentation, tags.

Shape suffixes: B batch, S samples, M mel bands, F frames, L classes, P pieces of a clip.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from atr_scale.batch import TokenSequence, to_float
from atr_scale.encoders.attention import Attention
from atr_scale.encoders.buckets import encode_in_buckets
from atr_scale.encoders.front_ends import FrontEnd
from atr_scale.encoders.pretrained.layout import Layout
from atr_scale.encoders.spec_augment import SpecAugmentSection, for_the_batch, keep_outside_stripes
from atr_scale.encoders.windows import (
    cells_around,
    cells_of_windows,
    cut_into_windows,
    join_windows,
    shares_of_audio,
    weighted_mean,
    window_starts,
)
from atr_scale.errors import UserError
from atr_scale.sections import Positive, Section

AUDIOSET_CLASSES = 527
# Options that only some encoders support; every encoder supports the others.
SPECIAL_OPTIONS = frozenset(
    {"long_clips", "s_patchout_t", "s_patchout_f", "fmin_aug_range", "fmax_aug_range", "attention"}
)


# What configurations of version 0.3 and earlier say, also for encoders without attention.
OLD_DEFAULTS = {"attention": "eager"}


class AudioEncoderOptions(Section):
    """Options of an audio encoder. An encoder refuses an option that it does not support, by name."""

    batch_norm: Literal["frozen", "local"] = Field(
        "frozen", description="Statistics of batch norm: frozen (as stored) or local (of the batch of one rank)."
    )
    long_clips: Literal["windows", "resize"] = Field(
        "windows",
        description="Clips longer than the window: cut into windows, or their whole spectrogram resized (HTS-AT).",
    )
    window_seconds: Positive | None = Field(
        None, description="Length of a window in seconds; by default the native length of the encoder, if it has one."
    )
    window_hop_seconds: Positive | None = Field(
        None, description="Distance between the starts of two windows in seconds; by default the length of a window."
    )
    s_patchout_t: Annotated[int, Field(ge=0)] = Field(
        0, description="Number of columns of patches left out in training (PaSST)."
    )
    s_patchout_f: Annotated[int, Field(ge=0)] = Field(
        0, description="Number of rows of patches left out in training (PaSST)."
    )
    spec_augment: SpecAugmentSection | None = Field(
        None, description="SpecAugment in training: stripes of the spectrogram are set to zero; none by default."
    )
    fmin_aug_range: Annotated[int, Field(ge=0)] = Field(
        0, description="Range in Hz of the random lower limit of the mel bands in training (PaSST, MN)."
    )
    fmax_aug_range: Annotated[int, Field(ge=0)] = Field(
        0, description="Range in Hz of the random upper limit of the mel bands in training (PaSST, MN)."
    )
    attention: Attention = Field(
        "auto",
        description="Implementation of attention: eager, sdpa (fused; equal up to rounding), or auto: sdpa on a GPU.",
    )
    activation_checkpointing: bool = Field(
        False, description="Gradient checkpointing: layers are recomputed in the backward pass to save memory."
    )
    compile: bool = Field(False, description="Compile each layer with torch.compile.")


class AudioEncoder(nn.Module, ABC):
    """Waveform -> TokenSequence. With frozen batch norm the result of a clip never depends on the rest of its batch.

    sample_rate: of the waveform, in Hz.
    dim: width of the tokens and of the pooled embedding.
    native_seconds: a longer clip is cut into windows of this length; None if one pass takes any length.
    pooled_is_mean: whether the pooled embedding is the mean of the tokens, also of a clip in windows.
    shortest: `encode` pads clips of fewer samples with zeros to this number.
    reads_int16: whether `encode` takes waveforms of int16 too, as `front_end` and `spec_augment` do; otherwise they
    are float32.
    layouts: formats of the original files that the encoder loads.
    layers: the layers that `frozen_layers` and `layer_decay` count, lowest first; each is a tuple of prefixes of
    parameter names.
    special_options: the members of SPECIAL_OPTIONS that the encoder supports.
    Options: the section that checks the options. The constructor takes the fields that it adds to AudioEncoderOptions.
    equal_rounds: see `encode_in_buckets`; needed if parameters are sharded over ranks.

    Random draws in training follow from the `augment_seed` of a call, which is equal on all ranks.
    """

    sample_rate: int
    dim: int
    front_end: FrontEnd
    layouts: tuple[Layout, ...] = (Layout(),)
    native_seconds: ClassVar[float | None] = None
    pooled_is_mean: ClassVar[bool] = False
    shortest: ClassVar[int] = 0
    reads_int16: ClassVar[bool] = False
    special_options: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type[AudioEncoderOptions]] = AudioEncoderOptions
    options = AudioEncoderOptions()
    equal_rounds: Callable[[int], int] | None = None

    @abstractmethod
    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        """Encode clips [B, S] of one length, no longer than the window."""

    @property
    @abstractmethod
    def layers(self) -> list[tuple[str, ...]]: ...

    def logits(self, waveform_BS: Tensor) -> Tensor:
        """Logits [B, L] of the original classifier, for clips [B, S] no longer than the window.

        Raises UserError if the encoder has no classifier.
        """
        raise UserError(f"the audio encoder {type(self).__name__} has no classifier: it cannot tag")

    def configure(self, options: AudioEncoderOptions, name: str) -> None:
        """Apply the options. Raises UserError, naming the option, if this encoder does not support one of them."""
        default = AudioEncoderOptions()
        for option in sorted(SPECIAL_OPTIONS - self.special_options):
            if getattr(options, option) not in (getattr(default, option), OLD_DEFAULTS.get(option)):
                raise UserError(f"the audio encoder {name} has no {option}: leave it at {getattr(default, option)}")
        native, window = self.native_seconds, options.window_seconds
        if native is not None and window is not None and window > native:
            raise UserError(f"window_seconds = {window} is more than {name} takes at once: give at most {native}")
        if options.window_hop_seconds is not None:
            if (window or native) is None:
                raise UserError(f"window_hop_seconds without windows: {name} takes any length, give window_seconds too")
            if options.window_hop_seconds > (window or native or 0):
                raise UserError(
                    f"window_hop_seconds = {options.window_hop_seconds} is longer than the window and skips audio: "
                    f"give at most {window or native}"
                )
        self.options = options
        if options.compile:
            parts = list(self.compiled_parts())
            # Each shape of a layer is a variant of one function, and torch stops compiling a function after eight.
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 4 * len(parts))
            for part in parts:
                part.compile()

    def compiled_parts(self) -> Iterable[nn.Module]:
        """The modules that `compile` compiles, one by one, so that repeated layers share their code."""
        for name, child in self.named_children():
            if isinstance(child, nn.Sequential | nn.ModuleList):
                yield from child
            elif name != "front_end":
                yield child

    @property
    def window(self) -> int | None:
        """Most samples that `encode` takes; None if it takes any number."""
        seconds = self.options.window_seconds or self.native_seconds
        if seconds is None or self.options.long_clips == "resize":
            return None
        return round(seconds * self.sample_rate)

    @property
    def window_hop(self) -> int:
        """Number of samples from the start of one window to the start of the next."""
        assert self.window is not None
        seconds = self.options.window_hop_seconds
        return self.window if seconds is None else round(seconds * self.sample_rate)

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor | None = None, augment_seed: int = 0) -> TokenSequence:
        """Encode clips of any lengths.

        waveform: float32 or int16 [B, S]. lengths: int64 [B] in samples, None if every clip has S samples.
        augment_seed: seed of the random draws in training.

        A clip longer than the window is cut into windows, and the last is padded with zeros. Their tokens and masks are
        joined without those of the padding. The pooled embedding is the mean over all these tokens if the encoder pools
        by it (`pooled_is_mean`), otherwise the mean over the windows, each weighted by the audio that it holds.
        """
        encode = partial(self.encode, augment_seed=augment_seed)
        if waveform_BS.dtype == torch.int16 and not self.reads_int16:
            waveform_BS = to_float(waveform_BS)
        if self.window is None or waveform_BS.shape[1] <= self.window:
            return encode_in_buckets(encode, waveform_BS, lengths_B, self.equal_rounds)
        windows = cut_into_windows(waveform_BS, lengths_B, self.window, self.window_hop)
        encoded = encode_in_buckets(encode, windows.waveform, windows.lengths, self.equal_rounds)
        return join_windows(encoded, windows, self.pooled_is_mean)

    def token_times(self, samples: int) -> NDArray[np.float64]:
        """[T, 2]: start and stop in seconds of the audio that each token of a clip of `samples` samples stands for.

        The tokens are those of `forward` for this clip alone, in their order. Each instant of a window belongs to the
        token whose centre is nearest. Windows that overlap, and a clip that the encoder repeats, give several tokens to
        one instant. A token without audio has the length 0.
        """
        window = self.window or max(1, samples)
        cells_T2 = self.token_cells(min(samples, window))
        hop = window if self.window is None else self.window_hop
        return cells_of_windows(cells_T2, samples, window, hop) / self.sample_rate

    def token_cells(self, samples: int) -> NDArray[np.float64]:
        """The same in samples, for a clip that is no longer than the window."""
        return cells_around(self.token_centres(samples), samples)

    def token_centres(self, samples: int) -> NDArray[np.float64]:
        """[T]: the sample in the middle of what `encode` computes each token of such a clip from, ascending.

        Here the tokens divide the clip evenly. Encoders whose layers do otherwise override this.
        """
        device = next(self.parameters(), torch.empty(0)).device
        with torch.no_grad():
            count = self.encode(torch.zeros(1, samples, device=device)).tokens.shape[1]
        return (np.arange(count) + 0.5) * samples / max(1, count)

    @torch.no_grad()
    def tags(self, waveform_BS: Tensor) -> Tensor:
        """Logits [B, L] of the AudioSet classes for clips [B, S], in the order of its class_labels_indices.csv.

        For a clip longer than the window they are the mean over its windows, each weighted by the audio that it holds.
        Raises UserError if the weights came without a classifier.
        """
        window = self.window or waveform_BS.shape[1]
        hop = self.window_hop if self.window else window
        starts = window_starts(waveform_BS.shape[1], window, hop)
        pieces = [waveform_BS[:, start : start + window] for start in starts]
        if len(pieces) > 1:
            pieces[-1] = nn.functional.pad(pieces[-1], (0, window - pieces[-1].shape[1]))
        logits_PBL = torch.stack([self.logits(piece) for piece in pieces])
        return weighted_mean(logits_PBL, shares_of_audio(waveform_BS.shape[1], window, starts))

    def mel(self, waveform_BS: Tensor, augment_seed: int) -> Tensor:
        """Features [B, M, F] of the front end. In training their band limits are random if the options say so."""
        low, high = self.options.fmin_aug_range, self.options.fmax_aug_range
        band = None
        if self.training and (low or high):
            # AugmentMelSTFT of PaSST: whole Hz; the range of the upper limit is centred on its usual value.
            draws, usual = for_the_batch(augment_seed, "mel bands"), self.front_end.settings
            fmin = usual.fmin + (draws.integers(low) if low else 0)
            fmax = usual.fmax + (high // 2 - draws.integers(high) if high else 0)
            band = float(fmin), float(min(fmax, self.sample_rate / 2))
        mel_BMF: Tensor = self.front_end(waveform_BS, band)
        return mel_BMF

    def spec_augment(self, features_BMF: Tensor, waveform_BS: Tensor, augment_seed: int) -> Tensor:
        """In training set the stripes of SpecAugment to zero in normalised features, if the option is set."""
        widths = self.options.spec_augment
        if not self.training or widths is None:
            return features_BMF
        num_mels, num_frames = features_BMF.shape[1:]
        keep_BMF = keep_outside_stripes(augment_seed, waveform_BS, num_mels, num_frames, widths)
        return features_BMF * keep_BMF.to(features_BMF.dtype)

    def run(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """layer(x). With gradient checkpointing it is recomputed in the backward pass."""
        if self.options.activation_checkpointing and self.training and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(layer, x, use_reentrant=False)
            return recomputed
        return layer(x)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.options.batch_norm == "frozen":
            use_stored_statistics(self)
        return self


def use_stored_statistics(module: nn.Module) -> None:
    """Put every batch norm inside `module` into evaluation mode, whatever the mode of the other layers.

    With statistics of the local batch, results depend on the number of ranks and chunks; with stored statistics they do
    not. The affine weights are trained in both cases.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()


def as_image(features_BXY: Tensor) -> Tensor:
    """Features [B, X, Y] as an image of one channel [B, 1, X, Y] in the memory layout channels_last.

    Convolutions take their layout from the strides of their input. `contiguous(memory_format=channels_last)` may leave
    those of one channel as they are, since they describe both layouts.
    """
    return features_BXY.contiguous().unsqueeze(3).permute(0, 3, 1, 2)


def initialise_convolutions(module: nn.Module) -> None:
    """Draw the weights of convolutions before a ReLU so that they keep the variance of their input.

    Stored statistics of batch norm start at 0 and 1, so batch norm does not normalise an untrained network.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
