"""The model that Triton serves under a policy's name: from an observation to a chunk, in one request.

It runs the policy's own program, as the embedded engine does; requests that Triton hands over together step through
their denoising levels side by side and share the batches of every graph.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from policy_models.program import Dialogue, Outcome, Tensors
from policy_server import kserve
from policy_server.bundle import load_bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.errors import ClientError, PolicyServerError
from policy_server.golden import GoldenCase, check_golden
from policy_server.runtime.observation import ObservationReader
from policy_server.runtime.options import RequestOptions, read_options
from policy_server.runtime.sampling import drive_together
from policy_server.triton.graph_models import GraphModels


class TritonPythonModel:
    """One version of a policy, as Triton's Python backend wants it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle beside this version's `model.py`; an exception here means that the model does not load."""
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._bundle = load_bundle(Path(args["model_repository"]) / args["model_version"] / "bundle")
        self._digest = self._bundle.digest
        self._program = self._bundle.new_program()
        self._beginning = self._program.begin()
        self._reader = ObservationReader(self._bundle.spec)
        self._inputs = [port.name for port in kserve.input_ports(self._bundle.spec, self._beginning)]
        apart = settings["graphs"] == "models"
        self._engine: Engine = (
            GraphModels(args["model_name"], args["model_version"], settings)
            if apart
            else ENGINES[settings["engine"]].make(self._bundle, int(settings["threads"]))
        )
        self._tolerance = {self._engine.precision: float(settings["tolerance"])}
        self._replayed = False
        if not apart:
            self._replay_once()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests that Triton batched; each gets its chunks or its own error."""
        try:
            self._replay_once()
        except PolicyServerError as error:
            return [_refusal(error) for _ in requests]
        begun = [self._begin(request) for request in requests]
        dialogues, askers = [], []
        for request, rows in zip(requests, begun, strict=True):
            if not isinstance(rows, Exception):
                dialogues += rows
                askers += [request] * len(rows)
        outcomes = iter(drive_together(dialogues, self._engine, _wanted(askers)))
        return [
            _refusal(rows) if isinstance(rows, Exception) else self._reply([next(outcomes) for _ in rows])
            for rows in begun
        ]

    def finalize(self) -> None:
        """Give back what the engine holds."""
        self._engine.close()

    def _replay_once(self) -> None:
        """Replay the golden case; raises GoldenDrift.

        Where graphs are models of their own only the first request can do it, since Triton lets a model ask another
        one only while it answers; then no request is answered until the case is reproduced. It is never left to
        Triton's warm-up: Triton 2.51 crashes, every other time, when one fails.
        """
        if not self._replayed:
            case = GoldenCase(self._bundle.path / "golden.npz")
            check_golden(self._bundle.name, case, self._program, self._engine, self._tolerance)
            self._replayed = True

    def _begin(self, request: Any) -> list[Dialogue] | Exception:
        """Return a dialogue for every row of a request, or what is wrong with it."""
        try:
            asked = json.loads(request.parameters() or "{}")
            options = read_options({name: value for name, value in asked.items() if name not in kserve.PULL})
            tensors = {
                name: tensor.as_numpy()
                for name in self._inputs
                if (tensor := pb_utils.get_input_tensor_by_name(request, name)) is not None
            }
            return [self._dialogue(tensors, row, options, asked) for row in range(_rows(tensors))]
        except Exception as error:
            return error

    def _dialogue(self, tensors: Tensors, row: int, options: RequestOptions, asked: Mapping[str, Any]) -> Dialogue:
        observation = self._reader.read(kserve.unpack_request(tensors, row))
        memory = kserve.unpack_memory(tensors, row, self._beginning)
        chunk = kserve.unpack_continuation(tensors, row, asked, gradients=self._engine.differentiable)
        return self._program.infer(observation, memory, options.sampling(row, chunk))

    def _reply(self, outcomes: Sequence[Outcome | Exception]) -> Any:
        rows = []
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                return _refusal(outcome)
            rows.append(kserve.pack_reply(outcome, self._digest))
        tensors = [pb_utils.Tensor(name, np.stack([row[name] for row in rows])) for name in rows[0]]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _rows(tensors: Tensors) -> int:
    return len(next(iter(tensors.values())))


def _wanted(askers: Sequence[Any]) -> Callable[[int], bool]:
    return lambda place: not askers[place].is_cancelled()


def _refusal(error: Exception) -> Any:
    if not isinstance(error, PolicyServerError):
        pb_utils.Logger.log_error(f"a request failed: {error!r}")
        return pb_utils.InferenceResponse(error=pb_utils.TritonError("the policy failed; the server's log says why"))
    kind = pb_utils.TritonError.INVALID_ARG if isinstance(error, ClientError) else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{error.code}: {error}", kind))
