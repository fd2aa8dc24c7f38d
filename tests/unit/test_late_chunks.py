"""Who plays which row when, with chunks that say for which tick they were made."""

import numpy as np
import pytest

from policy_sim.late_chunks import AskAhead, Joint, Question, StandAndWait, disagreements, jumps, roughness

HORIZON = 6


class Scripted:
    """Answers question i with a chunk of 100 i + row, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, observation, question):
        self.asked.append((observation["tick"], question))
        return np.stack([[100.0 * len(self.asked) + row, 0.0] for row in range(HORIZON)])


def _rest(last):
    return np.array([-1.0, 0.0])


def _play(player, ticks):
    for tick in range(ticks):
        player.act(lambda tick=tick: {"tick": tick})
    return [action[0] for action in player.record.actions]


def test_a_player_that_asks_ahead_takes_over_at_the_row_that_is_due():
    infer = Scripted()
    player = AskAhead(infer, _rest, delay=2, every=3)
    assert _play(player, 12) == [-1, -1, 100, 101, 102, 103, 104, 202, 203, 204, 302, 303]
    assert player.record.stalls == 2
    assert [(joint.left, joint.tick) for joint in player.record.joints] == [(6, 7), (9, 10)]
    assert player.record.joints[0].disagreement[0] == 202 - 105


def test_the_first_observation_is_still_true_when_its_chunk_comes_and_later_ones_are_late():
    infer = Scripted()
    _play(AskAhead(infer, _rest, delay=2, every=3), 9)
    assert infer.asked == [(0, Question(2, 0)), (5, Question(5, 2)), (8, Question(8, 2))]


def test_questions_overtake_each_other_if_they_are_asked_faster_than_answered():
    infer = Scripted()
    player = AskAhead(infer, _rest, delay=3, every=1)
    assert _play(player, 9) == [-1, -1, -1, 100, 101, 102, 103, 203, 303]
    assert [tick for tick, _ in infer.asked] == [0, 4, 5, 6, 7, 8]


def test_a_chunk_that_has_run_out_before_the_next_one_comes_leaves_the_robot_at_rest():
    player = AskAhead(Scripted(), _rest, delay=3, every=5)
    assert _play(player, 13) == [-1, -1, -1, 100, 101, 102, 103, 104, 105, -1, -1, 203, 204]
    assert player.record.stalls == 5
    assert player.record.joints == [Joint(8, 11, None)]
    assert jumps(player.record) == [204.0]


def test_a_player_that_stands_and_waits_begins_every_chunk_at_its_first_row():
    infer = Scripted()
    player = StandAndWait(infer, _rest, delay=2, execute=3)
    assert _play(player, 11) == [-1, -1, 100, 101, 102, -1, -1, 200, 201, 202, -1]
    assert player.record.stalls == 5
    assert infer.asked[:2] == [(0, Question(2, 0)), (5, Question(7, 0))]
    assert [(joint.left, joint.tick) for joint in player.record.joints] == [(4, 7)]
    assert player.record.joints[0].disagreement[0] == 200 - 103
    assert jumps(player.record) == [201.0]


@pytest.mark.parametrize("player", [AskAhead, StandAndWait])
def test_without_delay_nobody_stalls_and_both_ways_play_the_same(player):
    every = {"every": 4} if player is AskAhead else {"execute": 4}
    one = player(Scripted(), _rest, delay=0, **every)
    assert _play(one, 10) == [100, 101, 102, 103, 200, 201, 202, 203, 300, 301]
    assert one.record.stalls == 0
    assert jumps(one.record) == [97.0, 97.0]
    assert disagreements(one.record) == [96.0, 96.0]


def test_roughness_is_the_second_difference_over_the_square_of_a_step():
    player = StandAndWait(lambda observation, question: np.array([[0.0], [0.0], [1.0]]), _rest, delay=0, execute=3)
    _play(player, 3)
    assert roughness(player.record, 0.5) == pytest.approx(4.0)
