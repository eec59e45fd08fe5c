"""The two directions of a loss, text to audio (t2a) and audio to text (a2t), for the record of a run.

    with listening() as told:
        loss = term(inputs)     # its formulas call `tell`
    told                        # {"t2a": ..., "a2t": ...}, or {} if the term has no directions

A term need not hand them on: it returns its loss alone. What several formulas tell inside one block is added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor


class _Listener(NamedTuple):
    found: dict[str, Tensor]
    factor: float


_listener: ContextVar[_Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening() -> Iterator[dict[str, Tensor]]:
    """What is told inside, by direction: scalars without a gradient. A block around this one is told nothing."""
    found: dict[str, Tensor] = {}
    before = _listener.set(_Listener(found, 1.0))
    try:
        yield found
    finally:
        _listener.reset(before)


@contextmanager
def weighed(factor: float) -> Iterator[None]:
    """What is told inside counts times `factor`, as the loss that is computed there does in its term."""
    listener = _listener.get()
    before = _listener.set(listener and listener._replace(factor=factor * listener.factor))
    try:
        yield
    finally:
        _listener.reset(before)


def tell(t2a: Tensor, a2t: Tensor, t2a_share: float) -> None:
    """The directions of a loss t2a_share * t2a + (1 - t2a_share) * a2t; one whose share is 0 is left out."""
    listener = _listener.get()
    if listener is None:
        return
    for name, value, share in (("t2a", t2a, t2a_share), ("a2t", a2t, 1 - t2a_share)):
        if share:
            own = value.detach() if listener.factor == 1 else listener.factor * value.detach()
            listener.found[name] = listener.found[name] + own if name in listener.found else own
