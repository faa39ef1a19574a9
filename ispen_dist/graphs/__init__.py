"""Traced and compiled graphs: one stage traced once, split by what its parts depend on, compiled."""
