"""The model of a configuration without weights. If the text encoder is a known one, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from atr_scale.config import RunConfig
from atr_scale.encoders import TEXT_ENCODERS, TextEncoder, build_text_encoder
from atr_scale.encoders.audio_encoders import audio_encoder_keys
from atr_scale.encoders.hub import must_use_cache
from atr_scale.encoders.transformers_text import TransformersTextEncoder, quiet_transformers, untrained
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.training.param_groups import freeze

# Sizes from the published config.json of each: (family, settings that differ from the family's defaults).
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
KNOWN_TEXT_ENCODERS: dict[str, tuple[str, dict[str, int]]] = {
    "bert-base-uncased": ("bert", {}),
    "bert-large-uncased": ("bert", _LARGE),
    "roberta-base": ("roberta", _ROBERTA),
    "roberta-large": ("roberta", {**_ROBERTA, **_LARGE}),
    "distilbert-base-uncased": ("distilbert", {}),
    "sentence-transformers/all-MiniLM-L6-v2": ("bert", _MINILM),
    "sentence-transformers/all-mpnet-base-v2": ("mpnet", {"vocab_size": 30527, "max_position_embeddings": 514}),
}


def build_without_weights(config: RunConfig, augmentation: bool = False) -> Retriever:
    """The retriever as it is trained, with its frozen layers. Audio encoder and heads have random weights; the text
    encoder is on the meta device. Raises UserError as the run itself would.

    augmentation: keep the random augmentation of spectrograms.
    """
    section = config.model.model_copy(deep=True)
    section.audio.checkpoint = None
    section.audio.compile = section.text.compile = False
    if section.audio.attention == "auto" and "attention" in audio_encoder_keys(section.audio.name):
        section.audio.attention = "sdpa"  # as on a GPU
    if not augmentation:  # it needs values: it reads the waveform, or makes a mel filter bank of its own
        section.audio.spec_augment = None
        section.audio.fmin_aug_range = section.audio.fmax_aug_range = 0
    text_encoder = _text_encoder(config)
    train = config.train
    model = Retriever(
        section,
        config.objective,
        precision=train.precision,
        head_products=train.head_products,
        text_encoder=text_encoder,
    )
    freeze(model, config.train)
    return model.train()


def become_fake(module: nn.Module, mode: FakeTensorMode, device: str = "cpu") -> None:
    """Replace all parameters and buffers by tensors of the same shapes without values, as if on `device`."""
    with mode:
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(
                        torch.empty(value.shape, dtype=value.dtype, device=device), value.requires_grad
                    )
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _text_encoder(config: RunConfig) -> TextEncoder:
    options = config.model.text.model_copy(update={"compile": False})
    if options.name in TEXT_ENCODERS:
        return build_text_encoder(options.name, **options.model_dump(exclude={"name"}))
    with quiet_transformers(), torch.device("meta"):
        transformer = untrained(_settings(options.name), options)
    encoder = TransformersTextEncoder(transformer, None, options)
    encoder.configure(options, options.name)
    return encoder


def _settings(name: str) -> Any:
    from transformers import AutoConfig

    if name in KNOWN_TEXT_ENCODERS and not Path(name).is_dir():
        family, sizes = KNOWN_TEXT_ENCODERS[name]
        return AutoConfig.for_model(family, **sizes)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=must_use_cache(name))
    except Exception as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise UserError(
            f"no config.json of the text encoder '{name}' ({reason}): give a folder, or one of "
            f"{', '.join(KNOWN_TEXT_ENCODERS)}"
        ) from None
