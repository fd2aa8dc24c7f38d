"""The policy families, one line each. Everything else about a family lives in its own folder."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from policy_models.program import Assets, Graph, Program
from policy_models.spec import PolicySpec

FAMILIES: Mapping[str, str] = {
    "beso": "policy_models.beso.family",
    "cad2rl": "policy_models.cad2rl.family",
    "divla": "policy_models.divla.family",
    "hold": "policy_models.hold.family",
    "mode": "policy_models.mode.family",
}


class Family(Protocol):
    """What a family's module offers. Importing it must not import torch."""

    Config: type

    def make_program(self, spec: PolicySpec, config: Any, assets: Assets) -> Program:
        """Return the program of one bundle; raises ValueError if the parts do not fit each other."""

    def make_graphs(self, spec: PolicySpec, config: Any, weights: Mapping[str, Any]) -> Mapping[str, Graph]:
        """Return the graphs of one bundle in torch; raises RuntimeError if the weights do not fit."""


def family(name: str) -> Family:
    """Return the family called `name`; raises ValueError for one that does not exist."""
    if name not in FAMILIES:
        raise ValueError(f"there is no policy family {name!r}; there are: {', '.join(FAMILIES)}")
    return cast(Family, import_module(FAMILIES[name]))
