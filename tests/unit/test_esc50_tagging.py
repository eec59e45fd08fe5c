from __future__ import annotations

import numpy as np

from tools.esc50_tagging import TAGS, classes_of


def test_the_most_probable_tag_decides() -> None:
    names = sorted({tag for tags in TAGS.values() for tag in tags} | {"Speech"})
    logits = np.full((3, len(names)), -5.0)
    logits[0, names.index("Meow")] = 1.0
    logits[1, names.index("Rain on surface")] = -1.0
    logits[:, names.index("Speech")] = 9.0  # no class of the table
    logits[2, names.index("Oink")], logits[2, names.index("Drip")] = 2.0, 1.5
    assert classes_of(logits, names) == ["cat", "rain", "pig"]
    assert len(TAGS) == 50
