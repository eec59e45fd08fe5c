"""A trained model as a library: embeddings and scores of texts and audio.

Shape suffixes: n texts or clips, d width of the embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from atr_scale.batch import FULL_SCALE, TokenSequence
from atr_scale.checkpoint import load_retriever
from atr_scale.config import RunConfig
from atr_scale.data.audio_source import MAX_RATE, MIN_RATE, open_audio
from atr_scale.data.collate import pad
from atr_scale.data.decode import Crop, check_waveform, decode_source
from atr_scale.data.sample import BadSample
from atr_scale.data.tokenizer import ReadWord, caption_tokenizer
from atr_scale.errors import UserError, one_line
from atr_scale.evaluation.embed import as_read, load_ahead
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.score import score
from atr_scale.model import Retriever
from atr_scale.moments import Moments, moments_of
from atr_scale.precision import Products, encoder_products

logger = logging.getLogger(__name__)

Waveform = NDArray[Any] | Tensor
Audio = str | Path | Waveform
T = TypeVar("T")
BAR_AFTER = 2.0  # seconds of work after which a progress bar appears
MAX_PEAK = 10.0  # larger samples are integers stored as floats, or not audio


def load_trained(
    run_or_checkpoint: str | Path,
    device: str | torch.device | None = None,
    plugins: Sequence[str] = (),
    precision: Products | None = None,
) -> TrainedModel:
    """See `atr_scale.load`."""
    if precision not in (None, *get_args(Products)):
        raise UserError(f"precision = {precision!r}: give one of {', '.join(get_args(Products))}")
    module, config, _ = load_retriever(run_or_checkpoint, plugins, precision)
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        module.to(chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {str(device)!r} cannot be used ({reason}): give 'cpu', or 'cuda' if there is one"
        ) from None
    return TrainedModel(module.eval(), config, chosen)


class TrainedModel:
    """A trained model that embeds and scores texts and audio; `atr_scale.load` returns it.

    module: the Retriever, a torch module in evaluation mode.
    config: the configuration of its run.
    device: the device of the module.
    tokenizer: texts -> token ids, with the caption cleaning of training.
    """

    def __init__(self, module: Retriever, config: RunConfig, device: torch.device) -> None:
        self.module, self.config, self.device = module, config, device
        self.tokenizer = caption_tokenizer(module.text_encoder.tokenizer, config.data.captions)

    @property
    def sample_rate(self) -> int:
        """Sample rate of the audio encoder in Hz. Audio with another rate is resampled."""
        return self.module.sample_rate

    def embed_text(self, texts: Sequence[str], batch_size: int | None = None) -> NDArray[np.float32]:
        """Embeddings [n, d] of texts, of unit length.

        batch_size: number of texts encoded at once, by default evaluation.batch_size of the run.
        Raises UserError if the model is a pairwise scorer (use `similarity`) or if `texts` is not a list of strings.
        """
        self._need_dual_encoder("embed_text")
        return self._encode_text(texts, batch_size).pooled.numpy()

    def embed_audio(
        self,
        audio: Sequence[Audio],
        sample_rate: int | None = None,
        batch_size: int | None = None,
        seconds: float | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings [n, d] of clips, of unit length.

        audio: paths of audio files, or mono waveforms [samples] (numpy or torch, floats in [-1, 1] or int16).
        sample_rate: of the waveforms, in Hz.
        batch_size: number of clips encoded at once, by default evaluation.batch_size of the run.
        seconds: only this much from the start of each clip is read, by default data.evaluation_seconds of the run.
        Raises UserError if the model is a pairwise scorer (use `similarity`), or if a clip cannot be used; it names the
        clip and the reason.
        """
        self._need_dual_encoder("embed_audio")
        return self._encode_audio(audio, sample_rate, batch_size, seconds).pooled.numpy()

    def similarity(
        self,
        texts: Sequence[str],
        audio: Sequence[Audio],
        sample_rate: int | None = None,
        batch_size: int | None = None,
        seconds: float | None = None,
    ) -> NDArray[np.float32]:
        """Scores [texts, clips] of every text with every clip. For every scorer a higher score is a better match.

        The arguments are those of `embed_text` and `embed_audio`. Raises UserError like them, for any scorer.
        """
        text = self._encode_text(texts, batch_size)
        clips = self._encode_audio(audio, sample_rate, batch_size, seconds)
        size = batch_size or self.config.evaluation.batch_size
        return score(self.module.scorer, text, clips, batch_size=size, parallel=Parallel(device=self.device)).numpy()

    @property
    def locates(self) -> bool:
        """Whether `moments` works: the scorer has attention over frames."""
        return self.module.scorer.attends_over_frames

    def need_moments(self) -> None:
        """Raises UserError if `moments` does not work."""
        if not self.locates:
            raise UserError(
                f"moments: the scorer {self.config.model.scorer.name} of this model has no attention over frames: "
                "use a model with the scorer tap, lgmm or coattention"
            )

    def moments(self, text: str, audio: Audio, sample_rate: int | None = None, seconds: float | None = None) -> Moments:
        """Where in a clip a text and each of its words are heard.

        text: one text. audio: one path or waveform, as for `embed_audio`, with its sample_rate and seconds.
        The weights of words are attention of the scorer; parts and scores of the whole text are scores of single frames
        (docs/math/moments.md).
        Raises UserError if the scorer has no attention over frames (`tap`, `lgmm` and `coattention` have), if the
        tokenizer cannot tell the places of words, or if text or audio cannot be used.
        """
        _check_text(text, "text")
        return self.locate([text], audio, sample_rate, seconds)[0]

    @torch.no_grad()
    def locate(
        self, texts: Sequence[str], audio: Audio, sample_rate: int | None = None, seconds: float | None = None
    ) -> list[Moments]:
        """`moments` of each of several texts in one clip, which is encoded once."""
        self.need_moments()
        texts = _checked_texts(texts)
        limit, cut = self._seconds(seconds), list[str]()
        waveform = self._read(audio, "audio", sample_rate, limit, cut)
        _warn_of_cut(cut, limit)
        clip = self._encode_clips([waveform], ["audio"])
        if not clip.mask.any():
            raise UserError(f"audio is too short for one frame: {len(waveform) / self.sample_rate:g} s")
        times = self.module.audio_encoder.token_times(len(waveform))
        return [self._moments(text, clip, times) for text in texts]

    def _moments(self, text: str, clip: TokenSequence, times: NDArray[np.float64]) -> Moments:
        """times: [T, 2] of the tokens of the one clip in `clip`."""
        words, scorer = self.tokenizer.words(text), self.module.scorer
        if scorer.reads_text_tokens:
            sentence = self._encode_captions([text])
        else:
            pooled = self._encode_captions([text, *(word.text for word in words)]).pooled
            sentence = TokenSequence.unpadded(pooled[None, 1:], pooled[:1])
            words = [ReadWord(word.text, [number]) for number, word in enumerate(words)]
        attention, scores = scorer.attention(sentence, clip), scorer.scores_of_frames(sentence, clip)
        return moments_of(attention, scores, words, clip.mask[0], times)

    @torch.no_grad()
    def _encode_text(self, texts: Sequence[str], batch_size: int | None) -> TokenSequence:
        groups = self._groups(_checked_texts(texts), batch_size, "embedding texts")
        return TokenSequence.cat(
            [as_read(self.module.scorer, self._encode_captions(group), "text") for group in groups]
        )

    def _encode_captions(self, texts: Sequence[str]) -> TokenSequence:
        ids, mask = self.tokenizer(texts)
        with encoder_products(self.module.tf32):
            return self.module.encode_text(ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def _encode_audio(
        self, audio: Sequence[Audio], sample_rate: int | None, batch_size: int | None, seconds: float | None
    ) -> TokenSequence:
        clips = _as_list(audio, "audio", str, Path)
        limit, cut = self._seconds(seconds), list[str]()

        def read(numbers: Sequence[int]) -> list[NDArray[np.float32]]:
            return [self._read(clips[n], f"audio[{n}]", sample_rate, limit, cut) for n in numbers]

        parts = list[TokenSequence]()
        groups = self._groups(range(len(clips)), batch_size, "embedding audio")
        done = 0
        for waveforms in load_ahead(read, groups):
            encoded = self._encode_clips(waveforms, [f"audio[{done + n}]" for n in range(len(waveforms))])
            parts.append(as_read(self.module.scorer, encoded, "audio"))
            done += len(waveforms)
        _warn_of_cut(cut, limit)
        return TokenSequence.cat(parts)

    def _encode_clips(self, waveforms: list[NDArray[np.float32]], places: list[str]) -> TokenSequence:
        """Encode clips. Raises UserError that names the place of a clip without a finite embedding."""
        waveform, lengths = pad(waveforms)
        with encoder_products(self.module.tf32):
            encoded = self.module.encode_audio(waveform.to(self.device), lengths)
        finite = encoded.pooled.isfinite().all(1).tolist()
        if not all(finite):  # a file of floats may hold any numbers
            number = finite.index(False)
            raise UserError(
                f"{places[number]} has no finite embedding: its largest sample is "
                f"{np.abs(waveforms[number]).max():g}; give samples in [-1, 1], or check the weights"
            )
        return encoded

    def _seconds(self, seconds: float | None) -> float:
        """How much of a clip is read."""
        return _positive(self.config.data.evaluation_seconds if seconds is None else seconds, "seconds")

    def _groups(self, items: Sequence[T], batch_size: int | None, name: str) -> Iterator[Sequence[T]]:
        size = self.config.evaluation.batch_size if batch_size is None else batch_size
        if not isinstance(size, int | np.integer) or size < 1:
            raise UserError(f"batch_size = {size!r}: give a whole number, at least 1")
        starts = range(0, len(items), size)
        for start in tqdm(starts, desc=name, unit="batch", disable=None, delay=BAR_AFTER):
            yield items[start : start + size]

    def _read(
        self, clip: Audio, place: str, sample_rate: int | None, seconds: float, cut: list[str]
    ) -> NDArray[np.float32]:
        """Read one clip as mono float32 at the rate of the model.

        place: name of the clip in messages. It is added to `cut` if the clip is longer than `seconds`.
        """
        try:
            if not isinstance(clip, str | Path):
                return self._resample(_mono(clip, place), place, sample_rate, seconds, cut)
            place = f"{place}, {clip},"
            contents, extension = Path(clip).read_bytes(), Path(clip).suffix[1:].lower()
            source = open_audio(contents, extension)
            if source.frames > seconds * source.rate:
                cut.append(place.rstrip(","))
            return decode_source(source, self.sample_rate, crop=Crop(0.0, seconds))
        except OSError as error:
            raise UserError(f"{place} cannot be read: {error.strerror or error}") from None
        except UserError:
            raise
        except ValueError as error:  # a zero byte in a path
            raise UserError(f"{place} cannot be read: {error}") from None
        except BadSample as error:
            raise UserError(f"{place} cannot be used: {error}") from None

    def _resample(
        self, waveform: NDArray[np.float32], place: str, sample_rate: int | None, seconds: float, cut: list[str]
    ) -> NDArray[np.float32]:
        if sample_rate is None:
            raise UserError(f"{place} is a waveform: give its sample_rate in Hz")
        if not MIN_RATE <= _positive(sample_rate, "sample_rate") <= MAX_RATE:
            raise UserError(f"sample_rate = {sample_rate}: give Hz, from {MIN_RATE} to {MAX_RATE}")
        if not len(waveform):
            raise BadSample("empty_audio", "no samples")
        if len(waveform) > seconds * sample_rate:
            cut.append(place)
            waveform = waveform[: max(1, round(seconds * sample_rate))]
        check_waveform(waveform)
        if (peak := float(np.abs(waveform).max())) > MAX_PEAK:
            raise UserError(f"{place} holds values up to {peak:g}: give floats in [-1, 1], or int16")
        if sample_rate == self.sample_rate:
            return waveform
        wanted = max(1, round(len(waveform) * self.sample_rate / sample_rate))
        resampled: NDArray[np.float32] = soxr.resample(waveform, sample_rate, self.sample_rate, quality="HQ")
        return resampled[:wanted]

    def _need_dual_encoder(self, method: str) -> None:
        if not self.module.scorer.is_dual_encoder:
            raise UserError(
                f"{method}: the scorer {self.config.model.scorer.name} of this model is pairwise, so it has no "
                "embeddings: use similarity(texts, audio)"
            )


def _as_list(items: Sequence[Any], name: str, *single: type) -> list[Any]:
    """The items as a list. Raises UserError if `items` is a single item of the types `single`, no list, or empty."""
    if isinstance(items, single):
        raise UserError(f"{name} is one item, {str(items)!r}: give a list, [{str(items)!r}]")
    try:
        found = list(items)
    except TypeError:
        raise UserError(f"{name} is {type(items).__name__}, not a list") from None
    if not found:
        raise UserError(f"{name} is empty: give at least one item")
    return found


def _checked_texts(texts: Sequence[str]) -> list[str]:
    texts = _as_list(texts, "texts", str)
    for number, text in enumerate(texts):
        _check_text(text, f"texts[{number}]")
    return texts


def _check_text(text: Any, place: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place} is {text!r}: give a text that is not empty")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{place} is {text!r}, not valid Unicode: read it with the right encoding")


