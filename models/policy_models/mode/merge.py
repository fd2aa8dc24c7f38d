"""Merges the experts of a MoDE network, guided by what its routers choose.

Source: Li et al. 2024, arXiv:2310.01334, section 3 (M-SMoE). The paper measures routers on data; MoDE's see the noise
level and nothing else, so the levels tell everything about them. Its fine-tuning after merging is left out: there may
be no data where a policy is compressed; without it an average may answer worse than the most used expert alone, see
`dominant_alone`. Where we depart from the paper otherwise, the function says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor
from tqdm import tqdm

from policy_models.diffusion.preconditioning import loglogistic
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.mode.config import TransformerConfig
from policy_models.mode.routing import Routes, asked_levels
from policy_models.spec import SamplerSpec

# A released policy has 12 routers of width 2048, and each level takes all of them: 512 take seconds.
_TRAINING_LEVELS = 512


@dataclass(frozen=True)
class Survey:
    """What the routers of a policy do with their experts.

    Attributes:
        on_schedule: Mean weight of each expert over the levels that the policy's own sampler asks for in its own number
            of steps, (blocks, E); each row sums to 1.
        use: The same, half of it over those levels and half over levels as training draws them.
        similarity: How alike each two experts are to their router, (blocks, E, E), from -1 to 1.
    """

    on_schedule: np.ndarray
    use: np.ndarray
    similarity: np.ndarray


def survey(routes: Routes, sampler: SamplerSpec) -> Survey:
    """Ask every router about all noise levels that matter.

    Those of the schedule are what robots ask for unless they say otherwise, but they are few, and other step counts ask
    for others; so the levels of training, within the schedule's range, count as much as they do.

    The paper counts how often an expert is chosen. Where two are chosen of four, and training has balanced them, counts
    hardly differ; weights do. Keeping 2 of 4 by weight changed the actions of the bundled Meta-World policy by 0.8 % of
    their range, by count by 1.3 % (64 recorded observations, nothing averaged).
    """
    assert not routes.config.goal_routing and not routes.config.merged, "levels alone must decide, for single experts"
    sets = (schedule_levels(sampler), training_levels(sampler, _TRAINING_LEVELS))
    uses = [routes.of(levels).mean(0) for levels in sets]
    alike = similarity([routes.probabilities(levels) for levels in sets])
    return Survey(uses[0], np.mean(uses, axis=0), alike)


def schedule_levels(sampler: SamplerSpec) -> tuple[float, ...]:
    """Return every noise level that a policy's own sampler asks about in its own number of steps."""
    levels = NoiseLevels(sampler.sigma_min, sampler.sigma_max, sampler.rho)
    return asked_levels(sampler.sampler, SCHEDULES[sampler.schedule](sampler.steps, levels))


def training_levels(sampler: SamplerSpec, count: int) -> tuple[float, ...]:
    """Return `count` noise levels within the sampler's range as training draws them; always the same."""
    drawn = loglogistic(
        count, sigma_min=sampler.sigma_min, sigma_max=sampler.sigma_max, generator=torch.Generator().manual_seed(0)
    )
    return tuple(drawn.tolist())


