"""Figures over a quantity: kept in a result, and drawn."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from benchmarks.continuity import summarise
from benchmarks.curves import plot_curves
from benchmarks.late_drives import COURSES, Cell
from benchmarks.result import Curve, Result, load_results, save_results
from policy_sim.late_chunks import AskAhead, StandAndWait
from policy_sim.late_episode import play

CURVES = tuple(
    Curve(panel, label, "delay, ms", ((0.0, 1.0, 0.9, 1.1), (100.0, slope, slope - 0.1, slope + 0.1)))
    for panel in ("reached", "jump", "disagreement", "stalls")
    for label, slope in (("naive", 0.5), ("ours", 0.9))
)
RESULT = Result("delays", {}, "", ("", "a"), (("x", "1"),), (), (), curves=CURVES)


def test_curves_survive_the_file(tmp_path):
    save_results(tmp_path / "results.json", {"delays": RESULT})
    assert load_results(tmp_path / "results.json") == {"delays": RESULT}


def test_curves_are_drawn_three_in_a_row(tmp_path):
    plot_curves(RESULT, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        width, height = picture.size
    assert width > 1000
    assert height > 800


@dataclass
class Corridor:
    """Is done once ten ones have been played."""

    limit_steps: int = 30
    given: list[float] = field(default_factory=list)

    @property
    def succeeded(self):
        return sum(self.given) >= 10

    over = succeeded

    def observe(self):
        return {}

    def rest(self, last):
        return np.zeros(1)

    def step(self, action):
        self.given.append(float(action[0]))


def test_standing_costs_steps_and_asking_ahead_costs_only_the_first_wait():
    def infer(observation, question):
        return np.ones((6, 1))

    standing, ahead = Corridor(), Corridor()
    waited = play(standing, StandAndWait(infer, standing.rest, delay=2, execute=5))
    hurried = play(ahead, AskAhead(infer, ahead.rest, delay=2, every=4))
    assert (waited.succeeded, waited.steps, waited.record.stalls) == (True, 14, 4)
    assert (hurried.succeeded, hurried.steps, hurried.record.stalls) == (True, 12, 2)


def test_an_episode_ends_at_its_limit():
    scene = Corridor(limit_steps=5)
    assert not play(scene, AskAhead(lambda o, q: np.ones((1, 1)), scene.rest, delay=0, every=4)).succeeded
    assert len(scene.given) == 5


def test_the_drives_of_all_ways_make_a_result_that_can_be_kept(tmp_path):
    def infer(observation, question):
        return np.full((16, 1), 0.3 + 0.1 * (question.tick % 3))

    cells = []
    for course in COURSES:
        for delay in course.delays:
            for way in course.ways:
                scene = Corridor(limit_steps=60)
                cells.append(Cell(course.policy, way, delay, [play(scene, way.player(infer, scene, delay))]))
    result = summarise(cells, {}, "")
    save_results(tmp_path / "results.json", {"continuity": result})
    assert load_results(tmp_path / "results.json") == {"continuity": result}
    assert [bar.met for bar in result.bars if "success" in bar.claim] == [True] * 4
    plot_curves(result, tmp_path / "curves.png")
