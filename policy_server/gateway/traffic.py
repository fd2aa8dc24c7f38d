"""Counts what is being answered, so that shutting down can wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager

from policy_server.errors import Draining


class Traffic:
    """Requests in flight on one server."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.draining = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold one request open; raises Draining once the server shuts down."""
        if self.draining:
            raise Draining
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
