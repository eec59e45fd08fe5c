"""Ranks: how a process finds and joins the others (start), and communication between them (world)."""
