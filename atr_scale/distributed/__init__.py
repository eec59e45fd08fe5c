"""Ranks: how a process finds and joins them (start), and what passes between them (world)."""
