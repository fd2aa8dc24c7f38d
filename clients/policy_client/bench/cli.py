"""The command line `policy-bench`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from policy_client.bench import table
from policy_client.bench.capacity import find_capacity
from policy_client.bench.compare import compare, comparison_lines
from policy_client.bench.distribution import in_words
from policy_client.bench.gates import Gates
from policy_client.bench.load import Load, run_load
from policy_client.bench.options import API_KEY, load_of, make_parser
from policy_client.bench.report import write_report
from policy_client.bench.result import Result, json_schema, load_result, save_result
from policy_client.errors import PolicyClientError

OK, BROKEN_GATE, TROUBLE = 0, 1, 2


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    arguments = make_parser().parse_args(words)
    arguments.command_line = command_line(words, getattr(arguments, "api_key", None))
    try:
        return COMMANDS[arguments.command](arguments)
    except (PolicyClientError, ValueError, OSError) as error:
        print(f"policy-bench: {error}", file=sys.stderr)
        return TROUBLE
    except KeyboardInterrupt:
        return 128 + 2  # as shells have it: ended by SIGINT


def command_line(words: Sequence[str], api_key: str | None) -> str:
    """Return the command as results keep it: without the key, since results are shown around."""
    command = shlex.join(["policy-bench", *words])
    return command.replace(api_key, f"${API_KEY}") if api_key else command


def _run(arguments: argparse.Namespace) -> int:
    result = _with_progress(load_of(arguments))
    print("\n".join(table.lines(result)))
    if arguments.json:
        save_result(arguments.json, result)
    if arguments.html:
        write_report(arguments.html, result)
    return _judge(Gates(arguments.max_p99, arguments.max_missed).broken(result))


def _compare(arguments: argparse.Namespace) -> int:
    before, after = load_result(arguments.before), load_result(arguments.after)
    changes = compare(before, after, seed=arguments.seed)
    print("\n".join(comparison_lines(before, after, changes)))
    if arguments.max_worse is None:
        return OK
    p99 = next(change for change in changes if change.what == "p99")
    bound = 1 + arguments.max_worse
    return _judge([f"p99 is surely more than {bound:.2f} times as long"] if p99.low > bound else [])


def _capacity(arguments: argparse.Namespace) -> int:
    load = load_of(arguments)
    gates = Gates(arguments.deadline, arguments.max_missed)
    results: dict[int, Result] = {}

    def holds(robots: int) -> bool:
        result = results[robots] = _with_progress(load.with_robots(robots))
        broken = gates.broken(result)
        # Sending late makes latencies longer and never shorter: it can be why a number fails, and not why it holds.
        verdict = "; ".join([*broken, *table.doubts(result)] if broken else ["held"])
        tqdm.write(f"{robots:4} robots: p99 {in_words(result.latency.p99_ms)}; {verdict}")
        return not broken

    found = find_capacity(holds, arguments.limit)
    rate, deadline = f"{arguments.rate:g} Hz", f"{arguments.deadline:g} ms"
    more = "" if found.bounded else f", and perhaps more than the --limit of {arguments.limit}"
    print(f"{found.robots} robots at {rate} with p99 under {deadline}{more}")
    if found.robots and arguments.json:
        save_result(arguments.json, results[found.robots])
    if found.robots and arguments.html:
        write_report(arguments.html, results[found.robots])
    short = arguments.min_robots is not None and found.robots < arguments.min_robots
    return _judge([f"{found.robots} robots, wanted {arguments.min_robots}"] if short else [])


def _report(arguments: argparse.Namespace) -> int:
    write_report(arguments.html, load_result(arguments.result))
    return OK


def _schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=1))
    return OK


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "compare": _compare,
    "capacity": _capacity,
    "report": _report,
    "schema": _schema,
}


def _with_progress(load: Load) -> Result:
    planned = round(load.robots * load.arrivals.rate_at(load.seconds) * load.seconds)
    with tqdm(total=planned, unit=" obs", desc=f"{load.robots} robots", leave=False, dynamic_ncols=True) as bar:

        def show(sent: int, settled: int) -> None:
            bar.set_postfix_str(f"{sent - settled} waiting", refresh=False)
            bar.update(sent - bar.n)

        return run_load(load, show)


def _judge(broken: list[str]) -> int:
    for sentence in broken:
        print(f"GATE: {sentence}", file=sys.stderr)
    return BROKEN_GATE if broken else OK
