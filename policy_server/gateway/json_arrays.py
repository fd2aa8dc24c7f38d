"""Arrays and bytes in JSON: json-numpy's form, which OpenVLA and GR00T clients speak, and base64 for encoded images."""

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Booleans, integers and floats of at most 64 bits, as json-numpy spells them ("<f4") and as people do ("float32").
_DTYPES = {
    name: np.dtype(name)
    for dtype in map(np.dtype, "?bhiqBHIQefd")
    for name in (dtype.name, dtype.str, dtype.newbyteorder(">").str)
}


def from_json(value: Any) -> Any:
    """Replace {"__numpy__": ...} by arrays and {"base64": ...} by bytes, at any depth; raises ValueError."""
    if isinstance(value, list):
        # A list of numbers needs no look inside, and observations are mostly that.
        return [from_json(item) for item in value] if any(isinstance(item, dict) for item in value) else value
    if not isinstance(value, dict):
        return value
    if value.keys() == {"base64"}:
        return _bytes(value["base64"])
    if "__numpy__" in value:
        return _array(value)
    return {key: from_json(item) for key, item in value.items()}


def to_json(inputs: Mapping[str, np.ndarray | str]) -> dict[str, Any]:
    """Return inputs as `from_json` reads them: images in json-numpy's form, vectors as lists rounded for people."""
    return {name: value if isinstance(value, str) else _plain(value) for name, value in inputs.items()}


def _plain(array: np.ndarray) -> Any:
    if array.dtype != np.uint8:
        return np.round(array.astype(float), 4).tolist()
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def _bytes(value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"base64: {error}") from error


def _array(value: dict[str, Any]) -> np.ndarray:
    data = _bytes(value["__numpy__"])
    dtype_name, shape = value.get("dtype"), value.get("shape")
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise ValueError(f"dtype {dtype_name!r}, expected booleans, integers or floats")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise ValueError(f"shape {shape!r}, expected a list of sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for an array of shape {shape} and dtype {dtype_name}")
    return np.frombuffer(data, dtype).reshape(shape)
