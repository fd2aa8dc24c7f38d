"""Training and evaluation of CAD2RL: views mirror rightly, both stages learn, flights are counted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policy_models.cad2rl.config import Cad2rlConfig
from policy_models.cad2rl.dataset import Views, at, mirror, read_views, relight
from policy_models.cad2rl.network import make_network
from policy_models.cad2rl.train import RECIPES, best_choices, held_out_loss, main, train
from policy_models.training import read_history
from policy_server.bundle import load_bundle
from tests.unit.cad2rl_views import draw_views

TINY = Cad2rlConfig(16, 3, 5, (8, 8), (1, 1), 2, 8, 1, batch_norm=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_batch_without_augmentation_is_what_was_seen():
    arrays = draw_views(20)
    batch = Views(arrays).batch(np.array([3, 17]))
    for name in ("images", "free", "bins", "collided"):
        np.testing.assert_array_equal(getattr(batch, name), arrays[name][[3, 17]])


def test_a_mirrored_view_asks_about_the_mirrored_direction():
    batch = Views(draw_views(20)).batch(np.arange(20))
    mirrored = mirror(batch)
    torch.testing.assert_close(at(mirrored.free, mirrored.bins), at(batch.free, batch.bins))
    torch.testing.assert_close(mirrored.images[:, :, 0], batch.images[:, :, -1])
    back = mirror(mirrored)
    assert all(torch.equal(getattr(back, name), getattr(batch, name)) for name in ("images", "free", "bins"))


def test_drawn_views_still_tell_what_came_of_each_direction():
    batch = Views(draw_views(50)).draw(200, np.random.default_rng(0))
    torch.testing.assert_close(1 - at(batch.free, batch.bins), batch.collided)
    assert batch.images.dtype == torch.uint8


def test_other_light_keeps_what_is_brighter_brighter():
    images = torch.full((30, 2, 2, 3), 90, dtype=torch.uint8)
    images[:, 0] = 160
    lit = relight(images, np.random.default_rng(0)).int()
    assert (lit[:, 0] > lit[:, 1]).all()
    assert len(torch.unique(lit[:, 0, 0], dim=0)) == 30


def test_a_grid_is_read_at_rows_and_columns():
    grid = torch.arange(2 * 3 * 5).view(2, 3, 5).float()
    bins = torch.tensor([[[0, 4], [2, 1]], [[1, 0], [1, 0]]])
    assert at(grid, bins).tolist() == [[4, 11], [20, 20]]


def test_held_out_views_are_the_last_and_are_not_trained_on():
    seen, unseen = Views(draw_views(30)).split(8)
    assert list(seen.rows) == list(range(22)) and list(unseen.rows) == list(range(22, 30))


@pytest.mark.parametrize("name", ["images", "free", "bins", "collided"])
def test_views_that_do_not_fit_each_other_are_refused(name):
    arrays = draw_views(6)
    with pytest.raises(ValueError, match=r"has shape .* expected"):
        Views({**arrays, name: arrays[name][:, :-1]})
    with pytest.raises(ValueError, match=f"no views: {name} missing"):
        Views({key: value for key, value in arrays.items() if key != name})


def test_the_freest_third_is_the_one_to_choose_and_straight_if_in_doubt():
    free = torch.zeros(4, 3, 6)
    free[0, :, :2] = 1
    free[1, :, 4:] = 1
    free[2] = 1
    assert best_choices(free).tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_few_steps_of_each_stage_reduce_its_held_out_loss(recipe):
    torch.manual_seed(0)
    network = make_network(replace(TINY, head=RECIPES[recipe].head))
    seen, unseen = Views(draw_views(120)).split(40)
    last = RECIPES[recipe].stages[-1]
    before = held_out_loss(network, unseen, last.loss)
    assert train(network, seen, RECIPES[recipe].stages, steps=60, minutes=None, seed=0, batch=32) == 60
    assert held_out_loss(network, unseen, last.loss) < 0.8 * before


def test_the_command_makes_a_bundle_and_goes_on_from_its_weights(tmp_path: Path):
    views, out = tmp_path / "views.npz", tmp_path / "avoider"
    np.savez(views, **draw_views(40, px=32, rows=5, columns=7))
    arguments = ["cad2rl", "-o", str(out), "--views", str(views), "--steps", "4", "--batch", "8"]
    main(arguments)
    weights = tmp_path / "avoider.training.safetensors"
    assert [fact["stage"] for fact in read_history(weights)] == ["free space", "rollouts"]
    main([*arguments, "--resume", str(weights)])
    assert [fact["optimiser_steps"] for fact in read_history(weights)] == [1, 3, 1, 3]
    bundle = load_bundle(out)
    assert bundle.spec.collision == read_views(views).directions
    assert bundle.manifest.results["recipe"] == "cad2rl"


def test_views_of_another_randomisation_are_refused(tmp_path: Path):
    np.savez(tmp_path / "views.npz", **draw_views(10))
    with pytest.raises(SystemExit, match="has 'all' randomised, the recipe 'none' wants 'none'"):
        main(["none", "-o", str(tmp_path / "out"), "--views", str(tmp_path / "views.npz")])


class Corridor:
    """A wall 3 m ahead; the way to the left is free."""

    def __init__(self) -> None:
        self.flown_m = self.elapsed_s = self.ahead_m = 0.0

    def image(self) -> np.ndarray:
        return np.zeros((16, 16, 3), dtype=np.uint8)

    def step(self, action: np.ndarray) -> bool:
        self.elapsed_s += 0.1
        self.ahead_m += 0.1 * float(action[0])
        self.flown_m += 0.1 * float(np.linalg.norm(action[:3]))
        return self.ahead_m > 3.0

    def room(self, grid) -> np.ndarray:
        room = np.full((grid.rows, grid.columns), 6.0)
        room[:, grid.columns // 3 :] = 3.0 - self.ahead_m
        return room


def test_a_flight_ends_with_its_collision_or_with_its_time():
    from policy_models.cad2rl.evaluate import fly, straight

    ended = fly(straight, Corridor(), seed=3, limit_s=60.0)
    assert ended.collided and ended.seed == 3 and 2.9 < ended.flown_m < 3.2
    assert not fly(straight, Corridor(), seed=0, limit_s=1.0).collided


def test_who_sees_all_flies_where_it_is_free():
    from policy_models.cad2rl.evaluate import all_seeing

    assert all_seeing(Corridor())[1] > 0.3


def test_means_come_with_intervals_that_hold_them():
    from policy_models.cad2rl.evaluate import Flight, summarise, table

    rng = np.random.default_rng(0)
    flights = [Flight(i, rng.exponential(10), rng.exponential(12), i % 4 > 0) for i in range(60)]
    summary = summarise(flights)
    assert summary["flights"] == 60 and summary["collided"] == 0.75
    low, high = summary["metres_interval_95"]
    assert low < summary["metres"] < high and high - low < 8
    assert table({"one": summary}).count("\n") == 2
