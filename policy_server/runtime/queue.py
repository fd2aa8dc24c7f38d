"""The bounded queue before a policy."""

from policy_server.errors import Overloaded


class Queue:
    """The places of those who wait or run: `with queue:` holds one."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0

    def __enter__(self) -> None:
        """Take a place; raises Overloaded if there is none."""
        if self.taken >= self.capacity:
            raise Overloaded(self.taken)
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        """Give the place back."""
        self.taken -= 1
