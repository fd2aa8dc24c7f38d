"""The model that Triton serves as `<policy>@<graph>` where no backend of its own runs the graph: a CPU engine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from policy_server.bundle import load_bundle
from policy_server.engine.base import ENGINES


class TritonPythonModel:
    """One graph of one version of a policy, as Triton's Python backend wants it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle of the policy's own model, of the same version."""
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        policy, _, self._graph = args["model_name"].partition("@")
        bundle = load_bundle(Path(args["model_repository"]).parent / policy / args["model_version"] / "bundle")
        self._engine = ENGINES[settings["engine"]].make(bundle, int(settings["threads"]))
        self._inputs = [tensor["name"] for tensor in config["input"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests that Triton batched with one run of the graph."""
        asked = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        together = {name: np.concatenate([inputs[name] for inputs in asked]) for name in self._inputs}
        borders = np.cumsum([len(inputs[self._inputs[0]]) for inputs in asked])[:-1]
        outputs = {name: np.split(a, borders) for name, a in self._engine.run(self._graph, together).items()}
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, parts[i]) for name, parts in outputs.items()])
            for i in range(len(requests))
        ]

    def finalize(self) -> None:
        """Give back what the engine holds."""
        self._engine.close()
