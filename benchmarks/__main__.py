"""The command line of the benchmarks."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from benchmarks import chunk, closed_loop, health, round_trip
from benchmarks.report import write_report
from benchmarks.result import Result, load_results, save_results
from benchmarks.settings import OPENPI_HINT, OPENPI_VARIABLE, ROOT, Settings, find_openpi

BENCHMARKS: Mapping[str, ModuleType] = {
    "chunk": chunk,
    "round_trip": round_trip,
    "health": health,
    "closed_loop": closed_loop,
}
RESULTS = ROOT / "benchmarks" / "results.json"


def main(words: Sequence[str] | None = None) -> int:
    """Measure what was asked for; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    try:
        settings = Settings(arguments.bundle, find_openpi(), arguments.quick)
        results = load_results(RESULTS)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    for name in [] if arguments.report_only else arguments.names or BENCHMARKS:
        results[name] = BENCHMARKS[name].run(settings, _command(name, settings))
        _show(results[name])
        if not settings.quick:
            save_results(RESULTS, results)
    if not settings.quick:
        write_report(results, BENCHMARKS, ROOT / "docs")
        tqdm.write("wrote docs/benchmarks.md")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "\n".join(
        f"  {name:12} {(module.__doc__ or '').partition(chr(10))[0]}" for name, module in BENCHMARKS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure this server beside its alternatives, on this machine alone (127.0.0.1), and write\n"
        f"docs/benchmarks.md with its pictures. All of it takes five to ten minutes.\n\nbenchmarks:\n{about}",
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
    parser.add_argument("--report-only", action="store_true", help="rebuild the page from benchmarks/results.json")
    return parser


def _command(name: str, settings: Settings) -> str:
    setting = f"{OPENPI_VARIABLE}=path/to/openpi " if settings.openpi and name != "chunk" else ""
    bundle = f" --bundle {shlex.quote(str(settings.bundle))}" if name == "chunk" else ""
    return f"{setting}python -m benchmarks {name}{bundle}"


def _show(result: Result) -> None:
    rows = [result.columns, *result.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(result.columns))]
    tqdm.write("")
    for row in rows:
        tqdm.write(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    for topic, text in result.facts.items():
        tqdm.write(f"{topic}: {text}")
    for bar in result.bars:
        tqdm.write(f"{'reached' if bar.met else 'MISSED '}  {bar.claim}: {bar.got}")


if __name__ == "__main__":
    sys.exit(main())
