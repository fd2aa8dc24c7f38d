"""The wire codec: the bytes that openpi writes, and DecodeError alone for bytes that nobody should write."""

from __future__ import annotations

import struct
from contextlib import suppress
from datetime import UTC, datetime

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from policy_client.codec import MAX_DEPTH, MAX_LENGTH, MAX_VALUES, DecodeError, pack, unpack

# Made with openpi-client 0.1.2 on numpy 1.26.
UPSTREAM_BYTES = [
    (
        {"x": np.array([1, 2], np.float32)},
        "81a17884c40b5f5f6e6461727261795f5fc3c40464617461c4080000803f00000040c4056474797065a33c6634c40573686170659102",
    ),
    (
        np.float32(1.5),
        "83c40d5f5f6e7067656e657269635f5fc3c40464617461cb3ff8000000000000c4056474797065a33c6634",
    ),
    (np.float64(1.5), "cb3ff8000000000000"),
    (
        np.array(7, np.uint8),
        "84c40b5f5f6e6461727261795f5fc3c40464617461c40107c4056474797065a37c7531c405736861706590",
    ),
    ({}, "80"),
]


@pytest.mark.parametrize(("value", "wire_hex"), UPSTREAM_BYTES)
def test_values_are_written_byte_for_byte_as_openpi_writes_them(value, wire_hex):
    assert pack(value).hex() == wire_hex


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(12, dtype=np.uint8)[::2],
        np.array(["left", "up"]),
        np.array([True, False]),
        np.zeros((0, 3), np.float16),
        np.array(1.5),
        np.ma.masked_array([1, 2, 3]),
        np.zeros((), "U3"),
    ],
    ids=repr,
)
def test_arrays_are_written_in_c_order_whatever_their_memory_looks_like(array):
    written = msgpack.unpackb(pack(array), strict_map_key=False)
    assert list(written) == [b"__ndarray__", b"data", b"dtype", b"shape"]
    assert written[b"data"] == array.tobytes()
    assert written[b"dtype"] == array.dtype.str
    assert written[b"shape"] == list(array.shape)
    np.testing.assert_array_equal(unpack(pack(array)), array)
    assert unpack(pack(array)).dtype == array.dtype


def test_times_can_be_sent_as_openpi_sends_them_but_are_not_taken():
    wire = pack(np.array(["2024-01-01"], "M8[D]"))
    assert msgpack.unpackb(wire)[b"dtype"] == "<M8[D]"
    with pytest.raises(DecodeError, match="dtype is '<M8"):
        unpack(wire)


@pytest.mark.parametrize("dtype", ["c8", "c16", "O", [("x", "f4")]])
def test_kinds_without_a_wire_form_are_refused_when_sent(dtype):
    with pytest.raises(ValueError, match=r"cannot send dtype .* kinds V, O and c have no form on the wire"):
        pack({"x": np.zeros(2, dtype)})


def test_a_long_double_scalar_is_refused_when_sent():
    with pytest.raises(ValueError, match="cannot send a scalar of dtype"):
        pack(np.longdouble(1))


def test_an_unknown_type_is_refused_by_name_when_sent():
    with pytest.raises(TypeError, match="cannot send a datetime, expected"):
        pack({"when": datetime.now(UTC)})


def test_arrays_are_read_only_and_share_the_memory_of_the_decoded_bytes():
    array = unpack(pack(np.zeros(1000)))
    assert not array.flags.writeable
    assert isinstance(array.base, bytes)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_decoded(kind):
    assert unpack(kind(pack({"prompt": "open the drawer"}))) == {"prompt": "open the drawer"}


