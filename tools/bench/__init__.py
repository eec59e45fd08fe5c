"""Benchmarks: ours and what one would otherwise use, side by side in one run (`python -m tools.bench.NAME`)."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory says when it starts and stops