def similarity(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """Return the cosine of each two experts' router logits over noise levels.

    Softmax does not see what is added to all logits of one level, so their mean is taken away first; the paper leaves
    it in.

    Args:
        probabilities: Sets of levels that count alike, each with every router's probabilities, (N, blocks, E).

    Returns:
        (blocks, E, E).
    """
    products = []
    for set_of_levels in probabilities:
        logits = np.log(set_of_levels)
        logits -= logits.mean(-1, keepdims=True)
        products.append(np.einsum("nbi,nbj->bij", logits, logits) / len(logits))
    product = np.mean(products, axis=0)
    norm = np.sqrt(np.einsum("bii->bi", product)) + np.finfo(np.float32).tiny
    cosine: np.ndarray = product / (norm[:, :, None] * norm[:, None, :])
    return cosine


def group(use: np.ndarray, similarity: np.ndarray, kept: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Gather every block's experts around its most used ones.

    The paper shares a budget among all layers, by use. Here every block is told its own, since a policy is compressed
    to fit, and blocks of one size are easier to reason about.

    Args:
        use: How much each expert is used, (blocks, E). Among equals, the one of lower number comes first.
        similarity: (blocks, E, E).
        kept: How many experts each block keeps.

    Returns:
        `TransformerConfig.merged`. The groups of a block are in the order of their dominant experts.
    """
    merged = []
    for used, alike, count in zip(use, similarity, kept, strict=True):
        dominant = sorted(np.argsort(-used, kind="stable")[:count].tolist())
        nearest = alike[:, dominant].argmax(1).tolist()
        merged.append(tuple(dominant.index(e) if e in dominant else nearest[e] for e in range(len(used))))
    return tuple(merged)


def dominant_alone(use: np.ndarray, merged: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Return 1 for the most used expert of each group and 0 for all others, (blocks, E) as `use`.

    Merging by that instead of `use` keeps those as they are and drops the others, whose noise levels they then serve.
    Without fine-tuning that is the better way: the bundled Meta-World policy's actions changed by 0.8 % of their range
    with 2 experts kept of 4, and by 2.4 % with 2 averages.
    """
    alone = np.zeros_like(use)
    for block, answers in enumerate(merged):
        for number in range(max(answers) + 1):
            used = np.where(np.array(answers) == number, use[block], -1)
            alone[block, used.argmax()] = 1
    return alone


@torch.no_grad()
def merge(
    config: TransformerConfig,
    weights: Mapping[str, Tensor],
    merged: tuple[tuple[int, ...], ...],
    use: np.ndarray,
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Replace every group of experts by one: aligned with the most used among them, then averaged by use.

    An expert of no use leaves no trace, so merging experts that no level chooses into others drops them, exactly.

    Args:
        config: Of a network whose experts all answer for themselves.
        weights: The networks' weights by name, as bundles store them.
        merged: From `group`.
        use: How much each expert counts, (blocks, E).

    Returns:
        Configuration and weights of the smaller network; tensors that are no expert's are not copied.
    """
    assert not config.merged, "experts that were averaged have forgotten how much each was used"
    small = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for block, answers in enumerate(tqdm(merged, desc="merge", unit="block")):
        for number in range(max(answers) + 1):
            members = [expert for expert, answering in enumerate(answers) if answering == number]
            experts = [_read(weights, block, expert) for expert in members]
            small |= _written(merge_group(experts, use[block, members]), block, number)
    return replace(config, merged=merged), small


@dataclass(frozen=True)
class HiddenUnits:
    """One SwishGLU expert as a list of its hidden units, which may stand in any order.

    Attributes:
        linear: What enters a unit's answer as a factor and leaves it as another, (4 d, 2 d + 1): its row of the linear
            half of `project` with the bias, and its column of the output matrix. The sign of the whole does not matter.
        gate: What decides how far a unit is open, (4 d, d + 1): its row of the gating half of `project` with the bias.
    """

    linear: Tensor
    gate: Tensor


def merge_group(experts: Sequence[HiddenUnits], use: np.ndarray) -> HiddenUnits:
    """Return the average of experts, each aligned with the most used one and weighted by `use`, (experts,)."""
    dominant = experts[int(use.argmax())]
    total = float(use.sum())
    if total == 0:
        return dominant
    linear, gate = torch.zeros_like(dominant.linear), torch.zeros_like(dominant.gate)
    for expert, used in zip(experts, use.tolist(), strict=True):
        if used > 0:
            units = expert if expert is dominant else align(expert, dominant)
            linear += used / total * units.linear
            gate += used / total * units.gate
    return HiddenUnits(linear, gate)


def align(expert: HiddenUnits, reference: HiddenUnits) -> HiddenUnits:
    """Return the same function with its hidden units in the order, and with the signs, that fit `reference` best.

    The order is the one of the largest inner product of all weights with those of the reference, so of the smallest
    distance (Ainsworth et al. 2022, weight matching). The paper's experts are not gated; ours may also turn the sign of
    a unit's linear half if its output column is turned with it.
    """
    products = reference.linear @ expert.linear.T  # (4 d, 4 d)
    fit = products.abs() + reference.gate @ expert.gate.T
    rows, order = (torch.from_numpy(indices) for indices in linear_sum_assignment(fit.numpy(), maximize=True))
    sign = torch.where(products[rows, order] < 0, -1.0, 1.0)
    return HiddenUnits(expert.linear[order] * sign[:, None], expert.gate[order])


def _read(weights: Mapping[str, Tensor], block: int, expert: int) -> HiddenUnits:
    name = _name(block, expert)
    linear, gate = weights[f"{name}.mlp.0.project.weight"].chunk(2)
    linear_bias, gate_bias = weights[f"{name}.mlp.0.project.bias"].chunk(2)
    out = weights[f"{name}.mlp.2.weight"]
    return HiddenUnits(
        torch.cat((linear, linear_bias[:, None], out.T), dim=1), torch.cat((gate, gate_bias[:, None]), dim=1)
    )


def _written(units: HiddenUnits, block: int, expert: int) -> dict[str, Tensor]:
    name = _name(block, expert)
    d = units.gate.shape[1] - 1
    linear, linear_bias, out = units.linear.split((d, 1, d), dim=1)
    gate, gate_bias = units.gate.split((d, 1), dim=1)
    return {
        f"{name}.mlp.0.project.weight": torch.cat((linear, gate)),
        f"{name}.mlp.0.project.bias": torch.cat((linear_bias, gate_bias))[:, 0].contiguous(),
        f"{name}.mlp.2.weight": out.T.contiguous(),
    }


def _name(block: int, expert: int) -> str:
    return f"denoiser.inner_model.blocks.{block}.experts.expert_{expert}"
