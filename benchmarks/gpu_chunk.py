"""One action chunk on an NVIDIA GPU, for every bundled policy and for MoDE at released size, by engine.

`python -m benchmarks.gpu_chunk`, on a machine with such a GPU and a torch that was built with CUDA; it takes minutes,
and writes `benchmarks/results-gpu-chunk.json`, which the next `python -m benchmarks` shows on this page. **Its CUDA
parts have not been run yet**: they were written where there is no GPU, and only `--device cpu` has been tried.

From a checked observation to actions in the robot's units, as in the first benchmark: images are sent to the GPU and
actions fetched from it, and the sampler's arithmetic is done on the CPU, between steps. `torch-cuda` replays CUDA
graphs, `onnx-cuda` is ONNX Runtime's CUDA provider where that is installed; `torch-cuda-bf16` multiplies in bfloat16,
and everything else in float32 without TensorFloat-32. The yardstick is eager torch with its sampler loop on the GPU,
MoDE's experts routed for every token as upstream does. Contenders take turns, each in a process of its own, and first
must give the same actions. The policy `hold` has no network, and nothing to gain.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import EAGER, EAGER_GPU, Worker, check_equal
from benchmarks.large_bundle import describe, large_bundle
from benchmarks.machine import describe_machine
from benchmarks.ratios import ratio_of
from benchmarks.result import Result, Series, ms, save_results, table_lines
from benchmarks.settings import CACHE, ROOT, Settings
from policy_server.bundle import Bundle, find_bundles, load_bundle

RESULTS = ROOT / "benchmarks" / "results-gpu-chunk.json"
ROUNDS, BLOCK, OBSERVATIONS = 100, 5, 3
# The yardstick comes first.
ON_GPU = (EAGER_GPU, "torch-cuda", "torch-cuda-bf16", "onnx-cuda")
ON_CPU = (EAGER, "torch", "onnx")


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write the results; returns the exit status."""
    arguments = _parse(words)
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("torch sees no NVIDIA GPU; --device cpu --quick shows that everything else runs", file=sys.stderr)
            return 1
    settings = Settings(arguments.zoo, None, arguments.quick, arguments.cache)
    command = "python -m benchmarks.gpu_chunk" + (f" --device {arguments.device}" if arguments.device != "cuda" else "")
    result = run(settings, command, arguments.device)
    print("\n".join(table_lines(result)))
    output = arguments.output or (RESULTS if arguments.device == "cuda" and not settings.quick else None)
    if output:
        save_results(output, {result.name: result})
        print(f"wrote {output}")
    return 0


def run(settings: Settings, command: str, device: str) -> Result:
    """Time every engine of the device on every policy; `settings.bundle` is the folder of the bundled ones."""
    machine = describe_machine(device)
    large = large_bundle(settings)
    bundled = [load_bundle(path) for path in find_bundles([settings.bundle])]
    rows: list[tuple[str, ...]] = []
    series: list[Series] = []
    facts: dict[str, str] = {}
    for bundle in (*(bundle for bundle in bundled if bundle.graphs()), large):
        _measure(bundle, ON_GPU if device == "cuda" else ON_CPU, settings.rounds(ROUNDS), rows, series, facts)
    return Result(
        name="gpu_chunk",
        machine=machine,
        command=command,
        columns=("", "p50 ms", "p99 ms", "times as fast as eager torch", "drift"),
        rows=tuple(rows),
        series=tuple(series),
        bars=(),
        facts={
            large.name: describe(large),
            "rounds": f"{settings.rounds(ROUNDS)} of {BLOCK} chunks for each contender",
            "drift": f"largest deviation from eager torch over {OBSERVATIONS} random observations, as a fraction of "
            "the action's range",
            **facts,
        },
    )


def _measure(
    bundle: Bundle,
    names: Sequence[str],
    rounds: int,
    rows: list[tuple[str, ...]],
    series: list[Series],
    facts: dict[str, str],
) -> None:
    """Add one policy's rows and series; `facts` says who was left out, and why."""
    yardstick = names[0]
    draw = np.random.default_rng(1)
    with ExitStack() as stack:
        workers = {}
        for name in names:
            try:
                workers[name] = stack.enter_context(Worker(bundle.path, (name,)))
            except ImportError as error:
                facts[name] = f"left out: {error}"
        drifts = check_equal(bundle, workers, yardstick, OBSERVATIONS)
        times: dict[str, list[list[float]]] = {name: [] for name in workers}
        for i in tqdm(range(rounds), desc=f"gpu_chunk, {bundle.name}", unit="round"):
            for name in map(str, draw.permutation(list(workers))):
                times[name].append(workers[name].time_block_ms(name, i, BLOCK))
    for name, taken in times.items():
        percentiles = (ms(float(np.percentile(taken, percent))) for percent in (50, 99))
        faster = str(ratio_of(times[yardstick], taken))
        rows.append((f"{bundle.name}, {name}", *percentiles, faster, f"{drifts[name]:.0e}"))
        series.append(Series.of(bundle.name, name, "reference" if name == yardstick else "ours", np.ravel(taken)))


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_chunk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds, and a small MoDE; for a look")
    parser.add_argument(
        "--zoo", type=Path, default=ROOT / "models" / "zoo", help="folder of bundles (default: the bundled policies)"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the large policy is kept, 4.1 GB")
    parser.add_argument(
        "-o", "--output", type=Path, help=f"JSON to write (default: {RESULTS.name}; nothing for a CPU or --quick)"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
