"""What robots send against what the spec wants; the doors are tested in tests/service."""

import cv2
import numpy as np
import pytest

from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, VectorSpec
from policy_server.errors import (
    MissingInput,
    NotFinite,
    ShapeMismatch,
    UndecodableImage,
    UnexpectedInput,
    WrongType,
)
from policy_server.runtime.observation import ObservationReader

JOINTS = VectorSpec(("a", "b"), ("rad", "rad"))
SPEC = PolicySpec(
    action=JOINTS,
    state=JOINTS,
    goal=GoalSpec("state", length=1, required=False),
    cameras=(CameraSpec("top", 8, 6), CameraSpec("wrist", 4, 4, "area")),
    horizon=2,
    step_s=0.1,
)
TOP = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
WRIST = np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)
GOOD = {"state": np.float32([1, 2]), "top": TOP, "wrist": WRIST}


def _read(**changes):
    return ObservationReader(SPEC).read({**GOOD, **changes})


@pytest.mark.parametrize(
    "raw",
    [
        GOOD,
        {"observation/state": [1, 2], "observation/top": TOP, "observation/wrist": WRIST},
        {"observation.state": [1.0, 2.0], "observation.images.top": TOP, "observation.images.wrist": WRIST},
        {"state": (1, 2), "images": {"top": TOP, "wrist": WRIST}, "prompt": "go"},
        {"observation": {"state": np.int64([1, 2]), "images": {"top": TOP, "wrist": WRIST}}},
    ],
    ids=["flat", "openpi", "lerobot", "aloha", "nested"],
)
def test_the_fields_spellings_of_an_observation_mean_the_same(raw) -> None:
    observation = ObservationReader(SPEC).read(raw)
    np.testing.assert_array_equal(observation.state, np.float32([1, 2]))
    np.testing.assert_array_equal(observation.images["top"], TOP)
    assert observation.images["wrist"].shape == (4, 4, 3)
    assert observation.goal is None


def test_channels_may_come_first() -> None:
    np.testing.assert_array_equal(_read(top=TOP.transpose(2, 0, 1)).images["top"], TOP)


def test_a_png_arrives_as_the_array_it_was_made_of() -> None:
    encoded = cv2.imencode(".png", cv2.cvtColor(TOP, cv2.COLOR_RGB2BGR))[1].tobytes()
    np.testing.assert_array_equal(_read(top=encoded).images["top"], TOP)


def test_resizing_follows_the_rule_of_the_spec() -> None:
    np.testing.assert_array_equal(_read().images["wrist"], cv2.resize(WRIST, (4, 4), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("goal", [[3, 4], [[3, 4]], np.float64([3, 4])])
def test_a_single_goal_may_come_without_its_axis(goal) -> None:
    np.testing.assert_array_equal(_read(goal=goal).goal, np.float32([[3, 4]]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": [1, 2, 3]}, ShapeMismatch, r"'state' has shape \(3,\), expected \(2,\) \(a, b\)"),
        ({"state": [[1, 2]]}, ShapeMismatch, r"\(1, 2\)"),
        ({"state": []}, ShapeMismatch, r"\(0,\)"),
        ({"state": [1, np.nan]}, NotFinite, "'state' holds nan at index 1"),
        ({"state": [np.inf, 1]}, NotFinite, "'state' holds inf at index 0"),
        ({"state": np.float64([1e300, 1])}, NotFinite, r"'state' holds 1e\+300 at index 0"),
        ({"state": [True, False]}, WrongType, "a list with bool in it"),
        ({"state": ["1", "2"]}, WrongType, "a list with str in it, expected an array of numbers"),
        ({"state": [0, "a" * 10**7]}, WrongType, "a list with str in it"),
        ({"state": [0] * 10**6}, ShapeMismatch, r"shape \(1000000,\), expected \(2,\)"),
        ({"goal": [[0] * 10**6]}, WrongType, "rows longer than 2"),
        ({"state": [1, [2]]}, WrongType, "a ragged list"),
        ({"state": [10**400, 1]}, WrongType, "'state'"),
        ({"state": 1.0}, WrongType, "'state' is float"),
        ({"state": None}, WrongType, "'state' is NoneType"),
        ({"goal": [[1, 2], [3, 4]]}, ShapeMismatch, r"'goal' has shape \(2, 2\)"),
        ({"gaol": [1, 2]}, UnexpectedInput, "'gaol' is not an input of this policy; it takes 'top', 'wrist', 'state'"),
        ({"observation/state": [1, 2]}, UnexpectedInput, "a second 'state'"),
        ({3: 4}, WrongType, "a key of type int"),
        ({"top": TOP[:7]}, ShapeMismatch, r"'top' has shape \(7, 6, 3\), expected \(8, 6, 3\)"),
        ({"top": TOP[..., :2]}, ShapeMismatch, r"'top' has shape \(8, 6, 2\)"),
        ({"top": TOP.astype(np.float32)}, WrongType, "an array of float32, expected uint8"),
        ({"top": "image"}, WrongType, "'top' is str"),
        ({"wrist": WRIST[:0]}, ShapeMismatch, r"'wrist' has shape \(0, 9, 3\)"),
        ({"top": b"GIF89a"}, UndecodableImage, "expected JPEG or PNG bytes"),
        ({"top": b"\xff\xd8\xff" + bytes(100)}, UndecodableImage, "'top' is not a usable image"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_got_and_wanted(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        ObservationReader(SPEC).read({**GOOD, **changes})


def test_a_missing_input_is_named_beside_what_came() -> None:
    with pytest.raises(MissingInput, match=r"'wrist' is missing; got 'state', 'top'"):
        ObservationReader(SPEC).read({"state": [1, 2], "top": TOP})


def test_unknown_inputs_are_ignored_where_the_operator_says_so() -> None:
    ObservationReader(SPEC, ignore_unknown=True).read({**GOOD, "third_camera": TOP})


@pytest.mark.parametrize("goal", [{}, {"goal": None}])
def test_a_goal_that_the_policy_needs_may_be_neither_left_out_nor_null(goal) -> None:
    needy = PolicySpec(action=JOINTS, state=JOINTS, goal=GoalSpec("state"), horizon=2, step_s=0.1)
    with pytest.raises(MissingInput, match="'goal' is missing; got 'state'"):
        ObservationReader(needy).read({"state": [1, 2], **goal})


def test_an_image_goal_is_checked_as_a_camera_is() -> None:
    spec = PolicySpec(
        action=JOINTS,
        state=JOINTS,
        goal=GoalSpec("image", camera=CameraSpec("goal", *TOP.shape[:2])),
        horizon=2,
        step_s=0.1,
    )
    reader = ObservationReader(spec)
    np.testing.assert_array_equal(reader.read({"state": [1, 2], "goal": TOP}).goal, TOP)
    with pytest.raises(WrongType, match="'goal' is an array of float32, expected uint8"):
        reader.read({"state": [1, 2], "goal": TOP.astype(np.float32)})
