"""`policy-server import mode`: from a published checkpoint to a bundle that every engine serves."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from policy_models.spec import Observation, SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.catalog import load_engine
from policy_server.cli import app
from policy_server.runtime.sampling import drive
from tests.unit.mode_files import SMALL, drawn, small_keys, with_encoder, write


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as MoDE publishes its policies, small, and a vocabulary of CLIP's size with merges of our own."""
    folder = tmp_path_factory.mktemp("published") / "MoDE_CALVIN_ABC_1"
    folder.mkdir()
    write(folder, drawn(small_keys()))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [f"{left} {right}" for left in letters for right in letters][: 49152 - 256 - 2]
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def command(published: Path, output: Path, *more: str) -> list[str]:
    vocabulary = published / "bpe_simple_vocab_16e6.txt.gz"
    return [
        "import",
        "mode",
        str(published),
        "--vocabulary",
        str(vocabulary),
        "-o",
        str(output),
        "--no-gradients",
        *more,
    ]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, published: Path) -> Bundle:
    output = tmp_path_factory.mktemp("bundles") / "mode-calvin"
    done = CliRunner().invoke(app, command(published, output))
    assert done.exit_code == 0, done.output
    return load_bundle(output)


@pytest.mark.slow
def test_an_imported_bundle_says_what_the_robot_must_send(imported: Bundle) -> None:
    spec = imported.spec
    assert [(c.name, c.width, c.height, c.resize) for c in spec.cameras] == [
        ("rgb_static", 224, 224, "linear"),
        ("rgb_gripper", 224, 224, "linear"),
    ]
    assert spec.goal.kind == "text"
    assert spec.action.names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert (spec.horizon, spec.step_s, spec.state) == (10, pytest.approx(1 / 30), None)
    assert (spec.sampler.sampler, spec.sampler.schedule, spec.sampler.steps) == ("ddim", "exponential", 10)
    assert (spec.sampler.sigma_min, spec.sampler.sigma_max) == (0.001, 80.0)
    assert imported.config == SMALL


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino", "torch"])
def test_an_imported_bundle_is_accepted_and_follows_instructions(imported: Bundle, engine: str) -> None:
    done = CliRunner().invoke(app, ["check", str(imported.path), "--engine", engine])
    assert done.exit_code == 0, done.output
    assert "golden drift" in done.output

    rng = np.random.default_rng(0)
    images = {camera.name: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for camera in imported.spec.cameras}
    runner, program = load_engine(imported, engine, 1).engine, imported.new_program()
    chunks = [
        drive(program.infer(Observation(images, None, text), program.begin(), SamplingOptions(0)), runner).actions
        for text in ("open the drawer", "turn on the light", "open the drawer")
    ]
    assert chunks[0].shape == (10, 7)
    np.testing.assert_array_equal(chunks[0], chunks[2])
    assert np.abs(chunks[0] - chunks[1]).max() > 1e-3


@pytest.mark.slow
def test_options_reach_the_bundle(tmp_path: Path) -> None:
    write(tmp_path, drawn(with_encoder("resnet18")))
    cameras = ("--benchmark", "libero", "--camera", "top:64x48", "--camera", "wrist:32x32:area")
    options = ("--goal", "image", "--steps", "5", "--sigma-min", "1.0", "--top-k", "1", "--no-noise-token")
    # Gradients are exported by the tests of what they are worth.
    arguments = ["import", "mode", str(tmp_path), "-o", str(tmp_path / "images"), *cameras, *options, "--no-gradients"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    bundle = load_bundle(tmp_path / "images")
    assert [(c.name, c.width, c.height, c.resize) for c in bundle.spec.cameras] == [
        ("top", 64, 48, "linear"),
        ("wrist", 32, 32, "area"),
    ]
    assert bundle.spec.goal.camera is not None and bundle.spec.goal.camera.width == 224
    assert (bundle.spec.sampler.steps, bundle.spec.sampler.sigma_min, bundle.spec.step_s) == (5, 1.0, 0.05)
    assert (bundle.config.transformer.top_k, bundle.config.transformer.noise_token) == (1, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--camera", "top:64x64"), "sees through 2 cameras"),
        (("--camera", "top:64x64", "--camera", "top:64x64"), "two cameras share the name 'top'"),
        (("--camera", "top", "--camera", "wrist"), "expected name:WIDTHxHEIGHT"),
        (("--camera", "top:0x64", "--camera", "wrist:1x1"), "cannot have 0x64 pixels"),
        (("--benchmark", "kitchen"), "there are: calvin, libero"),
        (("--sigma-min", "100"), "at most 80.0"),
        (("--top-k", "5"), "cannot choose 5 of 4 experts"),
        (("--vocabulary", "nowhere.gz"), "nowhere.gz cannot be read"),
    ],
)
def test_an_import_that_cannot_work_says_why_in_one_line(
    tmp_path: Path, published: Path, options: tuple[str, ...], message: str
) -> None:
    done = CliRunner().invoke(app, command(published, tmp_path / "mode", *options))
    assert done.exit_code == 2
    assert message in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "mode").exists()


def test_an_import_of_instructions_needs_the_vocabulary(tmp_path: Path, published: Path) -> None:
    done = CliRunner().invoke(app, ["import", "mode", str(published), "-o", str(tmp_path / "mode")])
    assert done.exit_code == 2
    assert "bpe_simple_vocab_16e6.txt.gz of openai/CLIP" in done.output


def test_an_import_of_nothing_says_so(tmp_path: Path, published: Path) -> None:
    lost = command(published, tmp_path / "mode")
    lost[2] = str(tmp_path / "lost.safetensors")
    done = CliRunner().invoke(app, lost)
    assert done.exit_code == 2
    assert "lost.safetensors" in done.output
    assert "Traceback" not in done.output
