from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atr_scale.batch import TokenSequence
from atr_scale.encoders import AudioEncoder, build_audio_encoder
from atr_scale.encoders.buckets import encode_in_buckets
from atr_scale.encoders.windows import cut_into_windows, join_windows, window_starts

ENCODERS = ["mn04", "small_cnn"]


def noise(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def seconds(encoder: AudioEncoder, time: float) -> int:
    return round(time * encoder.sample_rate)


@pytest.mark.parametrize(
    ("length", "hop", "starts"),
    [
        (0, 100, [0]),
        (99, 100, [0]),
        (100, 100, [0]),
        (101, 100, [0]),  # a tail of a hundredth gets no window
        (102, 100, [0, 100]),
        (200, 100, [0, 100]),
        (201, 100, [0, 100]),
        (202, 100, [0, 100, 200]),
        (102, 50, [0, 50]),
        (151, 50, [0, 50]),
        (152, 50, [0, 50, 100]),
        (250, 60, [0, 60, 120, 180]),
    ],
)
def test_window_starts(length: int, hop: int, starts: list[int]) -> None:
    assert window_starts(length, 100, hop) == starts


def test_no_samples_without_a_window() -> None:
    assert window_starts(0, 0, 0) == [0]


def test_cut_and_join_by_hand() -> None:
    waveform = torch.arange(1.0, 22).reshape(3, 7)
    windows = cut_into_windows(waveform, torch.tensor([7, 2, 4]), window=4, hop=4)
    rows = [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0], [15, 16, 17, 18]]
    assert windows.waveform.tolist() == rows and windows.counts == [2, 1, 1]
    assert windows.lengths.tolist() == [4, 4, 2, 4] and windows.filled == [1.0, 0.75, 1.0, 1.0]

    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    encoded = TokenSequence(windows.waveform.unsqueeze(2), mask, windows.waveform[:, :1])
    joined = join_windows(encoded, windows)
    assert joined.tokens[..., 0].tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 0, 0, 0, 0, 0, 0], [15, 16, 17, 18, 0, 0, 0]]
    assert joined.mask.sum(1).tolist() == [7, 1, 4] and torch.equal(joined.mask, joined.tokens[..., 0] > 0)
    # The first clip has 4 and 3 samples in its windows.
    assert joined.pooled.tolist() == [[pytest.approx((4 * 1 + 3 * 5) / 7)], [8], [15]]
    by_token = join_windows(encoded, windows, pooled_is_mean=True)
    assert by_token.pooled.tolist() == [[4], [8], [15]]  # a clip in one piece keeps what its encoder gave


