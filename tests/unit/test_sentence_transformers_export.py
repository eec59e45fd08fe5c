"""The text tower as a folder of sentence-transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from atr_scale.config import load_config
from atr_scale.data.tokenizer import CLEANING
from atr_scale.demo.text_encoder import build_demo_text_encoder
from atr_scale.errors import UserError
from atr_scale.export import sentence_transformers as export
from atr_scale.inference import TrainedModel
from atr_scale.model import Retriever
from atr_scale.scorers.pooling import CosineScorer, pooled
from tests.tiny import TinyInputs, write_tiny_config

WORDS = ["a", "dog", "barks", "in", "the", "rain", "wind", "loud", "soft", "tone"]
TEXTS = [
    "a dog barks in the rain",
    "wind",
    "A Dog BARKS In The RAIN",
    '  a "dog,barks":  (in) the rain!; it\'s 3-fold ',
    "[SEP] wind [CLS] a <mask> dog </s> <pad> rain [PAD]",
    "caf\u00e9 \u00dcber \u96e8 \U0001f415 na\u00efve \u0130 rain\u00a0wind\x1fdog",
    "a dog barks " * 100,
    "rain\n",
]
WIDTH = 256  # of small_cnn, so that no projection is needed
EMPTIED = "?!"  # by the rules of cleaning
READ = """
import json, sys
sys.modules["atr_scale"] = None  # importing it fails
import numpy as np
from sentence_transformers import SentenceTransformer
texts = json.load(open("texts.json"))
for folder in sys.argv[1:]:
    np.save(f"{folder}.npy", SentenceTransformer(folder, device="cpu").encode(texts, batch_size=3))
