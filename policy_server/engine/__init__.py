"""Engines: each runs a bundle's graphs with one library."""
