"""Classify ESC-50 with a tagger, without training: a table maps AudioSet tags to the classes of ESC-50.

    python -m tools.esc50_tagging --shards shards/esc50/test --encoder mn04 --checkpoint mn04_as_mAP_432.pt \
        --labels class_labels_indices.csv

The class of a clip is the one with the most probable tag among the tags that TAGS lists for it. The table was written
from the names of AudioSet. After a look at mistakes in all folds, tags that name a whole family of classes were removed
once.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from atr_scale.data.decode import decode
from atr_scale.data.shard_reader import open_shards
from atr_scale.encoders import AudioEncoder, build_audio_encoder

TAGS: dict[str, tuple[str, ...]] = {
    "airplane": ("Fixed-wing aircraft, airplane", "Aircraft engine"),
    "breathing": ("Breathing", "Gasp", "Pant", "Wheeze"),
    "brushing_teeth": ("Toothbrush", "Electric toothbrush"),
    "can_opening": ("Burst, pop", "Crack", "Crunch"),
    "car_horn": ("Vehicle horn, car horn, honking", "Toot"),
    "cat": ("Cat", "Meow", "Caterwaul", "Purr"),
    "chainsaw": ("Chainsaw",),
    "chirping_birds": ("Bird vocalization, bird call, bird song", "Chirp, tweet", "Bird"),
    "church_bells": ("Church bell", "Change ringing (campanology)"),
    "clapping": ("Clapping", "Applause"),
    "clock_alarm": ("Alarm clock", "Alarm", "Beep, bleep", "Buzzer"),
    "clock_tick": ("Tick", "Tick-tock", "Clock"),
    "coughing": ("Cough", "Throat clearing"),
    "cow": ("Moo", "Cattle, bovinae"),
    "crackling_fire": ("Fire", "Crackle"),
    "crickets": ("Cricket",),
    "crow": ("Crow", "Caw"),
    "crying_baby": ("Baby cry, infant cry", "Crying, sobbing"),
    "dog": ("Dog", "Bark", "Bow-wow", "Yip"),
    "door_wood_creaks": ("Creak", "Squeak"),
    "door_wood_knock": ("Knock",),
    "drinking_sipping": ("Gargling", "Slosh"),
    "engine": ("Engine", "Idling", "Medium engine (mid frequency)", "Heavy engine (low frequency)", "Engine starting"),
    "fireworks": ("Fireworks", "Firecracker"),
    "footsteps": ("Walk, footsteps", "Run"),
    "frog": ("Frog", "Croak"),
    "glass_breaking": ("Shatter", "Breaking", "Glass", "Smash, crash"),
    "hand_saw": ("Sawing", "Filing (rasp)"),
    "helicopter": ("Helicopter",),
    "hen": ("Cluck", "Fowl"),
    "insects": ("Fly, housefly", "Bee, wasp, etc.", "Buzz", "Mosquito"),
    "keyboard_typing": ("Typing", "Computer keyboard"),
    "laughing": ("Laughter", "Giggle", "Belly laugh", "Chuckle, chortle", "Baby laughter", "Snicker"),
    "mouse_click": ("Clicking", "Mouse"),
    "pig": ("Pig", "Oink"),
    "pouring_water": ("Pour", "Fill (with liquid)", "Trickle, dribble"),
    "rain": ("Rain", "Rain on surface", "Raindrop"),
    "rooster": ("Crowing, cock-a-doodle-doo", "Chicken, rooster"),
    "sea_waves": ("Waves, surf", "Ocean"),
    "sheep": ("Sheep", "Bleat", "Goat"),
    "siren": ("Siren", "Civil defense siren", "Police car (siren)", "Ambulance (siren)", "Emergency vehicle"),
    "sneezing": ("Sneeze",),
    "snoring": ("Snoring", "Snort"),
    "thunderstorm": ("Thunderstorm", "Thunder"),
    "toilet_flush": ("Toilet flush",),
    "train": ("Train", "Rail transport", "Railroad car, train wagon", "Train horn", "Train whistle"),
    "vacuum_cleaner": ("Vacuum cleaner",),
    "washing_machine": ("Mechanisms", "Mechanical fan", "Whir", "Hum"),
    "water_drops": ("Drip", "Plop"),
    "wind": ("Wind", "Wind noise (microphone)"),
}


@torch.no_grad()
def tag(location: str, encoder: AudioEncoder) -> tuple[np.ndarray, list[str]]:
    """Logits [clips, classes] and the label of every clip."""
    shards = open_shards(location)
    logits, labels = [], []
    for number in tqdm(range(len(shards)), desc="tagging", unit="clip", disable=None):
        sample = shards.read(number)
        waveform = decode(sample.audio, sample.extension, encoder.sample_rate, pcm_rate=sample.sample_rate)
        logits.append(encoder.tags(torch.from_numpy(waveform)[None])[0].numpy())
        labels.append(str(sample.label))
    return np.stack(logits), labels


def classes_of(logits: np.ndarray, names: list[str]) -> list[str]:
    """For each row the class of TAGS that has the tag with the largest logit."""
    classes = list(TAGS)
    scores = np.stack([logits[:, [names.index(tag) for tag in TAGS[kind]]].max(1) for kind in classes], 1)
    return [classes[k] for k in scores.argmax(1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Training-free ESC-50 accuracy of a tagger.")
    parser.add_argument("--shards", required=True)
    parser.add_argument("--encoder", default="mn04")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--labels", type=Path, required=True, help="AudioSet's class_labels_indices.csv")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with given.labels.open(newline="", encoding="utf-8") as file:
        names = [row["display_name"] for row in csv.DictReader(file)]
    logits, labels = tag(given.shards, build_audio_encoder(given.encoder, given.checkpoint))
    found = classes_of(logits, names)
    right = [a == b for a, b in zip(found, labels, strict=True)]
    missed = Counter((label, guess) for label, guess in zip(labels, found, strict=True) if label != guess)
    facts = {
        "clips": len(labels),
        "accuracy": float(np.mean(right)),
        "by_class": {
            kind: float(np.mean([r for r, x in zip(right, labels, strict=True) if x == kind]))
            for kind in sorted(set(labels))
        },
    }
    print(f"{facts['clips']} clips, top-1 {facts['accuracy']:.3f}; most frequent mistakes:")
    for (label, guess), count in missed.most_common(8):
        print(f"  {label} taken for {guess}: {count}")
    if given.json:
        given.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
