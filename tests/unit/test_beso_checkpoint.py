"""Public BESO checkpoints: loaded key by key, safely, and served as upstream's agent acts."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from policy_models.beso.checkpoint import CheckpointMismatch, load_checkpoint, read_hydra_config
from policy_models.normalizer import Statistics
from policy_models.spec import Observation, SamplingOptions
from policy_server.bundle import load_bundle
from policy_server.catalog import load_engine
from policy_server.cli import app
from policy_server.runtime.sampling import drive
from tests.unit.parity import parity_case

# The entries of a public run's .hydra/config.yaml that serving needs, references included.
HYDRA = {
    "agents": {
        "model": {"inner_model": {"n_heads": "${n_heads}"}, "sigma_data": "${sigma_data}"},
        "sampler_type": "ddim",
        "rho": 5.0,
        "sigma_min": 0.1,
        "sigma_max": 1,
        "num_sampling_steps": "${n_timesteps}",
    },
    "workspaces": {"use_minmax_scaler": True},
    "n_heads": 12,
    "sigma_data": 0.5,
    "n_timesteps": 3,
    "scale_data": True,
    "cond_lambda": 2,
}


@pytest.mark.parametrize("prefix", ["", "inner_model.", "model.inner_model.", "module.inner_model."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_known_spelling_of_the_keys_loads(tmp_path: Path, prefix: str, suffix: str) -> None:
    case = parity_case("beso_small")
    weights = {prefix + key.removeprefix("inner_model."): value for key, value in case.all_weights.items()}
    path = tmp_path / f"model_state_dict{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    loaded = load_checkpoint(path, heads=4)
    assert loaded.config == case.config()
    assert loaded.weights.keys() == case.weights.keys()
    for key, value in case.weights.items():
        torch.testing.assert_close(loaded.weights[key], value, rtol=0, atol=0)


def test_the_hidden_layer_of_an_output_head_is_read_from_the_keys(tmp_path: Path) -> None:
    case = parity_case("beso_small_mlphead")
    torch.save(case.all_weights, tmp_path / "model.pth")
    assert load_checkpoint(tmp_path / "model.pth", heads=4).config == case.config()


def test_a_lightning_style_file_loads_too(tmp_path: Path) -> None:
    case = parity_case("beso_small")
    torch.save({"state_dict": dict(case.all_weights), "epoch": 3}, tmp_path / "model.ckpt")
    assert load_checkpoint(tmp_path / "model.ckpt", heads=4).config == case.config()


def test_what_is_missing_unexpected_or_misshapen_is_listed(tmp_path: Path) -> None:
    weights = dict(parity_case("beso_small").all_weights)
    del weights["inner_model.ln_f.bias"]
    weights["inner_model.blocks.0.extra"] = torch.zeros(1)
    weights["inner_model.action_pred.weight"] = torch.zeros(3, 31)
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(tmp_path / "model.pth", heads=4)
    message = str(caught.value)
    assert "missing: inner_model.ln_f.bias" in message
    assert "unexpected: inner_model.blocks.0.extra" in message
    assert "inner_model.action_pred.weight (3, 31), expected (3, 32)" in message


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path) -> None:
    torch.save(dict(parity_case("beso_small").all_weights), tmp_path / "model.pth")
    with pytest.raises(CheckpointMismatch, match="5 heads do not divide"):
        load_checkpoint(tmp_path / "model.pth", heads=5)


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


def test_a_file_with_code_in_it_is_refused_and_the_code_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"inner_model.tok_emb.weight": _Bomb()}))
    with pytest.raises(CheckpointMismatch, match="need code to load are refused"):
        load_checkpoint(tmp_path / "model.pth", heads=4)
    assert not (tmp_path / "bomb-went-off").exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointMismatch, match=r"holds no BESO network.*conv\.weight"):
        load_checkpoint(tmp_path / "model.pth", heads=4)


def test_references_in_a_runs_configuration_are_followed() -> None:
    run = read_hydra_config(HYDRA)
    assert run["heads"] == 12
    assert run["steps"] == 3
    assert run["guidance"] == 2.0
    assert run["minmax"] is True


def test_upstreams_own_names_of_samplers_are_translated() -> None:
    renamed = {**HYDRA, "agents": {**HYDRA["agents"], "sampler_type": "dpmpp_2m_sde"}}
    assert read_hydra_config(renamed)["sampler"] == "dpmpp_sde"


def test_a_configuration_of_something_else_names_what_it_lacks() -> None:
    with pytest.raises(CheckpointMismatch, match=r"agents\.sampler_type"):
        read_hydra_config({"agents": {}})


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as BESO publishes its block-push runs, with random weights, and the statistics that it lacks."""
    case = parity_case("beso_rollout_push_minmax")
    masks = {f"inner_model.blocks.{layer}.attn.mask": torch.tril(torch.ones(12, 12))[None, None] for layer in range(4)}
    folder = tmp_path / "cfg_beso_1"
    (folder / ".hydra").mkdir(parents=True)
    torch.save({**case.weights, **masks}, folder / "model_state_dict.pth")
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(HYDRA))
    statistics = {
        name: Statistics.of(case.arrays[f"{letter}_data"]) for name, letter in (("state", "x"), ("action", "y"))
    }
    (folder / "stats.json").write_text(json.dumps({name: vars(value) for name, value in statistics.items()}))
    return folder


