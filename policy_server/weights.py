"""The weights of a bundle: one safetensors file that its graphs and torch share.

Compiled graphs want some matrices the other way round than torch. Each tensor is stored as the graphs want it, so that
they can use the file as it lies, and those that are stored transposed are named in the file's metadata.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def write_weights(path: Path, tensors: Mapping[str, np.ndarray], transposed: frozenset[str]) -> None:
    """Write tensors, those named in `transposed` turned round.

    They are written one by one: safetensors' own `save_file` takes all at once, and a released policy's are 13 GB.
    """
    # The library's order, by which every tensor begins at a multiple of its numbers' size.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {_TRANSPOSED: json.dumps(sorted(transposed))}} if transposed else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = tensors[name].shape[::-1] if name in transposed else tensors[name].shape
        header[name] = {"dtype": _dtype(tensors[name]), "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = tensors[name].T if name in transposed else tensors[name]
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _dtype(array: np.ndarray) -> str:
    return "BOOL" if array.dtype.kind == "b" else f"{array.dtype.kind.upper()}{8 * array.itemsize}"


def transposed_names(metadata: Mapping[str, str] | None) -> frozenset[str]:
    """Return the tensors that a file's metadata says are stored transposed."""
    return frozenset(json.loads((metadata or {}).get(_TRANSPOSED, "[]")))
