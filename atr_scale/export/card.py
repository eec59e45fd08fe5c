"""The model card: README.md with the metadata that Hugging Face reads at its top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from atr_scale.export.origin import Origin
from atr_scale.export.provenance import data_section, hub_name, licence_section, markdown_table, reproduction_section
from atr_scale.export.snippets import DUAL, NUMPY, ONNX, PAIRWISE, SENTENCES, TORCH
from atr_scale.inference import TrainedModel
from atr_scale.model import count_parameters

ENGLISH = {"audiocaps", "clotho", "wavcaps"}  # public corpora with English captions
ON_HUB = {"wavcaps": "cvssp/WavCaps"}  # corpora that are data sets of Hugging Face
WAYS = {"t2a": "text to audio", "a2t": "audio to text"}
SHOWN = ("R@1", "R@5", "R@10", "mAP@10", "mAP@16", "nDCG@16", "median_rank")
TASKS = {
    "retrieval": ("retrieval", "Audio-text retrieval"),
    "classification": ("audio-classification", "Zero-shot audio classification"),
}


def write_card(origin: Origin, model: TrainedModel, path: Path, formats: Sequence[str]) -> None:
    """Write the card of an exported model. formats: those that are in its folder."""
    parts = [f"---\n{_metadata(origin, model)}\n---", f"# {origin.names.model}", *_what_it_is(origin, model)]
    parts += ["## Use", *_examples(origin, model, formats)]
    parts += ["## Results", *_results(origin)]
    parts += ["## Training data", *data_section(origin)]
    parts += ["## Licences", *licence_section(origin)]
    parts += ["## Intended use and limits", *_limits(origin, model)]
    parts += ["## How to train it again", *reproduction_section(origin)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _metadata(origin: Origin, model: TrainedModel) -> str:
    """The YAML of the card. docs/export.md says where it may be completed by hand."""
    from huggingface_hub import ModelCardData  # of transformers; it is slow to import

    corpora = list(dict.fromkeys(facts.corpus for facts in origin.training_data if facts.corpus))
    complete = None not in origin.earlier and all(facts.corpus for facts in origin.training_data)
    data = ModelCardData(
        model_name=origin.names.model,
        license="unknown",
        language="en" if corpora and complete and ENGLISH.issuperset(corpora) else None,
        library_name="atr-scale",
        pipeline_tag="feature-extraction" if model.module.scorer.is_dual_encoder else None,
        tags=["audio", "audio-text-retrieval", "atr-scale"],
        datasets=[ON_HUB.get(corpus, corpus) for corpus in corpora if corpus in ENGLISH] or None,
        base_model=hub_name(origin.names.text_encoder(origin.config.model.text.name)),
        eval_results=list(_eval_results(origin)) or None,
    )
    return data.to_yaml().strip()


def _eval_results(origin: Origin) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for entry in origin.results:
        kind, task = TASKS[entry["kind"]]
        for name, metric in entry["metrics"].items():
            way, _, short = name.partition("/")
            if way in WAYS and short not in SHOWN:
                continue
            yield EvalResult(
                task_type=kind,
                task_name=task,
                dataset_type=_set_of(origin, entry) or entry["split"],
                dataset_name=_set_of(origin, entry) or entry["split"],
                dataset_split=entry["split"],
                metric_type=name,
                metric_name=f"{short.replace('_', ' ')}, {WAYS[way]}" if way in WAYS else name.replace("_", " "),
                metric_value=round(metric["value"], 5),
            )


def _what_it_is(origin: Origin, model: TrainedModel) -> Iterator[str]:
    config, module = origin.config, model.module
    if module.scorer.is_dual_encoder:
        kind = f"dual encoder for audio-text retrieval, with embeddings of width {module.audio_projection.dim}"
    else:
        kind = "pairwise scorer for audio-text retrieval, without embeddings: it compares every text with every sound"
    yield f"A {kind}. It finds sounds by a description and descriptions by a sound."

    def size(part: Any) -> str:
        return f"{count_parameters(part.parameters()) / 1e6:.1f} million parameters"

    text = origin.names.text_encoder(config.model.text.name)
    step, seen = origin.state.get("step"), origin.state.get("samples_seen")
    rows = [
        ("audio encoder", f"`{config.model.audio.name}`, {size(module.audio_encoder)}, {module.sample_rate} Hz"),
        ("text encoder", f"`{text}`, {size(module.text_encoder)}"),
        ("scorer", f"`{config.model.scorer.name}`"),
        ("in all", size(module)),
        ("trained for", (f"{step:,} optimizer steps" if step else "not known") + (f", {seen:,} pairs" if seen else "")),
        ("losses", ", ".join(f"`{name}`" for name, term in config.objective.terms.items() if term.weight > 0)),
    ]
    yield markdown_table("", rows)


def _examples(origin: Origin, model: TrainedModel, formats: Sequence[str]) -> Iterator[str]:
    values = {"name": origin.names.model, "dim": model.module.audio_projection.dim, "rate": model.sample_rate}
    dual = model.module.scorer.is_dual_encoder
    yield "The examples run beside this folder, with two recordings `dog.wav` and `rain.wav` there."
    yield "With the package `atr-scale`:"
    yield f"```python\n{(DUAL if dual else PAIRWISE).format(**values)}```"
    if origin.config.plugins:
        yield f"`load` needs these modules as its argument `plugins`: `{origin.config.plugins}`."
    yield "The PyTorch module:"
    yield f"```python\n{TORCH.format(**values)}```"
    if dual:
        yield "Search with NumPy alone, after the sounds of a folder have been embedded:"
        yield f"    atr-scale embed {quote(origin.names.model)} FOLDER --out sounds.npy"
        yield f"```python\n{NUMPY.format(**values)}```"
    if {"onnx/text.onnx", "onnx/audio.onnx"} <= set(formats):
        yield "Both towers with onnxruntime, tokenizers and soundfile, without PyTorch:"
        yield f"```python\n{ONNX.format(**values)}```"
        if (cleaning := origin.config.data.captions.cleaning) != "none":
            yield f"This model was trained on texts cleaned by the rule `{cleaning}`: clean texts for the graph so too."
    if "sentence-transformers" in formats:
        yield "Texts with the library sentence-transformers, without `atr-scale`:"
        yield f"```python\n{SENTENCES.format(**values)}```"


def _results(origin: Origin) -> Iterator[str]:
    if not origin.results:
        yield (
            f"No results of step {origin.state.get('step', 0)} were there at the export. "
            "`atr-scale evaluate RUN --split test` measures the run; export the run again after that."
        )
        return
    yield "In percent, ranks excepted. In brackets: 95 % bootstrap intervals over clips."
    for entry in origin.results:
        counts = ", ".join(f"{number:,} {what}" for what, number in entry["counts"].items())
        place = _set_of(origin, entry)
        yield f"**{entry['split']}**{f' ({place})' if place else ''}: {counts}. {entry['method'].capitalize()}".rstrip()
        yield _metrics(entry)
    if any(entry["kind"] == "retrieval" for entry in origin.results):
        yield (
            "R@k is the share of queries with a relevant item among the first k. Text to audio counts every caption, "
            "audio to text every clip by its best-ranked caption."
        )


def _metrics(entry: dict[str, Any]) -> str:
    metrics = entry["metrics"]
    if entry["kind"] == "classification":
        return markdown_table("| metric | value |", [(name, _value(name, each)) for name, each in metrics.items()])
    rows = []
    for name in SHOWN:
        cells = [metrics.get(f"{way}/{name}") for way in WAYS]
        if any(cells):
            rows.append((name.replace("_", " "), *(_value(name, cell) if cell else "" for cell in cells)))
    return markdown_table(f"| | {' | '.join(WAYS.values())} |", rows)


def _value(name: str, metric: dict[str, float]) -> str:
    def show(value: float) -> str:
        return f"{round(value, 1):g}" if name.endswith("median_rank") else f"{100 * value:.1f}"

    interval = f" [{show(metric['low'])}, {show(metric['high'])}]" if "low" in metric else ""
    return show(metric["value"]) + interval


def _limits(origin: Origin, model: TrainedModel) -> Iterator[str]:
    data = origin.config.data
    tokens = data.captions.max_tokens
    yield "For finding recordings by a description, and descriptions of a recording."
    lines = [
        "It knows the sounds, words and languages of its training data. Test it on yours before you rely on it.",
        f"A recording is mixed to mono at {model.sample_rate} Hz, its first {data.evaluation_seconds:g} s are read. "
        f"Cut longer ones into windows (`atr-scale embed --windows`). Training saw at most {data.crop_seconds:g} s of "
        "each clip.",
        f"Texts are cut to {tokens} tokens." if tokens else "Texts are cut to the limit of the text encoder.",
        "Scores order the results of a query. They are no probabilities, and a query always has a best result, also if "
        "nothing fits.",
        "Not measured and not intended: recognition of words or persons in speech, decisions about people or safety.",
    ]
    if not model.module.scorer.is_dual_encoder:
        lines.append(
            "Every text is scored with every sound. Of many sounds a dual encoder should choose candidates first."
        )
    yield "\n".join(f"- {line}" for line in lines)


def _set_of(origin: Origin, entry: dict[str, Any]) -> str | None:
    """The set that a result is of, if the run has one with its name and number of clips."""
    split, clips = entry["split"].removesuffix("/classes"), entry["counts"].get("clips")
    return next((facts.label for facts in origin.data if (facts.use, facts.clips) == (split, clips)), None)
