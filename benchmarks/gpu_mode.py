"""Denoising steps of a MoDE policy of released size on an NVIDIA GPU, against what its memory allows.

`python -m benchmarks.gpu_mode`, on a machine with such a GPU; it needs torch and this repository, takes minutes, and
writes `benchmarks/results-gpu.json`, which the next `python -m benchmarks` shows on this page. **Its CUDA parts have
not been run yet**: they were written where there is no GPU, and only `--device cpu` has been tried.

Robots that step together, 1 to 64 of them: with experts routed for every token, as upstream does; with routes settled
per noise level, where experts are chosen by number and nothing waits for the device; and with one CUDA graph per level
on top, captured with its experts settled. All read the same weights, and nothing is copied. Where ONNX Runtime for GPUs
is installed, the graph that this server exports takes part on its CUDA and TensorRT providers, in TensorFloat-32. Who
gives other actions than the first of these ways is left out. Ways take turns, chunk by chunk; a step is a tenth of one.

A step cannot be faster than its weights can be read: the floor is the weights of the experts that are chosen and of
everything else but routers, divided by the bandwidth of a large copy, as measured here. A chunk is ten steps with its
noise sent to the GPU and its actions fetched. Weights are random, sizes those of the published checkpoints.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.result import Result, Series, ms, save_results, table_lines
from benchmarks.settings import ROOT
from policy_models.diffusion.schedules import NoiseLevels, exponential
from policy_models.mode.config import TransformerConfig

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu_steps import Plan, Robots, Stepper
    from policy_models.diffusion.preconditioning import Denoiser

RESULTS = ROOT / "benchmarks" / "results-gpu.json"
RELEASED = TransformerConfig(
    action_width=7, horizon=10, width=1024, layers=12, heads=8, goal_width=512, token_width=2048
)
TINY = TransformerConfig(action_width=7, horizon=10, width=64, layers=2, heads=4, goal_width=16, token_width=32)
ROWS = (1, 2, 4, 8, 16, 32, 64)
DRAWN_ROWS = (1, 8)
ROUNDS, CAMERAS, STEPS = 30, 2, 10
ROUTED, SETTLED, GRAPHED = "routed per token", "settled routes", "settled, CUDA graphs"
ONNX: Mapping[str, str] = {
    "ONNX Runtime CUDA": "CUDAExecutionProvider",
    "ONNX Runtime TensorRT": "TensorrtExecutionProvider",
}
ONNX_CPU: Mapping[str, str] = {"ONNX Runtime CPU": "CPUExecutionProvider"}
# A chunk in bfloat16 is compared with one in bfloat16: only the order of sums differs.
SAME: Mapping[str, float] = {"f32": 1e-3, "tf32": 3e-2, "bf16": 1e-1}
Times = dict[str, list[list[float]]]  # ms a chunk, by way and round


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write the results; returns the exit status."""
    import torch

    arguments = _parse(words)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU; --device cpu --tiny shows that everything else runs", file=sys.stderr)
        return 1
    with torch.no_grad():
        result = _measure(arguments)
    print("\n".join(table_lines(result)))
    output = arguments.output or (RESULTS if arguments.device != "cpu" and not arguments.tiny else None)
    if output:
        save_results(output, {result.name: result})
        print(f"wrote {output}")
    return 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_mode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="torch's name of the device (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a network of a few kilobytes, to see that everything runs")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="robots in a batch (default: %(default)s)")
    parser.add_argument(
        "--precision", nargs="+", choices=tuple(SAME), default=["bf16", "tf32", "f32"], help="(default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="chunks of each way (default: %(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, help=f"JSON to write (default: {RESULTS}; nothing for a CPU or --tiny)"
    )
    return parser.parse_args(words)


def _measure(arguments: argparse.Namespace) -> Result:
    import torch

    from benchmarks.gpu_steps import bandwidth, draw_network, settle

    device, config = arguments.device, TINY if arguments.tiny else RELEASED
    on_gpu = device != "cpu"
    sigmas = exponential(STEPS, NoiseLevels(0.001, 80.0))
    rate = bandwidth(device, 1 << 32 if on_gpu else 1 << 26)
    table: list[tuple[str, ...]] = []
    series: list[Series] = []
    notes: dict[str, str] = {}
    providers = ONNX if on_gpu else ONNX_CPU
    ways = [ROUTED, SETTLED, *([GRAPHED] if on_gpu else []), *providers]
    for precision in arguments.precision:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        denoiser = draw_network(config, device).to(dtype)
        # ONNX Runtime uses TensorFloat-32 on GPUs that have it, and its graphs are float32 throughout.
        others = providers if precision == "tf32" else {}
        with _float32_as(precision), tempfile.TemporaryDirectory() as folder:
            routes, plan = settle(denoiser, sigmas[:-1])
            weights = active_weights(denoiser, plan)
            floor_ms = 1e3 * weights * dtype.itemsize / rate
            for rows in arguments.rows:
                robots = _draw_robots(config, rows, device, dtype, sigmas)
                steppers = _steppers(denoiser, plan, routes, robots, others, Path(folder), notes)
                drifts = _check_equal(steppers, robots, SAME[precision], notes)
                step_ms, chunk_ms = _time(steppers, robots, arguments.rounds)
                table.append(_row(precision, rows, ways, step_ms, chunk_ms, floor_ms, max(drifts.values())))
                print(" | ".join(table[-1]), flush=True)
                if rows in DRAWN_ROWS:
                    panel = f"{precision}, {rows} robot{'s' if rows > 1 else ''}"
                    series += [Series.of(panel, way, _role(way), np.ravel(times)) for way, times in step_ms.items()]
    return Result(
        name="gpu_mode",
        machine=describe_machine(device),
        command="python -m benchmarks.gpu_mode" + (f" --device {device}" if device != "cuda" else ""),
        columns=(
            "precision, robots",
            *(f"{way}, ms a step" for way in ways),
            "floor ms",
            "best / floor",
            f"{ROUTED}, ms a chunk",
            "best, ms a chunk",
            "drift",
        ),
        rows=tuple(table),
        series=tuple(series),
        bars=(),
        facts={
            "policy": f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.3g} million weights in the denoiser, of "
            f"which a step reads {weights / 1e6:.3g} million",
            "bandwidth": f"{rate / 1e9:,.0f} GB/s, read and written, by a large copy",
            "rounds": f"{arguments.rounds} chunks of each way, in turns; medians",
            **notes,
        },
    )


def _draw_robots(
    config: TransformerConfig, rows: int, device: str, dtype: "torch.dtype", sigmas: tuple[float, ...]
) -> "Robots":
    import torch

    from benchmarks.gpu_steps import Robots

    return Robots(
        x=torch.zeros(rows, config.horizon, config.action_width, device=device),
        tokens=torch.randn(rows, CAMERAS, config.token_width, device=device).to(dtype),
        goal=torch.randn(rows, config.goal_width, device=device).to(dtype),
        sigmas=sigmas,
    )


def _steppers(
    denoiser: "Denoiser",
    plan: "Plan",
    routes: "torch.Tensor",
    robots: "Robots",
    providers: Mapping[str, str],
    folder: Path,
    notes: dict[str, str],
) -> dict[str, "Stepper"]:
    """Make every way that this machine has; `notes` says what was left out, and why."""
    from benchmarks.gpu_steps import Graphed, Settled, routed

    settled = Settled(denoiser, plan, robots)
    steppers: dict[str, Stepper] = {ROUTED: routed(denoiser, robots), SETTLED: settled}
    makers: dict[str, Callable[[], Stepper]] = {}
    if robots.x.is_cuda:
        makers[GRAPHED] = partial(Graphed, settled)
    for way, provider in providers.items():
        makers[way] = partial(_onnx, folder, provider, denoiser, routes, robots)
    for way, make in makers.items():
        if way in notes:
            continue
        try:
            steppers[way] = make()
        except Exception as error:  # each library has classes of its own for what it cannot do
            _leave_out(way, str(error), notes)
    return steppers


def _onnx(folder: Path, provider: str, denoiser: "Denoiser", routes: "torch.Tensor", robots: "Robots") -> "Stepper":
    from benchmarks.gpu_steps import Onnx, export

    model = folder / "denoise.onnx"
    return Onnx(model if model.exists() else export(denoiser, robots, routes, folder), provider, routes, robots)


def _check_equal(
    steppers: dict[str, "Stepper"], robots: "Robots", allowed: float, notes: dict[str, str]
) -> dict[str, float]:
    """Return how far each way is from `ROUTED`, and take out those that compute something else."""
    import torch

    noise = robots.sigmas[0] * torch.randn(*robots.x.shape)
    wanted = _chunk(steppers[ROUTED], robots, noise)
    drifts: dict[str, float] = {}
    for way, stepper in list(steppers.items()):
        drift = float((_chunk(stepper, robots, noise) - wanted).abs().max() / wanted.abs().max())
        if drift <= allowed:
            drifts[way] = drift
        else:
            del steppers[way]
            _leave_out(way, f"it drifts {drift:.1e} from {ROUTED}, {allowed:.1e} is allowed", notes)
    return drifts


def _leave_out(way: str, reason: str, notes: dict[str, str]) -> None:
    notes[way] = f"left out: {reason}"
    print(f"{way}: {notes[way]}", file=sys.stderr)


def _time(steppers: Mapping[str, "Stepper"], robots: "Robots", rounds: int) -> tuple[Times, Times]:
    """Return milliseconds a step and a chunk; noise is drawn anew for each chunk."""
    import torch

    from benchmarks.gpu_steps import time_s

    device = robots.x.device.type
    step_ms: Times = {way: [] for way in steppers}
    chunk_ms: Times = {way: [] for way in steppers}
    draw = np.random.default_rng(0)
    for i in range(rounds + 1):
        for way in map(str, draw.permutation(list(steppers))):
            stepper, noise = steppers[way], robots.sigmas[0] * torch.randn(*robots.x.shape)
            robots.x.copy_(noise)
            steps_s = time_s(device, partial(_walk, stepper, robots))
            chunk_s = time_s(device, partial(_chunk, stepper, robots, noise))
            if i:  # the first round warms up
                step_ms[way].append([1e3 * steps_s / robots.steps])
                chunk_ms[way].append([1e3 * chunk_s])
    return step_ms, chunk_ms


def _chunk(stepper: "Stepper", robots: "Robots", noise: "torch.Tensor") -> "torch.Tensor":
    robots.x.copy_(noise)
    _walk(stepper, robots)
    return robots.x.cpu().clone()


def _walk(stepper: "Stepper", robots: "Robots") -> None:
    for i in range(robots.steps):
        stepper.step(i)


def _row(
    precision: str, rows: int, ways: Sequence[str], step_ms: Times, chunk_ms: Times, floor_ms: float, drift: float
) -> tuple[str, ...]:
    steps = {way: float(np.median(times)) for way, times in step_ms.items()}
    best = min(steps, key=lambda way: steps[way])
    return (
        f"{precision}, {rows}",
        *(ms(steps[way]) if way in steps else "-" for way in ways),
        ms(floor_ms),
        f"{steps[best] / floor_ms:.2f}",
        ms(float(np.median(chunk_ms[ROUTED]))),
        ms(float(np.median(chunk_ms[best]))),
        f"{drift:.0e}",
    )


def active_weights(denoiser: "Denoiser", plan: "Plan") -> float:
    """Return how many weights a step reads that knows its experts, on average over the levels."""
    sizes = {name: parameter.numel() for name, parameter in denoiser.named_parameters()}
    routers = sum(size for name, size in sizes.items() if ".router." in name)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    one = sum(size for name, size in sizes.items() if ".blocks.0.experts.expert_0." in name)
    chosen = np.mean([sum(len(choice) for choice in level) for level in plan])
    return sum(sizes.values()) - routers - experts + float(chosen) * one


@contextmanager
def _float32_as(precision: str) -> Iterator[None]:
    """Let matrix products of float32 use TensorFloat-32 where `precision` says so."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _role(way: str) -> str:
    return "ours" if way in (SETTLED, GRAPHED) else "reference" if way == ROUTED else "peer"


if __name__ == "__main__":
    sys.exit(main())
