"""Reads cameras as people write them on a command line."""

import re
from typing import Any

from policy_models.spec import CameraSpec, ResizeRule
from policy_server.errors import BundleInvalid


def read_camera(text: str, resize: ResizeRule) -> CameraSpec:
    """Return the camera that `text` describes: name:WIDTHxHEIGHT, or name:WIDTHxHEIGHT:rule instead of `resize`.

    Raises:
        BundleInvalid: It is written otherwise, or has no pixels.
    """
    found = re.fullmatch(r"([\w/.-]+):(\d+)x(\d+)(?::(refuse|area|linear))?", text)
    if not found:
        raise BundleInvalid(
            f"camera {text!r}, expected name:WIDTHxHEIGHT, such as top:224x224, and if needed :refuse, :area or :linear"
        )
    rule: Any = found[4] or resize
    try:
        return CameraSpec(found[1], height=int(found[3]), width=int(found[2]), resize=rule)
    except ValueError as error:
        raise BundleInvalid(str(error)) from error
