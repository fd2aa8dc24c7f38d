"""The command line of the benchmarks."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from benchmarks import (
    chunk,
    closed_loop,
    continuity,
    divla,
    expert_caching,
    gpu_chunk,
    gpu_mode,
    health,
    honesty,
    large_batch,
    large_start,
    robots,
    round_trip,
    triton,
)
from benchmarks.report import write_report
from benchmarks.result import load_results, save_results, table_lines
from benchmarks.settings import CACHE, OPENPI_HINT, OPENPI_VARIABLE, ROOT, Settings, find_openpi

BENCHMARKS: Mapping[str, ModuleType] = {
    "chunk": chunk,
    "round_trip": round_trip,
    "robots": robots,
    "triton": triton,
    "health": health,
    "closed_loop": closed_loop,
    "continuity": continuity,
    "honesty": honesty,
    "expert_caching": expert_caching,
    "divla": divla,
    "large_start": large_start,
    "large_batch": large_batch,
}
# Commands of their own, for other machines, with results of their own.
ON_GPUS: Mapping[str, ModuleType] = {"gpu_chunk": gpu_chunk, "gpu_mode": gpu_mode}
_WITH_OPENPI = ("round_trip", "robots", "health", "closed_loop")
RESULTS = ROOT / "benchmarks" / "results.json"


def main(words: Sequence[str] | None = None) -> int:
    """Measure what was asked for; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    try:
        settings = Settings(arguments.bundle, find_openpi(), arguments.quick, arguments.cache)
        results = load_results(RESULTS)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    for name in [] if arguments.report_only else arguments.names or BENCHMARKS:
        results[name] = BENCHMARKS[name].run(settings, _command(name, settings))
        tqdm.write("\n".join(("", *table_lines(results[name]))))
        if not settings.quick:
            save_results(RESULTS, results)
    if not settings.quick:
        for benchmark in ON_GPUS.values():
            results |= load_results(benchmark.RESULTS)
        write_report(results, {**BENCHMARKS, **ON_GPUS}, ROOT / "docs")
        tqdm.write("wrote docs/benchmarks.md")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "\n".join(
        f"  {name:14} {(module.__doc__ or '').partition(chr(10))[0]}" for name, module in BENCHMARKS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure this server beside its alternatives, on this machine alone (127.0.0.1), and write\n"
        f"docs/benchmarks.md with its pictures. All of it takes forty minutes.\n\nbenchmarks:\n{about}",
        epilog="examples:\n"
        "  python -m benchmarks --quick                 does everything run? writes nothing\n"
        "  python -m benchmarks chunk --bundle my/policy\n"
        f"  {OPENPI_VARIABLE}=../openpi python -m benchmarks round_trip health\n"
        "  python -m benchmarks --report-only           after a change to the report\n\n"
        f"Without {OPENPI_VARIABLE}, {OPENPI_HINT}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help="which benchmarks; all of them unless named")
    parser.add_argument(
        "--bundle",
        type=Path,
        default=Path("models/zoo/point-maze"),
        help="policy whose chunks `chunk` times; a BESO bundle (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds, for a look; writes nothing")
    parser.add_argument(
        "--cache",
        type=Path,
        default=CACHE,
        help="where policies of released size are kept, 7 GB, once they were written (default: %(default)s)",
    )
    parser.add_argument("--report-only", action="store_true", help="rebuild the page from benchmarks/results.json")
    return parser


def _command(name: str, settings: Settings) -> str:
    if name == "triton":
        return "TRITON_PYTHON=.venv/triton/bin/python python -m benchmarks triton"
    setting = f"{OPENPI_VARIABLE}=path/to/openpi " if settings.openpi and name in _WITH_OPENPI else ""
    bundle = f" --bundle {shlex.quote(str(settings.bundle))}" if name == "chunk" else ""
    return f"{setting}python -m benchmarks {name}{bundle}"


if __name__ == "__main__":
    sys.exit(main())