"""


def bert(folder: Path) -> None:
    build_demo_text_encoder([" ".join(WORDS)], folder, layers=2, dim=32, heads=2)


def marks() -> dict[str, str]:
    return {
        "cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>",
    }  # fmt: skip


def save(tokenizer: Tokenizer, vocabulary: dict[str, int], folder: Path) -> None:
    ends = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks()).save_pretrained(folder)


def roberta(folder: Path) -> None:
    """One token a byte, positions behind that of padding."""
    vocabulary = {token: n for n, token in enumerate([*marks().values(), *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    save(tokenizer, vocabulary, folder)
    RobertaModel(RobertaConfig(**sizes(vocabulary), pad_token_id=1)).save_pretrained(folder)


def mpnet(folder: Path) -> None:
    vocabulary = {token: n for n, token in enumerate([*marks().values(), *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    save(tokenizer, vocabulary, folder)
    MPNetModel(MPNetConfig(**sizes(vocabulary), pad_token_id=1)).save_pretrained(folder)


def sizes(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": len(vocabulary), "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 100,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainedModel]:
    """A model with random weights: the function that writes its text encoder, and overrides of its configuration."""
    place = tmp_path_factory.mktemp("towers")

    def make(encoder: Callable[[Path], None], *overrides: str) -> TrainedModel:
        torch.manual_seed(0)
        folder = place / encoder.__name__
        if not folder.exists():
            encoder(folder)
        config = load_config(
            write_tiny_config(place / "tiny.yaml", TinyInputs(place, folder), place / "run"),
            ["data.captions.max_tokens=24", "model.projection.dim=16", *overrides],
        )
        return TrainedModel(Retriever(config.model, config.objective).eval(), config, torch.device("cpu"))

    return make


@pytest.mark.slow
def test_without_this_package_the_folder_embeds_as_the_model_does(
    trained: Callable[..., TrainedModel], tmp_path: Path
) -> None:
    towers = {
        "bert": trained(bert, "model.projection.kind=mlp", "model.projection.hidden_dim=20"),
        "roberta": trained(roberta, "model.text.pooling=first", "data.captions.cleaning=wavcaps"),
        "mpnet": trained(mpnet, "data.captions.cleaning=lower_no_punctuation", "data.captions.max_tokens=null"),
        "bare": trained(mpnet, "model.projection.kind=none"),
    }
    towers["bert"].module.precision = "bf16"
    wanted = {}
    for name, model in towers.items():
        before = {key: value.clone() for key, value in model.module.state_dict().items()}
        rounded = model.embed_text(TEXTS)
        assert export.export_text_tower(model, tmp_path / name) == tmp_path / name
        assert np.array_equal(model.embed_text(TEXTS), rounded), "the model is as it was"
        assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
        model.module.precision = "fp32"
        wanted[name] = model.embed_text([*TEXTS, EMPTIED])
        written = b"".join(path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file())
        assert b"sdpa_without_waiting" not in written and bytes(tmp_path.parent) not in written
        assert not list(tmp_path.glob(".*"))
    (tmp_path / "texts.json").write_text(json.dumps([*TEXTS, EMPTIED, ""]))
    subprocess.run([sys.executable, "-c", READ, *towers], cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}, check=True)
    for name, expected in wanted.items():
        *found, emptied, empty = np.load(tmp_path / f"{name}.npy")
        assert np.abs(np.array(found) - expected[:-1]).max() < 1e-5, name
        if towers[name].config.data.captions.cleaning == "none":
            assert np.abs(emptied - expected[-1]).max() < 1e-5
        else:
            assert np.abs(emptied - empty).max() < 1e-5
    # Without a normalizer of its own, what is left is our cleaning.
    normalizer = AutoTokenizer.from_pretrained(tmp_path / "roberta").backend_tokenizer.normalizer
    for text in [*TEXTS, " x ".join(chr(code) for code in range(1, 0x2C00) if chr(code).isprintable())]:
        assert normalizer.normalize_str(text) == CLEANING["wavcaps"](text)


def changed_head(model: TrainedModel) -> None:
    model.module.text_projection.map = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))


def changed_scorer(model: TrainedModel) -> None:
    class Other(CosineScorer):
        def embed_text(self, text: Any) -> torch.Tensor:
            return -super().embed_text(text)

    model.module.scorer = Other(16, pooled)


def changed_encoder(model: TrainedModel) -> None:
    class Other(type(model.module.text_encoder)):  # type: ignore[misc]
        pass

    model.module.text_encoder.__class__ = Other


def added_token(model: TrainedModel) -> None:
    tokenizer: Any = model.module.text_encoder.tokenizer
    tokenizer.add_tokens(["<dog>"])


def slow_tokenizer(model: TrainedModel) -> None:
    class Slow:
        is_fast = False

    model.module.text_encoder.tokenizer = Slow()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("overrides", "change", "reason"),
    [
        (["model.scorer.name=tap"], None, "the scorer tap is pairwise and has no embeddings"),
        ([], changed_scorer, "the scorer pooled embeds texts in a way of its own"),
        ([], changed_encoder, r"the text encoder .*bert is not a model of transformers"),
        ([], changed_head, "its projection has a LayerNorm"),
        (["data.captions.cleaning=wavcaps"], added_token, r"cleaned by the rule wavcaps, .* added tokens \('<dog>'\)"),
        (["data.captions.cleaning=wavcaps"], slow_tokenizer, "the slow tokenizer Slow has no place for it"),
    ],
)
def test_what_no_built_in_module_stands_for_is_refused(
    trained: Callable[..., TrainedModel],
    tmp_path: Path,
    overrides: list[str],
    change: Callable[[TrainedModel], None] | None,
    reason: str,
) -> None:
    model = trained(bert, *overrides)
    if change:
        change(model)
    with pytest.raises(UserError, match=f"sentence-transformers cannot hold this text tower: .*{reason}"):
        export.export_text_tower(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(
    trained: Callable[..., TrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r'pip install "atr-scale\[export\]"'):
        export.export_text_tower(trained(bert), tmp_path / "out")


@pytest.mark.slow
def test_a_folder_that_embeds_otherwise_is_refused(
    trained: Callable[..., TrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export.POOLINGS, "mean", "max")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"cannot hold this text tower: its embeddings .* differ by \d"):
        export.export_text_tower(trained(bert), tmp_path / "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]
