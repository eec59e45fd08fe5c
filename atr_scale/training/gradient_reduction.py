"""Gradients are summed over ranks in buckets, while the backward pass that completes them still runs.

    a gradient is complete -> its bucket is full: one copy into a buffer, in the dtype that crosses the network
        -> an asynchronous collective on the buffer -> the sum: whole on every rank, or each slice on its owner

Buckets lie in the order in which the first step's backward pass completes gradients, and are sent in this order by all
ranks. It follows from the model, so sums do not depend on when a run was resumed.
Rajbhandari et al. 2020 (arXiv 1910.02054, section 5) send each gradient slice to its owner alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atr_scale.distributed.world import World

BUCKET_BYTES = 32 * 2**20  # of gradients in the dtype of their parameters


@dataclass(frozen=True)
class Slice:
    """Values `start` to `stop` of a flattened parameter, whose gradient a single rank owns.

    offset: place in partition `partition` of the owner.
    """

    start: int
    stop: int
    owner: int
    partition: int
    offset: int


@dataclass(frozen=True)
class Sharding:
    """Who owns which gradients. slices: of a parameter, in order. allocate: zeros for this rank's partitions."""

    slices: Callable[[nn.Parameter], list[Slice]]
    allocate: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class _Part:
    """A parameter's gradient in a bucket, or one slice of it."""

    parameter: nn.Parameter
    slice: Slice | None = None

    @property
    def size(self) -> int:
        return self.slice.stop - self.slice.start if self.slice else self.parameter.numel()

    def of(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1)[self.slice.start : self.slice.stop] if self.slice else gradient

    def in_buffer(self, values: Tensor) -> Tensor:
        """values: this part of the bucket's buffer. A whole gradient has the memory layout of its parameter."""
        return values if self.slice else values.as_strided(self.parameter.shape, self.parameter.stride())


@dataclass(eq=False)
class _Bucket:
    """`waiting`: gradients that are not complete yet. `work`: collectives that run on `buffer`."""

    number: int
    parameters: list[nn.Parameter]
    parts: list[_Part]
    waiting: int = 0
    sent: bool = False
    buffer: Tensor | None = None
    work: list[Any] = field(default_factory=list)

    def views(self, buffer: Tensor) -> list[Tensor]:
        pieces = buffer.split([part.size for part in self.parts])
        return [part.in_buffer(piece) for part, piece in zip(self.parts, pieces, strict=True)]

    def by_owner(self, buffer: Tensor) -> Iterable[tuple[int, Tensor]]:
        """The buffer in contiguous pieces, one for each owner. Parts are in the order of owners."""
        sizes: Counter[int] = Counter()
        for part in self.parts:
            assert part.slice
            sizes[part.slice.owner] += part.size
        return zip(sizes, buffer.split(list(sizes.values())), strict=True)


