"""The examples of a model card: code that runs beside the exported folder, with dog.wav and rain.wav there."""

from __future__ import annotations

DUAL = """\
import numpy as np

import atr_scale

model = atr_scale.load("{name}")
texts = model.embed_text(["a dog barks", "rain falls"])  # float32 [2, {dim}], unit length
sounds = model.embed_audio(["dog.wav", "rain.wav"])  # also waveforms: embed_audio([x], sample_rate=44100)
print(texts @ sounds.T)  # a higher score is a better match
np.save("texts.npy", texts)
"""

PAIRWISE = """\
import atr_scale

model = atr_scale.load("{name}")
print(model.similarity(["a dog barks", "rain falls"], ["dog.wav", "rain.wav"]))  # [texts, sounds], higher is better
"""

TORCH = """\
import torch

import atr_scale

model = atr_scale.load("{name}", device="cpu")
module = model.module  # a torch.nn.Module in evaluation mode
ids, mask = model.tokenizer(["a dog barks", "rain falls"])  # int64 [2, tokens]
waveform = 0.1 * torch.randn(1, 5 * model.sample_rate)  # float32 [sounds, samples], mono, {rate} Hz, within -1 and 1
lengths = torch.tensor([waveform.shape[1]])  # samples without padding
with torch.no_grad():
    text, audio = module.encode_text(ids, mask), module.encode_audio(waveform, lengths)
    print(audio.tokens.shape, audio.pooled.shape)  # [sounds, frames, width], [sounds, width]
    print(module.scorer.scores(text, audio))  # [2, 1]
"""

NUMPY = """\
import json

import numpy as np

sounds = np.load("sounds.npy")  # float32 [n, {dim}], unit length
items = [json.loads(line) for line in open("sounds.jsonl", encoding="utf-8")]
texts = np.load("texts.npy")  # of the first example
scores = texts @ sounds.T
for n in np.argsort(-scores[0])[:5]:
    print(f"{{scores[0, n]:.3f}}", items[n]["path"])
"""

SENTENCES = """\
from sentence_transformers import SentenceTransformer

tower = SentenceTransformer("{name}/sentence-transformers")
print(tower.encode(["a dog barks", "rain falls"]).shape)  # [2, {dim}], unit length
"""

ONNX = """\
import numpy as np
import onnxruntime
import soundfile
from tokenizers import Tokenizer

texts_of = onnxruntime.InferenceSession("{name}/onnx/text.onnx")
sounds_of = onnxruntime.InferenceSession("{name}/onnx/audio.onnx")
tokens = Tokenizer.from_file("{name}/text_encoder/tokenizer.json").encode("a dog barks")
ids, mask = np.array([tokens.ids], np.int64), np.array([tokens.attention_mask], np.int64)
text = texts_of.run(["text_embedding"], {{"input_ids": ids, "attention_mask": mask}})[0]  # [1, {dim}]
waveform, rate = soundfile.read("dog.wav", dtype="float32")
assert waveform.ndim == 1 and rate == int(sounds_of.get_modelmeta().custom_metadata_map["sample_rate"])
sound = sounds_of.run(["audio_embedding"], {{"waveform": waveform[None]}})[0]  # [1, {dim}]
print(text @ sound.T)
"""
