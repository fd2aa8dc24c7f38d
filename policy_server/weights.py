"""The weights of a bundle: one safetensors file that its graphs and torch share.

Compiled graphs want some matrices the other way round than torch. Each tensor is stored as the graphs want it, so that
they can use the file as it lies, and those that are stored transposed are named in the file's metadata.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from policy_server.errors import BundleInvalid

FILE = "weights.safetensors"
_TRANSPOSED = "transposed"


class StoredWeights(Mapping[str, np.ndarray]):
    """The tensors of one file by name, as torch has them, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises BundleInvalid if it is not safetensors."""
        # A pickle can carry code; the only weights that are ever opened are safetensors, whatever the file is called.
        try:
            with safe_open(path, framework="numpy") as file:
                self._names = frozenset(file.keys())
                self.transposed = transposed_names(file.metadata())
        except (SafetensorError, json.JSONDecodeError) as error:
            raise BundleInvalid(
                f"{path.name} is not a safetensors file ({error}); pickled weights are refused"
            ) from error
        self._path = path

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor."""
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="numpy") as file:
            array: np.ndarray = file.get_tensor(name)
        return array.T if name in self.transposed else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def transposed_names(metadata: Mapping[str, str] | None) -> frozenset[str]:
    """Return the tensors that a file's metadata says are stored transposed."""
    return frozenset(json.loads((metadata or {}).get(_TRANSPOSED, "[]")))


def describe_transposed(names: frozenset[str]) -> dict[str, str]:
    """Return the metadata that `transposed_names` reads."""
    return {_TRANSPOSED: json.dumps(sorted(names))} if names else {}
