"""The study: what the papers leave open, answered on the demo corpora, where every true correspondence is known.

recipes (what is compared) -> corpora, negatives (what it is tested on) -> encoders (trained once a seed, their tokens
kept) -> head (projections, scorer and objective on those tokens) -> runs (a JSON line each) -> report (docs/study.md).
"""
