"""The text tower of a trained model as a folder of sentence-transformers, from modules that the library brings along.

FOLDER/                 transformer and tokenizer, with the limit of tokens and the caption cleaning of training
FOLDER/1_Pooling ...    the pooling, a Dense for each linear map of the projection, and the scaling to unit length
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import string
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_model
from torch import nn

from atr_scale.data.tokenizer import WAVCAPS_MARKS
from atr_scale.encoders.transformers_text import TransformersTextEncoder, quiet_transformers
from atr_scale.errors import UserError, one_line
from atr_scale.export.quiet import quiet_libraries
from atr_scale.inference import TrainedModel
from atr_scale.run_checkpoints import rename
from atr_scale.scorers.pooling import CosineScorer

TOLERANCE = 1e-5  # of the numbers of an embedding of unit length
POOLINGS = {"first": "cls", "mean": "mean"}  # our names, and those of sentence-transformers
# What each rule of data.captions.cleaning does to a caption in lower case: a pattern, and what takes its place.
RULES: dict[str, list[tuple[str, str]]] = {
    "wavcaps": [(f"[{re.escape(WAVCAPS_MARKS)}]", " ")],
    "lower_no_punctuation": [(f"[{re.escape(string.punctuation)}]", "")],
}
SPACES = r"[\s\x{1c}-\x{1f}]+"  # what str.split() splits at
PROBES = (
    "wind",
    'A "Dog,cat" pair:  barks (loudly), it\'s 3-fold!',
    "  [SEP] a <mask> </s> [CLS] ",
    "caf\u00e9 \u00dcber \u96e8 \U0001f415",
    " ".join(["a very long caption"] * 300),
)


def export_text_tower(model: TrainedModel, folder: Path) -> Path:
    """Write the text tower to `folder`, which `SentenceTransformer(folder)` loads without this package.

    Its embeddings are those of `embed_text` in fp32, whatever the precision of the run: the folder is loaded and
    compared on a few texts before it takes its place. Two kinds of caption are cleaned in another way than in training:
    one that cleaning leaves nothing of becomes empty, and a capital sigma that ends a word becomes the sigma for the
    inside of words. An older folder is replaced. The model is not changed. Returns `folder`.

    Raises UserError with the reason if sentence-transformers is not installed, if the text tower has a part without a
    built-in module, if the embeddings differ, or if the folder cannot be written.
    """
    _check_tower(model)
    _need_library()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet_transformers(), quiet_libraries():
            _write(model, partial)
            _compare(model, partial)
        rename(partial, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({one_line(error)}): choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _need_library() -> None:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        raise UserError(
            'a sentence-transformers folder needs sentence-transformers: pip install "atr-scale[export]"'
        ) from None


def _check_tower(model: TrainedModel) -> None:
    """Raises UserError that names the first part of the text tower that no built-in module stands for."""
    encoder, scorer, cleaning = model.module.text_encoder, model.module.scorer, model.config.data.captions.cleaning
    cannot = "sentence-transformers cannot hold this text tower:"
    if not scorer.is_dual_encoder:
        raise UserError(f"{cannot} the scorer {model.config.model.scorer.name} is pairwise and has no embeddings")
    if not isinstance(scorer, CosineScorer) or type(scorer).embed_text is not CosineScorer.embed_text:
        raise UserError(f"{cannot} the scorer {model.config.model.scorer.name} embeds texts in a way of its own")
    if type(encoder) is not TransformersTextEncoder:
        raise UserError(f"{cannot} the text encoder {model.config.model.text.name} is not a model of transformers")
    for layer in _projection(model):
        if not isinstance(layer, nn.Linear | nn.ReLU | nn.Identity):
            raise UserError(f"{cannot} its projection has a {type(layer).__name__}")
    if cleaning == "none":
        return
    if cleaning not in RULES:
        raise UserError(f"{cannot} its captions are cleaned by the rule {cleaning}")
    if not encoder.tokenizer.is_fast:
        raise UserError(
            f"{cannot} its captions are cleaned by the rule {cleaning}, and the slow tokenizer "
            f"{type(encoder.tokenizer).__name__} has no place for it"
        )
    own = [token.content for token in encoder.tokenizer.added_tokens_decoder.values() if not token.special]
    if own:  # they are looked for before a tokenizer cleans
        raise UserError(
            f"{cannot} its captions are cleaned by the rule {cleaning}, and its tokenizer has added tokens ({own[0]!r})"
        )


def _projection(model: TrainedModel) -> list[nn.Module]:
    chain = model.module.text_projection.map
    return list(chain) if isinstance(chain, nn.Sequential) else [chain]


def _write(model: TrainedModel, folder: Path) -> None:
    """Write everything to the new folder `folder`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as library

    encoder = model.module.text_encoder
    assert isinstance(encoder, TransformersTextEncoder)
    chain: list[Any] = [library.Pooling(encoder.dim, POOLINGS[encoder.options.pooling])]
    layers = _projection(model)
    for layer, following in zip(layers, [*layers[1:], nn.Identity()], strict=True):
        if isinstance(layer, nn.Linear):
            activation = nn.ReLU() if isinstance(following, nn.ReLU) else nn.Identity()
            dense = library.Dense(layer.in_features, layer.out_features, layer.bias is not None, activation)
            dense.linear.load_state_dict(layer.state_dict())
            chain.append(dense)
    with TemporaryDirectory() as source:
        encoder.save_files(Path(source))
        save_model(encoder.transformer, str(Path(source) / "model.safetensors"), metadata={"format": "pt"})
        # Otherwise transformers adds a pooling layer with random weights, which nothing reads.
        unpooled = {"add_pooling_layer": False} if hasattr(encoder.transformer, "pooler") else {}
        first = library.Transformer(source, model_kwargs=dict(unpooled))
        tower = SentenceTransformer(modules=[first, *chain, library.Normalize()], device="cpu")
        tower.save_pretrained(str(folder), create_model_card=False)
    if unpooled:
        _edit(folder / "sentence_bert_config.json", model_kwargs=unpooled)
    settings: dict[str, Any] = {"split_special_tokens": True}  # saving loses it: "[SEP]" in a caption is text
    if model.tokenizer.max_tokens is not None:
        settings["model_max_length"] = model.tokenizer.max_tokens
    _edit(folder / "tokenizer_config.json", **settings)
    if (cleaning := model.config.data.captions.cleaning) != "none":
        _add_cleaning(folder / "tokenizer.json", cleaning)
    (folder / "README.md").write_text(_readme(model), encoding="utf-8")


