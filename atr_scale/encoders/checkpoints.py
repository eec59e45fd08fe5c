"""Original checkpoints, loaded strictly and without running code from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from atr_scale.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors stored at `path` by torch.save; UserError where it is anything but names and tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the checkpoint file in it") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise UserError(
            f"{path} is no checkpoint of plain tensors ({reason}): give the original weights file"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold named tensors: give the original weights file of the encoder")
    return state


def load_strictly(module: nn.Module, name: str, path: str | Path) -> None:
    """Copies the checkpoint at `path` into `module`; `name` is the encoder's, for messages.

    Raises UserError naming the first missing, unexpected or misshapen entry.
    """
    state, own = read_checkpoint(path), module.state_dict()
    misshapen = [k for k in own if k in state and state[k].shape != own[k].shape]
    for problem, keys in (
        ("lacks", [k for k in own if k not in state]),
        ("has the unexpected", [k for k in state if k not in own]),
        ("has another shape of", misshapen),
    ):
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{path} {problem} '{keys[0]}'{others}: it is no checkpoint of {name}")
    module.load_state_dict(state)