def test_an_imported_bundle_acts_as_upstreams_agent_did(published: Path, tmp_path: Path, monkeypatch) -> None:
    arguments = ["import", "beso", str(published / "model_state_dict.pth"), "--stats", str(published / "stats.json")]
    arguments += ["--schedule", "linear", "--zero-goal", "2,5,6,7,8,9", "-o", str(tmp_path / "push"), "--no-gradients"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    bundle = load_bundle(tmp_path / "push")
    assert (bundle.spec.window, bundle.spec.sampler.guidance, bundle.config.heads) == (5, 2.0, 12)

    case = parity_case("beso_rollout_push_minmax")
    engine = load_engine(bundle, "onnx", 1).engine
    memory = bundle.new_program().begin()
    for step in range(7):
        noise = case.arrays[f"init_noise/{step}"]
        monkeypatch.setattr(np.random, "default_rng", lambda seed, noise=noise: _Taped(noise))
        observation = Observation({}, case.arrays[f"obs/{step}"][0], case.arrays["goal_raw"])
        outcome = drive(bundle.new_program().infer(observation, memory, SamplingOptions(0)), engine)
        memory = outcome.memory
        wanted = case.arrays[f"action/{step}"].reshape(1, -1)
        np.testing.assert_allclose(outcome.actions, wanted, atol=2e-5, rtol=1e-4)


class _Taped:
    def __init__(self, noise: np.ndarray) -> None:
        self.noise = noise

    def standard_normal(self, shape, dtype):
        return self.noise.reshape(shape)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "stats.json").unlink(), "stats.json cannot be read"),
        (lambda folder: (folder / "stats.json").write_text("{}"), "has no entry 'state'"),
        (lambda folder: (folder / ".hydra" / "config.yaml").unlink(), "config.yaml cannot be read"),
        (lambda folder: (folder / ".hydra" / "config.yaml").write_text("agents: {}"), "the configuration has no entry"),
        (lambda folder: (folder / "model_state_dict.pth").write_bytes(b"junk"), "could not be read"),
        (lambda folder: (folder / "model_state_dict.pth").unlink(), "model_state_dict.pth"),
    ],
    ids=["no statistics", "empty statistics", "no run", "another run", "broken weights", "no weights"],
)
def test_an_import_that_cannot_work_says_why_in_one_line(published: Path, tmp_path: Path, spoil, message: str) -> None:
    spoil(published)
    arguments = ["import", "beso", str(published / "model_state_dict.pth"), "--stats", str(published / "stats.json")]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "push")])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "push").exists()
