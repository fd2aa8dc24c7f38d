"""The model repository, as a Triton server and clients of KServe v2 see it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from policy_models.spec import SamplingOptions
from policy_server.bundle import Bundle, digest, load_bundle
from policy_server.engine.base import ENGINES
from policy_server.errors import BundleInvalid, StartupError
from policy_server.export.plans import FORMAT, Batch, BuildOptions, Machine, Plans, plan_path, write_plans
from policy_server.export.triton_config import TARGETS, entry_config, layout_of, to_text
from policy_server.golden import GoldenCase
from policy_server.runtime.sampling import drive
from tests.conftest import REPOSITORY, ZOO
from tests.service.robot import STATE, TINY
from tests.service.triton import RunningTriton, export, running_triton, successor, tensor


def _ask(triton: RunningTriton, model: str, *inputs, **parameters):
    return triton.client.infer(model, list(inputs), parameters=parameters or None)


def test_a_client_of_kserve_gets_a_chunk_for_every_row(triton: RunningTriton, tiny_bundle: Bundle) -> None:
    states, goals = np.stack([STATE, -STATE, 2 * STATE]), np.stack([TINY["goal"]] * 3)[:, None]
    reply = _ask(triton, "tiny", tensor("state", states), tensor("goal", goals), seed=7, steps=4)
    assert reply.as_numpy("actions").shape == (3, 4, 2)
    assert [row[0].decode() for row in reply.as_numpy("bundle")] == [tiny_bundle.digest] * 3
    program, engine = tiny_bundle.new_program(), ENGINES["onnx"].make(tiny_bundle, 1)
    for row in range(3):
        observation = replace(
            GoldenCase(tiny_bundle.path / "golden.npz").observation(), state=states[row], goal=goals[row]
        )
        options = SamplingOptions(7 + row, steps=4)
        wanted = drive(program.infer(observation, program.begin(), options), engine).actions
        np.testing.assert_allclose(reply.as_numpy("actions")[row], wanted, atol=1e-5)


def test_what_a_policy_remembers_travels_with_the_request(triton: RunningTriton) -> None:
    def turn(state, memory):
        inputs = [tensor("state", state[None]), tensor("goal", TINY["goal"][None, None])]
        inputs += [tensor(name, a, "INT32" if a.dtype == np.int32 else "FP32") for name, a in memory.items()]
        reply = _ask(triton, "tiny-step", *inputs, seed=1)
        names = ("memory_states", "memory_actions", "memory_count")
        return reply.as_numpy("actions"), {name: reply.as_numpy(name) for name in names}

    first, memory = turn(STATE, {})
    assert memory["memory_count"] == 1
    second, memory = turn(-STATE, memory)
    assert memory["memory_count"] == 2
    assert not np.array_equal(second, turn(-STATE, {})[0])
    np.testing.assert_array_equal(first, turn(STATE, {})[0])


def test_an_instruction_and_images_go_in_as_they_are(triton: RunningTriton) -> None:
    case = GoldenCase(ZOO / "meta-world" / "golden.npz")
    observation = case.observation()
    words = np.array([[str(observation.goal).encode()]], dtype=object)
    images = [tensor(f"image_{name}", image[None], "UINT8") for name, image in observation.images.items()]
    reply = _ask(triton, "meta-world", *images, tensor("prompt", words, "BYTES"), seed=case.seed)
    np.testing.assert_allclose(reply.as_numpy("actions")[0], case.actions, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({"state": STATE}, {"steps": 500}, "invalid_option: .*options.steps"),
        ({"state": STATE}, {"spets": 5}, "invalid_option: .*options.spets"),
        ({"state": STATE * np.nan}, {}, "not_finite: 'state' holds nan"),
        ({"state": STATE[:3]}, {}, "unexpected shape for input 'state'"),
        ({}, {}, "expected .* inputs|got no input|state"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(triton: RunningTriton, inputs, parameters, message: str) -> None:
    with pytest.raises(InferenceServerException, match=message):
        _ask(triton, "tiny", *(tensor(name, a[None]) for name, a in inputs.items()), **parameters)
    assert _ask(triton, "tiny", tensor("state", STATE[None])).as_numpy("actions").shape == (1, 4, 2)


def test_a_single_graph_can_be_asked(triton: RunningTriton, tiny_step_bundle: Bundle) -> None:
    draw = np.random.default_rng(0)
    inputs = {
        "noisy": draw.standard_normal((2, 3, 2), np.float32),
        "sigma": np.float32([[0.5], [0.1]]),
        "states": draw.standard_normal((2, 3, 4), np.float32),
        "goal": draw.standard_normal((2, 1, 4), np.float32),
    }
    reply = _ask(triton, "tiny-step@denoise", *(tensor(name, a) for name, a in inputs.items()))
    engine = ENGINES["onnx"].make(tiny_step_bundle, 1)
    wanted = engine.run("denoise", {**inputs, "sigma": inputs["sigma"][:, 0]})["denoised"]
    np.testing.assert_allclose(reply.as_numpy("denoised"), wanted, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_is_one_that_the_server_can_read(
    target: str, tmp_path: Path, tiny_mode_bundle: Bundle
) -> None:
    """The wheel has no backend but Python's: for the others, the server gets as far as looking for theirs."""
    plans = _plans_without_content(tiny_mode_bundle, tmp_path / "plans") if target == "tensorrt" else None
    export(tiny_mode_bundle, tmp_path / "repository", target, apart=True, max_batch=2, plans=plans)
    models = [tiny_mode_bundle.name, *(f"{tiny_mode_bundle.name}@{graph}" for graph in tiny_mode_bundle.graphs())]
    with running_triton(tmp_path / "repository") as triton:
        for model in models[1:]:
            if TARGETS[target].is_gpu:
                with pytest.raises(InferenceServerException, match="unable to find backend library"):
                    triton.client.load_model(model)
            else:
                triton.client.load_model(model)
        if not TARGETS[target].is_gpu:
            triton.client.load_model(models[0])
            assert all(triton.client.is_model_ready(model) for model in models)


