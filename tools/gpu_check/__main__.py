"""Check and measure this project on one GPU, in less than 8 minutes.

    python -m tools.gpu_check                          # everything on the GPU
    python -m tools.gpu_check --part losses            # one part, after the ceilings
    python -m tools.gpu_check --device cpu --quick     # the same code on a CPU, small, as in CI

Rows are appended to OUT/gpu_check.jsonl as they are found. At the end there are OUT/gpu_check.json, which
`atr-scale plan --measured` reads, and OUT/gpu_check.md with its figure. The exit code is 1 if a row has failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tools.gpu_check.page import write_report
from tools.gpu_check.runner import Part, Setting, run_parts

HERE = "tools.gpu_check"
ZERO = [Part(f"engine-zero-{stage}", f"{HERE}.engine", 35, (stage,), quick=stage == 1) for stage in range(4)]
# In the order of what is lost if the time is over.
PARTS = [
    Part("ceilings", f"{HERE}.ceilings", 30),
    Part("collectives", f"{HERE}.collectives", 25),
    Part("losses", f"{HERE}.losses", 30, (1,)),
    Part("losses-on-ranks", f"{HERE}.losses", 60, (2,)),
    Part("scorers", f"{HERE}.scorers", 30),
    Part("ranks", f"{HERE}.ranks", 20),
    Part("loader", f"{HERE}.loader", 30),
    Part("encoders", f"{HERE}.encoders", 70),
    *ZERO,
    Part("loss-speed", f"{HERE}.loss_speed", 90),
    Part("head-speed", f"{HERE}.head_speed", 60),
    Part("input-speed", f"{HERE}.input_speed", 40),
    Part("updates", f"{HERE}.updates", 60),
    Part("encoder-speed", f"{HERE}.encoder_speed", 100),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        f"python -m {HERE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--part", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="small sizes; without --part, the fewest parts")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="folder of the report (default: runs/gpu_check)"
    )
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks, in this process and in those of the parts
    # A process that has asked the driver for devices, and not NVML, leaves forks that cannot use CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: install a CUDA build of torch, or give --device cpu")
    setting = Setting("cuda" if torch.cuda.is_available() else "cpu", given.quick)
    wanted = {"ceilings", *(given.part or (part.name for part in PARTS if part.quick or not given.quick))}
    chosen = [part for part in PARTS if part.name in wanted]
    lines = given.out / "gpu_check.jsonl"
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        lines.unlink(missing_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {given.out} ({error.strerror}): give another folder with --out")
    try:
        rows = run_parts(chosen, setting, lines)
    finally:
        write_report(lines, given.out, given.quick)
    sys.exit(any(row.passed is False for row in rows))


if __name__ == "__main__":
    main()
