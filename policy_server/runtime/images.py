"""Images as robots send them: raw arrays, or JPEG and PNG bytes."""

import os

# Read by OpenCV when it is first loaded: a small file must not unfold into gigabytes.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 24))

import cv2
import numpy as np

from policy_models.spec import CameraSpec
from policy_server.errors import ShapeMismatch, UndecodableImage, WrongType

_MAGIC = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n"}
_RESAMPLING = {"area": cv2.INTER_AREA, "linear": cv2.INTER_LINEAR}


def read_image(camera: CameraSpec, value: object) -> np.ndarray:
    """Return the image that a camera's network takes, (height, width, 3) uint8 RGB.

    Args:
        camera: What the image must be.
        value: Encoded JPEG or PNG bytes; or an uint8 array (height, width, 3), or (3, height, width) as openpi's ALOHA
            clients send it.

    Raises:
        UndecodableImage: The bytes are no JPEG or PNG, or a broken or oversized one.
        WrongType: Neither bytes nor an uint8 array.
        ShapeMismatch: Another size, and the spec's resize rule is "refuse"; or no RGB image at all.
    """
    image = decode_image(camera.name, value) if isinstance(value, bytes) else check_rgb(camera.name, value)
    if camera.crop < 1:
        image = _centre(image, camera.crop)
    if image.shape[:2] == (camera.height, camera.width):
        return image
    if camera.resize == "refuse":
        raise ShapeMismatch(camera.name, image.shape, f"({camera.height}, {camera.width}, 3)")
    return cv2.resize(image, (camera.width, camera.height), interpolation=_RESAMPLING[camera.resize])


def decode_image(name: str, data: bytes) -> np.ndarray:
    """Decode JPEG or PNG bytes to (height, width, 3) uint8 RGB; raises UndecodableImage."""
    if not data.startswith(tuple(_MAGIC.values())):
        raise UndecodableImage(name, f"it starts with {data[:4]!r}, expected JPEG or PNG bytes")
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise UndecodableImage(name, error.err or "OpenCV cannot decode it") from error
    if image is None:
        raise UndecodableImage(name, f"its {len(data)} bytes are broken or cut off")
    return image


def check_rgb(name: str, value: object) -> np.ndarray:
    """Return a raw image as (height, width, 3) uint8; raises WrongType or ShapeMismatch if it is none."""
    if not isinstance(value, np.ndarray):
        raise WrongType(name, type(value).__name__, "a uint8 array, or JPEG or PNG bytes")
    if value.dtype != np.uint8:
        raise WrongType(name, f"an array of {value.dtype}", "uint8")
    if value.ndim == 3 and value.shape[0] == 3 and value.shape[2] != 3:
        value = np.ascontiguousarray(value.transpose(1, 2, 0))
    if value.ndim != 3 or value.shape[2] != 3 or 0 in value.shape:
        raise ShapeMismatch(name, value.shape, "(height, width, 3)")
    return value


def _centre(image: np.ndarray, fraction: float) -> np.ndarray:
    height, width = (max(1, round(fraction * size)) for size in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])
