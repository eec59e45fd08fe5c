"""The text encoders by name: those of transformers, and others.

One that lives outside of this package is an entry that its module adds to `TEXT_ENCODERS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atr_scale.encoders.text import TextEncoder, TextEncoderOptions
from atr_scale.encoders.transformers_text import TransformersTextEncoder
from atr_scale.sections import check_options, options_of

TEXT_ENCODERS: dict[str, type[TextEncoder]] = {}  # any other name is that of a transformers model


def text_encoder_options(name: str) -> type[TextEncoderOptions]:
    """The section that checks the options of the encoder `name`."""
    return options_of(TEXT_ENCODERS.get(name), TextEncoderOptions)


def build_text_encoder(name_or_path: str | Path, pooling: str = "first", **options: Any) -> TextEncoder:
    """The encoder in evaluation mode: an entry of TEXT_ENCODERS, else the trained one of transformers in fp32, from a
    folder with model and tokenizer, or by its name on a model hub.

    pooling: first or mean. options: the other fields of TextEncoderOptions, and of the encoder's own `Options`.
    Raises UserError, in one line, for an unknown option, and if the encoder cannot be loaded, is no text encoder,
    lacks some of its weights, or cannot do what an option asks.
    """
    name = str(name_or_path)
    chosen = check_options(text_encoder_options(name), {"pooling": pooling, **options}, f"the text encoder {name}")
    encoder = TEXT_ENCODERS.get(name, TransformersTextEncoder).build(name, chosen)
    encoder.configure(chosen, name)
    return encoder.eval()


def load_text_encoder(folder: str | Path, name: str = "", **options: Any) -> TextEncoder:
    """The encoder `name` as `build_text_encoder` builds it, from the files that its `save_files` wrote to `folder`.

    Its weights are random, for the caller to overwrite: none are read, and nothing is downloaded. name: that of the
    configuration; transformers' encoders need none. options: as for `build_text_encoder`.
    Raises UserError, in one line, for an unknown option, and if the folder does not hold the files.
    """
    chosen = check_options(text_encoder_options(name), options, f"the text encoder {name or folder}")
    encoder = TEXT_ENCODERS.get(name, TransformersTextEncoder).load(Path(folder), chosen)
    encoder.configure(chosen, name or str(folder))
    return encoder.eval()
