from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.encoders.buckets import encode_in_buckets


class PerSample(nn.Module):
    """One token a sample; notes the shape of every batch it sees, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 3)
        self.seen: list[tuple[int, ...]] = []
        self.backwards = 0

    def count(self, gradient: Tensor) -> None:
        self.backwards += 1

    def encode(self, waveform: Tensor) -> TokenSequence:
        self.seen.append(tuple(waveform.shape))
        tokens = self.linear(waveform.unsqueeze(-1))
        tokens.register_hook(self.count)
        return TokenSequence(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), tokens.mean(1))


def test_buckets_keep_the_order_of_rows() -> None:
    encoder, waveform = PerSample(), torch.randn(5, 9)
    lengths = torch.tensor([4, 9, 4, 2, 9])
    out = encode_in_buckets(encoder.encode, waveform, lengths)
    assert sorted(encoder.seen) == [(1, 2), (2, 4), (2, 9)]
    assert out.mask.sum(1).tolist() == lengths.tolist()
    for row, length in enumerate(lengths.tolist()):
        expected = encoder.linear(waveform[row, :length, None])
        torch.testing.assert_close(out.tokens[row, :length], expected)
        torch.testing.assert_close(out.pooled[row], expected.mean(0))


def test_one_length_is_one_call_cut_to_it() -> None:
    encoder = PerSample()
    encode_in_buckets(encoder.encode, torch.randn(3, 9), torch.tensor([5, 5, 5]))
    encode_in_buckets(encoder.encode, torch.randn(3, 9), None)
    assert encoder.seen == [(3, 5), (3, 9)]


@pytest.mark.parametrize("used", ["tokens", "pooled"])
@pytest.mark.parametrize("lengths", [[4, 9, 4, 2, 9], [9] * 5])
def test_equal_rounds_add_calls_and_change_nothing(lengths: list[int], used: str) -> None:
    results = []
    waveform = torch.randn(5, 9)
    for rounds in (None, lambda own: own + 3):
        torch.manual_seed(0)
        encoder = PerSample()
        out = encode_in_buckets(encoder.encode, waveform, torch.tensor(lengths), rounds)
        getattr(out, used).square().sum().backward()
        results.append((out, encoder))
    (plain, one), (padded, other) = results
    assert len(other.seen) == len(one.seen) + 3
    assert other.backwards == one.backwards + 3
    assert torch.equal(padded.tokens, plain.tokens) and torch.equal(padded.pooled, plain.pooled)
    for of_other, of_one in zip(other.linear.parameters(), one.linear.parameters(), strict=True):
        assert of_other.grad is not None and of_one.grad is not None
        assert torch.equal(of_other.grad, of_one.grad)


def test_equal_rounds_is_asked_even_where_nothing_is_added() -> None:
    asked: list[int] = []

    def most(own: int) -> int:
        asked.append(own)
        return own

    encoder = PerSample()
    encode_in_buckets(encoder.encode, torch.randn(2, 6), torch.tensor([6, 3]), most)
    assert asked == [2] and len(encoder.seen) == 2
