"""A result as a page that can be sent to a colleague: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from policy_client.bench import plots, table
from policy_client.bench.distribution import in_words
from policy_client.bench.result import Result


def write_report(path: Path, result: Result) -> None:
    """Write a result's page."""
    path.write_text(page(result), encoding="utf-8")


def page(result: Result) -> str:
    """Return a result's page, in HTML."""
    title = html.escape(f"{result.test.policy or 'policy'}: {_fleet(result)}")
    style = files("policy_client.bench").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{html.escape(table.headline(result))}</p>
{"".join(f'<p class="doubt">{html.escape(doubt)}</p>' for doubt in table.doubts(result))}
{_tiles(result)}
{"".join(_sections(result))}
</main>
</body>
</html>
"""


def _fleet(result: Result) -> str:
    test = result.test
    return f"{test.robots} robot{'s' if test.robots > 1 else ''} at {test.rate_hz:g} Hz"


def _tiles(result: Result) -> str:
    late = result.latency.p99_ms > result.test.deadline_ms
    tiles = (
        (in_words(result.latency.p50_ms), "p50 latency", False),
        (in_words(result.latency.p99_ms), "p99 latency", late),
        (in_words(result.latency.p99_9_ms), "p99.9 latency", result.latency.p99_9_ms > result.test.deadline_ms),
        (f"{result.missed_share:.2%}", f"not within {result.test.deadline_ms:g} ms", result.missed > 0),
        (f"{result.answers_per_s:,.1f}", "answers a second", False),
        (f"{result.starved:.2%}", "of control steps without an action", result.starved > 0),
    )
    items = (
        f'<li><b class="{"bad" if bad else "good"}">{html.escape(value)}</b><span>{html.escape(what)}</span></li>'
        for value, what, bad in tiles
    )
    return f'<ul class="tiles">{"".join(items)}</ul>'


def _sections(result: Result) -> Sequence[str]:
    test = result.test
    deadline = (f"deadline, {test.deadline_ms:g} ms", test.deadline_ms)
    sections = [
        _section(
            "Latency by percentile",
            "From the moment at which a robot had to send an observation to the answer. A stall counts for "
            "every observation that was due meanwhile.",
            plots.by_percentile({"latency": result.latency}, deadline),
        ),
        _section(
            "Latency over the test",
            f"Each point is one of {len(result.slices)} slices of {test.seconds / len(result.slices):g} s.",
            plots.over_time(result.slices, test.seconds, deadline),
        ),
        _section(
            "What robots feel",
            "Age of the observation that a robot acts on, at every step of its control loop, and by how much answers "
            "come less evenly than observations went.",
            plots.by_percentile({"chunk age when acted on": result.chunk_age, "jitter": result.jitter}),
        ),
    ]
    if result.stages:
        means_ms = {name: stage.mean_ms for name, stage in result.stages.items()}
        sections.append(
            _section(
                "Where the time goes",
                "Means of what the server says of each answer; outside is the network, the client, and waiting there.",
                plots.shares(means_ms),
            )
        )
    rows = [(name, *table.quantiles(distribution)) for name, distribution in table.measured(result).items()]
    sections.append(_section("All figures", "", _table(table.HEAD, rows) + _list(table.tallies(result))))
    sections.append(_section("How it was measured", "", _facts(result)))
    return sections


def _section(title: str, explanation: str, inside: str) -> str:
    said = f"<p>{html.escape(explanation)}</p>" if explanation else ""
    return f"<section><h2>{html.escape(title)}</h2>{said}{inside}</section>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{html.escape(name)}</th>{values}</tr>'
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)


def _facts(result: Result) -> str:
    test = result.test
    facts: Mapping[str, str] = {
        "begun": result.made_at,
        "server": f"{test.url}, {test.door} door",
        "policy": f"{test.policy} {test.version}, engine {test.engine}".strip(),
        "load": f"{_fleet(result)}, {test.arrivals}, {test.seconds:g} s, open loop, {test.processes} process(es)",
        "seed": str(test.seed),
        "robots' machine": ", ".join(f"{topic} {text}" for topic, text in result.machine.items()),
    }
    items = "".join(f"<dt>{html.escape(topic)}</dt><dd>{html.escape(text)}</dd>" for topic, text in facts.items())
    return f"<dl>{items}<dt>command</dt><dd><code>{html.escape(result.command)}</code></dd></dl>"
