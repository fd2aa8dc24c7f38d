"""What each part may load, checked in fresh processes; import-linter checks the arrows."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "onnxruntime", "openvino", "diffusers", "transformers", "tritonclient")


def _loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_a_gateway_that_serves_onnx_never_loads_torch(tiny_bundle) -> None:
    loaded = _loaded_by(
        f"""
from pathlib import Path
import policy_server.gateway.server, policy_server.cli
from policy_server.catalog import load_catalog
from policy_server.gateway.app import create_app
from policy_server.gateway.traffic import Traffic
from policy_server.settings import Settings
settings = Settings(bundles=(Path({str(tiny_bundle.path)!r}),), engine="onnx")
catalog = load_catalog(settings)
create_app(catalog, settings, Traffic())
"""
    )
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "openvino", "onnx", "diffusers", "gymnasium"}


def test_choosing_the_fastest_engine_never_loads_torch(tiny_bundle) -> None:
    loaded = _loaded_by(
        f"""
from pathlib import Path
from policy_server.bundle import load_bundle
from policy_server.catalog import load_engine
load_engine(load_bundle(Path({str(tiny_bundle.path)!r})), "auto", 1)
"""
    )
    assert "torch" not in loaded


@pytest.mark.parametrize("module", ["policy_server.gateway.app", "policy_server.catalog", "policy_server.cli"])
def test_importing_the_server_loads_no_engine(module: str) -> None:
    assert not _loaded_by(f"import {module}") & set(HEAVY)


def test_the_client_loads_nothing_but_what_a_robot_needs() -> None:
    loaded = {name.partition(".")[0] for name in _loaded_by("import policy_client")}
    third_party = loaded - set(sys.stdlib_module_names) - {"policy_client"}
    assert not third_party & {"hdrh", "tqdm"}, "load tests are an extra"
    ours = {name for name in third_party if name in ("policy_server", "policy_models", "policy_sim")}
    assert not ours
    assert not third_party & {*HEAVY, "fastapi", "pydantic", "yaml", "cv2", "gymnasium"}


def test_specs_programs_and_samplers_need_no_torch() -> None:
    loaded = _loaded_by(
        "import policy_models.spec, policy_models.program, policy_models.families\n"
        "import policy_models.diffusion.samplers, policy_models.diffusion.schedules\n"
        "import policy_models.beso.family, policy_models.hold.family\n"
        "import policy_models.mode.family, policy_models.mode.program, policy_models.mode.routing"
    )
    assert not loaded & set(HEAVY)
