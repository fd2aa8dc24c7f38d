"""An evaluation as one HTML file that needs nothing else: figures, plots, and which episodes failed."""

from html import escape
from pathlib import Path
from typing import Any

from policy_sim import evaluation_plots as plots
from policy_sim.evaluation import Evaluation

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #24292f; --faint: #c3c9d0; --good: #1f7a6d; --bad: #c03a4f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e4e8ec; --faint: #4a535d; --good: #5cc8b6; --bad: #f0798b; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; }
.big { font-size: 2.6rem; font-weight: 600; color: var(--good); margin: 1rem 0 0; }
.big small { font-size: 1rem; font-weight: 400; color: var(--ink); }
.failure { border-left: 4px solid var(--bad); padding: 0.5rem 1rem; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem 2rem;
  align-items: start; }
figure { margin: 0; }
figcaption { font-weight: 600; }
svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.25rem 1.25rem 0.25rem 0; border-bottom: 1px solid var(--faint); }
td { font-variant-numeric: tabular-nums; }
"""


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write the HTML file; whatever the evaluation has so far is in it."""
    path.write_text(report(evaluation), encoding="utf-8")


def report(evaluation: Evaluation) -> str:
    """Return the page."""
    summary = evaluation.summary()
    title = escape(f"{evaluation.policy} {evaluation.version} in {evaluation.simulator}")
    last = evaluation.first_seed + evaluation.planned - 1
    body = [
        f"<h1>{title}</h1>",
        f"<p>{summary['episodes']} of {evaluation.planned} episodes, seeds {evaluation.first_seed} to {last}, "
        f"{evaluation.parallel} at a time, over the network. Intervals are of 95 %: Wilson's for rates, bootstrap for "
        "means.</p>",
    ]
    if evaluation.failure is not None:
        body.append(f'<p class="failure"><strong>Not finished.</strong> {escape(evaluation.failure)}</p>')
    if evaluation.results:
        rate, (low, high) = summary["success"]["rate"], summary["success"]["interval_95"]
        body += [
            f'<p class="big">{rate:.1%} <small>success, {low:.1%} to {high:.1%}</small></p>',
            _plots(evaluation),
            _rates(summary),
            _measures(summary),
            _failures(evaluation),
        ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{''.join(f'{part}{chr(10)}' for part in body)}</body>\n</html>\n"
    )


def _plots(evaluation: Evaluation) -> str:
    figures = {"Success after each episode": plots.running_success(evaluation.results)}
    if len(evaluation.groups()) > 1:
        figures["Success by task"] = plots.success_by_group(evaluation.groups())
    for name, values in evaluation.measures().items():
        if any(isinstance(value, bool) for value in values):
            continue  # a rate: its interval is in the table
        figures[f"{name}, with its mean"] = plots.histogram(name, values)
    from_above = plots.paths(evaluation.results)
    if from_above is not None:
        figures["Paths from above; crosses are where failures ended"] = from_above
    drawn = "\n".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in figures.items()
    )
    return f'<div class="plots">{drawn}</div>'


def _rates(summary: dict[str, Any]) -> str:
    rows = [
        (name, f"{rate['rate']:.1%}", _interval(rate, 100, " %"), rate["of"])
        for name, rate in {**summary["by_group"], "all": summary["success"]}.items()
        if name == "all" or len(summary["by_group"]) > 1
    ]
    return "<h2>Success</h2>" + _table(("task", "success", "interval", "episodes"), rows)


def _measures(summary: dict[str, Any]) -> str:
    rows = [
        (name, f"{mean['mean']:.4g}", _interval(mean), f"{mean['median']:.4g}", mean["of"])
        for name, mean in summary["measures"].items()
    ]
    return "<h2>Measures</h2>" + _table(("measure", "mean", "interval of the mean", "median", "episodes"), rows)


def _failures(evaluation: Evaluation) -> str:
    failed = [(result.seed, result.group) for result in evaluation.results if not result.success]
    if not failed:
        return "<p>No episode failed.</p>"
    return "<h2>Episodes that failed</h2><p>To run one again: <code>--episodes 1 --seed SEED</code>.</p>" + _table(
        ("seed", "task"), failed
    )


def _interval(figure: dict[str, Any], scale: float = 1, unit: str = "") -> str:
    low, high = figure["interval_95"]
    return f"{scale * low:.4g} to {scale * high:.4g}{unit}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    cells = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{titles}</tr>{cells}</table></div>'
