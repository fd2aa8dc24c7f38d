"""The file of weights: written one tensor at a time, read by safetensors."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from policy_server.weights import StoredWeights, write_weights


def test_weights_read_as_they_were_given_and_lie_as_graphs_want_them(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    given = {
        "flags": np.array([True, False, True]),
        "codes": draw.integers(-128, 128, (3, 5), dtype=np.int8),
        "counts": np.arange(3),
        "wide": draw.standard_normal((2, 7), dtype=np.float32),
        "turned": draw.standard_normal((4, 3), dtype=np.float32),
        "view": draw.standard_normal((6, 4), dtype=np.float32)[::2].T,
        "scalar": np.array(2.5, dtype=np.float32),
        "halves": draw.standard_normal((2, 2)).astype(np.float16),
    }
    path = tmp_path / "weights.safetensors"
    write_weights(path, given, frozenset({"turned", "codes"}))
    stored, lying = StoredWeights(path), load_file(path)
    assert stored.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(stored[name], array)
        assert stored[name].dtype == array.dtype
        turned = name in stored.transposed
        np.testing.assert_array_equal(lying[name], array.T if turned else array)
    assert stored.transposed == {"turned", "codes"}


def test_every_tensor_begins_where_its_numbers_may(tmp_path: Path) -> None:
    given = {name: np.ones(3, dtype=kind) for name, kind in {"a": np.int8, "b": np.float32, "c": np.int64}.items()}
    path = tmp_path / "weights.safetensors"
    write_weights(path, given, frozenset())
    raw = path.read_bytes()
    for name, array in given.items():
        assert raw.find(array.tobytes()) % array.itemsize == 0, name
    assert StoredWeights(path).transposed == frozenset()
