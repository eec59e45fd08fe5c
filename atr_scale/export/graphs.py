"""The two towers of a dual encoder as modules that the ONNX exporter can follow for any batch and any length.

They compute what `Retriever` computes in fp32. What follows from the length of the clips (padding, windows) is written
with symbolic sizes instead of Python conditions, so that it becomes part of the graph.

Both use the parts of the Retriever that they are given, without copies, and change the encoder for export.

Shape suffixes: B batch, S samples, N windows of a clip, P samples of a window, C real and imaginary parts of frequency
bins, M mel bands, F frames, T tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.encoders import AudioEncoder
from atr_scale.encoders.clap import ClapMel
from atr_scale.encoders.front_ends import FrontEnd
from atr_scale.encoders.transformers_text import TransformersTextEncoder
from atr_scale.encoders.windows import SHORTEST_TAIL
from atr_scale.model import Retriever


class TextGraph(nn.Module):
    """input_ids, attention_mask int64 [B, T] -> embeddings float32 [B, D] of unit length."""

    def __init__(self, model: Retriever) -> None:
        super().__init__()
        self.encoder = model.text_encoder
        if isinstance(self.encoder, TransformersTextEncoder):
            self.encoder.transformer.set_attn_implementation("eager")  # its masks depend on no values
        self.projection, self.scorer = model.text_projection, model.scorer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        encoded = self.encoder(input_ids, attention_mask)
        return self.scorer.embed_text(self.projection(encoded, with_tokens=False))


class AudioGraph(nn.Module):
    """Waveforms float32 [B, S] at the encoder's sample rate, all of S samples -> embeddings [B, D] of unit length."""

    def __init__(self, model: Retriever) -> None:
        super().__init__()
        self.encoder = model.audio_encoder
        if isinstance(self.encoder.front_end, FrontEnd):
            self.encoder.front_end = GraphFrontEnd(self.encoder.front_end)  # type: ignore[assignment]
        self.projection, self.scorer = model.audio_projection, model.scorer

    def forward(self, waveform: Tensor) -> Tensor:
        encoded = encode_any_length(self.encoder, waveform)
        return self.scorer.embed_audio(self.projection(encoded, self.scorer.reads_audio_tokens))


def encode_any_length(encoder: AudioEncoder, waveform_BS: Tensor) -> TokenSequence:
    """`AudioEncoder.forward` of clips of one length; masked tokens of padding stay between those of the windows."""
    samples, window = waveform_BS.shape[1], encoder.window
    if window is None:
        return encoder.encode(_at_least(waveform_BS, encoder.shortest))
    hop = encoder.window_hop
    beyond = samples - window - int(SHORTEST_TAIL * window)
    count = 1 + (torch.sym_max(0, beyond) + hop - 1) // hop
    width = torch.sym_min(samples, window)
    start_N = torch.arange(count) * hop
    padded_BS = nn.functional.pad(waveform_BS, (0, window + hop))
    pieces_BNP = padded_BS[:, start_N.unsqueeze(1) + torch.arange(width)]
    encoded = encoder.encode(_at_least(pieces_BNP.flatten(0, 1), encoder.shortest))

    # Shares of audio and kept tokens in float64, as Python computes them.
    several = start_N[-1:] > 0
    share_N = torch.where(several, (samples - start_N).clamp(max=window).double() / window, 1.0)
    per_piece = encoded.tokens.shape[1]
    kept_N = (share_N * per_piece).ceil()
    real_NT = torch.arange(per_piece) < kept_N.unsqueeze(1)
    tokens_BTD = encoded.tokens.unflatten(0, (-1, count)).flatten(1, 2)
    mask_BT = encoded.mask.unflatten(0, (-1, count)).flatten(1, 2) & real_NT.flatten()
    pooled_BND = encoded.pooled.unflatten(0, (-1, count))
    if encoder.pooled_is_mean:
        weight_BT1 = mask_BT.unsqueeze(2).to(tokens_BTD.dtype)
        mean_BD = (tokens_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        pooled_BD = torch.where(several, mean_BD, pooled_BND[:, 0])
    else:
        weight_N1 = (share_N / share_N.sum()).float().unsqueeze(1)
        pooled_BD = (pooled_BND * weight_N1).sum(1)
    return TokenSequence(tokens_BTD, mask_BT, pooled_BD)


class GraphFrontEnd(nn.Module):
    """A front end whose spectrogram is a convolution with the windowed waves of the Fourier transform."""

    waves: Tensor

    def __init__(self, original: FrontEnd) -> None:
        super().__init__()
        self.original, self.settings = original, original.settings
        n_fft, length = self.settings.n_fft, self.settings.window_length
        before = (n_fft - length) // 2
        window = nn.functional.pad(original.window.double().cpu(), (before, n_fft - length - before))
        turns = torch.arange(n_fft // 2 + 1).outer(torch.arange(n_fft)) % n_fft  # exact: whole numbers
        angle = turns.double() * (2 * math.pi / n_fft)
        waves = torch.cat([angle.cos(), angle.sin()]) * window
        self.register_buffer("waves", waves.float().unsqueeze(1), persistent=False)

    def forward(self, waveform_BS: Tensor, band: None = None) -> Tensor:
        original, half = self.original, self.settings.n_fft // 2
        if isinstance(original, ClapMel):
            prepared_BS = repeated(original.rounded(waveform_BS), 10 * self.settings.sample_rate)
        else:
            prepared_BS = original.prepare(waveform_BS)
        prepared_BS = _at_least(prepared_BS, half + 1)
        padded_B1S = nn.functional.pad(prepared_BS.unsqueeze(1), (half, half), mode="reflect")
        spectrum_BCF = nn.functional.conv1d(padded_B1S, self.waves, stride=self.settings.hop)
        real_BKF, imaginary_BKF = spectrum_BCF.chunk(2, 1)
        return original.compress(original.bank @ (real_BKF.square() + imaginary_BKF.square()))


def repeated(waveform_BS: Tensor, full: int) -> Tensor:
    """Clips below `full` samples repeated as often as they fit into `full`, then padded with zeros to it."""
    clips, samples = waveform_BS.shape
    times = torch.sym_max(1, full // samples)
    repeated_BS = waveform_BS.unsqueeze(1).expand(clips, times, samples).reshape(clips, times * samples)
    return nn.functional.pad(repeated_BS, (0, torch.sym_max(0, full - times * samples)))


def _at_least(waveform_BS: Tensor, samples: int) -> Tensor:
    """Padded with zeros to `samples` samples."""
    return nn.functional.pad(waveform_BS, (0, torch.sym_max(0, samples - waveform_BS.shape[1])))
