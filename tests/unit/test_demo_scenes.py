"""Demo events, scenes, captions and the relevance of clips to captions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from atr_scale.demo.captions import write_captions
from atr_scale.demo.events import BACKGROUNDS, EVENTS, LOUDNESS, PITCHES, synthesise
from atr_scale.demo.lexicon import LEXICON
from atr_scale.demo.relevance import relevance, relevance_matrix
from atr_scale.demo.scenes import SEVERAL, Content, Scene, Sound, draw_scene, render

RATE = 16_000


def scenes(count: int, seconds: float = 10.0) -> list[Scene]:
    return [draw_scene(np.random.default_rng([7, i]), seconds) for i in range(count)]


def isolated(label: str, pitch: str, take: int) -> np.ndarray:
    event = EVENTS[label]
    rng = np.random.default_rng([take, *label.encode()])
    count = 1 + take % event.max_count if event.discrete else 0
    return synthesise(rng, label, RATE, pitch=pitch, level=0.1, count=count, seconds=1.5)


def log_spectrum(signal: np.ndarray) -> np.ndarray:
    """Mean over time of the log power in 48 bands, without its level."""
    signal = np.pad(signal, (0, max(0, 4096 - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(signal, 1024)[::512] * np.hanning(1024)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.unique(np.geomspace(3, 513, 49).astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-6 * power.max()).mean(0)
    return bands - bands.mean()


def test_every_class_has_words_and_its_nouns_a_plural_exactly_if_its_units_are_countable() -> None:
    assert len(EVENTS) >= 24
    assert set(LEXICON) == set(EVENTS)
    assert set(BACKGROUNDS) <= {label for label, event in EVENTS.items() if not event.discrete}
    for label, words in LEXICON.items():
        assert {len(noun) for noun in words.nouns} == {2 if EVENTS[label].discrete else 1}, label


def test_no_two_classes_share_a_phrase() -> None:
    seen: dict[str, str] = {}
    for label, words in LEXICON.items():
        phrases = {n for noun in words.nouns for n in noun}
        phrases |= {f"{s.split('|')[1]} {verb}" for s in words.subjects for pair in words.verbs for verb in pair}
        for phrase in phrases:
            assert seen.setdefault(phrase, label) == label, phrase


def test_classes_sound_different() -> None:
    """The nearest mean log-spectrum of (class, pitch) predicts the class of other takes."""
    kinds = [(label, pitch) for label in EVENTS for pitch in PITCHES]
    centroids = np.stack([np.mean([log_spectrum(isolated(*kind, take)) for take in range(3)], 0) for kind in kinds])
    right = dict.fromkeys(EVENTS, 0)
    for label, pitch in kinds:
        for take in (11, 12):
            distance = ((centroids - log_spectrum(isolated(label, pitch, take))) ** 2).sum(1)
            right[label] += kinds[int(distance.argmin())][0] == label
    assert sum(right.values()) >= 0.9 * 2 * len(kinds)
    assert min(right.values()) >= 4, right  # of six


def test_higher_pitch_is_higher() -> None:
    lower = 0
    for label in EVENTS:
        centre = [
            (np.exp(s := log_spectrum(isolated(label, p, 1))) @ np.arange(len(s))) / np.exp(s).sum() for p in PITCHES
        ]
        lower += centre[0] < centre[1] < centre[2]
    assert lower >= 0.8 * len(EVENTS)


@pytest.mark.parametrize("label", sorted(EVENTS))
def test_level_is_the_loudest_fifty_milliseconds(label: str) -> None:
    for level in LOUDNESS.values():
        event = EVENTS[label]
        signal = synthesise(np.random.default_rng(1), label, RATE, level=level, count=int(event.discrete), seconds=2.0)
        assert signal.dtype == np.float32 and np.isfinite(signal).all()
        frames = np.pad(signal, (0, -len(signal) % 800)).reshape(-1, 800)
        assert np.sqrt((frames**2).mean(1).max()) == pytest.approx(level, rel=1e-3)


def test_rendering_is_deterministic_whole_and_never_clips() -> None:
    for scene in scenes(12) + scenes(4, 3.5):
        sound = render(scene, RATE)
        assert sound.shape == (round(scene.seconds * RATE),) and sound.dtype == np.float32
        assert 0.02 < np.abs(sound).max() < 1.0
        assert np.array_equal(sound, render(scene, RATE))
    scene = scenes(1)[0]
    assert not np.array_equal(render(scene, RATE), render(replace(scene, seed=scene.seed + 1), RATE))


def test_events_stand_out_of_the_background() -> None:
    for scene in scenes(40):
        if scene.background is None:
            continue
        whole, empty = render(scene, RATE), render(replace(scene, events=()), RATE)
        for event in scene.events:
            span = slice(round(event.onset * RATE), round((event.onset + event.seconds) * RATE))
            frames = [np.pad(x[span], (0, -len(x[span]) % 800)).reshape(-1, 800) for x in (whole, empty)]
            full, background = (np.sqrt((f**2).mean(1)) for f in frames)
            assert full.max() > 2 * np.median(background)


@pytest.mark.parametrize("seconds", [3.5, 5.0, 10.0, 30.0])
def test_relations_are_those_of_the_onsets(seconds: float) -> None:
    kinds = set()
    for scene in scenes(60, seconds):
        events = {event.sound.label: event for event in scene.events}
        assert 1 <= len(events) <= 4
        for event in events.values():
            assert event.onset >= 0 and event.onset + event.seconds <= seconds + 1e-9
        for first, second, kind in scene.content.relations:
            a, b = events[first], events[second]
            overlap = min(a.onset + a.seconds, b.onset + b.seconds) - max(a.onset, b.onset)
            assert (overlap > 0) == (kind == "while")
            assert kind == "while" or a.onset < b.onset
            kinds.add(kind)
    assert "while" in kinds and ("before" in kinds or seconds < 6)


# --- relevance

DOG = Sound("dog", "low", "loud", 3, background=False)
BELL = Sound("bell", "high", "soft", 2, background=False)
RAIN = Sound("rain", "mid", "soft", None, background=True)
CLIP = Content((DOG, BELL, RAIN), (("dog", "bell", "before"),))


def test_what_is_true_has_grade_one_and_a_part_of_it_too() -> None:
    assert relevance(CLIP, CLIP) == 1
    assert relevance(Content((Sound("dog"),)), CLIP) == 1
    assert relevance(Content((Sound("dog", count=SEVERAL), Sound("rain", background=True))), CLIP) == 1
    assert relevance(Content((Sound("bell"), Sound("dog")), (("dog", "bell", "before"),)), CLIP) == 1


def test_without_any_of_its_sounds_the_grade_is_zero() -> None:
    assert relevance(Content((Sound("cat", "low", "loud", 1),)), CLIP) == 0


def test_the_documented_weights_make_the_grade() -> None:
    stated = Content((Sound("dog", "high", "loud", 2), Sound("cat")), (("cat", "dog", "before"),))
    # presence 3 + loudness 1 + count 2/3 of 3 + 1 + 1 + 1 (dog), 3 (cat), 2 (relation)
    assert relevance(stated, CLIP) == pytest.approx((3 + 0 + 1 + 2 / 3) / 11)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(CLIP, sounds=(replace(DOG, count=2), BELL, RAIN)),
        replace(CLIP, sounds=(replace(DOG, count=5), BELL, RAIN)),
        replace(CLIP, sounds=(replace(DOG, pitch="mid"), BELL, RAIN)),
        replace(CLIP, sounds=(replace(DOG, loudness="soft"), BELL, RAIN)),
        replace(CLIP, sounds=(DOG, replace(BELL, count=SEVERAL), RAIN)),
        replace(CLIP, sounds=(DOG, BELL, replace(RAIN, background=False))),
        replace(CLIP, sounds=(DOG, BELL, replace(RAIN, label="wind"))),
        replace(CLIP, relations=(("bell", "dog", "before"),)),
        replace(CLIP, relations=(("dog", "bell", "while"),)),
        Content((*CLIP.sounds, Sound("cat")), CLIP.relations),
    ],
)
def test_each_false_fact_costs(wrong: Content) -> None:
    assert 0 < relevance(wrong, CLIP) < 1


def test_worse_is_lower() -> None:
    def with_dog(**changes: object) -> float:
        return relevance(replace(CLIP, sounds=(replace(DOG, **changes), BELL, RAIN)), CLIP)  # type: ignore[arg-type]

    assert with_dog(pitch="high") < with_dog(pitch="mid") < 1
    assert with_dog(count=5) < with_dog(count=4) < 1
    assert with_dog(count=1) < with_dog(count=2) < 1
    absent = Content((replace(DOG, label="cat"), BELL, RAIN), (("cat", "bell", "before"),))
    assert relevance(absent, CLIP) < with_dog(pitch="high", loudness="soft", count=1)


def test_while_has_no_direction_and_before_has() -> None:
    def both(kind: str, *labels: str) -> Content:
        return Content((Sound("dog"), Sound("bell")), ((*labels, kind),))  # type: ignore[arg-type]

    assert relevance(both("while", "dog", "bell"), both("while", "bell", "dog")) == 1
    assert relevance(both("before", "dog", "bell"), both("before", "bell", "dog")) < 1


def test_full_contents_that_differ_in_attributes_alone_have_symmetric_relevance() -> None:
    other = replace(CLIP, sounds=(replace(DOG, pitch="high", count=5), BELL, RAIN))
    assert relevance(CLIP, other) == pytest.approx(relevance(other, CLIP))


def test_one_more_true_fact_never_lowers_the_grade() -> None:
    half_true = Content((Sound("dog", pitch="high"), Sound("cat")))
    grade = relevance(half_true, CLIP)
    for better in (
        Content((Sound("dog", pitch="high", count=3), Sound("cat"))),
        Content((*half_true.sounds, Sound("bell"))),
        Content((Sound("dog", pitch="low"), Sound("cat"))),
    ):
        assert relevance(better, CLIP) > grade


# --- captions


def test_captions_state_what_is_true_of_their_scene() -> None:
    drawn = scenes(150)
    captions = [write_captions(np.random.default_rng([3, i]), scene, 3) for i, scene in enumerate(drawn)]
    for scene, own in zip(drawn, captions, strict=True):
        assert len({caption.text for caption in own}) == 3
        assert all(relevance(caption.states, scene.content) == 1 for caption in own)
    grades = relevance_matrix([c.states for own in captions for c in own], [scene.content for scene in drawn])
    assert (grades == 1).sum(1).mean() < 4  # they tell scenes apart
    assert np.median(grades) < 0.2


def test_the_text_says_every_stated_sound_and_attribute_and_nothing_of_what_is_unstated() -> None:
    several = {"several", "repeatedly", "many", "multiple"}
    numbers = {
        1: {"one", "single", "once"},
        2: {"two", "twice"},
        3: {"three"},
        4: {"four"},
        5: {"five"},
        SEVERAL: several,
    }
    counting = set().union(*numbers.values())
    for i, scene in enumerate(scenes(150)):
        for caption in write_captions(np.random.default_rng([4, i]), scene, 2):
            words = set(caption.text.lower().replace(".", "").replace(",", "").split())
            expected = {word for s in caption.states.sounds if s.count for word in words & numbers[s.count]}
            assert words & counting == expected, caption
            for sound in caption.states.sounds:
                assert sound.count is None or words & numbers[sound.count], caption
            assert ("background" in words) == any(sound.background for sound in caption.states.sounds)
            loud = words & {"loud", "loudly", "noisy", "noisily", "powerful", "powerfully"}
            assert bool(loud) == any(sound.loudness == "loud" for sound in caption.states.sounds), caption
            low = {"low-pitched", "deep", "low"} & words
            assert bool(low) == any(sound.pitch == "low" for sound in caption.states.sounds), caption
