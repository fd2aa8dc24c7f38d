"""The grid of directions: where its bins lead, and which of them a velocity takes."""

from itertools import product

import numpy as np
import pytest

from policy_models.directions import CollisionSpec

GRID = CollisionSpec("front", rows=5, columns=7, fov_deg=(90.0, 40.0), reach_m=3.0)
LEVEL = CollisionSpec("front", rows=1, columns=7, fov_deg=(90.0, 0.0), reach_m=3.0)


@pytest.mark.parametrize("speed", [0.1, 2.0])
def test_every_heading_lies_in_its_own_bin(speed: float) -> None:
    for row, column in product(range(GRID.rows), range(GRID.columns)):
        assert GRID.bin_of(speed * GRID.headings[row, column]) == (row, column)


def test_the_first_column_leads_left_and_the_first_row_up() -> None:
    forward, left, up = GRID.headings[0, 0]
    assert forward > 0 and left > 0 and up > 0
    np.testing.assert_allclose(GRID.headings[2, 3], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(GRID.headings, axis=-1), 1.0)


@pytest.mark.parametrize("velocity", [(-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.2, 0.0, 1.0), (0.0, 0.0, 0.0)])
def test_a_velocity_out_of_view_has_no_bin(velocity: tuple[float, float, float]) -> None:
    assert GRID.bin_of(np.array(velocity)) is None


def test_half_a_bin_beyond_the_outermost_direction_still_counts() -> None:
    inside, outside = np.radians([45.0 + 7.4, 45.0 + 7.6])
    assert GRID.bin_of(np.array([np.cos(inside), np.sin(inside), 0.0])) == (2, 0)
    assert GRID.bin_of(np.array([np.cos(outside), np.sin(outside), 0.0])) is None


def test_a_grid_of_one_row_stands_for_every_elevation() -> None:
    assert LEVEL.bin_of(np.array([1.0, 0.0, 0.9])) == (0, 3)


@pytest.mark.parametrize(
    ("rows", "columns", "fov_deg", "reach_m"),
    [(0, 7, (90.0, 0.0), 3.0), (1, 1, (90.0, 0.0), 3.0), (1, 7, (180.0, 0.0), 3.0), (1, 7, (90.0, 0.0), 0.0)],
)
def test_a_grid_that_is_none_is_refused(rows: int, columns: int, fov_deg: tuple[float, float], reach_m: float) -> None:
    with pytest.raises(ValueError, match="got"):
        CollisionSpec("front", rows, columns, fov_deg, reach_m)
