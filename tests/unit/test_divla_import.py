"""`policy-server import divla`: from what upstream's training leaves to a bundle that acts as upstream does."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from typer.testing import CliRunner

from policy_models.divla.fusion import Fusion
from policy_models.divla.prompt import Template, Vocabulary
from policy_models.divla.reason import reason
from policy_models.divla.tokenizer import learn_tokenizer
from policy_models.spec import Observation, SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.catalog import load_engine
from policy_server.cli import app
from policy_server.runtime.sampling import drive
from tests.unit.divla_files import (
    SMALL,
    settings,
    small_parts,
    small_vlm,
    upstream_parts,
    upstream_vlm,
    whole,
    write_lora,
    write_policy,
    write_statistics,
)

pytestmark = pytest.mark.timeout(300)  # eight graphs are exported

ORDERS = ("put the red block left", "wait")
TOKENIZER = learn_tokenizer(ORDERS, 300)
SPEAKING = replace(SMALL, language=replace(SMALL.language, vocabulary=300))  # room for every byte
ALOHA = replace(SPEAKING, state_width=14, action_width=14)
MOST = 6
SMALL_CAMERAS = ("--camera", "front:56x28:linear", "--camera", "side:56x28:linear")
ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")

Networks = tuple[Qwen2VLForConditionalGeneration, nn.Module, Fusion]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune for two arms of seven numbers, with its tokenizer."""
    folder = write_policy(tmp_path_factory.mktemp("run") / "checkpoint-10", whole(ALOHA), settings(ALOHA))
    draw = np.random.default_rng(4)
    low = draw.uniform(-2, -1, 14)
    write_statistics(
        folder.parent,
        action_min=low,
        action_max=low + draw.uniform(1, 3, 14),
        qpos_mean=draw.normal(size=14),
        qpos_std=draw.uniform(0.5, 2, 14),
        **{name: np.ones(14) for name in ("action_mean", "action_std")},
    )
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, published: Path) -> Bundle:
    return run_import(published, tmp_path_factory.mktemp("bundles") / "two-arms")


@pytest.fixture
def speaking(tmp_path: Path) -> Path:
    """A full fine-tune for a robot of other widths, with its tokenizer."""
    folder = write_policy(tmp_path / "run" / "checkpoint-10", whole(SPEAKING), settings(SPEAKING))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


def command(checkpoint: Path, output: Path, *more: str) -> list[str]:
    tokens = ("--reasoning-tokens", str(MOST))
    return ["import", "divla", str(checkpoint), "-o", str(output), "--no-gradients", *tokens, *more]


def run_import(checkpoint: Path, output: Path, *more: str) -> Bundle:
    done = CliRunner().invoke(app, command(checkpoint, output, *more))
    assert done.exit_code == 0, done.output
    return load_bundle(output)


def observation(bundle: Bundle, seed: int) -> Observation:
    rng, spec = np.random.default_rng(seed), bundle.spec
    images = {c.name: rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras}
    assert spec.state is not None
    return Observation(images, rng.standard_normal(spec.state.width, dtype=np.float32), ORDERS[0])


def upstreams_answer(
    networks: Networks, measured: Mapping[str, np.ndarray], bundle: Bundle, seen: Observation, seed: int
) -> tuple[str, np.ndarray]:
    """Reasoning and actions, through transformers' `generate` and diffusers' DDIM, with statistics as upstream does."""
    vlm, head, fusion = networks
    vocabulary, cameras = Vocabulary(TOKENIZER), bundle.spec.cameras
    special = vocabulary.special
    vlm.config.image_token_id, vlm.config.vision_start_token_id = special.image, special.vision_start
    height, width = cameras[0].height, cameras[0].width
    template = Template(vocabulary, bundle.config, images=len(cameras), height=height, width=width)
    prompt = template.write(str(seen.goal))
    tokens = torch.from_numpy(prompt.tokens)[None]
    # Its default is to enlarge images of fewer than 56x56 pixels.
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280})
    pixels = processor([seen.images[camera.name] for camera in cameras], return_tensors="pt")
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.from_numpy(prompt.mask)[None],
        "mm_token_type_ids": (tokens == special.image).int(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }
    reasoned = reason(vlm, inputs, end=special.end, pad=special.pad, most=MOST)
    assert len(reasoned.reasoning) > 0, "the answer of this seed must have words"

    state = torch.from_numpy((seen.state - measured["qpos_mean"]) / measured["qpos_std"]).float()[None]
    noise = np.random.default_rng(seed).standard_normal((1, bundle.spec.horizon, bundle.spec.action.width), np.float32)
    scheduler, actions = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2"), torch.from_numpy(noise)
    scheduler.set_timesteps(10)
    with torch.inference_mode():
        prefix, thought = reasoned.prefix[None], reasoned.reasoning[None]
        p, mean = fusion.prefix_part(prefix, torch.ones(prefix.shape[:2]))
        context = fusion.inject(p, mean, fusion.reasoning_part(thought, torch.ones(thought.shape[:2])))
        for timestep in scheduler.timesteps:
            eps = head(actions, timestep[None], context, state)
            actions = scheduler.step(eps, timestep, actions).prev_sample
    low, high = measured["action_min"], measured["action_max"]
    listener = vocabulary.listen()
    text = "".join(listener.hear(token) for token in reasoned.tokens.tolist()) + listener.close()
    return text.strip(), (actions[0].numpy() + 1) / 2 * (high - low) + low


