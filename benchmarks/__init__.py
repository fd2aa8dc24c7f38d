"""Measurements of this server beside its alternatives: `python -m benchmarks --help`."""
