"""Counts what is being answered, so that shutting down can wait for it."""

from policy_server.errors import Draining


class Traffic:
    """Requests in flight on one server: `with traffic:` holds one open."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.draining = False

    def __enter__(self) -> None:
        """Begin a request; raises Draining once the server shuts down."""
        if self.draining:
            raise Draining
        self.in_flight += 1

    def __exit__(self, *_: object) -> None:
        """End a request."""
        self.in_flight -= 1
