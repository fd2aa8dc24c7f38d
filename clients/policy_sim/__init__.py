"""Simulated robots that drive themselves through a policy client: one maze, its expert, its data, its pictures."""
