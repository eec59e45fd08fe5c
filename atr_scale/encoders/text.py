"""What all text encoders share: their options and what they promise.

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
    """What a text encoder can be told; an option that it does not have is refused by name."""

    pooling: Literal["first", "mean"] = "first"
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="default: the model's own")
    attention: Literal["eager", "sdpa"] = "sdpa"
    activation_checkpointing: bool = Field(False, description="layers recomputed in the backward pass")
    compile: bool = Field(False, description="torch.compile of the layers")


class Tokenizer(Protocol):
    """Called as a tokenizer of transformers is: captions -> "input_ids" and "attention_mask", int64 [captions, L]."""

    def __call__(
        self, captions: list[str], *, padding: bool, truncation: bool, max_length: int, return_tensors: str
    ) -> Mapping[str, Tensor]: ...


class TextEncoder(nn.Module, ABC):
    """Token ids -> TokenSequence.

    dim: width of tokens and of pooled. tokenizer: makes the token ids; it is no part of the state dict.
    layers: what `frozen_layers` and `layer_decay` count, lowest first, each the prefixes of its parameters' names.
    Options: the section that checks its options; the constructor gets the fields that it adds to TextEncoderOptions.
    common_options: those of TextEncoderOptions that it has; the others must keep their defaults.
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
        """input_ids int64 [B, T]; attention_mask [B, T], 1 or True if a token is real, special or not.

        The mask of what comes back leaves special tokens out, so that scorers over tokens never see them.
        """

    @classmethod
    def build(cls, name: str, options: TextEncoderOptions) -> Self:
        """A new encoder for `model.text.name`; here one that its own options say all about."""
        return cls(**own_fields(options, TextEncoderOptions))

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Writes to the existing `folder` all that `load` needs besides the weights: sizes, the tokenizer's files."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, options: TextEncoderOptions) -> Self:
        """The encoder whose files `save_files` wrote. Its weights may have any values, for they are overwritten; its
        state dict has the keys of the one that was saved. Reads no weights, and nothing from outside of `folder`."""

    def configure(self, options: TextEncoderOptions, name: str) -> None:
        """Takes the common options. Raises UserError, naming it, for one that this encoder does not have."""
        default = TextEncoderOptions()
        for option in sorted(TextEncoderOptions.model_fields.keys() - self.common_options):
            if getattr(options, option) != getattr(default, option):
                raise UserError(f"the text encoder {name} has no {option}: leave it at {getattr(default, option)}")
        self.options = options
