"""Bundles that benchmarks keep: written once, and again when what makes them has changed."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import kept
from policy_models.spec import PolicySpec, VectorSpec
from policy_server.bundle import FORMAT, Manifest
from policy_server.export.bundle import write_bundle

JOINTS = VectorSpec(("shoulder",), ("rad",))
SPEC = PolicySpec(action=JOINTS, state=JOINTS, horizon=2, step_s=0.1)


def write(path: Path, config: Any, spec: PolicySpec) -> None:
    write_bundle(
        path, Manifest(FORMAT, path.name, "hold", "1", "Holds still.", "Apache-2.0", spec, tolerance={"f32": 0.0})
    )


def test_a_bundle_is_kept_until_the_code_that_made_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kept"
    config = kept.kept_bundle(path, None, SPEC, write, "small").config

    def made_again() -> bool:
        capsys.readouterr()
        kept.kept_bundle(path, config, SPEC, write, "small")
        return "writing" in capsys.readouterr().out

    assert not made_again()
    monkeypatch.setattr(kept, "_makers", lambda: "other code")
    assert made_again()
    assert not made_again()
