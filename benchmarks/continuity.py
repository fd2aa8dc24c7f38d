"""Chunks that arrive late: what becomes of the task, and of the motion.

A policy drives a simulator at 20 Hz, and every chunk arrives so much later than its observation. The delay is virtual:
the simulator stands still while the server answers, and the chunk is played as many control steps later as the delay is
long. So drives repeat, step by step. All else is the real thing: a server, its openpi door, `policy_client`, and the
options `captured_ms` and `delay_ms`, by which the server knows which rows of which chunk the robot plays.

Five ways. *Stand and wait* is openpi's ActionChunkBroker: play the first 8 actions of a chunk, ask, stand until the
next one is there. A ball that stands gets no force and rolls on, an arm that stands stays where it is: charitable,
since to hold the last force would do worse. The other ways ask anew every 4 control steps or as soon as the answer
before has come, the later of the two, and play on until then; the new chunk takes over at the row that is due. *Naive*
plays chunks as they come. *Temporal ensembling*, *warm start* (2 denoising steps, from the chunk being played) and
*real-time chunking* are the server's, see [the protocol](stream.md#continuity). *Asked often* is every 2 control steps,
with up to four answers on their way: what a slow network allows, and a slow policy does not. At the start the robot
stands until its first chunk has come.

A jump is the length of the difference between the last action of a chunk and the first of the next, in the actions' own
units (the maze: 100 N; the arm: 1 cm, and the gripper's command); where the robot stood in between, the greater of the
two jumps into rest and out of it. A policy that accelerates or brakes jumps by its own plan too. The disagreement is
the discontinuity alone: the new chunk's action for the moment of the change, less the old one's for the same moment.
Roughness is the mean length of the second difference of all actions over the square of 50 ms. Meta-World's chunks are
played at 20 Hz as well, though they were recorded at 80 Hz: a control step counts 50 ms for the delay, and moves the
arm as it always does. A task fails after 300 control steps in the maze, 200 in Meta-World. Brackets and bands hold 95 %
intervals.
"""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from benchmarks.late_drives import COURSES, NAIVE, RTC, Cell, Course, Way, drive_late
from benchmarks.machine import describe_machine
from benchmarks.processes import ours, serving
from benchmarks.result import Bar, Curve, Result
from benchmarks.settings import ROOT, Settings
from policy_sim.late_episode import success_steps

ENGINE = "onnx"  # pinned, so that drives repeat
JOBS = 2
LOST, PART = 0.05, 1 / 3  # success that may be lost to a delay, and what may be left of naive's jumps
BAR_DELAYS = (2, 4)
COLUMNS = (
    "",
    "delay ms",
    "reached",
    "jump: largest of an episode",
    "mean",
    "p95",
    "disagreement: largest of an episode",
    "mean",
    "p95",
    "roughness /s²",
    "stalls an episode",
    "steps to the goal",
)


def run(settings: Settings, command: str) -> Result:
    """Drive every policy in every way under every delay."""
    first, *others = (ROOT / "models/zoo" / course.policy for course in COURSES)
    cells: list[Cell] = []
    # Nothing is timed, so drives may share the machine; cameras do not survive a fork.
    with (
        serving([*ours(first), *map(str, others), "--engine", ENGINE]) as server,
        multiprocessing.get_context("spawn").Pool(JOBS) as pool,
    ):
        work = [
            (server.url, course, way, delay, settings.rounds(course.episodes))
            for course in COURSES
            for delay in course.delays
            for way in course.ways
        ]
        for cell in tqdm(pool.imap(_drive, work), desc="continuity", total=len(work)):
            cells.append(cell)
            tqdm.write("  ".join(_row(cell)))
    facts = {
        course.policy: f"{settings.rounds(course.episodes)} episodes in each row, on {ENGINE}" for course in COURSES
    }
    return summarise(cells, describe_machine(), command, facts)


