"""The streaming protocol, docs/stream.md: observations flow up, chunks flow down, sessions outlive connections."""
