"""Words for the event classes: subjects, verbs and nouns, several for each.

A subject is "determiner|noun", with an empty determiner for mass nouns. A subject that begins with "-" is a person,
and takes no adjectives of sounds. A verb is (third person, participle). A noun is (singular, plural) for a discrete
class, whose units can be counted, and (singular,) for a sustained one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """Words for one class."""

    subjects: tuple[str, ...]
    verbs: tuple[tuple[str, str], ...]
    nouns: tuple[tuple[str, ...], ...]


def _verbs(*texts: str) -> tuple[tuple[str, str], ...]:
    """From "bark": ("barks", "barking"); "third/participle" gives both forms."""
    pairs = []
    for text in texts:
        third, _, participle = text.partition("/")
        pairs.append((third, participle) if participle else (f"{third}s", f"{third}ing"))
    return tuple(pairs)


def _countable(*texts: str) -> tuple[tuple[str, ...], ...]:
    """From "dog bark": ("dog bark", "dog barks"); "one/many" gives both forms."""
    pairs = []
    for text in texts:
        one, _, many = text.partition("/")
        pairs.append((one, many or f"{one}s"))
    return tuple(pairs)


def _mass(*texts: str) -> tuple[tuple[str, ...], ...]:
    return tuple((text,) for text in texts)


LEXICON: dict[str, Words] = {
    "dog": Words(("a|dog", "a|hound"), _verbs("bark", "woof"), _countable("dog bark", "bark of a dog/barks of a dog")),
    "cat": Words(("a|cat", "a|kitty"), _verbs("meow", "mews/mewing"), _countable("cat meow", "meow")),
    "bird": Words(
        ("a|bird", "a|songbird"), _verbs("chirp", "tweet"), _countable("bird chirp", "chirp of a bird/chirps of a bird")
    ),
    "frog": Words(("a|frog", "a|toad"), _verbs("croak", "ribbits/ribbiting"), _countable("frog croak", "toad croak")),
    "owl": Words(
        ("an|owl",), _verbs("hoot", "calls/calling"), _countable("owl hoot", "hoot of an owl/hoots of an owl")
    ),
    "bell": Words(
        ("a|bell", "a|church bell"),
        _verbs("ring", "toll", "is struck/being struck"),
        _countable("bell toll", "strike of a bell/strikes of a bell"),
    ),
    "drum": Words(
        ("a|drum", "a|bass drum"),
        _verbs("thump", "is hit/being hit", "is beaten/being beaten"),
        _countable("drum beat", "drum hit"),
    ),
    "knock": Words(
        ("-|someone", "-|a person"),
        _verbs("knocks on a door/knocking on a door", "raps on wood/rapping on wood"),
        _countable("knock on a door/knocks on a door", "rap on wood/raps on wood"),
    ),
    "hammer": Words(
        ("a|hammer", "an|anvil"),
        _verbs("clangs/clanging", "clanks/clanking"),
        _countable("hammer blow", "metallic clang"),
    ),
    "guitar": Words(
        ("a|guitar string", "a|guitar"),
        _verbs("is plucked/being plucked", "is strummed/being strummed"),
        _countable("guitar note", "pluck of a guitar/plucks of a guitar"),
    ),
    "glass": Words(
        ("|glass", "a|window"),
        _verbs("shatters/shattering", "breaks/breaking", "is smashed/being smashed"),
        _countable("glass crash/glass crashes", "smash of glass/smashes of glass"),
    ),
    "clap": Words(
        ("-|someone", "-|a person"),
        _verbs("claps/clapping", "claps their hands/clapping their hands"),
        _countable("hand clap", "clap"),
    ),
    "footstep": Words(
        ("-|someone", "-|a person"),
        _verbs("walks on gravel/walking on gravel", "takes steps/taking steps"),
        _countable("footstep", "step on gravel/steps on gravel"),
    ),
    "drop": Words(
        ("|water", "a|tap"),
        _verbs("drips/dripping", "trickles drop by drop/trickling drop by drop"),
        _countable("water drop", "drip of water/drips of water"),
    ),
    "horn": Words(
        ("a|car horn", "a|horn"),
        _verbs("honk", "is sounded/being sounded"),
        _countable("car honk", "blast of a horn/blasts of a horn"),
    ),
    "whistle": Words(
        ("a|whistle", "a|referee whistle"),
        _verbs("blow", "is blown/being blown"),
        _countable("whistle blast", "blow of a whistle/blows of a whistle"),
    ),
    "beep": Words(("an|alarm", "a|machine"), _verbs("beep", "bleep"), _countable("alarm beep", "beep")),
    "telephone": Words(
        ("a|telephone", "a|phone"),
        _verbs("ring", "jingles/jingling"),
        _countable("phone ring", "ring of a telephone/rings of a telephone"),
    ),
    "zap": Words(
        ("a|laser", "a|ray gun"), _verbs("zaps/zapping", "fires/firing"), _countable("laser zap", "laser shot")
    ),
    "thunder": Words(
        ("|thunder", "a|thunderstorm"),
        _verbs("roar", "rumbles/rumbling"),
        _countable("thunder clap", "roll of thunder/rolls of thunder"),
    ),
    "cricket": Words(
        ("a|cricket", "an|insect"),
        _verbs("stridulates/stridulating", "trill"),
        _mass("cricket song", "trill of an insect"),
    ),
    "bee": Words(("a|bee", "a|fly"), _verbs("buzzes/buzzing", "drones/droning"), _mass("bee buzz", "buzz of a fly")),
    "siren": Words(
        ("a|siren", "an|ambulance"), _verbs("wail", "blares/blaring"), _mass("siren wail", "ambulance siren")
    ),
    "rain": Words(("|rain", "a|shower"), _verbs("fall", "pours/pouring"), _mass("rainfall", "patter of rain")),
    "wind": Words(("|wind", "a|breeze"), _verbs("blow", "gusts/gusting"), _mass("wind noise", "gust of wind")),
    "waves": Words(
        ("the|sea", "an|ocean"),
        _verbs("surges/surging", "washes ashore/washing ashore"),
        _mass("surf", "wash of sea waves"),
    ),
    "stream": Words(
        ("a|stream", "a|brook"),
        _verbs("babbles/babbling", "gurgles/gurgling"),
        _mass("gurgle of a brook", "flowing stream"),
    ),
    "fire": Words(
        ("a|fire", "a|campfire"), _verbs("crackles/crackling", "burn"), _mass("crackle of a fire", "campfire crackle")
    ),
    "engine": Words(
        ("an|engine", "a|motor"), _verbs("idles/idling", "runs/running"), _mass("engine hum", "drone of a motor")
    ),
    "helicopter": Words(
        ("a|helicopter", "a|chopper"),
        _verbs("flies/flying", "hovers/hovering"),
        _mass("helicopter noise", "chop of a helicopter"),
    ),
    "train": Words(
        ("a|train", "a|steam locomotive"),
        _verbs("chugs/chugging", "passes/passing"),
        _mass("train clatter", "chug of a locomotive"),
    ),
    "saw": Words(
        ("a|saw", "a|handsaw"), _verbs("cuts wood/cutting wood", "saws/sawing"), _mass("sawing", "rasp of a saw")
    ),
    "vacuum": Words(
        ("a|vacuum cleaner", "a|vacuum"),
        _verbs("whirs/whirring", "is used/being used"),
        _mass("vacuum cleaner noise", "whir of a vacuum"),
    ),
    "keyboard": Words(
        ("-|someone", "-|a person"),
        _verbs("types/typing", "types on a keyboard/typing on a keyboard"),
        _mass("typing", "clatter of a keyboard"),
    ),
    "clock": Words(
        ("a|clock", "a|watch"), _verbs("tick", "ticks away/ticking away"), _mass("clock ticking", "tick of a clock")
    ),
}

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
TIMES = {1: ("once",), 2: ("twice", "two times"), 3: ("three times",), 4: ("four times",), 5: ("five times",)}
MANY_TIMES = ("several times", "repeatedly", "many times")
MANY = ("several", "many", "multiple")
PITCH_ADJECTIVES = {
    "low": ("low-pitched", "deep", "low"),
    "mid": ("medium-pitched",),
    "high": ("high-pitched", "high", "shrill"),
}
PITCH_PHRASES = {
    "low": ("at a low pitch", "in a deep tone"),
    "mid": ("at a medium pitch",),
    "high": ("at a high pitch", "in a high tone"),
}
LOUDNESS_ADJECTIVES = {"soft": ("soft", "quiet", "faint"), "loud": ("loud", "noisy", "powerful")}
LOUDNESS_ADVERBS = {"soft": ("softly", "quietly", "faintly"), "loud": ("loudly", "noisily", "powerfully")}