def assert_answers_as(networks: Networks, run: Path, bundle: Bundle) -> None:
    measured = {k: np.asarray(v) for k, v in json.loads((run / "dataset_stats.json").read_text()).items()}
    runner, program = load_engine(bundle, "onnx", 1).engine, bundle.new_program()
    seen = observation(bundle, 0)
    got = drive(program.infer(seen, program.begin(), SamplingOptions(3)), runner)
    text, actions = upstreams_answer(networks, measured, bundle, seen, 3)
    assert got.reasoning is not None and got.reasoning.text == text
    np.testing.assert_allclose(got.actions, actions, atol=1e-3)


@pytest.mark.slow
def test_an_imported_bundle_says_what_the_robot_must_send(imported: Bundle, published: Path) -> None:
    spec = imported.spec
    assert [(c.name, c.width, c.height, c.resize, c.crop) for c in spec.cameras] == [
        (name, 308, 252, "area", 0.95) for name in ("top", "left_wrist", "right_wrist")
    ]
    assert spec.state is not None
    assert spec.state.names == spec.action.names
    assert spec.action.names[5:8] == ("left_wrist_rotate", "left_gripper", "right_waist")
    assert spec.action.units[5:8] == ("rad", "", "rad")
    raw = json.loads((published.parent / "dataset_stats.json").read_text())
    np.testing.assert_allclose(spec.action.low, raw["action_min"], rtol=1e-6)
    np.testing.assert_allclose(spec.action.high, raw["action_max"], rtol=1e-6)
    assert (spec.goal.kind, spec.horizon, spec.step_s) == ("text", 8, 0.02)
    assert spec.sampler is not None and spec.reasoning is not None
    assert (spec.sampler.sampler, spec.sampler.schedule, spec.sampler.steps) == ("ddim_clipped", "squaredcos", 10)
    assert spec.reasoning.tokens == MOST
    assert imported.config == replace(ALOHA, reasoning_tokens=MOST)
    assert imported.manifest.provenance == {"imported_from": "checkpoint-10"}


@pytest.mark.slow
def test_an_imported_full_fine_tune_answers_as_upstream_does(imported: Bundle, published: Path) -> None:
    assert_answers_as((small_vlm(vocabulary=300), *small_parts(ALOHA)), published.parent, imported)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino", "torch"])
def test_an_imported_bundle_is_accepted(imported: Bundle, engine: str) -> None:
    done = CliRunner().invoke(app, ["check", str(imported.path), "--engine", engine])
    assert done.exit_code == 0, done.output
    assert "golden drift" in done.output


