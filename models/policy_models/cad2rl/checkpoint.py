"""ImageNet's weights of torchvision's VGG, key by key.

`vgg16-397923af.pth` and `vgg16_bn-6c64b313.pth` hold plain state dicts with keys `features.N.*` and `classifier.N.*`;
only the features are taken, since the classifier's layers see 7x7 positions at once.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from policy_models.cad2rl.network import CollisionNetwork


class CheckpointMismatch(ValueError):
    """The file does not hold the features of such a network; says which keys are missing or misshapen."""


def load_features(network: CollisionNetwork, path: Path) -> None:
    """Give a network's stages the weights of a torchvision VGG, in place; no code in the file is ever run.

    Args:
        network: With stages as the file has them.
        path: A `.pth` state dict or a `.safetensors` file.

    Raises:
        CheckpointMismatch: It cannot be read, or keys or shapes do not fit; the message lists them.
    """
    raw = _read(path)
    expected = network.features.state_dict()
    found = {key.removeprefix("features."): value for key, value in raw.items() if key.startswith("features.")}
    # Counters of batches are younger than the file.
    missing = sorted(key for key in expected.keys() - found.keys() if not key.endswith("num_batches_tracked"))
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"features.{key} {tuple(found[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(
            f"{path.name} does not fit stages of widths {network.config.widths}:\n  missing: {_listed(missing)}"
            f"\n  unexpected: {_listed(unexpected)}\n  wrong shape: {', '.join(misshapen) or 'nothing'}"
        )
    network.features.load_state_dict({**expected, **found})


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointMismatch(f"there is no file {path}") from error
    except SafetensorError as error:
        raise CheckpointMismatch(f"{path.name} is no safetensors file: {error}") from error
    except Exception as error:  # torch raises many types here, and each means the same to the user
        raise CheckpointMismatch(
            f"{path.name} could not be read as a plain state dict ({error}). Files that need code to load are refused."
        ) from error
    if not isinstance(raw, Mapping) or not all(isinstance(value, Tensor) for value in raw.values()):
        raise CheckpointMismatch(f"{path.name} holds {type(raw).__name__}, expected a state dict of tensors")
    return dict(raw)


def _listed(keys: list[str]) -> str:
    return ", ".join(f"features.{key}" for key in keys) if keys else "nothing"
