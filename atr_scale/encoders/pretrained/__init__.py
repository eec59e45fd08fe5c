"""Checkpoints of the original projects: their layouts, and how they are read safely and loaded strictly."""
