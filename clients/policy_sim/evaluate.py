"""Many episodes of a served policy at the same time, over the network."""

import contextlib
import logging
import queue
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from policy_client import ActionChunk, PolicyClient, PolicyClientError
from policy_sim.evaluation import Evaluation
from policy_sim.simulators import Simulator
from policy_sim.trial import TrialResult

logger = logging.getLogger(__name__)

_CONNECT_S, _REQUEST_S = 10.0, 60.0


class TimedClient(PolicyClient):
    """A client that remembers how long each chunk was waited for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.waits_ms: list[float] = []

    def infer(self, *arguments: Any, **options: Any) -> ActionChunk:
        """Do what `PolicyClient.infer` does."""
        chunk = super().infer(*arguments, **options)
        self.waits_ms.append(1e3 * (time.monotonic() - chunk.made_at_s))
        return chunk


def evaluate(evaluation: Evaluation, simulator: Simulator, url: str, *, api_key: str | None = None) -> None:
    """Run the episodes that `evaluation` plans, and put their results into it as they end.

    Every episode has its own session at the server and, in its turn, one of `parallel` worlds, each in a thread: MuJoCo
    and the client let go of Python's lock. What an episode comes to depends on its seed alone, as long as the server
    gives equal chunks for equal seeds.

    The first episode that breaks ends the evaluation, since the rates of those that happened not to break would be
    those of another policy. Results so far stay, and `evaluation.failure` says what happened.

    Args:
        evaluation: What to run.
        simulator: Where.
        url: Of the policy, such as ws://127.0.0.1:8000/v1/policies/point-maze/openpi.
        api_key: Of the server.
    """
    _Evaluator(evaluation, simulator, url, api_key).run()


class _Evaluator:
    def __init__(self, evaluation: Evaluation, simulator: Simulator, url: str, api_key: str | None) -> None:
        self._evaluation, self._simulator = evaluation, simulator
        self._url, self._api_key = url, api_key
        self._seeds: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._clients: list[TimedClient] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self) -> None:
        evaluation = self._evaluation
        for seed in range(evaluation.first_seed, evaluation.first_seed + evaluation.planned):
            self._seeds.put(seed)
        workers = min(evaluation.parallel, evaluation.planned)
        with (
            tqdm(total=evaluation.planned, desc=evaluation.policy, unit="episode", file=sys.stderr) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            running = [pool.submit(self._work, bar) for _ in range(workers)]
            try:
                for worker in running:
                    worker.result()
            except KeyboardInterrupt:
                self._fail("interrupted")
                for client in self._clients:
                    client.close()
        evaluation.results.sort(key=lambda result: result.seed)

    def _work(self, bar: Any) -> None:
        doing = f"simulator {self._simulator.name!r} could not be started"
        try:
            with contextlib.ExitStack() as stack:
                with self._lock:  # some simulators write files as they start
                    trial = stack.enter_context(contextlib.closing(self._simulator.new_trial()))
                doing = f"{self._url} did not answer"
                client = TimedClient(
                    self._url, api_key=self._api_key, connect_timeout_s=_CONNECT_S, request_timeout_s=_REQUEST_S
                )
                self._clients.append(client)
                stack.enter_context(client)
                while not self._stop.is_set():
                    try:
                        seed = self._seeds.get_nowait()
                    except queue.Empty:
                        return
                    doing = f"the episode with seed {seed} broke off"
                    client.waits_ms.clear()
                    self._keep(trial.run(client, seed), client.waits_ms, bar)
        except PolicyClientError as error:
            self._fail(f"{doing}: {type(error).__name__}: {error}")
        except Exception as error:
            # Hours of episodes must not be lost to a fault in one.
            if self._fail(f"{doing}: {type(error).__name__}: {error}"):
                logger.exception("%s", doing)

    def _keep(self, result: TrialResult, waits_ms: list[float], bar: Any) -> None:
        if waits_ms:
            result = replace(result, measures={**result.measures, "chunk_wait_ms": float(np.mean(waits_ms))})
        with self._lock:
            self._evaluation.results.append(result)
            done = self._evaluation.results
            bar.set_postfix_str(f"success {sum(r.success for r in done) / len(done):.1%}", refresh=False)
            bar.update()

    def _fail(self, why: str) -> bool:
        """End the evaluation; returns whether nothing else had ended it."""
        with self._lock:
            first = self._evaluation.failure is None
            if first:
                self._evaluation.failure = why
            self._stop.set()
        return first
