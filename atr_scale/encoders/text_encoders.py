"""The text encoders by name.

A plug-in adds its encoders to `TEXT_ENCODERS` when its module is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atr_scale.encoders.text import TextEncoder, TextEncoderOptions
from atr_scale.encoders.transformers_text import TransformersTextEncoder
from atr_scale.sections import check_options, options_of

TEXT_ENCODERS: dict[str, type[TextEncoder]] = {}  # any other name is the folder or name of a transformers model


def text_encoder_options(name: str) -> type[TextEncoderOptions]:
    """The section that checks the options of the encoder `name`."""
    return options_of(TEXT_ENCODERS.get(name), TextEncoderOptions)


def text_encoder_keys(name: str) -> frozenset[str]:
    """The options that the encoder `name` has."""
    supported = TEXT_ENCODERS.get(name, TransformersTextEncoder).common_options
    return frozenset(text_encoder_options(name).model_fields) - (TextEncoderOptions.model_fields.keys() - supported)


def build_text_encoder(name_or_path: str | Path, pooling: str = "first", **options: Any) -> TextEncoder:
    """Build a text encoder in evaluation mode.

    name_or_path: an entry of TEXT_ENCODERS, or a pretrained transformers model, which is loaded in fp32: a folder with
    model and tokenizer, or a name on a model hub.
    pooling: first or mean.
    options: the other fields of TextEncoderOptions and of the encoder's own `Options`.
    Raises UserError with one line if an option is unknown or not supported, or if the encoder cannot be loaded, is not
    a text encoder, or lacks some of its weights.
    """
    name = str(name_or_path)
    chosen = check_options(text_encoder_options(name), {"pooling": pooling, **options}, f"the text encoder {name}")
    encoder = TEXT_ENCODERS.get(name, TransformersTextEncoder).build(name, chosen)
    encoder.configure(chosen, name)
    return encoder.eval()


def load_text_encoder(folder: str | Path, name: str = "", **options: Any) -> TextEncoder:
    """Build a text encoder, without its weights, from the files that its `save_files` wrote to `folder`.

    The weights are not initialised; the caller must overwrite them. Nothing is downloaded.
    name: the name in the configuration; encoders of transformers need none. options: as for `build_text_encoder`.
    Raises UserError with one line if an option is unknown or if the folder does not hold the files.
    """
    chosen = check_options(text_encoder_options(name), options, f"the text encoder {name or folder}")
    encoder = TEXT_ENCODERS.get(name, TransformersTextEncoder).load(Path(folder), chosen)
    encoder.configure(chosen, name or str(folder))
    return encoder.eval()