def _warn_of_cut(cut: list[str], limit: float) -> None:
    if cut:
        logger.warning(
            "only the first %g s of %d longer clips were read, the first is %s; seconds=... reads more",
            limit, len(cut), cut[0],
        )  # fmt: skip


def _positive(number: Any, name: str) -> float:
    """`number` as a float. Raises UserError if it is not a finite number above 0."""
    if isinstance(number, bool) or not isinstance(number, int | float | np.number) or not 0 < number < np.inf:
        raise UserError(f"{name} = {number!r}: give a number above 0")
    return float(number)


def _mono(waveform: Waveform, place: str) -> NDArray[np.float32]:
    """A copy of the samples as float32. Raises UserError if they are not a mono waveform of floats or int16."""
    if isinstance(waveform, Tensor):
        try:
            waveform = waveform.detach().to("cpu", torch.float32 if waveform.is_floating_point() else None)
            values = waveform.resolve_neg().numpy()
        except (RuntimeError, TypeError) as error:  # a sparse tensor, or one without values
            raise UserError(f"{place} is a tensor that cannot be read ({one_line(error)}): give samples") from None
    else:
        try:
            values = np.asarray(waveform)
        except ValueError:
            raise UserError(
                f"{place} is {type(waveform).__name__}: give a path, or a mono waveform [samples]"
            ) from None
    if values.ndim != 1:
        raise UserError(
            f"{place} has the shape {list(values.shape)}: give a list of paths, or of mono waveforms [samples]"
        )
    if values.dtype == np.int16:
        return values.astype(np.float32) * np.float32(FULL_SCALE)
    if values.dtype.kind != "f":
        raise UserError(f"{place} holds {values.dtype}: give floats in [-1, 1], or int16")
    with np.errstate(over="ignore"):  # samples that become infinite are refused later
        return values.astype(np.float32)
