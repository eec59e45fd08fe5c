from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from atr_scale.encoders import AUDIO_ENCODERS, build_audio_encoder
from atr_scale.encoders.pretrained.layout import Entry, Layout
from atr_scale.encoders.pretrained.load import identify, load_strictly
from atr_scale.encoders.pretrained.read import read_checkpoint
from atr_scale.errors import UserError


class Network(nn.Module):
    """A fused and a plain layer, and a batch norm with its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.window: Tensor
        self.register_buffer("window", torch.ones(3))


def fused(name: str) -> Entry | None:
    module, leaf = name.split(".") if "." in name else (name, "")
    if module == "window":
        return None
    if module == "norm":
        return Entry(f"bn0.{leaf}")
    return Entry(f"qkv.{leaf}", ("query", "key", "value").index(module))


FUSED = Layout("fused", "state_dict", "net.", (r"stft\.", r"net\.melW$"), (r"head\.",), fused)
PLAIN = Layout("plain", origin=lambda name: None if name == "window" else Entry(name))


def file_entries(**changes: Tensor | None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(4).state_dict()
    entries: dict[str, Any] = {
        "net.qkv.weight": torch.randn(12, 4),
        "net.qkv.bias": torch.randn(12),
        **{f"net.bn0.{name}": value for name, value in norm.items()},
        "stft.kernel": torch.full((5,), torch.nan),
        "net.melW": torch.full((2, 2), -1.0),
        "head.weight": torch.full((3, 4), torch.inf),
    }
    entries |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in entries.items() if value is not None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("archive", [True, False])
def test_parts_of_entries_go_where_they_belong(path: Path, wrapper: str, archive: bool) -> None:
    entries = file_entries()
    stored = {"epoch": 3, "state_dict": {wrapper + key: value for key, value in entries.items()}}
    torch.save(stored, path, _use_new_zipfile_serialization=archive)
    network = Network()
    loaded = load_strictly(network, (PLAIN, FUSED), "network", path)
    assert loaded.layout is FUSED
    assert (loaded.num_loaded, loaded.num_derived, loaded.num_unused) == (7, 2, 1)
    assert torch.equal(network.query.weight, entries["net.qkv.weight"][:4])
    assert torch.equal(network.value.bias, entries["net.qkv.bias"][8:])
    assert torch.equal(network.window, torch.ones(3))
    assert all(parameter.isfinite().all() and parameter.requires_grad for parameter in network.parameters())


def test_the_file_may_go_after_loading(path: Path) -> None:
    torch.save({"state_dict": file_entries()}, path)
    network = Network()
    load_strictly(network, (FUSED,), "network", path)
    expected = network.query.weight.detach().clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(network.query.weight, expected)


BAD: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "renamed": (
        {"net__qkv__bias": None, "net__qkv__bais": torch.randn(12)},
        "lacks 'net.qkv.bias', has the unexpected 'net.qkv.bais'",
    ),
    "lacking two": ({"net__qkv__bias": None, "net__bn0__bias": None}, "lacks 'net.bn0.bias' and 1 more"),
    "beside the prefix": ({"other__weight": torch.ones(2)}, "has the unexpected 'other.weight'"),
    "like a derived one": ({"net__melW2": torch.ones(2)}, "has the unexpected 'net.melW2'"),
    "misshapen": ({"net__qkv__weight": torch.ones(11, 4)}, "has another shape of 'net.qkv.weight'"),
    "no thirds": ({"net__qkv__weight": torch.ones(4, 4)}, "has another shape of 'net.qkv.weight'"),
    "scalar": ({"net__qkv__bias": torch.tensor(1.0)}, "has another shape of 'net.qkv.bias'"),
    "integers": ({"net__qkv__bias": torch.ones(12, dtype=torch.int8)}, "has another shape of 'net.qkv.bias'"),
    "nan": ({"net__bn0__running_var": torch.full((4,), torch.nan)}, "non-finite values in 'net.bn0.running_var'"),
    "infinity in the last third": (
        {"net__qkv__bias": torch.tensor([0.0] * 11 + [torch.inf])},
        "non-finite values in 'net.qkv.bias'",
    ),
}


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(path: Path, case: str, wrapper: str) -> None:
    changes, message = BAD[case]
    torch.save({"state_dict": {wrapper + key: v for key, v in file_entries(**changes).items()}}, path)
    network = Network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_strictly(network, (FUSED,), "network", path)
    assert message.replace("'net", f"'{wrapper}net").replace("'other", f"'{wrapper}other") in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_nearest_layout_is_the_one_complained_about(path: Path) -> None:
    near = Layout("near", origin=PLAIN.origin, unused=(r"head\.",))
    state = Network().state_dict()
    torch.save({key: value for key, value in state.items() if key not in ("window", "norm.bias")}, path)
    far = Layout("far", origin=lambda name: Entry("encoder." + name))
    with pytest.raises(UserError, match=r"lacks 'norm\.bias': it is no checkpoint of network"):
        load_strictly(Network(), (far, near), "network", path)


@pytest.mark.parametrize("fits", [True, False])
def test_a_refusal_is_told(path: Path, fits: bool) -> None:
    fusion = Layout(container="state_dict", prefix="net.fusion.", refusal="has the fusion: give the file without")
    torch.save({"state_dict": file_entries(**({} if fits else {"net__fusion__w": torch.ones(1)}))}, path)
    if fits:
        load_strictly(Network(), (FUSED, fusion), "network", path)
    else:
        with pytest.raises(UserError, match="has the fusion: give the file without"):
            load_strictly(Network(), (FUSED, fusion), "network", path)


def test_half_precision_files(path: Path) -> None:
    entries = file_entries(net__qkv__weight=torch.full((12, 4), 0.5, dtype=torch.float16))
    torch.save({"state_dict": entries}, path)
    network = Network()
    load_strictly(network, (FUSED,), "network", path)
    assert network.query.weight.dtype == torch.float32 and (network.query.weight == 0.5).all()


def plain_state() -> dict[str, Tensor]:
    return {name: value for name, value in Network().state_dict().items() if name != "window"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_transformers_folders(tmp_path: Path, kind: str, shards: int) -> None:
    state = plain_state()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    write = save_file if kind == "safetensors" else torch.save
    if shards == 1:
        write(state, tmp_path / f"{stem}.{kind}")
    else:
        names = list(state)
        places: dict[str, str] = {}
        for shard in range(2):
            file = f"{stem}-{shard}-of-2.{kind}"
            write({name: state[name] for name in names[shard::2]}, tmp_path / file)
            places |= dict.fromkeys(names[shard::2], file)
        (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": places}))
    network = Network()
    load_strictly(network, (PLAIN,), "network", tmp_path)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    if shards == 2:
        next(tmp_path.glob("*1-of-2*")).unlink()
        with pytest.raises(UserError, match=r"no checkpoint at .*1-of-2"):
            load_strictly(network, (PLAIN,), "network", tmp_path)


@pytest.mark.parametrize("index", ["{}", "no json", '{"weight_map": 3}'])
def test_a_broken_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="no checkpoint of plain tensors") as error:
        read_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_of_another_encoder_says_which(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(build_audio_encoder("mn10").state_dict(), path)
    assert identify(path) == ["mn10"]
    with pytest.raises(UserError, match=r"no checkpoint of mn04; it is one of mn10, choose that encoder"):
        build_audio_encoder("mn04", path)
    with pytest.raises(UserError, match=r"does not hold the named tensors of cnn14 .* it is one of mn10"):
        build_audio_encoder("cnn14", path)
    torch.save({**build_audio_encoder("mn10").state_dict(), "more": torch.ones(1)}, path)
    assert identify(path) == []
    with pytest.raises(UserError, match="no checkpoint of mn04; give its original file"):
        build_audio_encoder("mn04", path)


def test_success_asks_no_other_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pt"
    torch.save(build_audio_encoder("mn04").state_dict(), path)
    for name in set(AUDIO_ENCODERS) - {"mn04"}:
        monkeypatch.delitem(AUDIO_ENCODERS, name)
    monkeypatch.setitem(AUDIO_ENCODERS, "none", None)
    build_audio_encoder("mn04", path)


def test_every_encoder_can_be_asked_without_its_memory() -> None:
    for name, build in AUDIO_ENCODERS.items():
        with torch.device("meta"):
            encoder = build()
        assert all(value.is_meta for value in encoder.state_dict().values()), name
        assert encoder.layouts, name
