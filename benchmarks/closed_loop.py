"""Closed loop: does the network change what the policy achieves?

The bundled policy drives the same held-out tasks three times: in process, with nothing between it and the simulator;
through `policy_client`; and through the unmodified openpi client, which runs in an environment of its own. Every chunk
has the same seed in all three, so drives must be the same step by step. A task fails after 300 control steps (15 s).
The picture shows how long a chunk was waited for, from the observation in the robot's hands to the actions.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.processes import HOST, ours, serving
from benchmarks.result import Bar, Result, Series
from benchmarks.settings import Settings
from policy_models.spec import Observation, SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.catalog import load_engine
from policy_server.runtime.guard import Guard
from policy_server.runtime.sampling import drive
from policy_sim.chunked import Infer
from policy_sim.closed_loop import chunk_seed, drive_tasks

TASKS, SEED, EXECUTE = 200, 0, 8
ENGINE = "onnx"  # pinned, so that in process and served are the same arithmetic
IN_PROCESS, OURS, OPENPI = "in process", "policy_client", "openpi's client, unmodified"


def run(settings: Settings, command: str) -> Result:
    """Drive the tasks by every way there is."""
    tasks = settings.rounds(TASKS)
    bundle = load_bundle(settings.bundle)
    drives = drive_tasks(in_process(bundle), tasks=tasks, seed=SEED, execute=EXECUTE)
    runs: dict[str, dict[str, list]] = {
        IN_PROCESS: {
            "success": [episode.reached for episode in drives.episodes],
            "steps": [episode.steps for episode in drives.episodes],
            "waits_ms": drives.waits_ms,
        }
    }
    pythons = {OURS: ("ours", sys.executable), OPENPI: ("openpi", os.environ.get("OPENPI_PYTHON"))}
    with serving([*ours(settings.bundle), "--engine", ENGINE]) as server:
        for name, (client, python) in pythons.items():
            if python:
                runs[name] = _over_network(python, client, server.port, tasks)

    wanted = runs[IN_PROCESS]
    same = all((r["success"], r["steps"]) == (wanted["success"], wanted["steps"]) for r in runs.values())
    return Result(
        name="closed_loop",
        machine=describe_machine(),
        command=command,
        columns=("", "tasks", "reached", "mean steps to the goal", "p50 wait ms", "p99 wait ms"),
        rows=tuple(_row(name, result) for name, result in runs.items()),
        series=tuple(
            Series.of("wait for a chunk", name, "peer" if name == OPENPI else "ours", result["waits_ms"])
            for name, result in runs.items()
        ),
        bars=(
            Bar(
                "served drives are the same, step by step, as those in process",
                f"{'the same' if same else 'different'} over {len(runs) - 1} clients and {tasks} tasks",
                same and len(runs) == len(pythons) + 1,
            ),
        ),
        facts={
            "policy": f"{bundle.name} {bundle.manifest.version} on {ENGINE}, the first {EXECUTE} actions of each chunk"
        },
    )


def in_process(bundle: Bundle) -> Callable[[int], Infer]:
    """Answer every task's observations with the policy itself."""
    engine = load_engine(bundle, ENGINE, 0).engine
    program = bundle.new_program()
    guard = Guard(bundle.name, bundle.spec)

    def new_infer(task: int) -> Infer:
        asked = -1

        def infer(observation: dict[str, np.ndarray]) -> np.ndarray:
            nonlocal asked
            asked += 1
            checked = Observation({}, observation["state"], observation["goal"][None])
            options = SamplingOptions(chunk_seed(task, asked))
            outcome = drive(program.infer(checked, program.begin(), options), engine)
            return guard.check(outcome.actions).actions

        return infer

    return new_infer


def _over_network(python: str, client: str, port: int, tasks: int) -> dict[str, list]:
    arguments = ["--client", client, "--tasks", str(tasks), "--seed", str(SEED), "--execute", str(EXECUTE)]
    command = [python, "-m", "policy_sim.closed_loop", f"ws://{HOST}:{port}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, list] = json.loads(done.stdout)
    return result


def _row(name: str, result: dict[str, list]) -> tuple[str, ...]:
    success, steps = np.array(result["success"]), np.array(result["steps"])
    waits = np.percentile(result["waits_ms"], (50, 99))
    reached = f"{success.mean():.1%}"
    return (name, str(len(success)), reached, f"{steps[success].mean():.1f}", *(f"{wait:.3g}" for wait in waits))
