"""What all audio encoders share: windows, buckets, options, augmentation, tags.

Shape suffixes: B batch, S samples, M mel bands, F frames, L classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from atr_scale.batch import TokenSequence
from atr_scale.encoders.buckets import encode_in_buckets
from atr_scale.encoders.front_ends import FrontEnd
from atr_scale.encoders.pretrained.layout import Layout
from atr_scale.encoders.spec_augment import SpecAugmentSection, for_the_batch, keep_outside_stripes
from atr_scale.encoders.windows import cut_into_windows, join_windows, window_starts
from atr_scale.errors import UserError
from atr_scale.sections import Positive, Section

AUDIOSET_CLASSES = 527
# Options that only some encoders can honour; the others all have.
SPECIAL_OPTIONS = frozenset(
    {"long_clips", "s_patchout_t", "s_patchout_f", "fmin_aug_range", "fmax_aug_range", "attention"}
)


class AudioEncoderOptions(Section):
    """What an audio encoder can be told; an option that it does not have is refused by name."""

    batch_norm: Literal["frozen", "local"] = Field("frozen", description="stored statistics, or those of the batch")
    long_clips: Literal["windows", "resize"] = Field(
        "windows", description="clips beyond the window: cut into windows, or the whole spectrogram resized (HTS-AT)"
    )
    window_seconds: Positive | None = Field(None, description="default: the encoder's native length, if it has one")
    window_hop_seconds: Positive | None = Field(None, description="default: the window's length")
    s_patchout_t: Annotated[int, Field(ge=0)] = Field(0, description="columns of patches left out in training (PaSST)")
    s_patchout_f: Annotated[int, Field(ge=0)] = Field(0, description="rows of patches left out in training (PaSST)")
    spec_augment: SpecAugmentSection | None = Field(None, description="stripes of the spectrogram zeroed in training")
    fmin_aug_range: Annotated[int, Field(ge=0)] = Field(0, description="Hz, jitter of the lowest band (PaSST, MN)")
    fmax_aug_range: Annotated[int, Field(ge=0)] = Field(0, description="Hz, jitter of the highest band (PaSST, MN)")
    attention: Literal["eager", "sdpa"] = Field("eager", description="sdpa: fused attention")
    activation_checkpointing: bool = Field(False, description="layers recomputed in the backward pass")
    compile: bool = Field(False, description="torch.compile of the layers")


class AudioEncoder(nn.Module, ABC):
    """Waveform -> TokenSequence; a clip's result never depends on its batch mates (batch_norm frozen).

    sample_rate: Hz of the waveform. dim: width of tokens and of pooled.
    native_seconds: the length beyond which a clip is cut into windows; None if any length goes through in one pass.
    layouts: the original files it loads. layers: what `frozen_layers` and `layer_decay` count, lowest first, each the
    prefixes of its parameters' names. special_options: those of SPECIAL_OPTIONS that it has. Options: the section that
    checks its options; the constructor gets the fields that it adds to AudioEncoderOptions.
    equal_rounds: see `encode_in_buckets`; needed if parameters are sharded over ranks.

    The draws of training follow from the `augment_seed` of a call, which is equal on all ranks.
    """

    sample_rate: int
    dim: int
    front_end: FrontEnd
    layouts: tuple[Layout, ...] = (Layout(),)
    native_seconds: ClassVar[float | None] = None
    special_options: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type[AudioEncoderOptions]] = AudioEncoderOptions
    options = AudioEncoderOptions()
    equal_rounds: Callable[[int], int] | None = None

    @abstractmethod
    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        """Clips of one length, no longer than the window."""

    @property
    @abstractmethod
    def layers(self) -> list[tuple[str, ...]]: ...

    def logits(self, waveform_BS: Tensor) -> Tensor:
        """[B, L] of the original's classifier, before the sigmoid, for clips no longer than the window."""
        raise UserError(f"the audio encoder {type(self).__name__} has no classifier: it cannot tag")

    def configure(self, options: AudioEncoderOptions, name: str) -> None:
        """Takes the options of training. Raises UserError, naming it, for one that this encoder does not have."""
        default = AudioEncoderOptions()
        for option in sorted(SPECIAL_OPTIONS - self.special_options):
            if getattr(options, option) != getattr(default, option):
                raise UserError(f"the audio encoder {name} has no {option}: leave it at {getattr(default, option)}")
        native, window = self.native_seconds, options.window_seconds
        if native is not None and window is not None and window > native:
            raise UserError(f"window_seconds = {window} is more than {name} takes at once: give at most {native}")
        if options.window_hop_seconds is not None:
            if (window or native) is None:
                raise UserError(f"window_hop_seconds without windows: {name} takes any length, give window_seconds too")
            if options.window_hop_seconds > (window or native or 0):
                raise UserError("window_hop_seconds is longer than the window: audio between windows would be unheard")
        self.options = options
        if options.compile:
            parts = list(self.compiled_parts())
            # Layers of other shapes are other variants of one function, and torch gives a function up after eight.
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 4 * len(parts))
            for part in parts:
                part.compile()

    def compiled_parts(self) -> Iterable[nn.Module]:
        """The modules that `compile` compiles, each by itself: repeated layers share their code."""
        for name, child in self.named_children():
            if isinstance(child, nn.Sequential | nn.ModuleList):
                yield from child
            elif name != "front_end":
                yield child

    @property
    def window(self) -> int | None:
        """Samples that `encode` sees at most; None for any number."""
        seconds = self.options.window_seconds or self.native_seconds
        if seconds is None or self.options.long_clips == "resize":
            return None
        return round(seconds * self.sample_rate)

    @property
    def window_hop(self) -> int:
        """Samples from the start of a window to the next."""
        assert self.window is not None
        seconds = self.options.window_hop_seconds
        return self.window if seconds is None else round(seconds * self.sample_rate)

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor | None = None, augment_seed: int = 0) -> TokenSequence:
        """waveform float32 [B, S]; lengths int64 [B] in samples, None if every clip fills the width; augment_seed: of
        the draws of training.

        A clip beyond the window is cut into windows, the last filled up with zeros: their tokens and masks are joined,
        pooled is the mean of theirs.
        """
        encode = partial(self.encode, augment_seed=augment_seed)
        if self.window is None or waveform_BS.shape[1] <= self.window:
            return encode_in_buckets(encode, waveform_BS, lengths_B, self.equal_rounds)
        windows = cut_into_windows(waveform_BS, lengths_B, self.window, self.window_hop)
        encoded = encode_in_buckets(encode, windows.waveform, windows.lengths, self.equal_rounds)
        return join_windows(encoded, windows)

    @torch.no_grad()
    def tags(self, waveform_BS: Tensor) -> Tensor:
        """Logits [B, L] of AudioSet's classes, in the order of its class_labels_indices.csv; for a clip beyond the
        window, their mean over windows. UserError if the weights came without a classifier."""
        window = self.window or waveform_BS.shape[1]
        hop = self.window_hop if self.window else window
        starts = window_starts(waveform_BS.shape[1], window, hop)
        pieces = [waveform_BS[:, start : start + window] for start in starts]
        if len(pieces) > 1:
            pieces[-1] = nn.functional.pad(pieces[-1], (0, window - pieces[-1].shape[1]))
        return torch.stack([self.logits(piece) for piece in pieces]).mean(0)

    def mel(self, waveform_BS: Tensor, augment_seed: int) -> Tensor:
        """The front end's features [B, M, F]; in training with jittered band limits, if the option is set."""
        low, high = self.options.fmin_aug_range, self.options.fmax_aug_range
        if not self.training or not (low or high):
            return self.front_end(waveform_BS)
        # AugmentMelSTFT of PaSST: whole Hz, the upper limit centred on its usual place.
        draws = for_the_batch(augment_seed, "mel bands")
        fmin = self.front_end.fmin + (draws.integers(low) if low else 0)
        fmax = self.front_end.fmax + (high // 2 - draws.integers(high) if high else 0)
        return self.front_end(waveform_BS, band=(float(fmin), float(min(fmax, self.sample_rate / 2))))

    def spec_augment(self, features_BMF: Tensor, waveform_BS: Tensor, augment_seed: int) -> Tensor:
        """Normalised features with SpecAugment's stripes set to 0, in training if the option is set."""
        widths = self.options.spec_augment
        if not self.training or widths is None:
            return features_BMF
        num_mels, num_frames = features_BMF.shape[1:]
        keep_BMF = keep_outside_stripes(augment_seed, waveform_BS, num_mels, num_frames, widths)
        return features_BMF * keep_BMF.to(features_BMF.dtype)

    def run(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """layer(x), recomputed in the backward pass if the option is set."""
        if self.options.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, x, use_reentrant=False)
        return layer(x)

    def train(self, mode: bool = True) -> AudioEncoder:
        super().train(mode)
        if self.options.batch_norm == "frozen":
            use_stored_statistics(self)
        return self


def use_stored_statistics(module: nn.Module) -> None:
    """Puts every batch norm inside `module` into evaluation mode, whatever the mode of the rest.

    With statistics of the local batch, results depend on how many ranks and chunks share the work; with the stored ones
    they do not. The affine weights are trained either way.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
