"""Names of splits: the canonical ones are train, val and test; corpora call them by several other names."""

from __future__ import annotations

CANONICAL_SPLITS = {
    "train": "train", "training": "train", "development": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test", "evaluation": "test", "eval": "test",
}  # fmt: skip


def canonical_split(name: str) -> str:
    """train, val or test for their common synonyms, in any letter case; any other name is returned unchanged."""
    return CANONICAL_SPLITS.get(name.lower(), name)


def synonyms(split: str) -> list[str]:
    """`split` and then every other name of the same split."""
    wanted = canonical_split(split)
    return [split, *(name for name, canonical in CANONICAL_SPLITS.items() if canonical == wanted and name != split)]


def is_split_name(name: str) -> bool:
    """Whether `name` is train, val, test or a synonym of one of them."""
    return name.lower() in CANONICAL_SPLITS


def is_held_out(name: str) -> bool:
    """Whether models are evaluated on the split `name`, so that nothing in it may be trained on."""
    return canonical_split(name) in ("val", "test")
