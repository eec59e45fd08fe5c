"""Write ESC-50 as a `folder` corpus with class captions. Fold 5 is the split "test", the others are "train".

With --validation-fold that fold is the split "validation", to choose hyper-parameters without the test fold.

    python -m tools.esc50_corpus --esc50 ESC-50 --out corpus
    atr-scale shards build folder --root corpus --out shards/esc50/train --split train --sample-rate 32000

The folder of --esc50 holds `audio/` and `esc50.csv` as in the official repository. Audio is wav, flac or ogg.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path

CAPTION = "the sound of {}"


def write_corpus(esc50: Path, out: Path, test_fold: int, validation_fold: int | None) -> Counter[str]:
    """Write OUT/captions.csv and link OUT/audio; returns the number of clips per split."""
    files = {path.stem: path.name for path in (esc50 / "audio").iterdir()}
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "audio").exists():
        (out / "audio").symlink_to((esc50 / "audio").resolve(), target_is_directory=True)
    names = {test_fold: "test", validation_fold: "validation"}
    counts: Counter[str] = Counter()
    with (
        (esc50 / "esc50.csv").open(newline="", encoding="utf-8") as source,
        (out / "captions.csv").open("w", newline="", encoding="utf-8") as target,
    ):
        writer = csv.writer(target)
        writer.writerow(["file_name", "caption_1", "label", "split", "fold"])
        for row in csv.DictReader(source):
            split = names.get(int(row["fold"]), "train")
            caption = CAPTION.format(row["category"].replace("_", " "))
            writer.writerow([files[Path(row["filename"]).stem], caption, row["category"], split, row["fold"]])
            counts[split] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Write ESC-50 as a folder corpus with class captions.")
    parser.add_argument("--esc50", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--test-fold", type=int, default=5)
    parser.add_argument("--validation-fold", type=int)
    given = parser.parse_args()
    print(dict(write_corpus(given.esc50, given.out, given.test_fold, given.validation_fold)))


if __name__ == "__main__":
    main()
