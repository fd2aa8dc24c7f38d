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
    UnusableGoal,
    WrongType,
)
from policy_server.runtime.observation import ObservationReader, describe_inputs

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


PICTURE = np.random.default_rng(2).integers(0, 256, (20, 31, 3), dtype=np.uint8)


def _seeing(camera: CameraSpec) -> ObservationReader:
    return ObservationReader(PolicySpec(action=JOINTS, cameras=(camera,), horizon=2, step_s=0.1))


@pytest.mark.parametrize(
    "image",
    [PICTURE, PICTURE.transpose(2, 0, 1), cv2.imencode(".png", cv2.cvtColor(PICTURE, cv2.COLOR_RGB2BGR))[1].tobytes()],
    ids=["raw", "channels first", "PNG"],
)
def test_a_crop_keeps_the_centre_of_what_the_camera_sent_and_resizes_that(image) -> None:
    reader = _seeing(CameraSpec("top", 8, 6, "area", crop=0.8))
    centre = PICTURE[2:18, 3:28]  # 16 of 20 rows, 25 of 31 columns
    wanted = cv2.resize(centre, (6, 8), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(reader.read({"top": image}).images["top"], wanted)


def test_a_crop_also_cuts_an_image_that_has_the_size_of_the_spec_already() -> None:
    reader = _seeing(CameraSpec("top", 20, 31, "linear", crop=0.5))
    wanted = cv2.resize(PICTURE[5:15, 7:23], (31, 20), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(reader.read({"top": PICTURE}).images["top"], wanted)
    assert reader.takes_long({"top": PICTURE})


def test_a_crop_of_the_size_of_the_spec_is_not_resized() -> None:
    reader = _seeing(CameraSpec("top", 10, 16, "area", crop=0.5))
    np.testing.assert_array_equal(reader.read({"top": PICTURE}).images["top"], PICTURE[5:15, 7:23])


def test_a_crop_leaves_at_least_one_pixel() -> None:
    reader = _seeing(CameraSpec("top", 2, 2, "area", crop=0.01))
    np.testing.assert_array_equal(reader.read({"top": PICTURE}).images["top"], np.full((2, 2, 3), PICTURE[9, 15]))


def _told(prompt, longest: int = 12):
    spec = PolicySpec(action=JOINTS, goal=GoalSpec("text", longest=longest), horizon=2, step_s=0.1)
    return ObservationReader(spec).read({"prompt": prompt}).goal


@pytest.mark.parametrize("prompt", ["open", " open\n", "o" * 12, "öffne 🤖", np.array("open"), np.str_("open")])
def test_an_instruction_is_read_as_it_was_written(prompt) -> None:
    goal = _told(prompt)
    assert goal == str(prompt)
    assert isinstance(goal, str)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("o" * 13, UnusableGoal, "'prompt' has 13 characters, an instruction has at most 12"),
        (" " * 13, UnusableGoal, "'prompt' has 13 characters"),
        (np.array("o" * 13), UnusableGoal, "'prompt' has 13 characters"),
        ("", WrongType, "'prompt' is '', expected an instruction"),
        (" \t\u2003", WrongType, "'prompt' is ' .*', expected an instruction"),
        (np.array(" "), WrongType, "'prompt' is ' ', expected an instruction"),
        ("a \ud800 b", WrongType, r"'prompt' is text with half a letter, '\\ud800'"),
        (b"open", WrongType, "'prompt' is bytes"),
        (["open"], WrongType, "'prompt' is list"),
        (np.array(["open"]), WrongType, "'prompt' is ndarray"),
        (np.array(3.0), WrongType, "'prompt' is ndarray"),
        (True, WrongType, "'prompt' is bool"),
        (None, MissingInput, "'prompt' is missing; got nothing"),
    ],
)
def test_what_is_no_instruction_is_refused(prompt, error, message) -> None:
    with pytest.raises(error, match=message):
        _told(prompt)


def test_the_longest_instruction_is_measured_in_characters_and_is_a_thousand_unless_the_spec_says_otherwise() -> None:
    longest = GoalSpec("text").longest
    assert _told("🤖" * longest, longest) == "🤖" * 1000


def _shown(camera: CameraSpec) -> ObservationReader:
    spec = PolicySpec(
        action=JOINTS,
        cameras=(CameraSpec("top", *TOP.shape[:2]),),
        goal=GoalSpec("image", camera=camera),
        horizon=2,
        step_s=0.1,
    )
    return ObservationReader(spec)


def test_an_image_goal_is_cropped_and_resized_as_its_own_camera_says() -> None:
    goal = _shown(CameraSpec("goal", 8, 6, "area", crop=0.8)).read({"top": TOP, "goal": PICTURE}).goal
    np.testing.assert_array_equal(goal, cv2.resize(PICTURE[2:18, 3:28], (6, 8), interpolation=cv2.INTER_AREA))


def test_an_image_goal_is_called_goal_whatever_its_camera_is_called() -> None:
    reader = _shown(CameraSpec("final", 8, 6))
    np.testing.assert_array_equal(reader.read({"top": TOP, "goal": TOP}).goal, TOP)
    with pytest.raises(UnexpectedInput, match="'final' is not an input of this policy; it takes 'top', 'goal'"):
        reader.read({"top": TOP, "final": TOP})


@pytest.mark.parametrize(
    ("goal", "error", "message"),
    [
        (None, MissingInput, "'goal' is missing; got 'top'"),
        (PICTURE, ShapeMismatch, r"'goal' has shape \(20, 31, 3\), expected \(8, 6, 3\)"),
        (TOP[None], ShapeMismatch, r"'goal' has shape \(1, 8, 6, 3\)"),
        ("open", WrongType, "'goal' is str"),
        ([1.0, 2.0], WrongType, "'goal' is list"),
        (b"", UndecodableImage, "'goal' is not a usable image"),
    ],
)
@pytest.mark.parametrize("name", ["goal", "final"])
def test_an_image_goal_is_refused_by_the_name_that_the_robot_gave_it(goal, error, message, name) -> None:
    with pytest.raises(error, match=message):
        _shown(CameraSpec(name, 8, 6)).read({"top": TOP, "goal": goal})


def test_inputs_are_described_with_what_becomes_of_their_size() -> None:
    cameras = (CameraSpec("top", 8, 6), CameraSpec("wrist", 4, 4, "area"), CameraSpec("side", 4, 4, "linear", crop=0.9))
    said = describe_inputs(
        PolicySpec(action=JOINTS, cameras=cameras, goal=GoalSpec("text", examples=("go",)), horizon=2, step_s=0.1)
    )
    assert said == {
        "top": "uint8 (8, 6, 3) RGB, raw or JPEG or PNG",
        "wrist": "uint8 RGB of any size, raw or JPEG or PNG; it is resized to (4, 4, 3)",
        "side": "uint8 RGB of any size, raw or JPEG or PNG; its centre, 90% of each side, is resized to (4, 4, 3)",
        "prompt": "an instruction of at most 1000 characters, such as 'go'",
    }
