"""CAD2RL's network: grids of the right size, features from torchvision's keys, a baseline of three choices."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from policy_models.cad2rl.checkpoint import CheckpointMismatch, load_features
from policy_models.cad2rl.config import Cad2rlConfig, small, vgg16
from policy_models.cad2rl.network import CollisionNetwork, LeftRightStraight, make_network

# Where torchvision's vgg16 and vgg16_bn have their convolutions.
VGG16 = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG16_BN = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)


def _images(count: int, px: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, px, px, 3), dtype=torch.uint8)


def _thin(*, batch_norm: bool = False, head: str = "grid") -> Cad2rlConfig:
    """VGG16's stages with few channels."""
    return Cad2rlConfig(
        33,
        5,
        5,
        (2, 2, 3, 4, 4),
        (2, 2, 3, 3, 3),
        8,
        4,
        2,
        batch_norm=batch_norm,
        head=head,  # type: ignore[arg-type]
    )


def test_vgg16_at_stride_8_sees_as_many_positions_as_it_has_directions():
    config = vgg16()
    assert config.features == config.rows == config.columns == 41
    with torch.device("meta"):
        network = make_network(config)
        assert network.features(torch.empty(1, 3, 321, 321)).shape == (1, 512, 41, 41)
        assert network.logits(torch.empty(1, 321, 321, 3)).shape == (1, 41, 41)


def test_the_convolutions_of_vgg16_have_the_keys_and_shapes_that_torchvision_gives_them():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in make_network(vgg16()).features.state_dict().items()}
    assert {int(key.split(".")[0]) for key in shapes} == set(VGG16)
    assert shapes["0.weight"] == (64, 3, 3, 3) and shapes["28.weight"] == (512, 512, 3, 3)
    normalised = make_network(_thin(batch_norm=True)).features.state_dict()
    assert {int(k.split(".")[0]) for k, v in normalised.items() if v.ndim == 4} == set(VGG16_BN)


def test_the_last_stage_of_vgg16_is_dilated_in_place_of_pooling():
    convolutions = [m for m in make_network(_thin()).features if isinstance(m, torch.nn.Conv2d)]
    assert [m.dilation[0] for m in convolutions] == [1] * 10 + [2] * 3


def test_the_small_network_takes_less_than_two_million_bytes():
    network = make_network(small())
    assert sum(tensor.nbytes for tensor in network.state_dict().values()) < 2e6
    assert network.eval()(_images(2, 64)).shape == (2, 9, 13)


def test_a_direction_is_judged_by_what_lies_there():
    torch.manual_seed(0)
    network = make_network(small()).eval()
    image = _images(1, 64)
    changed = image.clone()
    changed[:, 24:40, 4:12] = 0
    moved = (network.logits(changed) - network.logits(image)).abs()[0]
    assert moved[:, :4].mean() > 1.5 * moved[:, 9:].mean()


def test_probabilities_are_those_of_the_logits():
    network = make_network(_thin()).eval()
    images = _images(3, 33)
    torch.testing.assert_close(network(images), network.logits(images).sigmoid())


@pytest.mark.parametrize("choice", [0, 1, 2])
def test_the_baseline_of_three_choices_spares_the_middle_of_the_third_that_it_chooses(choice, monkeypatch):
    network = make_network(small(head="left-right-straight"))
    assert isinstance(network, LeftRightStraight)
    logits = torch.eye(3)[None, choice] * 4
    monkeypatch.setattr(network, "choices", lambda image: logits)
    grid = network(_images(1, 64))[0]
    assert grid.shape == (9, 13)
    assert grid[4].argmin() in ([0, 1, 2], [6], [10, 11, 12])[choice]
    torch.testing.assert_close(grid.min(), 1 - logits.softmax(-1)[0, choice])


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_features_load_key_by_key_and_the_classifier_is_left_alone(tmp_path: Path, batch_norm: bool, suffix: str):
    network, other = (make_network(_thin(batch_norm=batch_norm)) for _ in range(2))
    raw = {f"features.{k}": v for k, v in other.features.state_dict().items() if not k.endswith("tracked")}
    raw["classifier.0.weight"] = torch.zeros(2, 2)
    path, before = tmp_path / f"vgg{suffix}", network.score.weight.clone()
    save_file(raw, path) if suffix == ".safetensors" else torch.save(raw, path)
    load_features(network, path)
    for key, value in other.features.state_dict().items():
        torch.testing.assert_close(network.features.state_dict()[key], value)
    torch.testing.assert_close(network.score.weight, before)


def _features(network: CollisionNetwork) -> dict[str, torch.Tensor]:
    return {f"features.{key}": value for key, value in network.features.state_dict().items()}


def test_features_that_do_not_fit_are_named(tmp_path: Path):
    network, path = make_network(_thin()), tmp_path / "vgg.safetensors"
    raw = _features(network)
    raw["features.31.weight"] = raw.pop("features.28.weight")
    raw["features.0.weight"] = torch.zeros(5, 3, 3, 3)
    save_file(raw, path)
    with pytest.raises(CheckpointMismatch) as caught:
        load_features(network, path)
    text = str(caught.value)
    assert "missing: features.28.weight" in text and "unexpected: features.31.weight" in text
    assert "features.0.weight (5, 3, 3, 3), expected (2, 3, 3, 3)" in text


def test_a_file_with_code_in_it_is_refused(tmp_path: Path):
    path = tmp_path / "vgg.pth"
    path.write_bytes(pickle.dumps({"features.0.weight": print}))
    with pytest.raises(CheckpointMismatch, match="could not be read as a plain state dict"):
        load_features(make_network(_thin()), path)


def test_a_missing_or_broken_file_is_named(tmp_path: Path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointMismatch, match=r"broken\.safetensors is no safetensors file"):
        load_features(make_network(_thin()), tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointMismatch, match="there is no file"):
        load_features(make_network(_thin()), tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 3}, "cannot have a stride of 3"),
        ({"stride": 64}, "cannot have a stride of 64"),
        ({"depths": (1, 1)}, "each stage needs a width and a depth"),
        ({"columns": 2, "head": "left-right-straight"}, "need 3 columns, got 2"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes, message):
    base = {"image": 16, "rows": 3, "columns": 5, "widths": (4, 4, 4), "depths": (1, 1, 1), "stride": 4}
    with pytest.raises(ValueError, match=message):
        Cad2rlConfig(**{**base, "wide": 4, "wide_dilation": 2, **changes})


def test_brightness_arrives_as_imagenet_has_it(monkeypatch):
    network = make_network(_thin())
    seen = []
    monkeypatch.setattr(network.features, "forward", lambda x: seen.append(x) or torch.zeros(1, 4, 5, 5))
    network.logits(torch.full((1, 33, 33, 3), 255, dtype=torch.uint8))
    np.testing.assert_allclose(seen[0][0, :, 0, 0], (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], 1e-5)
