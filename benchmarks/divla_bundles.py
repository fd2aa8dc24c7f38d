"""DiVLA policies with random weights, of the sizes that the benchmark needs."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from benchmarks.kept import kept_bundle
from benchmarks.settings import Settings
from policy_models.divla.config import SCALE_DP, DivlaConfig, EyesConfig, LanguageConfig, UnetConfig
from policy_models.normalizer import Normalizer, Statistics
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, ReasoningSpec, SamplerSpec, VectorSpec
from policy_server.bundle import FORMAT, MANIFEST, Bundle, Manifest

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 14  # of states and actions: two arms of seven joints
_SAMPLER = SamplerSpec("ddim_clipped", "squaredcos", 10, sigma_min=0.01, sigma_max=100.0)
_INSTRUCTION = "put the red block into the bin on the left"
_LEAST_VOCABULARY = 400
_EMBEDDING = "vlm.model.language_model.embed_tokens.weight"
# Random weights say words that are nearly as likely as others, and rounding decides between them.
_TOLERANCE: Mapping[str, float] = {"f32": 1e-3, "bf16": 0.2}

# As wide as Qwen2-VL-2B, so that the head is told as much as DexVLA's, and next to no language model.
_TOLD = LanguageConfig(_LEAST_VOCABULARY, layers=1, ffn_width=1536, context=256)
_GLANCE = EyesConfig(layers=1, width=64, heads=2)
SCALE_DP_L = DivlaConfig(SCALE_DP["L"], WIDTH, WIDTH, 50, _GLANCE, _TOLD, reasoning_tokens=8)
UNET = DivlaConfig(UnetConfig(), WIDTH, WIDTH, 16, _GLANCE, _TOLD, reasoning_tokens=8)
TALKING = DivlaConfig(
    SCALE_DP["S"],
    WIDTH,
    WIDTH,
    50,
    EyesConfig(layers=8, width=512, heads=8),
    LanguageConfig(8000, 512, 8, 8, 2, 2048, rope_sections=(8, 12, 12), context=1024),
    reasoning_tokens=64,
)


@dataclass(frozen=True)
class Policies:
    """What is measured.

    Attributes:
        heads: Policies with a head of released size and hardly a language model, by what their heads are called.
        talking: One with a language model.
        acting: A small one, which reasons as long as its spec says.
    """

    heads: Mapping[str, Bundle]
    talking: Bundle
    acting: Bundle


def divla_policies(settings: Settings, tokens: int) -> Policies:
    """Return the policies, those that are not there yet written first; for `--quick` the small one for everything.

    Args:
        settings: Of the run.
        tokens: The most that the small one can reason.
    """
    acting = _small(settings, tokens)
    if settings.quick:
        return Policies({"the small UNet": acting}, acting, acting)

    def keep(name: str, config: DivlaConfig, spec: PolicySpec, size: str) -> Bundle:
        return kept_bundle(settings.cache / name, config, spec, _write, f"{size}, some minutes")

    table = tuple(CameraSpec(name, 252, 308) for name in ("top", "left_wrist", "right_wrist"))
    glance = (CameraSpec("top", 56, 56),)
    return Policies(
        {
            "ScaleDP-L": keep("divla-scale-dp-l", SCALE_DP_L, _spec(SCALE_DP_L, glance), "1.9 GB"),
            "the UNet": keep("divla-unet", UNET, _spec(UNET, glance), "0.5 GB"),
        },
        keep("divla-talking", TALKING, _spec(TALKING, table), "0.5 GB"),
        acting,
    )


def shortened(bundle: Bundle, tokens: int, path: Path) -> Path:
    """Write a copy of a bundle of random weights that reasons in at most `tokens` tokens; return its folder.

    The golden case stays what it is: fresh weights let no reasoning change an action. The server would say so.
    """
    shutil.copytree(bundle.path, path)
    manifest = yaml.safe_load((path / MANIFEST).read_text(encoding="utf-8"))
    manifest["spec"]["reasoning"]["tokens"] = tokens
    (path / MANIFEST).write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    return path


def describe(bundle: Bundle) -> str:
    """Return what a bundle is, in words."""
    config: DivlaConfig = bundle.config
    weights = bundle.assets.weights
    counts = {
        part: sum(weights[name].size for name in weights if name.startswith(part)) / 1e6 for part in ("vlm", "head")
    }
    eyes, language, cameras = config.eyes, config.language, bundle.spec.cameras
    return (
        f"random weights, {counts['head']:.3g} million in the head and {counts['vlm']:.3g} in the language model "
        f"(image tower {eyes.layers} x {eyes.width}, language {language.layers} x {language.width}, vocabulary "
        f"{language.vocabulary}); {len(cameras)} image{'s' if len(cameras) > 1 else ''} of {cameras[0].height} x "
        f"{cameras[0].width}, chunks of {config.horizon} actions of {config.action_width} numbers"
    )


def _small(settings: Settings, tokens: int) -> Bundle:
    from policy_models.divla.train import make_config, make_spec

    config = make_config()
    config = replace(config, language=replace(config.language, context=512), reasoning_tokens=tokens)
    spec = replace(make_spec(), reasoning=ReasoningSpec(tokens, budget_s=60.0))
    return kept_bundle(settings.cache / "divla-small", config, spec, _write, "a minute")


def _spec(config: DivlaConfig, cameras: tuple[CameraSpec, ...]) -> PolicySpec:
    names = tuple(f"joint_{i}" for i in range(WIDTH))
    joints = VectorSpec(names, ("",) * WIDTH, (-1.0,) * WIDTH, (1.0,) * WIDTH)
    return PolicySpec(
        action=joints,
        state=joints,
        cameras=cameras,
        goal=GoalSpec("text", examples=(_INSTRUCTION,)),
        horizon=config.horizon,
        step_s=1 / 50,
        sampler=_SAMPLER,
        reasoning=ReasoningSpec(config.reasoning_tokens, budget_s=60.0),
    )


def random_weights(config: DivlaConfig, tokenizer: str) -> "dict[str, Tensor]":
    """Return the weights of a policy that reasons on until it has said the most tokens."""
    from policy_models.divla.network import DivlaNetworks
    from policy_models.divla.prompt import Vocabulary

    vocabulary = Vocabulary(tokenizer)
    # The output layer is the embedding.
    state = DivlaNetworks(config).state_dict()
    weights = {name: value for name, value in state.items() if name != "vlm.lm_head.weight"}
    # What has an embedding of 0 is never the likeliest: answers are of letters, and nothing ends them.
    silent = [i for i in range(config.language.vocabulary) if not vocabulary.decode([i]).strip().isalpha()]
    weights[_EMBEDDING][silent] = 0
    return weights


def _write(path: Path, config: DivlaConfig, spec: PolicySpec) -> None:
    from policy_models.divla.tokenizer import learn_tokenizer
    from policy_server.export.bundle import write_bundle

    tokenizer = learn_tokenizer(spec.goal.examples, _LEAST_VOCABULARY)
    state, action = (
        Statistics((0.0,) * width, (1.0,) * width, (-1.0,) * width, (1.0,) * width)
        for width in (config.state_width, config.action_width)
    )
    write_bundle(
        path,
        Manifest(
            FORMAT, path.name, "divla", "1", "Random weights.", "Apache-2.0", spec, asdict(config), dict(_TOLERANCE)
        ),
        normalizer=Normalizer(state, action),
        weights=random_weights(config, tokenizer),
        tokenizer=tokenizer,
        gradients=False,
    )
