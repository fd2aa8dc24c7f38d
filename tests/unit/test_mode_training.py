"""Training and evaluation of MoDE: batches are what the cameras saw, steps reduce the loss, successes are counted."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from policy_models.diffusion.preconditioning import ExponentialAverage
from policy_models.mode.assembly import ModeNetworks
from policy_models.mode.config import ImageConfig, ModeConfig, TextConfig, TransformerConfig
from policy_models.mode.dataset import (
    CAMERAS,
    NO_AUGMENTATION,
    Augmentation,
    Demonstrations,
    Phrases,
    augment,
    shifted,
    split,
)
from policy_models.mode.network import ModeDiT
from policy_models.mode.tokenizer import learn_merges, make_tokenizer
from policy_sim.meta_world_tasks import SCENES, TASKS
from policy_sim.success import summary

NAMES = tuple(TASKS)
TEXT = TextConfig(512 + 40 + 2, width=16, layers=1, heads=2, context=40, projection=8)
SHIFT = Augmentation(shift_px=2, brightness=0.0, contrast=0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def phrases() -> Phrases:
    return Phrases(NAMES, make_tokenizer(learn_merges(_all_phrases(), 40)), TEXT)


@pytest.fixture
def demos() -> dict[str, np.ndarray]:
    """Ten observations of every task, whose pictures and actions tell the task."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(len(NAMES)), 10)
    images = rng.integers(0, 40, (len(task), 32, 32, 3), dtype=np.uint8) + (30 * task[:, None, None, None]).astype("u1")
    actions = np.linspace(-1, 1, len(NAMES), dtype=np.float32)[task][:, None, None] * np.ones((1, 8, 4), np.float32)
    return {"static": images, "wrist": images[:, ::-1].copy(), "actions": actions, "task": task}


def _all_phrases() -> list[str]:
    return [phrase for task in TASKS.values() for phrase in task.phrases]


def _networks() -> ModeNetworks:
    torch.manual_seed(0)
    config = ModeConfig(
        TransformerConfig(4, 6, 16, 2, 2, goal_width=8, token_width=32, sigma_data=0.7),
        ImageConfig("resnet18", 4),
        TEXT,
    )
    networks = ModeNetworks(config, CAMERAS)
    networks.materialize()
    return networks


def test_without_augmentation_a_batch_is_what_the_cameras_saw(demos, phrases):
    demonstrations = Demonstrations(demos, phrases, horizon=6)
    batch = demonstrations.batch(np.array([3, 41]), NO_AUGMENTATION, np.random.default_rng(0))
    for camera, images in zip(CAMERAS, batch.images, strict=True):
        np.testing.assert_array_equal(images, demos[camera][[3, 41]])
    np.testing.assert_array_equal(batch.actions, demos["actions"][[3, 41], :6])


def test_a_chunk_longer_than_the_demonstrated_ones_is_refused(demos, phrases):
    with pytest.raises(ValueError, match="have 8 actions, 9 are wanted"):
        Demonstrations(demos, phrases, horizon=9)


def test_a_shifted_image_is_the_image_elsewhere_with_its_edges_repeated():
    images = np.arange(2 * 6 * 7 * 3, dtype=np.uint8).reshape(2, 6, 7, 3)
    rows = np.array([1, 0, 1, 1, 0, 0, 1, 0])
    moved = shifted(images, rows, SHIFT, np.random.default_rng(3))
    offsets = np.random.default_rng(3).integers(-2, 3, size=(len(rows), 2))
    assert len({tuple(offset) for offset in offsets}) > 2
    for got, row, (down, right) in zip(moved, rows, offsets, strict=True):
        padded = np.pad(images[row], ((2, 2), (2, 2), (0, 0)), mode="edge")
        np.testing.assert_array_equal(got, padded[2 - down : 8 - down, 2 - right : 9 - right])


def test_brightness_and_contrast_stay_within_what_was_allowed():
    images = np.full((200, 1, 1, 3), 100, dtype=np.uint8)
    images[:, :, :, 1] = 250
    changed = augment(images, Augmentation(0, brightness=0.1, contrast=0.2), np.random.default_rng(0)).numpy()
    gain = 1 + 0.2 * np.array([-1, 1])
    low, high = (100 - 127.5) * gain[::-1] + 127.5 + 25.5 * np.array([-1, 1])
    assert low <= changed[..., 0].min() < 90 and 110 < changed[..., 0].max() <= high
    assert changed.max() == 255  # clamped, as a camera would
    assert np.unique(changed[..., 0]).size == 200  # each sample has its own


