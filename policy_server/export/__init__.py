"""Offline: making bundles. Nothing here runs while robots are served."""
