"""Distributed large-scale pretraining for audio-text retrieval."""

__version__ = "0.1.0"