@pytest.mark.slow
def test_an_imported_lora_fine_tune_answers_as_its_base_with_adapters(tmp_path: Path) -> None:
    vlm = small_vlm(vocabulary=300)
    base = write_policy(tmp_path / "qwen2-vl", upstream_vlm(vlm), {})
    (base / "tokenizer.json").write_text(TOKENIZER)
    generator, adapter = torch.Generator().manual_seed(6), {}
    for name in ADAPTED:
        weight = vlm.get_submodule(name.replace("model.", "model.language_model.", 1)).weight
        A = torch.randn(4, weight.shape[1], generator=generator) / 6
        B = torch.randn(weight.shape[0], 4, generator=generator) / 6
        adapter |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        weight.data += 16 / 4 * B @ A
    parts = small_parts(SPEAKING)
    others = {f"base_model.model.{key}": tensor for key, tensor in upstream_parts(*parts).items()}
    lora = write_lora(tmp_path / "run" / "lora", adapter, others, settings(SPEAKING))
    options = (*SMALL_CAMERAS, "--crop", "1", "--step-s", "0.1", "--instruction", ORDERS[0], "--instruction", ORDERS[1])
    names = ("--state", "x:m, y:m, z:m, roll:rad, pitch:rad, yaw:rad", "--action", "dx:m,dy:m,dz:m,turn:rad,grip")
    bundle = run_import(lora, tmp_path / "arm", "--base", str(base), *options, *names)
    assert_answers_as((vlm, *parts), lora.parent, bundle)

    spec = bundle.spec
    assert [(c.name, c.width, c.height, c.resize, c.crop) for c in spec.cameras] == [
        ("front", 56, 28, "linear", 1.0),
        ("side", 56, 28, "linear", 1.0),
    ]
    assert spec.state is not None and spec.state.names == ("x", "y", "z", "roll", "pitch", "yaw")
    assert (spec.action.names, spec.action.units) == (("dx", "dy", "dz", "turn", "grip"), ("m", "m", "m", "rad", ""))
    assert (spec.goal.examples, spec.step_s) == (ORDERS, 0.1)
    assert bundle.manifest.provenance == {"imported_from": "lora", "base": "qwen2-vl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--camera", "top"), "expected name:WIDTHxHEIGHT"),
        (("--camera", "top:56x28", "--camera", "top:56x28"), "two cameras share a name: top, top"),
        (("--camera", "top:56x28", "--camera", "side:56x56"), "have one size, got 56x28, 56x56"),
        (("--camera", "top:320x240"), "not made of tokens of 28x28; the nearest size is 308x252"),
        ((*SMALL_CAMERAS, "--crop", "0"), "crop is a fraction"),
        ((*SMALL_CAMERAS, "--steps", "101"), "100 levels, fewer than 101 steps"),
        ((*SMALL_CAMERAS, "--tokenizer", "nowhere"), "nowhere cannot be read as a tokenizer"),
        ((*SMALL_CAMERAS, "--base", "nowhere"), "takes no base"),
        ((*SMALL_CAMERAS, "--state", "x,y"), "the state of this policy has 6 numbers, and 2 are named"),
        ((*SMALL_CAMERAS, "--action", "x,y,z,x,w"), "names must be there and differ, got x, y, z, x, w"),
        ((*SMALL_CAMERAS, "--instruction", " "), "the instruction is empty"),
        ((*SMALL_CAMERAS, "--reasoning-tokens", "4096"), "a context of 4096 has room for 0"),
        (("--camera", "state:56x28"), "no camera can be called 'state'"),
    ],
)
def test_an_import_that_cannot_work_says_why_in_one_line(
    tmp_path: Path, speaking: Path, options: tuple[str, ...], message: str
) -> None:
    refuses(command(speaking, tmp_path / "policy", *options), message)
    assert not (tmp_path / "policy").exists()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def tokenizer_of_more_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(learn_tokenizer([*ORDERS, "one two three four five six seven"], 340))


def no_statistics(folder: Path) -> None:
    (folder.parent / "dataset_stats.json").unlink()


def pickled_statistics(folder: Path) -> None:
    (folder.parent / "dataset_stats.json").rename(folder.parent / "dataset_stats.pkl")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_tokenizer, "name the folder of the Qwen2-VL that was fine-tuned"),
        (tokenizer_of_more_tokens, "tokens, the language model 300"),
        (no_statistics, "holds dataset_stats.json or dataset_stats.npz"),
        (pickled_statistics, "is a pickle, which can run any code"),
        (no_weights, "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_files_that_make_no_policy_are_named(
    tmp_path: Path, speaking: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(speaking)
    refuses(command(speaking, tmp_path / "policy", *SMALL_CAMERAS), message)


def test_an_import_of_nothing_says_so(tmp_path: Path) -> None:
    refuses(command(tmp_path / "lost", tmp_path / "policy"), "lost is not a folder")


def refuses(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert message in done.output
    # What the import logs on its way is no part of the answer.
    assert sum(line.startswith("policy-server:") for line in done.output.splitlines()) == 1
    assert "Traceback" not in done.output
