"""Sorting by a served policy over the network: how often it succeeds, and how often what it says is right."""

import argparse
import contextlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from policy_client import PolicyClient
from policy_sim.sorting import Sorting
from policy_sim.sorting_episode import (
    PLAY_STEPS,
    Answer,
    Episode,
    Policy,
    evaluation_tasks,
    expert_policy,
    random_policy,
    run_episode,
)
from policy_sim.success import wilson


def over_the_network(client: PolicyClient, *, seed: int) -> Policy:
    """Answer one episode's observations through a client, with chunks that `seed` decides.

    The text a server reasoned is the reply's "reasoning". Options that the observation comes with are sent as well.
    """
    client.reset()
    asked = -1

    def answer(observation: Mapping[str, Any]) -> Answer:
        nonlocal asked
        asked += 1
        options = {"seed": 1_000 * seed + asked, **observation.get("options", {})}
        chunk = client.infer({**observation, "options": options})
        return Answer(chunk.actions, chunk.metadata.get("reasoning"))

    return answer


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return rates with their 95 % intervals: of success by form of order, and of right reasonings.

    Reasonings of one episode are not independent, so the interval of theirs is somewhat too narrow.
    """
    by_form: dict[str, list[bool]] = {}
    for episode in episodes:
        by_form.setdefault(episode.task.order.form, []).append(episode.succeeded)
    said = [asked.right for episode in episodes for asked in episode.asked if asked.right is not None]
    steps = [episode.steps for episode in episodes if episode.succeeded]
    return {
        "success": _rate([episode.succeeded for episode in episodes]),
        "by_form": {form: _rate(by_form[form]) for form in sorted(by_form)},
        "reasoning": _rate(said) if said else None,
        "mean_steps": round(float(np.mean(steps)), 1) if steps else None,
    }


def _drive(policy: str, tasks: int, held_out: bool, execute: int, options: Mapping[str, Any]) -> list[Episode]:
    """Sort one set of tasks with what the command line names."""
    drawn = evaluation_tasks(tasks, held_out=held_out)
    served = policy not in ("expert", "random")
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(Sorting(drawn[0]))
        client = stack.enter_context(PolicyClient(policy, connect_timeout_s=60)) if served else None
        expert = expert_policy(world)
        episodes = []
        for number, task in enumerate(tqdm(drawn, desc="held-out" if held_out else "trained", unit="episode")):
            if client is not None:
                answer = over_the_network(client, seed=number)
            else:
                answer = expert if policy == "expert" else random_policy(number)
            episodes.append(run_episode(world, answer, task, options=lambda scene: options, play_steps=execute))
    return episodes


def _rate(right: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(right), len(right))
    return {"rate": round(sum(right) / len(right), 4), "interval_95": [round(low, 4), round(high, 4)], "of": len(right)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Let a served policy sort, and print how often it succeeded as one JSON object.

    Tasks are of two sets: "trained" moves combinations of colour, kind and bin that demonstrations show, from
    beginnings that none of them had; "held_out" moves combinations that none of them shows. The scripted expert and
    random motion, which need no server, are the ceiling and the floor.

    Example: python -m policy_sim.sorting_closed_loop ws://127.0.0.1:8000 --tasks 100
             python -m policy_sim.sorting_closed_loop expert
    """
    parser = argparse.ArgumentParser(
        prog="python -m policy_sim.sorting_closed_loop",
        description=inspect.getdoc(main),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", help='the server, such as ws://127.0.0.1:8000; or "expert" or "random"')
    parser.add_argument("--tasks", type=int, default=100, help="of each set (default: %(default)s)")
    parser.add_argument(
        "--execute", type=int, default=PLAY_STEPS, help="actions played of each chunk (default: %(default)s)"
    )
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="sent with every request, such as '{\"steps\": 5}'",
    )
    parser.add_argument("--json", type=Path, help="write the results here, too")
    chosen = parser.parse_args(arguments)

    results = {}
    for name, held_out in (("trained", False), ("held_out", True)):
        results[name] = summarise(_drive(chosen.policy, chosen.tasks, held_out, chosen.execute, chosen.options))
    text = json.dumps(
        {"policy": chosen.policy, "execute": chosen.execute, "options": chosen.options, **results}, indent=2
    )
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
