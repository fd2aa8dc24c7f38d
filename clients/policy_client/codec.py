"""The wire codec: msgpack with numpy arrays in it, byte for byte as openpi's clients and servers write it.

An array is a map with the binary keys `__ndarray__`, `data`, `dtype`, `shape`; a numpy scalar is one with
`__npgeneric__`, `data`, `dtype`. Decoding trusts nothing: upstream's decoder builds an array of whatever
dtype and shape the sender claims, which for dtype `|O` means one over pointers of the sender's choice.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Annotated, Any

import msgpack
import msgspec
import numpy as np

# The longest list or map, and the most values in one message. Long runs of numbers travel as arrays, whose
# items do not count, so a message past these limits is a mistake or an attempt to turn few bytes into much
# memory.
MAX_LENGTH = 4096
MAX_VALUES = 100_000
MAX_DEPTH = 32
MAX_RANK = 32


class DecodeError(ValueError):
    """Bytes that are not a message of this dialect. Says what was got and what was wanted."""


def pack(value: Any) -> bytes:
    """Encode dicts, lists, strings, bytes, numbers, booleans, None, numpy arrays and numpy scalars.

    Arrays are written in C order whatever their memory layout. Tuples arrive as lists.

    Raises:
        ValueError: An array or scalar of kind V (records), O (objects) or c (complex).
        TypeError: Anything else that has no form on the wire, a torch tensor for example.
        OverflowError: An integer beyond 64 bits.
    """
    packed: bytes = msgpack.packb(value, default=_encode)
    return packed


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """Decode one message.

    Arrays come back read-only. The bytes of images are not copied a second time, and in the messages that robots send
    most not once; numbers are aligned. Map keys are str or bytes.

    Raises:
        DecodeError: For everything that is wrong with `data`; nothing else is raised.
    """
    value = _observation(data)
    return _decode(data) if value is None else value


_NDARRAY, _NPGENERIC, _DATA, _DTYPE, _SHAPE = b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"
_ARRAY_KEYS = frozenset({_NDARRAY, _DATA, _DTYPE, _SHAPE})
_SCALAR_KEYS = frozenset({_NPGENERIC, _DATA, _DTYPE})
_TOO_DEEP = f"got a message nested deeper than {MAX_DEPTH} levels"

_NUMBERS = ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]
_DTYPES = {dtype.str: dtype for code in _NUMBERS for dtype in (np.dtype(f"<{code}"), np.dtype(f">{code}"))}
_STRING_DTYPE = re.compile(r"[<>]U[1-9][0-9]{0,5}", re.ASCII)
_SCALAR_TYPES: dict[str, tuple[type, ...]] = {
    "b": (bool,),
    "i": (int,),
    "u": (int,),
    "f": (float, int),
    "U": (str,),
}


def _encode(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"cannot send a {type(value).__name__}, expected plain values or numpy arrays")
    dtype = value.dtype
    if dtype.kind in "VOc":
        raise ValueError(f"cannot send dtype {dtype}: kinds V, O and c have no form on the wire")
    if isinstance(value, np.generic):
        plain = value.item()
        if isinstance(plain, np.generic):  # long double: msgpack would come back here for ever
            raise ValueError(f"cannot send a scalar of dtype {dtype}")
        return {_NPGENERIC: True, _DATA: plain, _DTYPE: dtype.str}
    # Saves a copy: msgpack reads a buffer directly. Subclasses may hide what they hold, and times have no
    # buffer.
    as_is = type(value) is np.ndarray and value.flags.c_contiguous and dtype.kind not in "mM"
    return {
        _NDARRAY: True,
        _DATA: value.data if as_is else value.tobytes(),
        _DTYPE: dtype.str,
        _SHAPE: value.shape,
    }


# The message that robots send most: a short map of arrays, plain values, and short maps of plain values. msgspec reads
# it without copying arrays.
_ENTRIES = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_FIELDS = msgspec.msgpack.Decoder(dict[bytes, msgspec.Raw])
_PLAIN = msgspec.msgpack.Decoder(str | bool | int | float | None)
_BYTES = msgspec.msgpack.Decoder(memoryview)
_NAME = msgspec.msgpack.Decoder(str)
_SIZES = msgspec.msgpack.Decoder(Annotated[list[int], msgspec.Meta(max_length=MAX_RANK)])
_FIXMAP, _SHORT_BYTES, _TRUE = range(0x80, 0x90), 0xC4, b"\xc3"


def _observation(data: bytes | bytearray | memoryview) -> dict[str, Any] | None:
    """Decode such a message; None for any other, and for a wrong one: `_decode` says what is wrong with it."""
    try:
        return {name: _entry(raw) for name, raw in _short_map(_ENTRIES, data).items()}
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, RecursionError):
        return None


def _short_map(decoder: msgspec.msgpack.Decoder[dict[Any, msgspec.Raw]], data: Any) -> dict[Any, msgspec.Raw]:
    fields = decoder.decode(data)
    if len(fields) != memoryview(data)[0] - _FIXMAP.start:
        raise DecodeError("a long map, or one where a key comes twice")
    return fields


def _entry(raw: msgspec.Raw) -> Any:
    head = memoryview(raw)
    if head[0] not in _FIXMAP:
        return _PLAIN.decode(raw)
    if head[1] == _SHORT_BYTES:  # its first key tells
        return _short_array(_short_map(_FIELDS, raw))
    return {name: _PLAIN.decode(value) for name, value in _short_map(_ENTRIES, raw).items()}


def _short_array(fields: dict[Any, msgspec.Raw]) -> np.ndarray:
    dtype, shape = _DTYPES[_NAME.decode(fields[_DTYPE])], _SIZES.decode(fields[_SHAPE])
    data = _BYTES.decode(fields[_DATA])
    wrong = len(fields) != len(_ARRAY_KEYS) or bytes(fields[_NDARRAY]) != _TRUE
    if wrong or len(data) != math.prod(shape) * dtype.itemsize or dtype.kind == "b":
        raise DecodeError("an array that needs a closer look")
    array = np.ndarray(shape, dtype, data)  # refuses negative sizes itself
    if dtype.itemsize > 1:  # numbers must lie where processors like to read them; images may lie anywhere
        array = array.copy()
        array.flags.writeable = False
    return array


def _decode(data: bytes | bytearray | memoryview) -> Any:
    message = _Message()
    try:
        value = msgpack.unpackb(
            data,
            object_pairs_hook=message.close_map,
            list_hook=message.close_list,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_ext_len=0,  # also refuses timestamps, which no hook sees
            ext_hook=_refuse_extension,
        )
    except DecodeError:
        raise
    except msgpack.ExtraData as error:
        raise DecodeError(f"got {len(error.extra)} bytes after the end of the message, expected none") from error
    except msgpack.StackError as error:
        raise DecodeError(_TOO_DEEP) from error
    except (ValueError, TypeError, BufferError) as error:
        reason = str(error) or type(error).__name__
        raise DecodeError(f"got bytes that are not a msgpack message of this dialect: {reason}") from error
    _check_depth(value)
    return value


class _Message:
    """One message being decoded. Containers are closed innermost first."""

    def __init__(self) -> None:
        self.values = 0

    def close_map(self, pairs: list[tuple[str | bytes, Any]]) -> Any:
        self._count(len(pairs))
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            raise DecodeError(f"got key {next(n for n in names if names.count(n) > 1)!r} twice in one map")
        if _NDARRAY in fields:
            return _array(fields)
        if _NPGENERIC in fields:
            return _scalar(fields)
        return fields

    def close_list(self, values: list[Any]) -> list[Any]:
        self._count(len(values))
        return values

    def _count(self, length: int) -> None:
        self.values += 1 + length
        if self.values > MAX_VALUES:
            raise DecodeError(f"got more than {MAX_VALUES} values in one message, send arrays instead")


def _array(fields: dict[str | bytes, Any]) -> np.ndarray:
    _check_marker(fields, _NDARRAY, _ARRAY_KEYS)
    data, dtype, shape = fields[_DATA], _dtype(fields[_DTYPE]), fields[_SHAPE]
    if type(data) is not bytes:
        raise DecodeError(f"array data is {type(data).__name__}, expected bytes")
    if type(shape) is not list or len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise DecodeError(f"array shape is {shape!r:.200}, expected at most {MAX_RANK} non-negative integers")
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise DecodeError(f"array of shape {shape} and dtype {dtype.str} has {len(data)} bytes, expected {wanted}")
    if not data and math.prod(filter(None, shape)) * dtype.itemsize > sys.maxsize:
        raise DecodeError(f"array shape {shape} is empty but cannot be addressed")
    _check_items(data, dtype)
    return np.ndarray(shape, dtype, data)


def _scalar(fields: dict[str | bytes, Any]) -> np.generic:
    _check_marker(fields, _NPGENERIC, _SCALAR_KEYS)
    data, dtype = fields[_DATA], _dtype(fields[_DTYPE])
    wanted = _SCALAR_TYPES[dtype.kind]
    if type(data) not in wanted:
        raise DecodeError(f"scalar of dtype {dtype.str} holds a {type(data).__name__}, expected {wanted[0].__name__}")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= data <= np.iinfo(dtype).max:
        raise DecodeError(f"scalar of dtype {dtype.str} holds {data}, which is out of its range")
    with np.errstate(over="ignore"):  # too large for the dtype becomes infinite, as a cast would have it
        scalar: np.generic = dtype.type(data)
    return scalar


def _check_marker(fields: dict[str | bytes, Any], marker: bytes, wanted: frozenset[bytes]) -> None:
    if fields.keys() != wanted:
        raise DecodeError(f"{marker!r} map has keys {list(fields)!r:.200}, expected {sorted(wanted)}")
    if fields[marker] is not True:
        raise DecodeError(f"{marker!r} is {fields[marker]!r:.40}, expected True")


def _dtype(name: Any) -> np.dtype[Any]:
    if type(name) is str:
        if name in _DTYPES:
            return _DTYPES[name]
        if _STRING_DTYPE.fullmatch(name):
            return np.dtype(name)
    raise DecodeError(f"dtype is {name!r:.40}, expected booleans, integers, floats of at most 64 bits, or strings")


def _check_items(data: bytes, dtype: np.dtype[Any]) -> None:
    """Refuse bytes that numpy takes for granted: its own loops rely on booleans being 0 or 1."""
    if dtype.kind == "b" and data and np.frombuffer(data, np.uint8).max() > 1:
        raise DecodeError("boolean array holds bytes other than 0 and 1")
    if dtype.kind == "U" and data and np.frombuffer(data, f"{dtype.str[0]}u4").max() > sys.maxunicode:
        raise DecodeError("string array holds numbers that are not characters")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if type(item) in (dict, list)]
        if not containers:
            return
        level = [item for parent in containers for item in (parent.values() if type(parent) is dict else parent)]
    raise DecodeError(_TOO_DEEP)


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise DecodeError(f"got msgpack extension type {code}, expected none")
