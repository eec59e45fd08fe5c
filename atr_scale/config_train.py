"""The section `train` of a configuration: length, batch, optimizer, schedule, first weights, checkpoints."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from atr_scale.products import HeadProducts
from atr_scale.sections import Count, Location, NonNegative, Positive, Section, Share

ModelPart = Literal[
    "audio_encoder", "text_encoder", "audio_projection", "text_projection", "scorer", "temperature", "objective"
]
MODEL_PARTS: tuple[ModelPart, ...] = typing.get_args(ModelPart)


Decay = Annotated[float, Field(ge=0, lt=1)]


class InitialCheckpoint(Section):
    from_: Location = Field(
        alias="from", min_length=1, description="run folder or checkpoint whose weights start this run"
    )
    parts: Annotated[list[ModelPart], Field(min_length=1)] | None = Field(
        None,
        description="parts of the model whose weights are taken, each of which must fit; "
        "default: both encoders, and whichever of the projections and the scorer fits",
    )

    @model_serializer
    def _by_key(self) -> dict[str, Any]:
        return {"from": self.from_, "parts": self.parts}


class ProfileSection(Section):
    start: Count = Field(description="first optimizer step of the trace, counted from 1; the first ones are slow")
    steps: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="optimizer steps in the trace, of which each takes some megabytes"
    )


class TrainSection(Section):
    steps: Count | None = Field(None, description="length of the run in optimizer steps; give this or epochs")
    epochs: Positive | None = Field(None, description="length of the run in epochs of the training data; see epoch_of")
    epoch_of: Literal["clips", "captions"] = Field(
        "clips",
        description="what an epoch counts: it has as many visits to clips as the training data has clips, or captions; "
        "the sample order is the same",
    )
    global_batch_size: Count = Field(64, description="text-audio pairs inside one loss, over all ranks")
    micro_batch_size: Count | None = Field(
        None,
        description="most pairs in one forward pass; below the local batch, GradCache runs; default: the local batch",
    )
    kept_chunks: Annotated[int, Field(ge=0)] = Field(
        0, description="GradCache: chunks of the local batch that keep their activations and need no second forward"
    )
    accum_steps: Count = Field(1, description="losses of global_batch_size pairs averaged in one optimizer step")
    lr: Positive = Field(1e-4, description="peak learning rate of AdamW, for every group without a rate of its own")
    lr_audio: NonNegative | None = Field(
        None, description="peak learning rate of the audio encoder; 0 freezes it; default: lr"
    )
    lr_text: NonNegative | None = Field(
        None, description="peak learning rate of the text encoder; 0 freezes it; default: lr"
    )
    lr_heads: NonNegative | None = Field(
        None, description="peak learning rate of projections, scorer, temperature and loss parameters; default: lr"
    )
    lr_floor: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="learning rate at the end of the cosine or of the cool-down, as a fraction of the peak"
    )
    layer_decay_audio: Share = Field(
        1.0, description="learning rate of an audio encoder layer, as a fraction of that of the layer above"
    )
    layer_decay_text: Share = Field(
        1.0, description="learning rate of a text encoder layer, as a fraction of that of the layer above"
    )
    frozen_layers_audio: Annotated[int, Field(ge=0)] = Field(
        0, description="lowest layers of the audio encoder that are not trained"
    )
    frozen_layers_text: Annotated[int, Field(ge=0)] = Field(
        0, description="lowest layers of the text encoder that are not trained"
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up: a cosine to lr_floor, or constant until the cool-down"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="optimizer steps over which the learning rate rises from 0; default: 5 % of all"
    )
    warmup_epochs: NonNegative | None = Field(
        None, description="length of the warm-up in epochs, instead of warmup_steps"
    )
    decay_steps: Count | None = Field(
        None, description="optimizer steps from the first on after which the cosine ends; default: the end of the run"
    )
    decay_epochs: Positive | None = Field(None, description="end of the cosine in epochs, instead of decay_steps")
    cooldown_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="last optimizer steps of a constant schedule, in which the rate falls linearly; default: none"
    )
    cooldown_epochs: NonNegative | None = Field(
        None, description="length of the cool-down in epochs, instead of cooldown_steps"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay rates of AdamW's two moments")
    eps: Positive = Field(1e-8, description="epsilon in AdamW's denominator")
    weight_decay: NonNegative = Field(0.01, description="decoupled weight decay of AdamW")
    gradient_clipping: NonNegative = Field(1.0, description="largest global gradient norm; 0: no clipping")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="dtype of autocast; parameters, scores and losses stay fp32; fp16 scales the loss"
    )
    tf32: bool = Field(
        True, description="matmuls and convolutions of encoders that are fp32 under autocast use TF32 on a GPU"
    )
    head_products: HeadProducts = Field(
        "ieee",
        description="matrix products of scorers and losses on a GPU: fp32; TF32, with gradients 3e-4 to 2e-3 off; "
        "or three bf16 products with fp32 sums, about 2e-5 off, with tap 3e-5",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage; a resume may have another")
    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype in which gradients cross the network; bf16 halves the bytes; ZeRO 3 needs fp32"
    )
    initial_checkpoint: InitialCheckpoint | None = Field(
        None, description="weights of another run that start this one, never its settings; a text alone is `from`"
    )
    evaluate_every: Count | None = Field(None, description="optimizer steps between validations; default: one epoch")
    checkpoint_every: Count | None = Field(
        None, description="optimizer steps between checkpoints; default: evaluate_every"
    )
    keep_checkpoints: Count = Field(2, description="newest checkpoints that are kept, besides the best one")
    log_every: Count = Field(10, description="optimizer steps between log lines; the first and last step have one too")
    profile: ProfileSection | None = Field(
        None, description="writes a trace of some optimizer steps of every rank to RUN/profile"
    )
    max_bad_steps: Count = Field(
        3, description="optimizer steps in a row with a non-finite loss or gradient after which the run stops"
    )
    hang_seconds: Positive | None = Field(
        None,
        description="time without progress after which the run ends because a rank hangs; default: 10 median steps, "
        "at least 60 s, with a compiled encoder 600 s; declared waits, such as the start, a save or an evaluation, may "
        "take an hour",
    )

    @field_validator("initial_checkpoint", mode="before")
    @classmethod
    def text_is_from(cls, value: Any) -> Any:
        return {"from": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and null for the other one")
        return self

    @model_validator(mode="after")
    def one_gradient_dtype(self) -> TrainSection:
        if self.zero_stage == 3 and self.gradient_dtype != "fp32":
            raise ValueError("zero_stage 3 sends gradients in fp32: set gradient_dtype to fp32, or another zero_stage")
        return self

    @model_validator(mode="after")
    def one_schedule(self) -> TrainSection:
        for name in ("warmup", "decay", "cooldown"):
            given = [getattr(self, f"{name}_{unit}") is not None for unit in ("steps", "epochs")]
            if all(given):
                raise ValueError(f"give {name}_steps or {name}_epochs, and null for the other one")
            wanted = {"decay": "cosine", "cooldown": "constant"}.get(name, self.schedule)
            if any(given) and self.schedule != wanted:
                raise ValueError(
                    f"{name} belongs to schedule {wanted}, but schedule is {self.schedule}: drop one of both"
                )
        return self
