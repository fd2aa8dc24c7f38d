"""What the command line takes, and what its help teaches."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TypedDict

from policy_client.bench.arrivals import read_arrivals
from policy_client.bench.doors import DOORS, Target, door_url
from policy_client.bench.gates import read_share
from policy_client.bench.load import Load
from policy_client.bench.served import ServedPolicy, fetch_policy, read_policy

API_KEY = "POLICY_API_KEY"

_ABOUT = """\
Load-test a policy server as a fleet of robots would: every robot sends when it is due, whether or not the server has
answered (open loop), and every latency counts from then, so that a stall costs all who waited through it."""

_EXAMPLES = """\
examples:
  policy-bench run http://127.0.0.1:8000
      one robot at 20 Hz for 10 s against the server's default policy
  policy-bench run http://gpu-box:8000 --policy meta-world --robots 16 --rate 10 --html report.html
      a fleet, and a page to show to a colleague
  policy-bench run http://gpu-box:8000 --door stream --rate 50 --arrivals bursts:5
      the streaming door, five observations at once every tenth of a second
  policy-bench run ws://gpu-box:8001 --spec policy.json
      openpi's own server, which does not describe its policies: the description comes from a file
  policy-bench compare before.json after.json
      what changed, with 95 % intervals
  policy-bench capacity http://gpu-box:8000 --rate 10 --deadline 50
      the most robots at 10 Hz with p99 under 50 ms
  policy-bench run http://127.0.0.1:8000 --max-p99 50 --max-missed 1%
      in CI: exit status 1 if a bound is broken, 2 if the test could not be run

docs/load-testing.md says what each figure means."""

_RUN_EXAMPLES = """\
arrivals, each a pure function of --seed:
  periodic         a control loop; every robot has a phase of its own
  poisson          requests that know nothing of each other
  bursts:8         eight at once, then a pause; the mean rate stays --rate
  ramp:1..40       from 1 Hz at the beginning to 40 Hz at the end
  trace:FILE       what was recorded: lines of 'seconds robot'

examples:
  policy-bench run http://127.0.0.1:8000 --robots 8 --rate 20 --seconds 30 --json now.json --html now.html
  policy-bench run http://127.0.0.1:8000 --policy meta-world --arrivals ramp:1..40
"""

_COMPARE_EXAMPLES = """\
Slices of both tests are drawn again and again (bootstrap), so intervals take into account that neighbouring
observations share their fate. An interval that holds 1 shows no difference.

example:
  policy-bench compare main.json branch.json --max-worse 10%
      exit status 1 if p99 is surely more than 10 % longer
"""

_CAPACITY_EXAMPLES = """\
Doubles the robots until they are not served in time, then halves the gap. A number that fails is tried again before
it is believed. Where this machine could not send in time, it says so: then the limit may be its own.

example:
  policy-bench capacity http://gpu-box:8000 --policy meta-world --rate 10 --deadline 100 --seconds 20 --min-robots 16
"""


class _Words(TypedDict):
    description: str
    epilog: str
    formatter_class: type[argparse.HelpFormatter]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="policy-bench", **_words(_ABOUT, _EXAMPLES))
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    run = commands.add_parser("run", help="one test", **_words("One load test.", _RUN_EXAMPLES))
    _add_load(run)
    run.add_argument("--robots", type=int, default=1, help="how many robots (default: %(default)s)")
    run.add_argument("--rate", type=float, default=20.0, metavar="HZ", help="of each robot (default: %(default)s)")
    run.add_argument("--deadline", type=float, metavar="MS", help="by when an answer has to be there (default: 1/rate)")
    run.add_argument("--max-p99", type=float, metavar="MS", help="exit status 1 if p99 is longer")
    run.add_argument(
        "--max-missed", type=read_share, metavar="SHARE", help="... if more miss the deadline; 1%% or 0.01"
    )

    compare = commands.add_parser(
        "compare",
        help="two results, with intervals",
        **_words("Say what changed between two results.", _COMPARE_EXAMPLES),
    )
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--max-worse", type=read_share, metavar="SHARE", help="exit status 1 if p99 rose by more")
    compare.add_argument("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")

    capacity = commands.add_parser(
        "capacity",
        help="the most robots in time",
        **_words("Search the most robots that are served in time.", _CAPACITY_EXAMPLES),
    )
    _add_load(capacity)
    capacity.add_argument("--rate", type=float, required=True, metavar="HZ", help="of each robot")
    capacity.add_argument("--deadline", type=float, required=True, metavar="MS", help="p99 has to be below")
    capacity.add_argument("--max-missed", type=read_share, default=0.01, metavar="SHARE", help="default: 1%%")
    capacity.add_argument("--limit", type=int, default=64, help="robots to try at most (default: %(default)s)")
    capacity.add_argument("--min-robots", type=int, metavar="N", help="exit status 1 if it carries fewer")
    capacity.set_defaults(robots=1)

    report = commands.add_parser("report", help="a page from a result", **_words("Write a result's page again.", ""))
    report.add_argument("result", type=Path)
    report.add_argument("--html", type=Path, required=True)
    commands.add_parser("schema", help="the JSON schema of results", **_words("Print results' JSON schema.", ""))
    return parser


def load_of(arguments: argparse.Namespace) -> Load:
    """Return the test that `run` or `capacity` names; asks the server for its policy.

    Raises:
        ConnectFailed: The server does not say.
        ValueError: Something named cannot be.
    """
    if not arguments.rate > 0:
        raise ValueError(f"--rate is {arguments.rate:g} Hz, expected a positive rate")
    arrivals = read_arrivals(arguments.arrivals, arguments.rate)
    policy = _policy(arguments)
    # A server that does not describe its policies has one, at its root.
    name = arguments.policy if arguments.spec else policy.name
    target = Target(arguments.url, name, float(policy.spec["step_s"]), arguments.api_key)
    door_url(arguments.door, target)
    return Load(
        target,
        arguments.door,
        policy,
        arguments.robots,
        arrivals,
        arguments.arrivals,
        arguments.seconds,
        1e3 / arguments.rate if arguments.deadline is None else arguments.deadline,
        arguments.seed,
        arguments.processes,
        arguments.command_line,
    )


def _policy(arguments: argparse.Namespace) -> ServedPolicy:
    if arguments.spec:
        return read_policy(arguments.spec)
    return fetch_policy(arguments.url, arguments.policy, arguments.api_key)


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--policy", metavar="NAME", help="which policy (default: the server's default)")
    parser.add_argument("--door", choices=tuple(DOORS), default="openpi", help="protocol (default: %(default)s)")
    parser.add_argument(
        "--arrivals", default="periodic", metavar="PATTERN", help="when robots send (default: periodic)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="to play the robots (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of observations and arrivals (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get(API_KEY), help=f"default: ${API_KEY}")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="saved GET /v1/policies/NAME, for other servers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the result as a page with plots")


def _words(about: str, examples: str) -> _Words:
    return _Words(description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
