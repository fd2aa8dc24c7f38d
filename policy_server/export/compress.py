"""Makes a smaller bundle of a MoDE bundle by merging experts, and measures what that costs."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from torch import Tensor
from tqdm import tqdm

from policy_models.mode.config import ModeConfig
from policy_models.mode.merge import Survey, dominant_alone, group, merge, survey
from policy_models.mode.routing import Routes
from policy_models.spec import Observation, PolicySpec, SamplingOptions
from policy_server.bundle import GRAPHS, Bundle, Manifest, load_bundle
from policy_server.catalog import load_engine
from policy_server.errors import BundleInvalid
from policy_server.export.bundle import write_bundle
from policy_server.export.observations import read_images
from policy_server.golden import draw_observation
from policy_server.runtime.sampling import drive
from policy_server.weights import FILE

logger = logging.getLogger(__name__)

ENGINE = "onnx"
How = Literal["drop", "merge"]
_TIMED = 10  # chunks of each bundle


@dataclass(frozen=True)
class Size:
    """What one bundle takes.

    Attributes:
        name: The policy.
        experts: How many each block has.
        parameters: Numbers in all its networks.
        weights_bytes: Size of the file that holds them.
        chunk_ms: Median time for a chunk on ONNX Runtime, with as many threads as the server would give it.
    """

    name: str
    experts: tuple[int, ...]
    parameters: int
    weights_bytes: int
    chunk_ms: float


@dataclass(frozen=True)
class Difference:
    """How far apart the actions of two policies are, as fractions of the action range: on average, and at most."""

    mean: float
    max: float


@dataclass(frozen=True)
class Compression:
    """What came of compressing a bundle.

    Attributes:
        before: The original.
        after: The new bundle.
        samples: Observations that both have answered, each with the same seed.
        recorded: Whether their images were recorded; otherwise they are noise.
        error: Between the two.
        between_seeds: Between the original and itself with another seed, for comparison.
    """

    before: Size
    after: Size
    samples: int
    recorded: bool
    error: Difference
    between_seeds: Difference


def compress(
    path: Path, output: Path, *, experts: int | None, how: How, observations: Path | None, samples: int
) -> Compression:
    """Write a bundle with fewer experts, and compare it with the original.

    Args:
        path: A bundle of the family "mode".
        output: The folder to make; its name is the new policy's.
        experts: How many each block keeps; None for exactly those that its own sampler and steps use, which changes no
            chunk that is asked for without other options.
        how: What becomes of a group of experts: "drop" keeps the most used one as it is, "merge" averages all.
        observations: An .npz file with one array of images per camera, (N, height, width, 3) uint8, under its name, to
            compare on; None for noise.
        samples: How many observations to compare on.

    Raises:
        BundleInvalid: The bundle cannot be compressed like that, the folder is taken, or the observations do not fit.
    """
    if output.exists():
        raise BundleInvalid(f"{output} exists already; nothing was written")
    bundle = load_bundle(path)
    config = _mergeable(bundle)
    seen = _observations(observations, bundle.spec, samples)
    assert bundle.spec.sampler is not None, "MoDE is a diffusion policy"
    logger.info("asking the routers of %s", bundle.name)
    found = survey(Routes(config.transformer, bundle.assets.weights), bundle.spec.sampler)
    kept = _kept(config, found, experts)

    weights = _load_weights(bundle)
    use = found.on_schedule if experts is None else found.use
    merged = group(use, found.similarity, kept)
    if how == "drop":
        use = dominant_alone(use, merged)
    transformer, small = merge(config.transformer, weights, merged, use)
    parameters = _count(weights), _count(small)
    del weights
    logger.info("writing %s", output)
    compressed = write_bundle(
        output,
        _manifest(bundle, output.name, replace(config, transformer=transformer), _described(experts, how)),
        normalizer=bundle.assets.normalizer,
        weights=small,
        tokenizer=bundle.assets.tokenizer,
        gradients=bool(bundle.gradients()),
    )
    del small
    logger.info("comparing %s with %s", compressed.name, bundle.name)
    runners = _Runner(bundle), _Runner(compressed)
    error, between_seeds = _differences(*runners, seen)
    before, after = (
        Size(b.name, b.config.transformer.kept, count, b.weights.stat().st_size, chunk_ms)
        for b, count, chunk_ms in zip((bundle, compressed), parameters, _chunk_ms(*runners, seen), strict=True)
    )
    for runner in runners:
        runner.engine.close()
    return Compression(before, after, samples, observations is not None, error, between_seeds)


def _mergeable(bundle: Bundle) -> ModeConfig:
    config = bundle.config
    if not isinstance(config, ModeConfig):
        raise BundleInvalid(
            f"{bundle.name} is a {bundle.manifest.family} bundle; only those of the family mode have experts to merge"
        )
    if config.transformer.merged:
        raise BundleInvalid(f"the experts of {bundle.name} are merged already; compress the original instead")
    if config.transformer.goal_routing:
        raise BundleInvalid(
            f"the routers of {bundle.name} look at the goal, so noise levels do not tell which experts are used"
        )
    return config


def _kept(config: ModeConfig, found: Survey, experts: int | None) -> tuple[int, ...]:
    there = config.transformer.experts
    if experts is None:
        kept = tuple((found.on_schedule > 0).sum(1).tolist())
        if set(kept) == {there}:
            raise BundleInvalid(
                f"every block uses all of its {there} experts; none can be dropped without a change, so say how many "
                "to keep"
            )
        return kept
    if not 1 <= experts < there:
        raise BundleInvalid(f"each block has {there} experts and can keep 1 to {there - 1} of them, got {experts}")
    return (experts,) * config.transformer.layers


def _described(experts: int | None, how: How) -> str:
    if experts is None:
        return "experts that its own sampler and steps never choose were dropped"
    if how == "drop":
        return "the most used experts answer for the others, grouped by router logits (as in arXiv:2310.01334)"
    return "experts were merged by use (M-SMoE, arXiv:2310.01334), without fine-tuning"


def _manifest(bundle: Bundle, name: str, config: ModeConfig, how: str) -> Manifest:
    original, shape = bundle.manifest, config.transformer
    return replace(
        original,
        name=name,
        description=f"{original.description.rstrip('.')}. Compressed: {how}.",
        config=asdict(config),
        files={},
        provenance={
            **original.provenance,
            "compressed_from": {
                "name": original.name,
                "version": original.version,
                "weights_sha256": original.files[f"{GRAPHS}/{FILE}"],
                "how": how,
                "experts_before": shape.experts,
                "experts_kept_by_block": list(shape.kept),
            },
        },
        results={},  # what was measured was measured with the original
    )


def _observations(path: Path | None, spec: PolicySpec, samples: int) -> list[Observation]:
    draw = np.random.default_rng(0)
    drawn = [draw_observation(spec, draw) for _ in range(samples)]
    if path is None:
        return drawn
    recorded = read_images(path, spec)
    count = min(map(len, recorded.values()))
    rows = draw.choice(count, samples, replace=samples > count)
    # Images are recorded; what is said to them comes from the spec's examples.
    return [
        replace(observation, images={name: images[row] for name, images in recorded.items()})
        for observation, row in zip(drawn, rows, strict=True)
    ]


class _Runner:
    """A bundle on ONNX Runtime, as the server would run it."""

    def __init__(self, bundle: Bundle) -> None:
        self.spec = bundle.spec
        self.engine = load_engine(bundle, ENGINE, threads=0).engine
        self._program = bundle.new_program()

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        """Return (H, A) actions."""
        options = SamplingOptions(seed)
        return drive(self._program.infer(observation, self._program.begin(), options), self.engine).actions


def _differences(before: _Runner, after: _Runner, seen: Sequence[Observation]) -> tuple[Difference, Difference]:
    """Return how far `after` is from `before`, and `before` from itself with other seeds."""
    chunks = []
    for seed, observation in enumerate(tqdm(seen, desc="compare", unit="observation")):
        wanted, got = before.chunk(observation, seed), after.chunk(observation, seed)
        chunks.append((wanted, got, before.chunk(observation, len(seen) + seed)))
    wanted, got, reseeded = np.stack(chunks, axis=1)  # each (N, H, A)
    span = _action_range(before.spec, wanted)
    errors, between_seeds = (np.abs(actions - wanted) / span for actions in (got, reseeded))
    return (
        Difference(float(errors.mean()), float(errors.max())),
        Difference(float(between_seeds.mean()), float(between_seeds.max())),
    )


def _chunk_ms(before: _Runner, after: _Runner, seen: Sequence[Observation]) -> tuple[float, float]:
    """Return the median time of a chunk of each; their goals must be embedded already."""
    times_ms: tuple[list[float], list[float]] = [], []
    for number in range(_TIMED):
        # In turn, so that a busy neighbour slows both.
        for runner, times in zip((before, after), times_ms, strict=True):
            started_at_s = time.perf_counter()
            runner.chunk(seen[number % len(seen)], number)
            times.append(1e3 * (time.perf_counter() - started_at_s))
    return median(times_ms[0]), median(times_ms[1])


def _action_range(spec: PolicySpec, actions: np.ndarray) -> np.ndarray:
    if spec.action.low and spec.action.high:
        return np.subtract(spec.action.high, spec.action.low)
    span: np.ndarray = np.ptp(actions, axis=(0, 1))
    return np.where(span > 0, span, 1.0)


def _load_weights(bundle: Bundle) -> dict[str, Tensor]:
    from policy_server.engine.torch import load_weights

    return load_weights(bundle.weights)


def _count(weights: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
