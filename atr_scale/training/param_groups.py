"""The optimizer's parameter groups, frozen layers, and layer-wise decay of the learning rate.

An encoder's `layers` lists its layers from the lowest (next to the input) to the highest, each by prefixes of the names
of its parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from atr_scale.config_train import TrainSection
from atr_scale.errors import UserError
from atr_scale.model import Retriever

ENCODERS = ("audio", "text")


def freeze(model: Retriever, train: TrainSection) -> None:
    """Freeze the lowest train.frozen_layers_* layers of each encoder, and all layers of one with a learning rate of 0.

    UserError if an encoder has fewer layers.
    """
    for kind in ENCODERS:
        encoder = getattr(model, f"{kind}_encoder")
        frozen, layers = getattr(train, f"frozen_layers_{kind}"), encoder.layers
        if frozen > len(layers):
            raise UserError(
                f"train.frozen_layers_{kind} = {frozen}, but the {kind} encoder has {len(layers)} layers: "
                f"give at most {len(layers)}"
            )
        if getattr(train, f"lr_{kind}") == 0:
            frozen = len(layers)
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad and layer_of(name, layers) < frozen:
                parameter.requires_grad_(False)


def rate_scales(model: Retriever, train: TrainSection) -> dict[str, float]:
    """The factor on the learning rate of each trainable parameter, by the parameter's name in the model.

    It is decay ** (n - 1 - k) for layer k of n, and 1 for heads: layer-wise decay as in ELECTRA (Clark et al. 2020,
    arXiv 2003.10555) and BEiT (Bao et al. 2021, arXiv 2106.08254).
    """
    scales = {}
    for group, members in model.parameter_groups().items():
        layers = getattr(model, f"{group}_encoder").layers if group in ENCODERS else []
        decay = getattr(train, f"layer_decay_{group}") if group in ENCODERS else 1.0
        for name, _ in members:
            own_name = name.removeprefix(f"{group}_encoder.")
            scales[name] = 1.0 if decay == 1 else decay ** (len(layers) - 1 - layer_of(own_name, layers))
    return scales


def optimizer_groups(model: Retriever, train: TrainSection) -> Iterable[dict[str, Any]]:
    """Parameter groups "audio", "text" and "heads", each split by weight decay (none for biases, norms and scalars) and
    by the factor on the learning rate (`lr_scale`)."""
    scales = rate_scales(model, train)
    for name, members in model.parameter_groups().items():
        for weight_decay, chosen in (
            (train.weight_decay, [(n, p) for n, p in members if p.ndim > 1]),
            (0.0, [(n, p) for n, p in members if p.ndim <= 1]),
        ):
            by_scale = defaultdict(list)
            for parameter_name, parameter in chosen:
                by_scale[scales[parameter_name]].append(parameter)
            for scale, parameters in by_scale.items():
                yield {"params": parameters, "weight_decay": weight_decay, "name": name, "lr_scale": scale}


def layer_of(name: str, layers: Sequence[tuple[str, ...]]) -> int:
    """The number of the layer that the encoder's parameter `name` belongs to."""
    found = [number for number, prefixes in enumerate(layers) if name.startswith(prefixes)]
    assert len(found) == 1, f"parameter {name} belongs to {len(found)} layers, not to one"
    return found[0]


def describe_layers(model: Retriever, train: TrainSection) -> list[str]:
    """One line about frozen layers and one about decay of the learning rate, each only if there is any."""
    frozen, decayed = [], []
    for kind in ENCODERS:
        count = len(getattr(model, f"{kind}_encoder").layers)
        lowest, decay = getattr(train, f"frozen_layers_{kind}"), getattr(train, f"layer_decay_{kind}")
        if getattr(train, f"lr_{kind}") == 0 or lowest == count:
            frozen.append(f"{kind}: all {count} layers")
            continue
        if lowest:
            frozen.append(f"{kind}: lowest {lowest} of {count} layers")
        if decay < 1:
            smallest = decay ** (count - 1 - lowest)
            decayed.append(f"{kind}: {decay:g} a layer, lowest trained one {smallest:.2g} of the rate")
    return [
        f"{label:<11} {'; '.join(found)}" for label, found in (("frozen", frozen), ("layer decay", decayed)) if found
    ]
