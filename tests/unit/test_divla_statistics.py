"""What a DiVLA policy was trained on: read without running code, and checked."""

import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policy_models.divla.state_dict import CheckpointMismatch
from policy_models.divla.statistics import read_statistics
from tests.unit.divla_files import statistics, write_statistics


@pytest.mark.parametrize("kind", ["json", "npz"])
@pytest.mark.parametrize("above", [True, False])
def test_statistics_scale_states_and_actions(tmp_path: Path, kind: str, above: bool) -> None:
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    place = tmp_path if above else folder
    write_statistics(place) if kind == "json" else np.savez(place / "dataset_stats.npz", **statistics())
    read = read_statistics(folder)
    np.testing.assert_allclose(read.denormalize_action(np.array([[-1.0] * 5, [1.0] * 5])), [[-2] * 5, [4] * 5])
    np.testing.assert_allclose(read.normalize_state(np.arange(6) + 2.0), np.ones(6))
    np.testing.assert_allclose(read.clip_action(np.full(5, 1.3)), np.ones(5))


def test_the_statistics_of_a_pickle_are_refused_and_the_way_to_convert_them_works(tmp_path: Path) -> None:
    (tmp_path / "dataset_stats.pkl").write_bytes(pickle.dumps(statistics()))
    with pytest.raises(CheckpointMismatch, match="is a pickle") as refused:
        read_statistics(tmp_path)
    command = shlex.split(str(refused.value).split("lies: ")[1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert read_statistics(tmp_path).action.max == (4.0,) * 5


def test_statistics_that_need_code_to_load_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "dataset_stats.npz", **{**statistics(), "qpos_mean": np.array([{}], dtype=object)})
    with pytest.raises(CheckpointMismatch, match="could not be read as plain arrays"):
        read_statistics(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qpos_std": None}, "missing qpos_std, unknown nothing"),
        ({"speed": [1.0]}, "missing nothing, unknown speed"),
        ({"qpos_std": [0.0] * 6}, "'qpos_std' must be above 0, got 0.0"),
        ({"qpos_std": [1.0] * 3}, "disagree about the width"),
        ({"action_max": [-2.0] * 5}, "every 'action_min' must be below its 'action_max'"),
        ({"action_mean": [float("nan")] * 5}, "'action_mean' must be a row of finite numbers"),
        ({"action_mean": "fast"}, "'action_mean' holds no numbers"),
    ],
)
def test_statistics_that_make_no_sense_are_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    write_statistics(tmp_path, **changed)
    with pytest.raises(CheckpointMismatch, match=message):
        read_statistics(tmp_path)
