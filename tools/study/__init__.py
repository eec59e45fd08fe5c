"""The study: questions that the papers leave open, answered on the demo corpora, whose relevance is known.

recipes (the compared trainings) -> corpora, negatives (the tests) -> encoders (trained once per seed, their tokens are
kept) -> head (projections, scorer and objective on those tokens) -> runs (one JSON line each) -> report (RESULTS.md).
"""
