"""The ways to take a denoising step of MoDE that `gpu_mode` compares. Needs torch and `policy_models` alone.

Each holds one batch of robots that step together. A step replaces their noisy actions by those of the next level, so
what a step reads was written by the one before it, and nothing can be skipped.
"""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.token_routing import sharing_copy, token_routed
from policy_models.diffusion.preconditioning import Denoiser, scalings
from policy_models.mode.config import TransformerConfig
from policy_models.mode.network import Block, Experts, ModeDiT, make_denoiser
from policy_models.program import Graph

Choice = Sequence[tuple[int, float]]  # number and weight of every expert that was chosen
Plan = Sequence[Sequence[Choice]]  # by noise level and block


@dataclass(frozen=True)
class Robots:
    """What a batch of robots sees, on the device.

    Attributes:
        x: Noisy actions, (B, H, A) float32; steps write into it.
        tokens: Encoded images, (B, C, token width), in the network's precision.
        goal: Embedded goals, (B, goal width), likewise.
        sigmas: Noise levels that are walked down, ending with 0.
    """

    x: Tensor
    tokens: Tensor
    goal: Tensor
    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        """How many steps make a chunk."""
        return len(self.sigmas) - 1


class Stepper(Protocol):
    """One way to take steps."""

    def step(self, i: int) -> None:
        """Denoise the robots' actions at level i, and move them to level i + 1 (DDIM)."""


class Eager:
    """Kernels are launched one by one from Python; `Routed` and `Settled` say which."""

    def __init__(self, network: ModeDiT, sigma_data: float, robots: Robots) -> None:
        self.robots = robots
        self._network = network
        self._sigma_data = sigma_data
        # On the device beforehand: a level that is copied there in each step would make the device wait.
        self._sigmas = [torch.full((len(robots.x),), sigma, device=robots.x.device) for sigma in robots.sigmas[:-1]]
        config = network.config
        self._no_route = robots.x.new_zeros(len(robots.x), config.layers, config.experts)

    def step(self, i: int) -> None:
        """See `Stepper.step`. Preconditioning and DDIM stay in float32."""
        robots, sigma = self.robots, self._sigmas[i]
        dtype = robots.tokens.dtype
        c_skip, c_out, c_in = (c[:, None, None] for c in scalings(sigma, self._sigma_data))
        F = self._network((c_in * robots.x).to(dtype), sigma.to(dtype), robots.tokens, robots.goal, self._no_route)
        D = c_out * F.float() + c_skip * robots.x
        robots.x.copy_(towards(robots, D, i))


def towards(robots: Robots, D: Tensor, i: int) -> Tensor:
    """Return DDIM's actions at level i + 1 for the clean actions D seen at level i."""
    share = robots.sigmas[i + 1] / robots.sigmas[i]
    return share * robots.x + (1 - share) * D


def routed(denoiser: Denoiser, robots: Robots) -> Eager:
    """Return the network as upstream runs it: every token is routed, in every block and at every step."""
    network = token_routed(denoiser).inner_model
    assert isinstance(network, ModeDiT)
    return Eager(network, denoiser.sigma_data, robots)


class ChosenExperts(nn.Module):
    """Experts of which some were chosen by number: no router, no gathering, nothing that waits for the device."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts.values())
        self.choice: Choice = ()

    def forward(self, z: Tensor, route: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d); `route` is ignored."""
        out = torch.zeros_like(z)
        for j, weight in self.choice:
            out = out + weight * self.experts[j](z)
        return out


class Settled(Eager):
    """Routes were settled per noise level; every weight is shared with the network that they were settled for."""

    def __init__(self, denoiser: Denoiser, plan: Plan, robots: Robots) -> None:
        copied = sharing_copy(denoiser)
        assert isinstance(copied.inner_model, ModeDiT)
        super().__init__(copied.inner_model, denoiser.sigma_data, robots)
        self._experts = []
        for block in copied.inner_model.blocks:
            assert isinstance(block, Block) and isinstance(block.experts, Experts)
            self._experts.append(ChosenExperts(block.experts))
            block.add_module("experts", self._experts[-1])
        self._plan = plan

    def step(self, i: int) -> None:
        """See `Stepper.step`."""
        for experts, choice in zip(self._experts, self._plan[i], strict=True):
            experts.choice = choice
        super().step(i)