def _plans_without_content(bundle: Bundle, folder: Path) -> Path:
    """Write files where plans would be: nothing reads further than their names before there is a backend for them."""
    (folder / bundle.name).mkdir(parents=True)
    graphs = bundle.graphs()
    for graph in graphs:
        plan_path(folder / bundle.name, graph).write_bytes(b"no plan")
    sha256 = {graph: digest(plan_path(folder / bundle.name, graph)) for graph in graphs}
    options, machine = BuildOptions("f16", Batch(1, 1, 4)), Machine("10.13", "none", "0.0")
    write_plans(folder / bundle.name, Plans(FORMAT, bundle.name, bundle.digest, options, 1e-3, machine, sha256))
    return folder


def test_the_repository_that_is_checked_in_is_the_one_that_is_exported() -> None:
    for path in sorted(ZOO.iterdir()):
        bundle = load_bundle(path)
        layout = layout_of(bundle, "onnx", plans=None, apart=False, max_batch=16, instances=1, threads=1)
        wanted = to_text(entry_config(bundle, layout, {}))
        assert (REPOSITORY / "triton_repo" / bundle.name / "config.pbtxt").read_text() == wanted, "make serve-triton"


def test_versions_lie_beside_each_other(tiny_bundle: Bundle, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    export(tiny_bundle, repository)
    export(successor(tiny_bundle, tmp_path / "tiny"), repository)
    export(tiny_bundle, repository)  # again, which changes nothing
    assert {path.name for path in (repository / "tiny").iterdir()} == {"1", "2", "warmup", "config.pbtxt", "README.md"}
    assert load_bundle(repository / "tiny" / "1" / "bundle").digest == tiny_bundle.digest
    config = text_format.Parse((repository / "tiny" / "config.pbtxt").read_text(), pb.ModelConfig())
    assert config.name == "tiny"
    assert "Weights" not in (repository / "tiny" / "README.md").read_text()


def test_what_cannot_be_a_version_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    export(tiny_bundle, repository)

    def changed(folder: str, **entries) -> Bundle:
        target = tmp_path / folder / "tiny"
        shutil.copytree(tiny_bundle.path, target)
        manifest = yaml.safe_load((target / "policy.yaml").read_text())
        (target / "policy.yaml").write_text(yaml.safe_dump({**manifest, **entries}))
        return load_bundle(target)

    with pytest.raises(BundleInvalid, match="version 1 of 'tiny' is in .* with other content"):
        export(changed("same", description="Another."), repository)
    with pytest.raises(BundleInvalid, match="Triton counts versions"):
        export(changed("letters", version="1.2-rc"), repository)
    with pytest.raises(BundleInvalid, match="cannot be a model's name"):
        export(changed("named", name="tiny/../x"), repository)
    with pytest.raises(StartupError, match="tolerates f32, not 'bf16'"):
        export(changed("strict", tolerance={"f32": 1e-4}), repository, "openvino-bf16")
    with pytest.raises(StartupError, match="there is no target 'warp'"):
        export(tiny_bundle, repository, "warp")


def test_other_tensors_are_refused_beside_versions_that_are_there(
    tiny_bundle: Bundle, tiny_step_bundle: Bundle, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    export(tiny_bundle, repository)
    (repository / "tiny").rename(repository / "tiny-step")
    (repository / "tiny-step" / "1").rename(repository / "tiny-step" / "7")
    with pytest.raises(BundleInvalid, match="has versions 7 with"):
        export(tiny_step_bundle, repository)
