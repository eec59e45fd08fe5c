"""Encoders, trained once per seed and set of corpora, and the tokens that they give for the clips and captions.

They favour no scorer, because they are trained with the sum of three NT-Xent losses. Each loss has its own projections
and scorer: meanmax, tap and lgmm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from atr_scale.batch import TokenSequence
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.encoders import AudioEncoder, TextEncoder, build_text_encoder
from atr_scale.encoders.audio import AudioEncoderOptions
from atr_scale.encoders.small_cnn import SmallCNN
from atr_scale.files import atomic_write
from tools.study.corpora import SAMPLE_RATE, TRAINING, Demo, Split
from tools.study.head import Head, Optimizer
from tools.study.negatives import hard_negatives
from tools.study.recipes import BASELINE, BATCH, LGMM, TAP
from tools.study.tokens import Tokens

SECONDS = 10.0
FRAMES = 500  # of the log-mel of ten seconds
LR = 1e-3
EXTRA_CAPTIONS = 5
AT_ONCE = 16


class ResizedCNN(SmallCNN):
    """Resizes the log-mel of every clip to that of ten seconds (arXiv 2403.10146 does so with longer clips)."""

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor | None = None, augment_seed: int = 0) -> TokenSequence:
        ends = [waveform_BS.shape[1]] * len(waveform_BS) if lengths_B is None else lengths_B.tolist()
        mels = [self.front_end(clip[None, :end]) for clip, end in zip(waveform_BS, ends, strict=True)]
        size = (mels[0].shape[1], FRAMES)
        return self.encode(torch.cat([interpolate(mel[None], size, mode="bilinear")[0] for mel in mels]), augment_seed)

    def mel(self, waveform_BS: Tensor, augment_seed: int) -> Tensor:
        """The argument, because `forward` has computed and resized the log-mel."""
        return waveform_BS


def epochs(size: int, batch: int, steps: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield `steps` batches of rows, over as many epochs as needed. A row occurs at most once per epoch."""
    batch = min(batch, size)
    for step in range(steps):
        place = step % (size // batch)
        if place == 0:
            order = torch.from_numpy(rng.permutation(size))
        yield order[place * batch : (place + 1) * batch]


def draw_captions(owner: Tensor, clips: Tensor, rng: np.random.Generator, most: Tensor | None = None) -> Tensor:
    """Draw a caption (row of `owner`) for each clip, among all captions of the clip or its first `most` [clips]."""
    first = torch.searchsorted(owner, clips)
    counts = torch.searchsorted(owner, clips, right=True) - first
    if most is not None:
        counts = torch.minimum(counts, most)
    return first + torch.from_numpy(rng.random(len(clips))).mul(counts).long()


def train_encoders(
    split: Split, text_folder: Path, resized: bool, seed: int, steps: int
) -> tuple[SmallCNN, TextEncoder]:
    """Train an audio and a text encoder. Returns them in evaluation mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    audio = ResizedCNN() if resized else SmallCNN()
    text = build_text_encoder(text_folder, pooling="mean")
    tokenizer = CaptionTokenizer(text.tokenizer)
    heads = nn.ModuleList(Head(audio.dim, text.dim, recipe) for recipe in (BASELINE, TAP, LGMM))
    everything = nn.ModuleList([audio, text, heads]).train()
    optimizer = Optimizer(list(everything.parameters()), LR, steps)
    batches = epochs(len(split.clips), BATCH, steps, rng)
    for step, clips in enumerate(tqdm(batches, "encoders", steps, unit="step", disable=None)):
        waveforms = [_training_clip(split, int(clip), resized, rng) for clip in clips]
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        encoded_audio = audio(pad_sequence(waveforms, batch_first=True), lengths)
        captions = draw_captions(split.owner, clips, rng)
        encoded_text = text(*tokenizer([split.captions[k].text for k in captions.tolist()]))
        loss = torch.stack([head(encoded_text, encoded_audio, clips[:, None], step) for head in heads]).sum()
        optimizer.step(loss, step)
    everything.eval()
    return audio, text


def _training_clip(split: Split, clip: int, resized: bool, rng: np.random.Generator) -> Tensor:
    """A random crop of SECONDS, or the whole clip if it is shorter or will be resized."""
    room = split.seconds(clip) - SECONDS
    if resized or room <= 0:
        return split.waveform(clip)
    return split.waveform(clip, int(rng.random() * room * SAMPLE_RATE), round(SECONDS * SAMPLE_RATE))


@torch.no_grad()
def encode_clips(encoder: AudioEncoder, waveforms: Iterable[Tensor]) -> Tokens:
    """Encode whole clips, one at a time."""
    return Tokens.of([encoder(waveform[None]) for waveform in waveforms])


@torch.no_grad()
def encode_captions(encoder: TextEncoder, tokenizer: CaptionTokenizer, texts: list[str]) -> Tokens:
    """Encode captions, AT_ONCE at a time."""
    groups = [texts[k : k + AT_ONCE] for k in range(0, len(texts), AT_ONCE)]
    return Tokens.of([encoder(*tokenizer(group)) for group in groups])


def tokens_of_demo(demo: Demo, encoders: str, seed: int, steps: int) -> dict[str, Tokens]:
    """Train the encoders that `encoders` of a recipe names. Returns tokens by name: "train/audio", "train/text", ...

    For each test split, "/windows" are the test clips in windows, "/crop" their middle ten seconds, and "/negatives"
    the hard negatives.
    """
    text_folder = demo.training.folder / "text_encoder"
    resized = encoders == "resized"
    split = demo.of((encoders,) if encoders in TRAINING else tuple(TRAINING))
    audio, text = train_encoders(split, text_folder, resized, seed, steps)
    tokenizer = CaptionTokenizer(text.tokenizer)

    def captions(part: Split) -> Tokens:
        return encode_captions(text, tokenizer, [caption.text for caption in part.captions])

    def clips(part: Split) -> Tokens:
        return encode_clips(audio, (part.waveform(k) for k in range(len(part.clips))))

    found = {"train/audio": clips(split), "validation/audio": clips(demo.validation)}
    found |= {"train/text": captions(split), "validation/text": captions(demo.validation)}
    if encoders == "all":
        found["train/more"] = captions(split.with_more_captions(EXTRA_CAPTIONS))
    for name, part in demo.tests.items():
        found |= {f"{name}/audio": clips(part), f"{name}/text": captions(part)}
        found[f"{name}/negatives"] = encode_captions(text, tokenizer, hard_negatives(part).texts)
        if encoders == "all":
            found[f"{name}/crop"] = encode_clips(audio, (_middle(part, k) for k in range(len(part.clips))))
    if encoders == "all":
        audio.configure(AudioEncoderOptions(window_seconds=SECONDS), "small_cnn")
        found |= {f"{name}/windows": clips(part) for name, part in demo.tests.items()}
    return found


def _middle(split: Split, clip: int) -> Tensor:
    room = max(0.0, split.seconds(clip) - SECONDS)
    return split.waveform(clip, int(room / 2 * SAMPLE_RATE), round(SECONDS * SAMPLE_RATE))


def save_tokens(tokens: dict[str, Tokens], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save({name: part.state() for name, part in tokens.items()}, temporary)


def load(path: Path) -> dict[str, Tokens]:
    return {name: Tokens(**state) for name, state in torch.load(path, weights_only=True).items()}