def _edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}, indent=2), encoding="utf-8")


def _add_cleaning(path: Path, cleaning: str) -> None:
    """Put the cleaning of captions before the normalizer of a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(path))
    steps = [normalizers.Replace(Regex(pattern), by) for pattern, by in [*RULES[cleaning], (SPACES, " ")]]
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps, normalizers.Strip(), *own])
    tokenizer.save(str(path))


def _compare(model: TrainedModel, folder: Path) -> None:
    """Raises UserError if the folder embeds PROBES in another way than the model does in fp32."""
    from sentence_transformers import SentenceTransformer

    tower = SentenceTransformer(str(folder), device=str(model.device), local_files_only=True)
    found: NDArray[np.float32] = tower.encode(list(PROBES), show_progress_bar=False)
    module = copy.copy(model.module)  # its parts are shared, its precision is not
    module.precision, module.tf32 = "fp32", False
    wanted = TrainedModel(module, model.config, model.device).embed_text(PROBES)
    # A NaN fails the comparison too.
    if found.shape != wanted.shape or not (difference := np.abs(found - wanted).max()) <= TOLERANCE:
        by = f"differ by {difference:.1e}" if found.shape == wanted.shape else f"have the width {found.shape[1]}"
        raise UserError(
            f"sentence-transformers cannot hold this text tower: its embeddings of a {model.config.model.text.name} "
            f"{by} from those of the model"
        )


def _readme(model: TrainedModel) -> str:
    captions, tokens = model.config.data.captions, model.tokenizer.max_tokens
    cleaned = {
        "none": "Texts are read as they are",
        "wavcaps": f"Texts are read in lower case, with a space for each of {WAVCAPS_MARKS}",
        "lower_no_punctuation": "Texts are read in lower case, without punctuation",
    }[captions.cleaning]
    cut = "." if tokens is None else f", and cut to {tokens} tokens."
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction]
---

# Text tower of an audio-text retrieval model

    from sentence_transformers import SentenceTransformer

    texts = SentenceTransformer("this/folder").encode(["a dog barks", "rain falls"])

The embeddings have unit length. Compare them with those of the model's audio tower: their dot product is the score.
{cleaned}{cut} The numbers are those of the model in fp32.
"""
