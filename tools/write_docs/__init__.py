"""Writes docs/config.md and docs/api.md from the package itself: `python -m tools.write_docs`."""
