"""A collective that fails because another rank is gone, in one line instead of a traceback on every other rank."""

from __future__ import annotations

import re

import torch.distributed as dist

from atr_scale.errors import Failure, one_line

# How gloo begins its errors: the place in its C++ source. NCCL's name for a peer that has left.
OF_GLOO = re.compile(r"\[\S*gloo/transport/\S+\] *")
OF_NCCL = "ncclRemoteError"


def lost_rank(error: Exception) -> Failure | None:
    """What to say if `error` is of a connection to another rank; None if it is of another kind."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not (
        OF_GLOO.search(text) or (isinstance(error, dist.DistBackendError) and OF_NCCL in text)
    ):
        return None
    said = one_line(OF_GLOO.sub("", text).split(". This is typically")[0], 200)
    return Failure(
        f"the connection to another rank failed ({said}): its process or its machine is gone, and its own log says "
        "why; the same command goes on from the last checkpoint"
    )
