"""A server for robot policies: observations in, action chunks out, at control-loop rates."""

__version__ = "0.1.0"
