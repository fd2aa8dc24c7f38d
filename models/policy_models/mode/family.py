"""What the server needs of MoDE: its program, and its graphs when something is exported or run in torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from policy_models.diffusion.samplers import SAMPLERS
from policy_models.diffusion.schedules import SCHEDULES
from policy_models.mode.config import ModeConfig
from policy_models.program import Assets, Graph
from policy_models.spec import PolicySpec

if TYPE_CHECKING:
    from torch import Tensor

    from policy_models.mode.program import ModeProgram

Config = ModeConfig


def make_program(spec: PolicySpec, config: ModeConfig, assets: Assets) -> "ModeProgram":
    """Return the program of one bundle; raises ValueError if the parts do not fit each other."""
    from tokenizers import Tokenizer

    from policy_models.mode.program import ModeProgram
    from policy_models.mode.routing import Routes

    wanted = "text" if config.text else "image"
    if spec.sampler is None or not spec.cameras or spec.goal.kind != wanted:
        raise ValueError(f"this MoDE bundle needs a sampler, cameras and a goal of kind {wanted!r}")
    if spec.sampler.sampler not in SAMPLERS or spec.sampler.schedule not in SCHEDULES:
        raise ValueError(
            f"sampler {spec.sampler.sampler!r} with schedule {spec.sampler.schedule!r}; there are the samplers "
            f"{', '.join(SAMPLERS)} and the schedules {', '.join(SCHEDULES)}"
        )
    for what, got, fits in (
        ("action width", spec.action.width, config.transformer.action_width),
        ("horizon", spec.horizon, config.transformer.horizon),
        ("window", spec.window, 1),
    ):
        if got != fits:
            raise ValueError(f"{what} is {got}, but the network has {fits}")
    if config.vision and (spec.goal.camera is None or spec.goal.camera.height != config.vision.image):
        raise ValueError(f"goal images must be resized to {config.vision.image} pixels a side, see goal.camera")
    if config.text and assets.tokenizer is None:
        raise ValueError("a bundle that reads instructions needs a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(assets.tokenizer) if assets.tokenizer else None
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"tokenizer.json: {error}") from error
    if tokenizer and config.text and tokenizer.get_vocab_size() != config.text.vocabulary:
        raise ValueError(
            f"tokenizer.json has {tokenizer.get_vocab_size()} tokens, the language model {config.text.vocabulary}"
        )
    routes = Routes(config.transformer, assets.weights)
    return ModeProgram(spec, config, routes, tokenizer=tokenizer, normalizer=assets.normalizer)


def make_graphs(spec: PolicySpec, config: ModeConfig, weights: "Mapping[str, Tensor]") -> dict[str, Graph]:
    """Return the graphs of one bundle in torch, with example inputs of batch 2; weights must fit key by key."""
    import torch

    from policy_models.mode.assembly import ModeNetworks
    from policy_models.mode.network import SteeredDenoiser, branching, dense
    from policy_models.mode.vision import settled

    networks = ModeNetworks(config, [camera.name for camera in spec.cameras])
    networks.load_state_dict(weights, assign=True)  # not copied: a released policy is 3 GB
    networks.eval()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> "Tensor":
        return torch.randn(*shape, generator=generator)

    def draw_image(height: int, width: int) -> "Tensor":
        return torch.randint(0, 256, (2, height, width, 3), generator=generator, dtype=torch.uint8)

    shape = config.transformer
    route = torch.zeros(2, shape.layers, max(shape.kept))
    route[:, :, : shape.top_k] = 1 / shape.top_k
    graphs = {
        "perceive": Graph(
            module=networks.perceive,
            exported=settled(networks.perceive),
            inputs={
                "goal": draw(2, shape.goal_width),
                **{f"image_{c.name}": draw_image(c.height, c.width) for c in spec.cameras},
            },
            outputs=("tokens",),
        ),
        "denoise": Graph(
            module=networks.denoiser,
            exported=branching(networks.denoiser),
            steered=SteeredDenoiser(networks.denoiser),
            differentiated=dense(networks.denoiser),
            inputs={
                "noisy": draw(2, shape.horizon, shape.action_width),
                "sigma": draw(2).abs() + 0.1,
                "tokens": draw(2, len(spec.cameras), shape.token_width),
                "goal": draw(2, shape.goal_width),
                "route": route,
            },
            outputs=("denoised",),
        ),
    }
    if networks.language and config.text:
        tokens = torch.zeros(2, config.text.context, dtype=torch.int64)
        tokens[:, :3] = torch.tensor([config.text.vocabulary - 2, 1, config.text.vocabulary - 1])
        graphs["language"] = Graph(networks.language, {"tokens": tokens}, ("goal",))
    if networks.look_at_goal and config.vision:
        image = draw_image(config.vision.image, config.vision.image)
        graphs["look_at_goal"] = Graph(networks.look_at_goal, {"image": image}, ("goal",))
    return graphs
