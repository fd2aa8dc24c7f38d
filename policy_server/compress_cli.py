"""The command `policy-server compress`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from policy_server.console import log, or_explain

if TYPE_CHECKING:
    from policy_server.export.compress import Compression, Difference

_USED = "used"


def compress(
    bundle: Annotated[Path, typer.Argument(help="Folder of a MoDE bundle.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder of the new bundle; its name is the policy's.", show_default=False),
    ],
    experts: Annotated[
        str,
        typer.Option(
            help='How many experts each block keeps, or "used": exactly those that the bundle\'s own sampler and steps '
            "choose, which changes no chunk unless a request asks for others."
        ),
    ] = _USED,
    how: Annotated[
        Literal["drop", "merge"],
        typer.Option(
            help="What becomes of experts that share an answer. drop: the most used of them answers as it is. merge: "
            "their average, aligned and weighted by use (M-SMoE), a better beginning for fine-tuning, and a worse "
            "end without."
        ),
    ] = "drop",
    observations: Annotated[
        Path | None,
        typer.Option(
            help="An .npz file to compare both on, with one array of images per camera under its name, such as "
            "policy_sim.meta_world_demos writes; noise unless named, which no policy was made for.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Observations to compare both on.")] = 32,
) -> None:
    """Make a smaller bundle of a MoDE policy, with fewer experts.

    A MoDE's routers see nothing but the noise level, so which experts are used, and how often, is known without any
    data. In each block the most used stay, and each of the others joins the one whose router output is most like its
    own (Li et al. 2024). The new bundle needs less disk and memory, and a chunk is faster where both experts of a noise
    level became one.

    It costs accuracy, since nothing is trained afterwards: the table says by how much actions change. A small change of
    actions need not be a small change of success; measure the task before you serve the new policy. A released policy
    takes minutes, and 12 GB of memory.

    Example: policy-server compress models/zoo/meta-world -o meta-world-small --experts 2
    """
    if experts != _USED and not experts.lstrip("-").isdigit():
        raise typer.BadParameter(f'{experts!r}, expected a number or "{_USED}"', param_hint="--experts")
    from policy_server.export.compress import compress as run

    log(verbose=False)
    result = or_explain(
        run,
        bundle,
        output,
        experts=None if experts == _USED else int(experts),
        how=how,
        observations=observations,
        samples=samples,
    )
    typer.echo(table(result))
    typer.echo(f"{output} holds {result.after.name!r}; try: policy-server check {output}")


def table(result: "Compression") -> str:
    """Return figures for people, before and after."""
    before, after = result.before, result.after
    rows = [
        ("", before.name, after.name),
        ("experts in each block", _experts(before.experts), _experts(after.experts)),
        ("parameters, million", f"{before.parameters / 1e6:.2f}", f"{after.parameters / 1e6:.2f}"),
        ("weights, MB", f"{before.weights_bytes / 1e6:.2f}", f"{after.weights_bytes / 1e6:.2f}"),
        ("ms a chunk, ONNX Runtime", f"{before.chunk_ms:.2f}", f"{after.chunk_ms:.2f}"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    seen = f"{result.samples} {'recorded observations' if result.recorded else 'observations of noise'}"
    lines += [
        "",
        f"Over {seen}, actions differ by",
        f"  {_difference(result.error)} from {before.name} to {after.name};",
        f"  {_difference(result.between_seeds)} from one seed of {before.name} to another.",
    ]
    return "\n".join(lines)


def _experts(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))


def _difference(difference: "Difference") -> str:
    return f"{100 * difference.mean:.3g} % of their range on average, {100 * difference.max:.3g} % at most,"