def test_each_task_is_told_in_its_own_words_and_all_of_them(phrases):
    rng = np.random.default_rng(0)
    told = phrases.draw(np.full(200, 2), rng)
    assert set(told) == set(range(14, 21))
    assert len(phrases.tokens) == len(_all_phrases())
    assert len(np.unique(phrases.tokens, axis=0)) == len(phrases.tokens)


def test_held_out_episodes_are_the_last_of_each_task_and_are_not_trained_on():
    tasks = np.array([0, 0, 0, 0, 1, 1, 1])
    episodes = np.array([0, 0, 1, 2, 10000, 10001, 10001])
    seen, unseen = split(episodes, 1, tasks)
    assert list(seen) == [0, 1, 2, 4] and list(unseen) == [3, 5, 6]


def test_averaged_weights_copy_counters_and_average_the_rest():
    norm = nn.BatchNorm1d(2)
    average = ExponentialAverage(norm)
    for _ in range(3):
        norm(torch.full((4, 2), 5.0) + torch.randn(4, 2))
        average.update(norm)
    assert average.shadow["num_batches_tracked"] == 3
    assert 0 < average.shadow["running_mean"][0] < norm.running_mean[0]


def test_a_few_steps_reduce_the_loss_and_leave_a_checkpoint(demos, phrases, tmp_path):
    from policy_models.mode.train import held_out_loss, train

    demonstrations = Demonstrations(demos, phrases, horizon=6)
    networks, checkpoint = _networks(), tmp_path / "weights.safetensors"
    before = held_out_loss(networks, networks.state_dict(), demonstrations)
    taken, weights = train(
        networks,
        demonstrations,
        steps=40,
        minutes=None,
        seed=0,
        batch=24,
        checkpoint=checkpoint,
        held_out=demonstrations,
    )
    assert taken == 40
    assert held_out_loss(networks, weights, demonstrations) < 0.8 * before
    with safe_open(checkpoint, "pt") as file:
        assert json.loads(file.metadata()["training"])[-1]["optimiser_steps"] == 40


def test_training_draws_experts_that_inference_would_not_take(demos, phrases, monkeypatch):
    from policy_models.mode.train import losses

    networks = _networks()
    network = networks.denoiser.inner_model
    assert isinstance(network, ModeDiT)
    seen = []
    monkeypatch.setattr(network, "forward", lambda *inputs: seen.append(inputs[-1]) or torch.zeros(60, 6, 4))
    batch = Demonstrations(demos, phrases, horizon=6).batch(np.arange(60), NO_AUGMENTATION, np.random.default_rng(0))
    for mode in (True, False):
        networks.train(mode)
        losses(networks, batch, phrases, torch.Generator().manual_seed(0))
    drawn, taken = seen
    for route in seen:
        assert ((route > 0).sum(-1) == 2).all()
        torch.testing.assert_close(route.sum(-1), torch.ones(60, 2))
    assert ((drawn > 0).float().mean(0) > 0.2).all()  # every expert is tried
    assert len(torch.unique((taken > 0).flatten(1), dim=0)) < len(torch.unique((drawn > 0).flatten(1), dim=0))


def test_phrases_that_settle_among_those_of_another_task_are_punished():
    from policy_models.mode.train import told_apart

    sorted_by_task = torch.eye(3).repeat_interleave(4, dim=0) + 0.01 * torch.randn(12, 3)
    tasks = torch.arange(3).repeat_interleave(4)
    one_astray = sorted_by_task.clone()
    one_astray[5] = sorted_by_task[0]
    assert told_apart(sorted_by_task, tasks) < 0.01
    assert told_apart(one_astray, tasks) > 0.5


def test_a_rate_comes_with_its_interval():
    assert summary([], 10) == {"success": 0.0, "interval_95": [0.0, 0.2775], "mean_steps": None}
    assert summary([40, 50], 2) == {"success": 1.0, "interval_95": [0.3424, 1.0], "mean_steps": 45.0}


def test_the_expert_does_what_it_is_told_and_chance_does_not():
    evaluate = pytest.importorskip("policy_models.mode.evaluate")
    scene = SCENES["drawer"]
    played = {
        name: evaluate.play(evaluate.Condition(name, contestant), scene.name, episodes=1)
        for name, contestant in (("expert", evaluate.expert), ("chance", evaluate.chance))
    }
    expert = evaluate.summarise(played["expert"])
    assert [expert[task]["success"] for task in (*scene.tasks, "all")] == [1.0, 1.0, 1.0]
    assert expert["all"]["other"] == 0.0
    chance = evaluate.summarise(played["chance"])
    assert chance["all"]["success"] < 1.0
    assert "| expert | 100 % | 100 % | - |" in evaluate.table({"expert": expert, "chance": chance})
