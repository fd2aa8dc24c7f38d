"""Between the robot's units and the network's."""

import numpy as np
import pytest

from policy_models.normalizer import Normalizer, Statistics

STATE = Statistics(mean=(1.0, 0.0), std=(2.0, 0.0), min=(-3.0, 0.0), max=(5.0, 0.0))
ACTION = Statistics(mean=(0.5, 1.0), std=(0.5, 0.2), min=(-1.0, 0.5), max=(1.0, 1.5))


@pytest.mark.parametrize("scaling", ["zscore", "minmax", "none"])
def test_an_action_survives_the_round_trip(scaling: str) -> None:
    normalizer = Normalizer(STATE, ACTION, action_scaling=scaling)
    actions = np.random.default_rng(0).uniform(ACTION.min, ACTION.max, (5, 2)).astype(np.float32)
    back = normalizer.denormalize_action(normalizer.normalize_action(actions))
    np.testing.assert_allclose(back, actions, atol=1e-6)
    assert back.dtype == np.float32


def test_minmax_maps_the_training_range_to_minus_one_and_one() -> None:
    normalizer = Normalizer(STATE, ACTION, action_scaling="minmax")
    np.testing.assert_allclose(normalizer.normalize_action(np.array([ACTION.min, ACTION.max])), [[-1, -1], [1, 1]])


def test_a_dimension_that_never_moved_does_not_divide_by_zero() -> None:
    assert np.isfinite(Normalizer(STATE, ACTION).normalize_state(np.array([3.0, 0.0]))).all()


def test_clipping_multiplies_the_bounds_as_upstream_does() -> None:
    unscaled = Normalizer(STATE, ACTION, action_scaling="none", clip=1.1)
    # The lower bound of the second action is positive, so the factor tightens it: 0.5 becomes 0.55.
    np.testing.assert_allclose(unscaled.clip_action(np.array([-9.0, -9.0])), [-1.1, 0.55], rtol=1e-6)
    np.testing.assert_allclose(unscaled.clip_action(np.array([9.0, 9.0])), [1.1, 1.65], rtol=1e-6)


def test_statistics_are_measured_over_all_leading_axes() -> None:
    data = np.random.default_rng(0).standard_normal((3, 7, 2))
    measured = Statistics.of(data)
    np.testing.assert_allclose(measured.mean, data.reshape(-1, 2).mean(axis=0))
    np.testing.assert_allclose(measured.std, data.reshape(-1, 2).std(axis=0))
    assert measured.min == tuple(data.reshape(-1, 2).min(axis=0))


def test_statistics_of_uneven_width_are_refused() -> None:
    with pytest.raises(ValueError, match="disagree about the width"):
        Statistics((0.0,), (1.0, 1.0), (0.0,), (1.0,))