DTYPES = st.one_of(
    nps.boolean_dtypes(),
    nps.integer_dtypes(endianness="?"),
    nps.unsigned_integer_dtypes(endianness="?"),
    nps.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    nps.unicode_string_dtypes(endianness="?", max_len=5),
)
ARRAYS = nps.arrays(DTYPES, nps.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
SCALARS = nps.arrays(nps.integer_dtypes() | nps.boolean_dtypes() | nps.floating_dtypes(sizes=(16, 32)), ()).map(
    lambda array: array[()]
)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
VALUES = st.recursive(
    PLAIN | ARRAYS | SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def same(got, wanted):
    if isinstance(wanted, np.ndarray | np.generic):
        assert type(got) is type(wanted)
        assert got.shape == wanted.shape
        # A scalar comes back in this machine's byte order, an array in the sender's.
        assert got.dtype == (wanted.dtype if isinstance(wanted, np.ndarray) else wanted.dtype.newbyteorder("="))
        np.testing.assert_array_equal(got, wanted)
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for name in wanted:
            same(got[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            same(one, other)
    else:
        assert type(got) is type(wanted)
        assert got == wanted or got != got


@settings(max_examples=300, deadline=None, database=None)
@given(VALUES)
def test_what_is_packed_comes_back_the_same(value):
    same(unpack(pack(value)), value)


def decodes_or_is_refused(data):
    with suppress(DecodeError):
        value = unpack(data)
        repr(value)  # touches every item: nothing in it may be a trap that springs later


@settings(max_examples=500, deadline=None, database=None)
@given(st.binary(max_size=64))
def test_random_bytes_are_decoded_or_refused(data):
    decodes_or_is_refused(data)


@settings(max_examples=500, deadline=None, database=None)
@given(VALUES | ARRAYS, st.data())
def test_damaged_messages_are_decoded_or_refused(value, data):
    wire = bytearray(pack(value))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_is_refused(bytes(wire))


@settings(max_examples=200, deadline=None, database=None)
@given(VALUES | ARRAYS, st.data())
def test_truncated_messages_are_refused(value, data):
    wire = pack(value)
    with pytest.raises(DecodeError):
        unpack(wire[: data.draw(st.integers(0, len(wire) - 1))])


@settings(max_examples=300, deadline=None, database=None)
@given(
    dtype=st.sampled_from(["<f4", "|u1", "|b1", "<U2", ">U1", "|O", "<c8", "V8", "f4", "<U0", "<f4,<f4", ""]) | PLAIN,
    shape=st.lists(st.integers(-(2**63), 2**64 - 1) | st.integers(-1, 4), max_size=40) | PLAIN,
    contents=st.binary(max_size=32) | PLAIN,
)
def test_forged_arrays_are_decoded_or_refused(dtype, shape, contents):
    decodes_or_is_refused(forged(dtype=dtype, shape=shape, data=contents))


@settings(max_examples=300, deadline=None, database=None)
@given(dtype=st.sampled_from(["<f4", "<f2", "|i1", ">u8", "|b1", "<U2", "|O"]) | PLAIN, contents=VALUES)
def test_forged_scalars_are_decoded_or_refused(dtype, contents):
    decodes_or_is_refused(pack({b"__npgeneric__": True, b"data": contents, b"dtype": dtype}))


def forged(**changes):
    """Return an array's wire form, (2,) float32 but for `changes`; a field changed to ... is left out."""
    fields = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2]} | changes
    return msgpack.packb({name.encode(): value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (forged(dtype="|O", shape=[1]), r"dtype is '\|O', expected booleans, integers, floats"),
        (forged(dtype="|V8", shape=[1]), "dtype is"),
        (forged(dtype="<c8", shape=[1]), "dtype is"),
        (forged(dtype="<M8[s]", shape=[1]), "dtype is"),
        (forged(dtype="<f16", shape=[0], data=b""), "dtype is"),
        (forged(dtype="<U0", shape=[10**9], data=b""), "dtype is"),
        (forged(dtype="<U9999999", shape=[0], data=b""), "dtype is"),
        (forged(dtype="f4,f4", shape=[1]), "dtype is"),
        (forged(dtype=b"<f4"), "dtype is"),
        (forged(shape=[3]), r"array of shape \[3\] and dtype <f4 has 8 bytes, expected 12"),
        (forged(shape=[1]), "has 8 bytes, expected 4"),
        (forged(shape=[2**40, 2**40]), "has 8 bytes, expected"),
        (forged(shape=[-1]), r"array shape is \[-1\], expected at most 32 non-negative integers"),
        (forged(shape=[-2, -1]), "array shape is"),
        (forged(shape=[True, 2]), "array shape is"),
        (forged(shape=[2.0]), "array shape is"),
        (forged(shape=2), "array shape is 2"),
        (forged(shape=None), "array shape is None"),
        (forged(shape=[2] + [1] * 32), "array shape is"),
        (forged(shape=[1] * 4000), "array shape is"),
        (forged(shape=[0, 2**63], data=b""), "cannot be addressed"),
        (forged(shape=[0, 2**31, 2**31, 2], data=b""), "cannot be addressed"),
        (forged(data="12345678"), "array data is str, expected bytes"),
        (forged(data=[0] * 8), "array data is list, expected bytes"),
        (forged(data=...), "map has keys .* expected"),
        (forged(dtype=...), "map has keys"),
        (forged(shape=...), "map has keys"),
        (forged(more=1), "map has keys"),
        (forged(__ndarray__=1), "b'__ndarray__' is 1, expected True"),
        (forged(dtype="|b1", data=b"\x02\x00"), "bytes other than 0 and 1"),
        (forged(dtype="<U2", shape=[1], data=b"\xff" * 8), "not characters"),
        (forged(dtype=">U2", shape=[1], data=b"\x01" * 8), "not characters"),
        (
            pack({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
            "holds 300, which is out of its range",
        ),
        (pack({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}), "holds a str, expected float"),
        (pack({b"__npgeneric__": True, b"data": True, b"dtype": "<i4"}), "holds a bool, expected int"),
        (pack({b"__npgeneric__": True, b"dtype": "<i4"}), "map has keys"),
        (pack({}) + b"\xc0", "got 1 bytes after the end of the message, expected none"),
        (pack({}) * 2, "got 1 bytes after the end"),
        (b"\x82\xa1a\x01\xa1a\x02", "got key 'a' twice in one map"),
        (b"\x91" * (MAX_DEPTH + 1) + b"\xc0", "nested deeper than 32 levels"),
        (b"\x81\xa1a" * (MAX_DEPTH + 1) + b"\xc0", "nested deeper than 32 levels"),
        (b"\x91" * 100_000 + b"\xc0", "nested deeper than 32 levels"),
        (b"\x81\x01\x02", "int is not allowed for map key|not allowed"),
        (b"\xc7\x00\x05", "got msgpack extension type 5, expected none"),
        (b"\xd4\x05\x00", "max_ext_len"),
        (msgpack.packb(msgpack.Timestamp(1)), "max_ext_len"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete|max_bin_len"),
        (b"\xa1\xff", "utf-8"),
        (b"\xc1", "not a msgpack message"),
        (b"", "incomplete"),
        ("text", "bytes-like"),
        (None, "NoneType"),
    ],
)
def test_malformed_messages_are_refused_with_the_reason(data, complaint):
    with pytest.raises(DecodeError, match=complaint):
        unpack(data)


def test_a_message_may_be_as_deep_as_the_limit():
    value = unpack(b"\x91" * MAX_DEPTH + b"\xc0")
    for _ in range(MAX_DEPTH):
        (value,) = value
    assert value is None


def test_few_bytes_cannot_become_a_great_many_values():
    full = b"\xdc" + struct.pack(">H", MAX_LENGTH) + b"\x90" * MAX_LENGTH
    lists = MAX_VALUES // MAX_LENGTH + 1
    with pytest.raises(DecodeError, match="more than 100000 values in one message"):
        unpack(b"\xdc" + struct.pack(">H", lists) + full * lists)


def test_a_scalar_too_large_for_its_dtype_becomes_infinite():
    assert unpack(pack({b"__npgeneric__": True, b"data": 1e300, b"dtype": "<f4"})) == np.inf


def test_arrays_with_string_markers_stay_maps_as_in_openpi():
    assert unpack(pack({"__ndarray__": True})) == {"__ndarray__": True}


@settings(max_examples=300, deadline=None, database=None)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=5))
def test_a_map_of_arrays_decodes_as_any_other_message_does(value):
    """Short maps take a shorter way; a list around the same map does not."""
    same(unpack(pack(value)), unpack(pack([value]))[0])


def test_the_bytes_of_an_image_are_not_copied():
    wire = pack({"image": np.arange(12, dtype=np.uint8)})
    image = unpack(wire)["image"]
    assert np.shares_memory(image, np.frombuffer(wire, np.uint8))
    assert not image.flags.writeable


def test_numbers_lie_aligned_whatever_their_place_in_the_message():
    for padding in range(8):
        got = unpack(pack({"x" * (1 + padding): np.float64([1.5, -2.5])}))
        assert all(array.flags.aligned and not array.flags.writeable for array in got.values())


@pytest.mark.parametrize(
    "message",
    [
        b"\x81\xa7options\x82\xa4seed\x01\xa4seed\x02",
        b"\x82\xa1a\x01\xa1a\x02",
        pack({"a": np.zeros(1, np.uint8)}).replace(b"\x84", b"\x85", 1) + b"\xc4\x04data\xc4\x01\x01",
    ],
    ids=["in a map inside", "in the message", "in an array"],
)
def test_a_key_that_comes_twice_is_refused_wherever_it_is(message: bytes) -> None:
    with pytest.raises(DecodeError, match="twice in one map"):
        unpack(message)


def test_options_beside_arrays_are_read_as_they_were_sent() -> None:
    options = {"seed": 2**63, "steps": None, "guidance": 1.5, "sampler": "ddim", "fresh": True}
    read = unpack(pack({"state": np.ones(3, np.float32), "options": options}))
    assert read["options"] == options
    assert read["state"].tolist() == [1.0, 1.0, 1.0]
