"""Encoders, trained once for each seed and set of corpora, and the tokens they give for all that a recipe reads.

No scorer has them to itself: they are trained with the sum of three NT-Xent losses, each over projections of its own:
one vector a clip (meanmax), sentence over frames (tap), frames over words (lgmm).
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
from atr_scale.encoders import build_text_encoder
from atr_scale.encoders.audio import AudioEncoderOptions
from atr_scale.encoders.small_cnn import SmallCNN
from atr_scale.files import atomic_write
from tools.study.corpora import SAMPLE_RATE, TRAINING, Demo, Split
from tools.study.head import Head, Optimiser
from tools.study.negatives import hard_negatives
from tools.study.recipes import BASELINE, BATCH, LGMM, TAP
from tools.study.tokens import Tokens

SECONDS = 10.0
FRAMES = 500  # of the log-mel of ten seconds
LR = 1e-3
EXTRA_CAPTIONS = 5
AT_ONCE = 16


class ResizedCNN(SmallCNN):
    """Hears every clip's log-mel resized to ten seconds' (arXiv 2403.10146 does so with clips beyond ten seconds)."""

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> TokenSequence:
        ends = [waveform.shape[1]] * len(waveform) if lengths is None else lengths.tolist()
        mels = [self.front_end(clip[None, :end]) for clip, end in zip(waveform, ends, strict=True)]
        size = (mels[0].shape[1], FRAMES)
        return self.encode(torch.cat([interpolate(mel[None], size, mode="bilinear")[0] for mel in mels]))

    def mel(self, mel: Tensor) -> Tensor:
        return mel


def epochs(size: int, batch: int, steps: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """`steps` batches of different rows, as many epochs as it takes."""
    batch = min(batch, size)
    for step in range(steps):
        place = step % (size // batch)
        if place == 0:
            order = torch.from_numpy(rng.permutation(size))
        yield order[place * batch : (place + 1) * batch]


def draw_captions(owner: Tensor, clips: Tensor, rng: np.random.Generator, most: Tensor | None = None) -> Tensor:
    """A caption (row of `owner`) for each of some clips, drawn among all of its or its first `most` [clips]."""
    first = torch.searchsorted(owner, clips)
    counts = torch.searchsorted(owner, clips, right=True) - first
    if most is not None:
        counts = torch.minimum(counts, most)
    return first + torch.from_numpy(rng.random(len(clips))).mul(counts).long()


def train_encoders(split: Split, text_folder: Path, resized: bool, seed: int, steps: int) -> tuple[SmallCNN, nn.Module]:
    """Audio and text encoder in evaluation mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    audio = ResizedCNN() if resized else SmallCNN()
    text = build_text_encoder(text_folder, pooling="mean")
    tokenizer = CaptionTokenizer(text.tokenizer)
    heads = nn.ModuleList(Head(audio.dim, text.dim, recipe) for recipe in (BASELINE, TAP, LGMM))
    everything = nn.ModuleList([audio, text, heads]).train()
    optimiser = Optimiser(list(everything.parameters()), LR, steps)
    batches = epochs(len(split.clips), BATCH, steps, rng)
    for step, clips in enumerate(tqdm(batches, "encoders", steps, unit="step", disable=None)):
        waveforms = [_heard(split, int(clip), resized, rng) for clip in clips]
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        heard = audio(pad_sequence(waveforms, batch_first=True), lengths)
        captions = draw_captions(split.owner, clips, rng)
        read = text(*tokenizer([split.captions[k].text for k in captions.tolist()]))
        loss = torch.stack([head(read, heard, clips[:, None], step) for head in heads]).sum()
        optimiser.step(loss, step)
    everything.eval()
    return audio, text


def _heard(split: Split, clip: int, resized: bool, rng: np.random.Generator) -> Tensor:
    room = split.seconds(clip) - SECONDS
    if resized or room <= 0:
        return split.waveform(clip)
    return split.waveform(clip, int(rng.random() * room * SAMPLE_RATE), round(SECONDS * SAMPLE_RATE))


@torch.no_grad()
def hear(encoder: nn.Module, waveforms: Iterable[Tensor]) -> Tokens:
    """Whole clips, one at a time."""
    return Tokens.of([encoder(waveform[None]) for waveform in waveforms])


@torch.no_grad()
def read(encoder: nn.Module, tokenizer: CaptionTokenizer, texts: list[str]) -> Tokens:
    groups = [texts[k : k + AT_ONCE] for k in range(0, len(texts), AT_ONCE)]
    return Tokens.of([encoder(*tokenizer(group)) for group in groups])


def tokens_of_demo(demo: Demo, encoders: str, seed: int, steps: int) -> dict[str, Tokens]:
    """Trains the encoders that a recipe's `encoders` names; tokens by place: "train/audio", "train/text", ...

    "test name/windows" and "/crop": the same test clips in windows, and their middle ten seconds. "/negatives": texts.
    """
    text_folder = demo.training.folder / "text_encoder"
    resized = encoders == "resized"
    split = demo.of((encoders,) if encoders in TRAINING else tuple(TRAINING))
    audio, text = train_encoders(split, text_folder, resized, seed, steps)
    tokenizer = CaptionTokenizer(text.tokenizer)

    def captions(part: Split) -> Tokens:
        return read(text, tokenizer, [caption.text for caption in part.captions])

    def clips(part: Split) -> Tokens:
        return hear(audio, (part.waveform(k) for k in range(len(part.clips))))

    found = {"train/audio": clips(split), "validation/audio": clips(demo.validation)}
    found |= {"train/text": captions(split), "validation/text": captions(demo.validation)}
    if encoders == "all":
        found["train/more"] = captions(split.with_more_captions(EXTRA_CAPTIONS))
    for name, part in demo.tests.items():
        found |= {f"{name}/audio": clips(part), f"{name}/text": captions(part)}
        found[f"{name}/negatives"] = read(text, tokenizer, hard_negatives(part).texts)
        if encoders == "all":
            found[f"{name}/crop"] = hear(audio, (_middle(part, k) for k in range(len(part.clips))))
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
