"""Readers, data sets, and the sharded sampler."""
