"""Makes a bundle that keeps a robot where it is: for wiring up cameras and joints before a policy exists."""

from collections.abc import Sequence
from pathlib import Path

from policy_models.spec import PolicySpec, VectorSpec
from policy_server.bundle import FORMAT, Bundle, Manifest
from policy_server.errors import BundleInvalid
from policy_server.export.bundle import write_bundle
from policy_server.export.cameras import read_camera


def make_hold_bundle(
    output: Path, *, joints: Sequence[str], unit: str, cameras: Sequence[str], horizon: int, step_s: float
) -> Bundle:
    """Write a bundle whose every action repeats the state.

    Args:
        output: The folder to make; its name is the policy's.
        joints: What the state and the action hold.
        unit: Unit of every joint.
        cameras: As "name:WIDTHxHEIGHT"; images of another size are resized.
        horizon: Actions in a chunk.
        step_s: Time between them.

    Raises:
        BundleInvalid: A camera is not described like that, or the folder is taken.
    """
    try:
        vector = VectorSpec(tuple(joints), (unit,) * len(joints))
        seen = tuple(read_camera(text, "area") for text in cameras)
        spec = PolicySpec(action=vector, state=vector, horizon=horizon, step_s=step_s, cameras=seen)
    except ValueError as error:
        raise BundleInvalid(str(error)) from error
    manifest = Manifest(
        format=FORMAT,
        name=output.name,
        family="hold",
        version="1",
        description="Keeps a robot where it is: every action repeats the state. For wiring up and for measuring.",
        licence="Apache-2.0",
        spec=spec,
        tolerance={"f32": 0.0},
    )
    return write_bundle(output, manifest)
