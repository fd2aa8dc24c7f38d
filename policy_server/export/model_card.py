"""The model card that lies beside a policy's models in a Triton repository."""

from collections.abc import Iterable

import yaml

from policy_server import kserve
from policy_server.bundle import Bundle
from policy_server.export.triton_config import Layout
from policy_server.runtime.observation import describe_inputs

_TEXT = """\
# {name}, version {version}

{description}

Family {family}, licence {licence}. Graphs run on {engine} in {precision}, {where}.
Most robots that are answered together: {max_batch}.

Actions are as the policy gives them: a gateway of `policy-server` holds them to the limits of the spec and refuses
numbers that are not finite; whoever asks this model directly must do so.

## What a request holds

{meaning}

| input | type | shape of a row | |
| --- | --- | --- | --- |
{inputs}

Parameters of a request, all optional: `seed`, `steps`, `sampler`, `guidance` (a number with a fraction as text). Row i
of a request with several rows has the seed `seed` + i.

## What a reply holds

| output | type | shape of a row | |
| --- | --- | --- | --- |
{outputs}

`actions`: {actions}; {step_s} s between two. `bundle` is the SHA-256 of the `policy.yaml` that answered. Send what
comes back in `memory_...` with the robot's next request; leave it out to begin an episode.

## Provenance

```yaml
{provenance}```

Measured results are in `{version}/bundle/policy.yaml`.
"""


def model_card(bundle: Bundle, layout: Layout) -> str:
    """Return a policy's model card in Markdown."""
    manifest, spec = bundle.manifest, bundle.spec
    beginning = bundle.new_program().begin()
    return _TEXT.format(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        family=manifest.family,
        licence=manifest.licence,
        engine=layout.target.engine or layout.target.backend,
        precision=layout.precision,
        where="each a model of its own" if layout.apart else "inside this model",
        max_batch=layout.max_batch,
        meaning="\n".join(f"- `{name}`: {text}" for name, text in describe_inputs(spec).items()),
        inputs=_rows(kserve.input_ports(spec, beginning)),
        outputs=_rows(kserve.output_ports(spec, beginning)),
        actions=", ".join(f"{n} [{u}]" for n, u in zip(spec.action.names, spec.action.units, strict=True)),
        step_s=f"{spec.step_s:g}",
        provenance=yaml.safe_dump(manifest.provenance, sort_keys=False, width=110),
    )


def _rows(ports: Iterable[kserve.Port]) -> str:
    kinds = {"float32": "FP32", "uint8": "UINT8", "int32": "INT32", "int64": "INT64", "text": "BYTES"}
    return "\n".join(
        f"| `{p.name}` | {kinds[p.kind]} | {list(p.shape)} | {'optional' if p.optional else ''} |" for p in ports
    )