def summarise(
    cells: Sequence[Cell], machine: Mapping[str, str], command: str, facts: Mapping[str, str] | None = None
) -> Result:
    """Return the result of all cells."""
    return Result(
        name="continuity",
        machine=machine,
        command=command,
        columns=COLUMNS,
        rows=tuple(map(_row, cells)),
        series=(),
        bars=tuple(bar for course in COURSES for bar in _bars(course, cells)),
        facts=facts or {},
        curves=tuple(curve for course in COURSES for curve in _curves(course, cells)),
    )


def _drive(work: tuple[str, Course, Way, int, int]) -> Cell:
    return drive_late(*work)


def _row(cell: Cell) -> tuple[str, ...]:
    low, high = cell.interval
    name = f"{cell.policy}, {cell.way.name}"
    steps = success_steps(cell.episodes)
    return (
        f"**{name}**" if cell.way == RTC else name,
        f"{cell.delay_ms:.0f}",
        f"{cell.success:.1%} [{100 * low:.1f}, {100 * high:.1f}]",
        *_lengths(cell.jumps),
        *_lengths(cell.disagreements),
        f"{cell.roughness:.1f}",
        f"{np.mean([e.record.stalls for e in cell.episodes]):.1f}",
        f"{np.mean(steps):.1f}" if steps else "-",
    )


def _lengths(found: Sequence[Sequence[float]]) -> Iterator[str]:
    if not found:
        return iter("---")
    everything = np.concatenate(found)
    return (f"{length:.3f}" for length in (_largest(found), everything.mean(), np.percentile(everything, 95)))


def _largest(found: Sequence[Sequence[float]]) -> float:
    return float(np.mean([max(lengths) for lengths in found]))


def _bars(course: Course, cells: Sequence[Cell]) -> Iterator[Bar]:
    of = {(c.way.name, c.delay): c for c in cells if c.policy == course.policy}
    still = of[NAIVE.name, 0].success
    for delay in BAR_DELAYS:
        late = of[RTC.name, delay]
        yield Bar(
            f"real-time chunking keeps success within 5 points of no delay ({course.policy}, {late.delay_ms:.0f} ms)",
            f"{late.success:.1%}, without delay {still:.1%}",
            late.success >= still - LOST,
        )
    for delay in BAR_DELAYS:
        late, naive = of[RTC.name, delay], of[NAIVE.name, delay]
        for what, ours_, theirs in (
            ("jumps", late.jumps, naive.jumps),
            ("disagreements", late.disagreements, naive.disagreements),
        ):
            part = _largest(ours_) / _largest(theirs)
            mean = float(np.concatenate(ours_).mean() / np.concatenate(theirs).mean())
            yield Bar(
                f"its {what} are at most a third of naive's ({course.policy}, {late.delay_ms:.0f} ms)",
                f"{part:.0%} for the largest of an episode, {mean:.0%} for the mean",
                max(part, mean) <= PART,
            )


def _curves(course: Course, cells: Sequence[Cell]) -> Iterator[Curve]:
    for way in course.ways:
        of_way = [cell for cell in cells if (cell.policy, cell.way) == (course.policy, way)]
        success = [(c.delay_ms, 100 * c.success, *(100 * bound for bound in c.interval)) for c in of_way]
        yield _curve(course, "reached, %", way.name, success)
        for title, found in (
            ("largest jump of an episode", [c.jumps for c in of_way]),
            ("largest disagreement of an episode", [c.disagreements for c in of_way]),
        ):
            yield _curve(
                course,
                title,
                way.name,
                [(c.delay_ms, *_mean_of_largest(lengths)) for c, lengths in zip(of_way, found, strict=True) if lengths],
            )


def _curve(course: Course, title: str, label: str, points: Sequence[tuple[float, ...]]) -> Curve:
    return Curve(f"{course.policy}: {title}", label, "added delay, ms", tuple((x, y, a, b) for x, y, a, b in points))


def _mean_of_largest(found: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean over episodes of the largest, with both ends of its 95 % interval."""
    largest = [max(lengths) for lengths in found]
    mean, margin = float(np.mean(largest)), 1.96 * float(np.std(largest)) / len(largest) ** 0.5
    return mean, mean - margin, mean + margin
