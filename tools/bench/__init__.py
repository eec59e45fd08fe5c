"""Benchmarks: ours and what one would otherwise use, side by side in one run (`python -m tools.bench.NAME`)."""
