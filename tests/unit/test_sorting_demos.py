"""Demonstrations of sorting: what is shown, said and done belongs together, and nothing held out is among it."""

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="the sim extra is not installed")

from policy_sim.sorting_camera import SIZE_PX
from policy_sim.sorting_demos import Noise, Settings, collect
from policy_sim.sorting_scene import TOP_SPEED_M_S
from policy_sim.sorting_words import HELD_OUT, ORDERS, THOUGHTS

DISTURBED = Settings(noise=Noise(slip_probability=0.1, mistake_probability=0.5))


@pytest.fixture(scope="module")
def demos():
    return collect(6, DISTURBED)


def test_demonstrations_agree_with_themselves_and_show_no_held_out_combination(demos):
    count = len(demos["step"])
    assert demos["image"].shape == (count, SIZE_PX, SIZE_PX, 3) and demos["image"].dtype == np.uint8
    assert demos["state"].shape == (count, 3) and demos["actions"].shape == (count, 16, 3)
    assert demos["bounds"][0] == 0 and demos["bounds"][-1] == count and len(demos["bounds"]) == 7
    assert np.abs(demos["actions"][..., :2]).max() <= TOP_SPEED_M_S + 1e-6
    for first, end in zip(demos["bounds"], demos["bounds"][1:], strict=False):
        assert (np.diff(demos["step"][first:end]) == 2).all() and demos["step"][first] == 0
        assert len(set(demos["instruction"][first:end])) == 1
        order = ORDERS[demos["instructions"][demos["instruction"][first]]]
        thoughts = [THOUGHTS[demos["reasonings"][i]] for i in demos["reasoning"][first:end]]
        assert [thought is None for thought in thoughts] == demos["done"][first:end].tolist()
        assert demos["done"][end - 1]
        for thought, (_, _, holds) in zip(thoughts, demos["state"][first:end], strict=True):
            if thought is not None:
                assert thought.goal == (order.bin_of(thought.thing) or "table")
                assert (thought.thing, thought.goal) not in HELD_OUT
                assert (thought.at == "hand") == bool(holds)


def test_demonstrations_do_not_depend_on_the_number_of_processes(demos):
    assert all(np.array_equal(demos[name], array) for name, array in collect(6, DISTURBED, jobs=2).items())
