"""The base class and the options of the text encoders.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol, Self

from pydantic import Field
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.errors import UserError
from atr_scale.sections import Section, own_fields


class TextEncoderOptions(Section):
    """Options of a text encoder. An encoder refuses an option that it does not support, by name."""

    pooling: Literal["first", "mean"] = Field(
        "first", description="Pooled embedding: that of the first token, or the mean over all tokens."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Dropout probability of hidden states and attention; by default that of the model."
    )
    attention: Literal["eager", "sdpa"] = Field(
        "sdpa", description="Implementation of attention: eager, or sdpa (fused; equal up to rounding)."
    )
    activation_checkpointing: bool = Field(
        False, description="Gradient checkpointing: layers are recomputed in the backward pass to save memory."
    )
    compile: bool = Field(False, description="Compile each layer with torch.compile.")


class Tokenizer(Protocol):
    """Called like a tokenizer of transformers: captions -> "input_ids" and "attention_mask", int64 [captions, T].

    max_length: the largest T; None stands for the largest that the encoder takes. A tokenizer may state that number as
    its attribute `model_max_length`: then no larger one is asked for.
    """

    def __call__(
        self, captions: list[str], *, padding: bool, truncation: bool, max_length: int | None, return_tensors: str
    ) -> Mapping[str, Tensor]: ...


class TextEncoder(nn.Module, ABC):
    """Token ids -> TokenSequence.

    dim: width of the tokens and of the pooled embedding.
    tokenizer: makes the token ids; it is not part of the state dict.
    layers: the layers that `frozen_layers` and `layer_decay` count, lowest first; each is a tuple of prefixes of
    parameter names.
    Options: the section that checks the options. The constructor takes the fields that it adds to TextEncoderOptions.
    common_options: the fields of TextEncoderOptions that the encoder supports; the others must keep their defaults.
    """

    dim: int
    tokenizer: Tokenizer
    Options: ClassVar[type[TextEncoderOptions]] = TextEncoderOptions
    common_options: ClassVar[frozenset[str]] = frozenset()
    options = TextEncoderOptions()

    @property
    @abstractmethod
    def layers(self) -> list[tuple[str, ...]]: ...

    @abstractmethod
    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> TokenSequence:
        """input_ids int64 [B, T] and attention_mask [B, T], 1 or True for every token that is not padding.

        The mask of the result is False for special tokens, so that scorers over tokens never use them.
        """

    @classmethod
    def build(cls, name: str, options: TextEncoderOptions) -> Self:
        """A new encoder for `model.text.name`. By default it is built from its own options alone."""
        return cls(**own_fields(options, TextEncoderOptions))

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Write the files that `load` needs besides the weights (sizes, tokenizer) to the existing `folder`."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, options: TextEncoderOptions) -> Self:
        """Build the encoder from the files of `save_files`, without weights.

        The weights may have any values, because the caller overwrites them. The state dict has the same keys as that of
        the saved encoder. Nothing outside of `folder` is read.
        """

    def configure(self, options: TextEncoderOptions, name: str) -> None:
        """Apply the common options. Raises UserError, naming the option, if this encoder does not support one."""
        default = TextEncoderOptions()
        for option in sorted(TextEncoderOptions.model_fields.keys() - self.common_options):
            if getattr(options, option) != getattr(default, option):
                raise UserError(f"the text encoder {name} has no {option}: leave it at {getattr(default, option)}")
        self.options = options
