"""One action chunk of a MoDE policy of released size: experts settled once, against routing every token.

Everything from two camera images of 224x224 to ten actions: both image encoders once, the instruction remembered, ten
denoising steps of a transformer with 12 blocks of width 1024 and 4 experts each. The weights are random, the sizes are
those of the published checkpoints. Images and noise are drawn anew for every chunk.

The yardstick is the same network in eager torch as upstream's evaluation runs it: every block asks its router about
every token's copy of the noise level, at every step, and gathers tokens by expert. `eager torch, routes settled` is
given what a router would say, which depends on the noise level alone: that much is expert caching by itself. This
server settles routes when it loads the policy, and hands them to a compiled graph that branches by expert and holds
every weight once. Upstream can fuse the chosen experts' weights for each level instead; its evaluation does not, and
the copies take 100 MB a block and level, 12 GB for this policy.

Contenders take turns as in the first benchmark, each in a process of its own (the two of eager torch share one), and
first must give the same actions. `openvino-bf16` computes in bfloat16, `openvino-int8` has int8 weights and computes in
float32, everything else is float32. `auto` is what the server runs unless told otherwise; the engine that it chose is
not listed again. All together need 16 GB of memory.
"""

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import AUTO, EAGER, EAGER_SETTLED, Worker, check_equal
from benchmarks.large_bundle import describe, large_bundle
from benchmarks.machine import describe_machine
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.result import Bar, Result, Series, ms
from benchmarks.settings import Settings
from policy_models.mode.config import TransformerConfig
from policy_server.bundle import Bundle
from policy_server.golden import draw_observation

if TYPE_CHECKING:
    from benchmarks.eager_mode import EagerMode

ROUNDS, BLOCK = 15, 1
FAST_F32 = "openvino"
SERVED = ("openvino-int8", "openvino-bf16", FAST_F32, "onnx")
WANTED, WANTED_F32 = 4.0, 2.0
OBSERVATIONS = 3
PANEL = "each in a process of its own"


def run(settings: Settings, command: str) -> Result:
    """Time eager torch and every engine."""
    machine = describe_machine()
    bundle = large_bundle(settings)
    rounds = settings.rounds(ROUNDS)
    draw = np.random.default_rng(1)
    with ExitStack() as stack:
        tqdm.write("expert_caching: loading everything that takes part")
        workers = {AUTO: stack.enter_context(Worker(bundle.path, (AUTO,)))}
        chosen = workers[AUTO].engines[AUTO]
        # What `auto` chose is not loaded twice: every process holds gigabytes.
        for group in [*((name,) for name in SERVED if name != chosen), (EAGER_SETTLED, EAGER)]:
            workers.update(dict.fromkeys(group, stack.enter_context(Worker(bundle.path, group))))
        names = list(workers)
        times: dict[str, list[list[float]]] = {name: [] for name in names}
        drifts = check_equal(bundle, workers, EAGER, OBSERVATIONS)
        arithmetic = _arithmetic(workers)
        for i in tqdm(range(rounds), desc="expert_caching", unit="round"):
            for name in map(str, draw.permutation(names)):
                times[name].append(workers[name].time_block_ms(name, i, BLOCK))
    labels = {name: f"{AUTO}: {chosen}" if name == AUTO else name for name in names}
    return Result(
        name="expert_caching",
        machine=machine,
        command=command,
        columns=("", "p50 ms", "slowest ms", "times as fast as eager torch", "drift"),
        rows=tuple(
            (
                f"**{labels[name]}**" if name == AUTO else labels[name],
                ms(float(np.median(times[name]))),
                ms(float(np.max(times[name]))),
                str(ratio_of(times[EAGER], times[name])),
                f"{drifts[name]:.0e}",
            )
            for name in names
        ),
        series=tuple(Series.of(PANEL, labels[name], _role(name), np.ravel(times[name])) for name in names),
        bars=(
            _bar(f"the default engine ({labels[AUTO]})", WANTED, ratio_of(times[EAGER], times[AUTO])),
            _bar(
                f"float32 ({FAST_F32})",
                WANTED_F32,
                ratio_of(times[EAGER], times[AUTO if chosen == FAST_F32 else FAST_F32]),
            ),
        ),
        facts={
            "policy": describe(bundle),
            "rounds": f"{rounds} of {BLOCK} chunk for each contender, after one that is not counted",
            "arithmetic of a step": arithmetic,
            "weights of a step": weights_of_a_step(bundle.config.transformer),
            "drift": f"largest deviation from eager torch over {OBSERVATIONS} random observations, as a fraction of "
            "the action's range",
        },
    )


def _count_flops(eager: "EagerMode", bundle: Bundle) -> tuple[int, int]:
    """Return the floating-point operations of one denoising step, and of a whole chunk with its instruction."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = bundle.config.transformer
    noisy = torch.randn(1, config.horizon, config.action_width)
    tokens = torch.randn(1, len(bundle.spec.cameras), config.token_width)
    with torch.inference_mode(), FlopCounterMode(display=False) as step:
        eager.denoise(noisy, 1.0, tokens, torch.randn(1, config.goal_width))
    eager.forget()
    with FlopCounterMode(display=False) as chunk:
        eager.chunk(draw_observation(bundle.spec, np.random.default_rng(0)), 0)
    return step.get_total_flops(), chunk.get_total_flops()


def _arithmetic(workers: dict[str, Worker]) -> str:
    """Return, in words, what routers add to a denoising step."""
    (routed, routed_chunk), (settled, settled_chunk) = (
        workers[name].ask(_count_flops, name) for name in (EAGER, EAGER_SETTLED)
    )
    return (
        f"{routed / 1e9:.3g} GFLOP routed, {settled / 1e9:.3g} settled (torch.utils.flop_counter, two to a "
        f"multiplication): routers are {1 - settled / routed:.1%} of it, and that is all that caching can save in "
        f"arithmetic; the paper's 90 % does not come out. A whole chunk, with images and instruction: "
        f"{routed_chunk / 1e9:.3g} and {settled_chunk / 1e9:.3g}"
    )


def weights_of_a_step(config: TransformerConfig) -> str:
    """Return, in words, how many weights a denoising step of one robot reads."""
    import torch

    from policy_models.mode.network import make_denoiser

    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in make_denoiser(config).named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    routers = sum(size for name, size in sizes.items() if ".router." in name)
    everything = sum(sizes.values())
    routed = everything - experts * (config.experts - config.top_k) / config.experts
    settled = routed - routers
    return (
        f"{everything / 1e6:,.0f} million in the denoiser, of which a step reads {routed / 1e6:,.0f} million routed, "
        f"{settled / 1e6:,.0f} settled: {4e-9 * settled:.2f} GB in float32, {2e-9 * settled:.2f} in bfloat16, "
        f"{1e-9 * settled:.2f} in int8"
    )


def _bar(who: str, wanted: float, got: Ratio) -> Bar:
    claim = f"{who} answers a MoDE policy of released size at least {wanted:g} times as fast as eager torch does"
    return Bar(claim, f"{got} times", got.value >= wanted)


def _role(name: str) -> str:
    return "ours" if name == AUTO else "reference" if name in (EAGER, EAGER_SETTLED) else "peer"
