"""From observation to chunk: checking, sessions, scheduling, sampling, guarding."""
