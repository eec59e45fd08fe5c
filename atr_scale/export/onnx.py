"""The towers of a dual encoder as ONNX graphs, for programs without torch.

    text.onnx   input_ids, attention_mask int64 [B, T] -> text_embedding float32 [B, D]
    audio.onnx  waveform float32 [B, S] in [-1, 1] -> audio_embedding float32 [B, D]

Embeddings have unit length, so their dot products are the scores. B, T and S are dynamic; T is at most the number of
positions of the text encoder. All clips of one call have S samples at the encoder's sample rate: zeros after the end of
a clip would be heard. Long clips are cut into windows inside the graph. Weights and products are fp32, whatever the
precision of the run.

Shape suffixes: B batch, S samples, T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.errors import UserError, one_line
from atr_scale.export.graphs import AudioGraph, TextGraph
from atr_scale.export.quiet import quiet_libraries
from atr_scale.inference import TrainedModel
from atr_scale.model import Retriever
from atr_scale.version import __version__

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20
TOLERANCE = 1e-4  # largest difference of a value of an embedding of unit length
TEXTS = (
    ["rain", "a dog"],
    ["a bird sings"],
    ["a dog barks in the rain while a car passes by", "a bell", "wind " * 1000],
)
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class ExportedGraph:
    """One tower: the file that was written, or the reason why none was.

    max_difference: of a value of an embedding from that of the model in fp32 on the CPU, over the inputs compared.
    """

    file: Path | None
    megabytes: float = 0.0
    max_difference: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Tower:
    """What `export_tower` needs of one side of a model.

    graph: builds the module to export. names: of its inputs. metadata: of the file.
    inputs: of the comparison; the graph is traced with the first. expected: the model's embeddings of them.
    """

    graph: Callable[[], nn.Module]
    names: tuple[str, ...]
    inputs: list[Inputs]
    expected: list[NDArray[np.float32]]
    metadata: dict[str, str]


def export_onnx(model: TrainedModel, folder: Path) -> dict[str, ExportedGraph]:
    """Write text.onnx and audio.onnx into `folder`; the keys are "text" and "audio".

    Each graph is run by onnxruntime and compared with the model for several batch sizes and lengths. A tower that the
    exporter cannot follow, or that differs by more than `TOLERANCE`, is not written, and its reason is returned.
    Weights above 1.5 GiB lie in a second file beside the graph, FILE.data.
    Raises UserError for a pairwise scorer, or if the packages of the extra `export` are missing.
    """
    if not model.module.scorer.is_dual_encoder:
        raise UserError(
            f"the scorer {model.config.model.scorer.name} of this model is pairwise, so its towers give no embeddings: "
            "ONNX graphs need a dual encoder such as meanmax"
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f'ONNX graphs need {package}: pip install "atr-scale[export]"')
    folder.mkdir(parents=True, exist_ok=True)
    module, data = copy.deepcopy(model.module).cpu().eval(), model.config.data
    text = text_tower(module, model.tokenizer, {"cleaning": data.captions.cleaning})
    audio = audio_tower(module, {"evaluation_seconds": str(data.evaluation_seconds)})
    return {
        "text": export_tower(text, folder / "text.onnx"),
        "audio": export_tower(audio, folder / "audio.onnx"),
    }


@torch.no_grad()
def text_tower(module: Retriever, tokenizer: CaptionTokenizer, metadata: dict[str, str]) -> Tower:
    """The text side of a model on the CPU. Its encoder is changed by the export."""
    inputs: list[Inputs] = [tokenizer(texts) for texts in TEXTS]
    expected = []
    for ids, mask in inputs:
        encoded = module.text_projection(module.text_encoder(ids, mask), with_tokens=False)
        expected.append(module.scorer.embed_text(encoded).numpy())
    return Tower(partial(TextGraph, module), ("input_ids", "attention_mask"), inputs, expected, metadata)


@torch.no_grad()
def audio_tower(module: Retriever, metadata: dict[str, str]) -> Tower:
    """The audio side of a model on the CPU. Its encoder is changed by the export."""
    clips = list(_clips(module.sample_rate, module.audio_encoder.window))
    expected = []
    for clips_BS in clips:
        encoded = module.audio_projection(module.audio_encoder(clips_BS), module.scorer.reads_audio_tokens)
        expected.append(module.scorer.embed_audio(encoded).numpy())
    metadata = {"sample_rate": str(module.sample_rate), **metadata}
    return Tower(partial(AudioGraph, module), ("waveform",), [(clip,) for clip in clips], expected, metadata)


def _clips(rate: int, window: int | None) -> Iterator[Tensor]:
    """Batches [B, S] of noise, a tone and silence: far below a second, some seconds, and above the window."""
    noise = np.random.default_rng(0)
    for clips, samples in (
        (2, int(1.3 * rate)),
        (1, rate // 100),
        (3, int(2.7 * rate)),
        (1, int(2.3 * (window or 3 * rate))),
    ):
        tone = 0.5 * np.sin(2 * np.pi * 440 / rate * np.arange(samples))
        rows = [noise.uniform(-0.3, 0.3, samples), tone, np.zeros(samples)]
        yield torch.from_numpy(np.stack(rows[:clips]).astype(np.float32))


def export_tower(tower: Tower, path: Path) -> ExportedGraph:
    """Write the graph of one tower and compare it; no file is left if that fails."""
    files = (path, path.with_name(f"{path.name}.data"))
    try:
        _write_graph(tower, path)
        difference = _largest_difference(tower, path)
        if not difference <= TOLERANCE:
            raise ArithmeticError(f"embeddings differ by {difference:.1e} from those of the model")
    except Exception as error:  # the exporter raises errors of its own, of onnxscript, onnx and onnxruntime
        for file in files:
            file.unlink(missing_ok=True)
        return ExportedGraph(None, reason=_reason(error))
    size = sum(file.stat().st_size for file in files if file.exists())
    return ExportedGraph(path, size / 1e6, difference)


def _write_graph(tower: Tower, path: Path) -> None:
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    with torch.no_grad(), quiet_libraries():
        program = torch.onnx.export(
            tower.graph().eval(),
            tower.inputs[0],
            dynamo=True,
            dynamic_shapes=tuple(sizes for _ in tower.names),
            input_names=list(tower.names),
            output_names=[f"{path.stem}_embedding"],  # "embedding" is the name of a node of BERT
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        _remove_traces(program.model)
        program.model.producer_name, program.model.producer_version = "atr_scale", __version__
        program.model.metadata_props.update(tower.metadata)
        program.save(path)


def _remove_traces(model: onnx_ir.Model) -> None:
    """Remove what the exporter notes beside nodes and values: it names source files of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*values, *model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _largest_difference(tower: Tower, path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = []
    for inputs, expected in zip(tower.inputs, tower.expected, strict=True):
        (found,) = session.run(None, {name: value.numpy() for name, value in zip(tower.names, inputs, strict=True)})
        if found.shape != expected.shape:
            raise ArithmeticError(f"embeddings of the shape {list(found.shape)}, not {list(expected.shape)}")
        differences.append(np.abs(found - expected).max())
    return float(np.max(differences))  # keeps NaN


def _reason(error: BaseException) -> str:
    """The first cause: the exporter wraps it in instructions for its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(f"{type(error).__name__}: {error}", 200)
