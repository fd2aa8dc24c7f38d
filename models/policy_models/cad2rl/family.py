"""What the server needs of CAD2RL: its program, and its graph when something is exported or run in torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from policy_models.cad2rl.config import Cad2rlConfig
from policy_models.cad2rl.program import Cad2rlProgram
from policy_models.directions import VELOCITY
from policy_models.program import Assets, Graph
from policy_models.spec import PolicySpec

if TYPE_CHECKING:
    from torch import Tensor

Config = Cad2rlConfig


def make_program(spec: PolicySpec, config: Cad2rlConfig, assets: Assets) -> Cad2rlProgram:
    """Return the program of one bundle; raises ValueError if the parts do not fit each other."""
    wanted = (*VELOCITY, "yaw_rate")
    if spec.action.names != wanted:
        raise ValueError(f"CAD2RL's actions are {', '.join(wanted)}; the spec has {', '.join(spec.action.names)}")
    if spec.collision is None or len(spec.cameras) != 1:
        raise ValueError("a CAD2RL bundle needs one camera and a collision grid over it")
    camera, grid = spec.cameras[0], spec.collision
    for what, got, fits in (
        (f"camera {camera.name!r}", (camera.height, camera.width), (config.image, config.image)),
        ("the collision grid", (grid.rows, grid.columns), (config.rows, config.columns)),
    ):
        if got != fits:
            raise ValueError(f"{what} is {got[0]}x{got[1]}, but the network has {fits[0]}x{fits[1]}")
    return Cad2rlProgram(spec, config, grid)


def make_graphs(spec: PolicySpec, config: Cad2rlConfig, weights: "Mapping[str, Tensor]") -> dict[str, Graph]:
    """Return the graph of one bundle in torch, with example inputs of batch 2; weights must fit key by key."""
    import torch

    from policy_models.cad2rl.network import make_network

    network = make_network(config)
    network.load_state_dict(weights)
    network.eval()
    shape = (2, config.image, config.image, 3)
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {"look": Graph(network, {"image": image}, ("collision",))}
