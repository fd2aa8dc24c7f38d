"""What the language model remembers of one prompt and its answer: a key-value cache of fixed size. No torch here."""

import numpy as np


class Cache:
    """Keys and values of a prompt, with room for an answer.

    Its size never changes, so that robots at different words of different answers share a run.

    Attributes:
        entries: (1, layers, 2, kv heads, K, head width) float32.
        mask: 0 for what is padding or not there yet, (1, K) int64.
    """

    def __init__(self, read: np.ndarray, mask: np.ndarray, capacity: int) -> None:
        """Begin after a prompt.

        Args:
            read: What the graph `read` gave, (1, layers, 2, kv heads, L, head width).
            mask: Of the prompt, (L,).
            capacity: K, at least L and the longest answer.
        """
        length = len(mask)
        # Zeros rather than whatever is there: what is masked has no weight, but zero times NaN is NaN.
        self.entries = np.zeros((*read.shape[:4], capacity, read.shape[5]), dtype=read.dtype)
        self.entries[..., :length, :] = read
        self.mask = np.zeros((1, capacity), dtype=np.int64)
        self.mask[0, :length] = mask
        self._next = length

    def add(self, entry: np.ndarray) -> None:
        """Remember what the graph `speak` gave, (1, layers, 2, kv heads, 1, head width)."""
        assert self._next < self.mask.shape[1], "an answer longer than its cache has room for"
        self.entries[..., self._next, :] = entry[..., 0, :]
        self.mask[0, self._next] = 1
        self._next += 1