class GradientReduction:
    """Sums the gradients of an update over ranks.

        reduction.begin(passes)    # these backward passes complete the gradients
        ...                        # the passes
        owned = reduction.finish()

    Earlier backward passes add to `.grad` as usual. Gradients leave `.grad` as their bucket is filled.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world: World,
        *,
        dtype: torch.dtype | None = None,
        sharding: Sharding | None = None,
        most_in_flight: int | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """parameters: those that learn, in order of registration, the same on all ranks.

        dtype: crosses the network; by default that of the parameters. Backends add in pairs, and round each sum to it.
        sharding: without it every rank gets all sums. most_in_flight: buckets in memory before the oldest is awaited.
        """
        self.parameters, self.world, self.dtype, self.sharding = list(parameters), world, dtype, sharding
        self.most_in_flight, self.bucket_bytes = most_in_flight, bucket_bytes
        self._buckets: list[_Bucket] = []
        self._passes: Counter[nn.Parameter] = Counter()  # that complete a gradient; those that come last have none
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._active, self._next = False, 0
        self._in_flight: deque[_Bucket] = deque()
        self._partitions: list[Tensor] = []
        self._local_sums = self.parameters[0].new_zeros(0)
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._complete)

    def begin(self, passes: Iterable[Sequence[Tensor]]) -> None:
        """Start to send buckets. passes: the roots of each backward pass that is still to come, after which gradients
        are complete."""
        if self._alone:
            return
        if not self._buckets:
            self._plan(list(passes))
        for bucket in self._buckets:
            bucket.waiting = sum(self._passes.get(parameter, 0) for parameter in bucket.parameters)
            bucket.sent = False
        self._partitions = self.sharding.allocate() if self.sharding else []
        self._active, self._next = True, 0
        self._local_sums = self.parameters[0].new_zeros(len(self._buckets))

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """Send what is left, wait, and return the sums that this rank owns: its partitions, or all in `.grad`."""
        if self._alone:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not self._active:
            self.begin(())
        self._active = False
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        while self._in_flight:
            self._receive()
        owned = self._partitions or [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self._partitions = []
        return owned

    def local_sum(self) -> Tensor:
        """After `finish`: a sum that is finite only if all gradients of this rank were, before they met the others'."""
        return self._local_sums.sum()

    @property
    def _alone(self) -> bool:
        return self.world.size == 1 and not self.sharding

    def _plan(self, passes: Sequence[Sequence[Tensor]]) -> None:
        """Make the buckets, in the main rank's order. What a rank does not reach comes last and is sent at the end."""
        numbers = range(len(self.parameters))
        completed: dict[nn.Parameter, tuple[int, int]] = {}  # in which pass, and where in it
        for number, roots in enumerate(passes):
            for parameter, place in _reached(roots).items():
                completed[parameter] = (number, place)
                self._passes[parameter] += 1
        order = [n for n in numbers if self.parameters[n] in completed]
        order.sort(key=lambda n: completed[self.parameters[n]])
        orders = self.world.gather_objects(order)
        on_all = set(numbers).intersection(*orders)
        early = [n for n in orders[0] if n in on_all]
        late = [n for n in reversed(numbers) if n not in on_all]
        for n in late:
            self._passes.pop(self.parameters[n], None)
        for some in (early, late):
            for parameters in _filled([self.parameters[n] for n in some], self.bucket_bytes):
                bucket = _Bucket(len(self._buckets), parameters, self._parts(parameters))
                self._buckets.append(bucket)
                self._bucket_of.update(dict.fromkeys(parameters, bucket))

    def _parts(self, parameters: Iterable[nn.Parameter]) -> list[_Part]:
        if not self.sharding:
            return [_Part(parameter) for parameter in parameters]
        placed = [(own, _Part(parameter, own)) for parameter in parameters for own in self.sharding.slices(parameter)]
        placed.sort(key=lambda pair: (pair[0].owner, pair[0].partition, pair[0].offset))
        return [part for _, part in placed]

    def _complete(self, parameter: Tensor) -> None:
        """A backward pass has added to the gradient of a parameter."""
        if not self._active or parameter not in self._passes:
            return
        bucket = self._bucket_of[parameter]  # type: ignore[index]
        if bucket.sent:
            raise RuntimeError("a parameter got a gradient in more backward passes than in the first optimizer step")
        bucket.waiting -= 1
        # The last buckets, of what was not reached in the first step, wait for the end.
        while self._next < len(self._buckets) and self._may_go(self._buckets[self._next]):
            self._send(self._buckets[self._next])
            self._next += 1

    def _may_go(self, bucket: _Bucket) -> bool:
        return bucket.waiting == 0 and bucket.parameters[0] in self._passes

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        """Fill the bucket's buffer and start its collectives."""
        example = bucket.parameters[0]
        buffer = example.new_empty(sum(part.size for part in bucket.parts), dtype=self.dtype or example.dtype)
        into: list[Tensor] = []
        gradients: list[Tensor] = []
        for part, view in zip(bucket.parts, bucket.views(buffer), strict=True):
            if part.parameter.grad is None:
                view.zero_()
            else:
                into.append(view)
                gradients.append(part.of(part.parameter.grad))
        if into:
            torch._foreach_copy_(into, gradients)
        for parameter in bucket.parameters:
            parameter.grad = None
        # Finite only if all values are: of which rank a bad value came, before it is spread by the sum over ranks.
        torch.sum(buffer, 0, dtype=self._local_sums.dtype, out=self._local_sums[bucket.number])
        if self.world.size > 1:
            start = partial(dist.all_reduce, group=self.world.group, async_op=True)
            reduce = partial(dist.reduce, group=self.world.group, async_op=True)
            if self.sharding:
                bucket.work = [reduce(piece, group_dst=owner) for owner, piece in bucket.by_owner(buffer)]
            else:
                bucket.work = [start(buffer)]
        bucket.buffer, bucket.sent = buffer, True
        self._in_flight.append(bucket)
        while self._in_flight and self._is_old(self._in_flight[0]):
            self._receive()

    def _is_old(self, bucket: _Bucket) -> bool:
        too_many = self.most_in_flight is not None and len(self._in_flight) > self.most_in_flight
        return too_many or all(work.is_completed() for work in bucket.work)

    @torch.no_grad()
    def _receive(self) -> None:
        """Wait for the oldest bucket and put its sums where they belong. On CUDA this orders streams, not the host."""
        bucket = self._in_flight.popleft()
        assert bucket.buffer is not None
        for work in bucket.work:
            work.wait()
        if self.sharding:
            self._keep_own(bucket)
        else:
            whole = bucket.buffer.to(bucket.parameters[0].dtype)
            for part, view in zip(bucket.parts, bucket.views(whole), strict=True):
                part.parameter.grad = view
        bucket.buffer, bucket.work = None, []

    def _keep_own(self, bucket: _Bucket) -> None:
        assert bucket.buffer is not None
        into: list[Tensor] = []
        values: list[Tensor] = []
        for part, view in zip(bucket.parts, bucket.views(bucket.buffer), strict=True):
            own = part.slice
            assert own
            if own.owner == self.world.rank:
                into.append(self._partitions[own.partition].narrow(0, own.offset, part.size))
                values.append(view)
        if into:
            torch._foreach_copy_(into, values)


def _filled(parameters: Sequence[nn.Parameter], most: int) -> Iterable[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, as many as `most` bytes hold, or a larger one alone."""
    bucket: list[nn.Parameter] = []
    nbytes = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if bucket and (nbytes + size > most or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(parameter)
        nbytes += size
    if bucket:
        yield bucket


def _reached(roots: Sequence[Tensor]) -> dict[nn.Parameter, int]:
    """The parameters to which a backward pass from `roots` adds a gradient, and a number that rises in their order.

    A pass takes its nodes by falling sequence number. A gradient is complete after the last node that uses the
    parameter.
    """
    found: dict[nn.Parameter, int] = {}
    seen = set()
    nodes = [root.grad_fn for root in roots]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            parameter = getattr(following, "variable", None)
            if parameter is None:
                nodes.append(following)
            else:
                place = -node._sequence_nr()
                found[parameter] = max(found.get(parameter, place), place)
    return found
