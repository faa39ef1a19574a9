"""Stages traced once, split by what is known when, and compiled."""