class Graphed:
    """One CUDA graph per noise level, its experts settled when it was captured; all read the same weights."""

    def __init__(self, settled: Settled) -> None:
        self._graphs: list[Any] = []
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate what they need on the first calls
            for i in range(settled.robots.steps):
                settled.step(i)
        torch.cuda.current_stream().wait_stream(aside)
        pool = None
        for i in range(settled.robots.steps):
            graph = torch.cuda.CUDAGraph()
            # One pool serves all, since they run one after the other and hand on nothing but the robots' actions.
            with torch.cuda.graph(graph, pool=pool):
                settled.step(i)
            pool = graph.pool()
            self._graphs.append(graph)

    def step(self, i: int) -> None:
        """See `Stepper.step`."""
        self._graphs[i].replay()


class Onnx:
    """The graph that this server exports, which branches by expert, in ONNX Runtime on one of its providers."""

    def __init__(self, model: Path, provider: str, routes: Tensor, robots: Robots) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        if provider not in ort.get_available_providers():
            raise ImportError(f"this ONNX Runtime has no {provider}")
        providers = dict.fromkeys((provider, "CPUExecutionProvider"))
        self._session = ort.InferenceSession(model, options, providers=list(providers))
        if self._session.get_providers()[0] != provider:
            raise RuntimeError(f"ONNX Runtime could not start {provider}")
        self.robots = robots
        self._denoised = torch.empty_like(robots.x)
        self._bound: list[Tensor] = []  # ONNX Runtime holds addresses, not tensors
        self._bindings = [self._bind(level, route) for level, route in zip(robots.sigmas, routes, strict=False)]

    def step(self, i: int) -> None:
        """See `Stepper.step`."""
        if self.robots.x.is_cuda:  # the two libraries work on streams of their own
            torch.cuda.current_stream().synchronize()
        self._session.run_with_iobinding(self._bindings[i])
        self.robots.x.copy_(towards(self.robots, self._denoised, i))

    def _bind(self, level: float, route: Tensor) -> Any:
        x, rows = self.robots.x, len(self.robots.x)
        inputs = {
            "noisy": x,
            "sigma": x.new_full((rows,), level),
            "tokens": self.robots.tokens,
            "goal": self.robots.goal,
            "route": route.expand(rows, -1, -1).contiguous(),
        }
        binding = self._session.io_binding()
        self._bound += inputs.values()
        place = (x.device.type, x.device.index or 0, "float32")
        for name, tensor in inputs.items():
            binding.bind_input(name, *place, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output("denoised", *place, tuple(x.shape), self._denoised.data_ptr())
        return binding


def draw_network(config: TransformerConfig, device: str) -> Denoiser:
    """Return a float32 network with random weights whose noise levels choose differently."""
    torch.manual_seed(0)
    with torch.device(device):
        denoiser = make_denoiser(config).eval()
    for name, parameter in denoiser.named_parameters():
        if ".router." in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
    return denoiser.requires_grad_(False)


def settle(denoiser: Denoiser, sigmas: Sequence[float]) -> tuple[Tensor, Plan]:
    """Return every level's route, (levels, blocks, E) float32, and the same as numbers and weights."""
    network = denoiser.inner_model
    assert isinstance(network, ModeDiT)
    like = network.pos_emb
    # In the network's own precision: a router in bfloat16 may choose otherwise than one in float32.
    levels = torch.tensor(list(sigmas), device=like.device).to(like.dtype)
    routes = network.route(levels, like.new_zeros(len(sigmas), network.config.goal_width)).float()
    return routes, [[[(j, w) for j, w in enumerate(block) if w] for block in level] for level in routes.tolist()]


def export(denoiser: Denoiser, robots: Robots, routes: Tensor, folder: Path) -> Path:
    """Write the network as this server exports it; needs the extra `export`. Returns the graph's path."""
    from policy_models.mode.network import branching
    from policy_server.export.onnx import export_graphs

    on_cpu = deepcopy(denoiser).to("cpu")  # what was captured in CUDA graphs must stay where it is
    inputs = {
        "noisy": robots.x[:1].cpu().repeat(2, 1, 1),
        "sigma": torch.ones(2),
        "tokens": robots.tokens[:1].cpu().float().repeat(2, 1, 1),
        "goal": robots.goal[:1].cpu().float().repeat(2, 1),
        "route": routes[:1].cpu().repeat(2, 1, 1),
    }
    graph = Graph(on_cpu, inputs, ("denoised",), branching(on_cpu))
    export_graphs({"denoise": graph}, on_cpu.state_dict(), folder)
    return folder / "denoise.onnx"


def bandwidth(device: str, size_bytes: int) -> float:
    """Return how many bytes a second a large copy reads and writes: the best of ten."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    return max(2 * size_bytes / time_s(device, lambda: target.copy_(source)) for _ in range(10))


def time_s(device: str, work: Callable[[], Any]) -> float:
    """Return how long some work takes, the device's share included."""
    wait(device)
    started_at_s = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started_at_s


def wait(device: str) -> None:
    """Wait until the device has done everything it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