class Operations(TorchDispatchMode):
    """Counts operations by name, and the values that they write. Refuses those for which the host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.written = Counter[str](), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert name not in ("_local_scalar_dense", "nonzero", "repeat_interleave") and not by_mask, f"{name} waits"
        result = func(*args, **(kwargs or {}))
        self.calls[name] += 1
        self.written += result.numel() if isinstance(result, Tensor) and not result._is_view() else 0
        return result


@pytest.mark.parametrize("pooled_is_mean", [False, True])
@pytest.mark.parametrize("lengths", [(30, 30, 30), (30, 25, 10)])
def test_many_clips_are_cut_and_joined_like_few(lengths: tuple[int, ...], pooled_is_mean: bool) -> None:
    """No wait, no loop over clips or windows, and a backward pass that is linear in them."""
    counted = []
    for times in (1, 8):
        weight = torch.ones(5, 3, requires_grad=True)

        def encode(piece: Tensor, weight: Tensor = weight) -> TokenSequence:
            tokens = piece.unflatten(1, (2, 5)) @ weight
            return TokenSequence.unpadded(tokens, tokens.mean(1))

        waveform, numbers = noise(3 * times, 30), torch.tensor(lengths * times)
        with Operations() as operations:
            windows = cut_into_windows(waveform, numbers, window=10, hop=10)
            encoded = encode_in_buckets(encode, windows.waveform, windows.lengths)
            joined = join_windows(encoded, windows, pooled_is_mean)
            (joined.tokens.square().sum() + joined.pooled.square().sum()).backward()
        counted.append(operations)
    few, many = counted
    assert many.calls == few.calls
    assert many.written < 9 * few.written


# Tokens of audio in the last window at 17 and at 21 s. ATST has 25 a second, HTS-AT and CLAP 3.2, of which the last one
# that has begun counts. The embedding of PaSST is no mean of tokens.
@pytest.mark.parametrize(
    ("name", "heard"),
    [("tiny_atst", (175, 25)), ("tiny_htsat", (23, 4)), ("tiny_clap", (23, 4)), ("tiny_passt", None)],
)
@torch.no_grad()
def test_padding_is_no_audio(name: str, heard: tuple[int, int] | None) -> None:
    """The rule written out. The mean over the windows would give a second of sound the weight of ten."""
    torch.manual_seed(0)
    encoder = build_audio_encoder(name).eval()
    for k, length in enumerate((17, 21)):
        waveform = noise(1, seconds(encoder, length)) * torch.linspace(0.1, 10, seconds(encoder, length))
        last = length % 10
        *full, tail = waveform.split(seconds(encoder, 10), 1)
        parts = [encoder.encode(piece) for piece in full]
        padded = encoder.encode(torch.nn.functional.pad(tail, (0, seconds(encoder, 10 - last))))
        if heard:
            expected = torch.cat([part.tokens[0] for part in parts] + [padded.tokens[0, : heard[k]]]).mean(0)
        else:
            expected = (10 * sum(part.pooled[0] for part in parts) + last * padded.pooled[0]) / length
        pooled = encoder(waveform).pooled[0]
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
        unweighted = torch.stack([part.pooled[0] for part in (*parts, padded)]).mean(0)
        assert not torch.allclose(pooled, unweighted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("hop", [2.0, 1.2])
@torch.no_grad()
def test_a_long_clip_is_its_windows_one_by_one(name: str, hop: float) -> None:
    torch.manual_seed(0)  # some random networks amplify rounding beyond the tolerance
    encoder = build_audio_encoder(name, window_seconds=2.0, window_hop_seconds=hop)
    window, length = seconds(encoder, 2), seconds(encoder, 4.5)
    waveform = noise(1, length)
    starts = window_starts(length, window, seconds(encoder, hop))
    pieces = [waveform[:, start : start + window] for start in starts]
    pieces[-1] = torch.nn.functional.pad(pieces[-1], (0, window - pieces[-1].shape[1]))
    alone = [encoder.encode(piece) for piece in pieces]

    joined = encoder(waveform)
    assert len(alone) == (3 if hop == 2.0 else 4) and joined.mask.all()
    tokens = torch.cat([part.tokens for part in alone], 1)
    count = joined.tokens.shape[1]
    torch.testing.assert_close(joined.tokens, tokens[:, :count], rtol=1e-4, atol=1e-4)
    heard = (length - starts[-1]) / window
    left_out = int((1 - heard) * alone[-1].tokens.shape[1])
    assert count == tokens.shape[1] - left_out and (heard < 0.95) == (left_out > 0)
    pooled = sum(part.pooled for part in alone[:-1]) + heard * alone[-1].pooled
    expected = joined.tokens.mean(1) if name == "mn04" else pooled / (len(alone) - 1 + heard)
    torch.testing.assert_close(joined.pooled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_long_and_short_clips_in_one_batch(name: str) -> None:
    encoder = build_audio_encoder(name, window_seconds=1.0)
    lengths = [seconds(encoder, t) for t in (2.6, 0.4, 1.0, 1.005, 0.0, 1.7)]
    waveform = noise(len(lengths), max(lengths))
    together = encoder(waveform, torch.tensor(lengths))
    others = waveform.clone()
    for row, length in enumerate(lengths):
        others[row, length:] = 5.0
    assert torch.equal(encoder(others, torch.tensor(lengths)).tokens, together.tokens)
    for row, length in enumerate(lengths):
        alone = encoder(waveform[row : row + 1, :length])
        count = alone.tokens.shape[1]
        assert alone.mask.all() and together.mask[row].tolist() == [True] * count + [False] * (
            together.mask.shape[1] - count
        )
        assert not together.tokens[row, count:].any()
        torch.testing.assert_close(together.tokens[row, :count], alone.tokens[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], rtol=1e-4, atol=1e-4)
    # The few milliseconds beyond a window are not heard.
    window = encoder(waveform[3:4, : seconds(encoder, 1)])
    torch.testing.assert_close(together.pooled[3], window.pooled[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_gradient_of_a_long_clip_is_that_of_its_windows(name: str) -> None:
    encoder = build_audio_encoder(name, window_seconds=1.0).double()  # random deep networks enlarge rounding
    waveform = noise(1, seconds(encoder, 2))
    parameters = [p for p in encoder.parameters() if p.requires_grad]

    def gradients(sequence: TokenSequence) -> list[Tensor]:
        return list(torch.autograd.grad(sequence.pooled.square().sum() + sequence.tokens.sum(), parameters))

    halves = [encoder.encode(half) for half in waveform.chunk(2, 1)]
    by_hand = TokenSequence(
        torch.cat([half.tokens for half in halves], 1),
        torch.cat([half.mask for half in halves], 1),
        (halves[0].pooled + halves[1].pooled) / 2,
    )
    for given, expected in zip(gradients(encoder(waveform)), gradients(by_hand), strict=True):
        assert given.any()
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_tags_average_the_windows() -> None:
    encoder = build_audio_encoder("mn04", window_seconds=1.0)
    rate = encoder.sample_rate
    waveform = noise(2, rate * 5 // 2)
    last = torch.nn.functional.pad(waveform[:, 2 * rate :], (0, rate // 2))
    with torch.no_grad():
        windows = [encoder.logits(piece) for piece in (waveform[:, :rate], waveform[:, rate : 2 * rate], last)]
    expected = (windows[0] + windows[1] + windows[2] / 2) / 2.5  # the last window holds half a second
    torch.testing.assert_close(encoder.tags(waveform), expected)
    assert encoder.tags(waveform[:, :0]).shape == build_audio_encoder("mn04").tags(waveform[:, :0]).shape == (2, 527)


def test_ranks_with_fewer_buckets_run_as_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = [], []

    def rounds(count: int) -> int:
        own.append(count)
        return 5

    encoder = build_audio_encoder("small_cnn", window_seconds=1.0, equal_rounds=rounds)
    plain = build_audio_encoder("small_cnn", window_seconds=1.0)
    plain.load_state_dict(encoder.state_dict())
    rate = encoder.sample_rate
    waveform, lengths = noise(2, 5 * rate // 2), torch.tensor([5 * rate // 2, rate // 2])
    expected = plain(waveform, lengths)
    encode = encoder.encode

    def counted(waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        calls.append(waveform_BS.shape)
        return encode(waveform_BS, augment_seed)

    monkeypatch.setattr(encoder, "encode", counted)
    sequence = encoder(waveform, lengths)
    assert own == [2] and len(calls) == 5  # windows are one bucket, the short clip another
    assert torch.equal(sequence.tokens, expected.tokens) and torch.equal(sequence.pooled, expected.pooled)
    encoder(waveform[1:, : rate // 2])
    assert own == [2, 1] and len(calls) == 10
