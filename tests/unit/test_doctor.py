"""The doctor: what each check says of machines as they are, and as they must not be."""

import json
import os
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper
from typer.testing import CliRunner

from policy_server.bundle import MANIFEST, Bundle, digest
from policy_server.cli import app
from policy_server.doctor import engines, examination
from policy_server.doctor.__main__ import CHECKS
from policy_server.doctor.apart import SUBJECTS, run_apart
from policy_server.doctor.bundles import bundles_below, check_bundle, check_golden_case, check_servable
from policy_server.doctor.cgroup import read_limits
from policy_server.doctor.clock import check_clock, synchronisation
from policy_server.doctor.engines import check_choice, check_engine
from policy_server.doctor.extras import EXTRAS, check_extras
from policy_server.doctor.finding import Finding, worst
from policy_server.doctor.gpus import check_gpus
from policy_server.doctor.machine import check_machine
from policy_server.doctor.ports import check_port
from policy_server.doctor.triton import check_triton, models

ROOT = Path("/")
GIB = 1 << 30


def _write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with eight good cores and nothing wrong."""
    files = {
        "proc/cpuinfo": "model name\t: Good CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_bf16\n",
        "proc/loadavg": "0.50 0.40 0.30 1/100 1\n",
        "proc/meminfo": f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {12 * GIB // 1024} kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    }
    _write(tmp_path, **files)
    return tmp_path


def _machine(root: Path, **environment: str) -> list[Finding]:
    return list(check_machine(root, environment, cores=8))


def _only(findings: list[Finding], level: str) -> Finding:
    (found,) = (finding for finding in findings if finding.level == level)
    return found


def test_a_good_machine_is_well(machine: Path) -> None:
    assert worst(_machine(machine)) == "ok"


def test_a_container_with_less_time_than_cores_is_told_how_many_threads(machine: Path) -> None:
    _write(machine, **{"sys/fs/cgroup/cpu.max": "250000 100000\n", "sys/fs/cgroup/memory.max": "max\n"})
    warning = _only(_machine(machine), "warning")
    assert "the time of 2.5" in warning.what
    assert "--threads 2" in warning.do


def test_limits_of_the_groups_above_count_too(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/pod"
    files = {f"{group}/cpu.max": "400000 100000", f"{group}/inner/cpu.max": "max 100000"}
    files |= {f"{group}/memory.max": str(3 * GIB), f"{group}/inner/cpu.stat": "nr_periods 9\nnr_throttled 7\n"}
    _write(tmp_path, **files, **{"proc/self/cgroup": "0::/pod/inner\n"})
    limits = read_limits(tmp_path)
    assert (limits.cores, limits.memory_bytes, limits.throttled) == (4.0, 3 * GIB, 7)


def test_limits_of_version_1_are_read(tmp_path: Path) -> None:
    files = {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}
    files |= {"memory/box/memory.limit_in_bytes": str(2 * GIB), "memory/memory.limit_in_bytes": str((1 << 63) - 4096)}
    _write(tmp_path, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    # A container's own group is mounted as the root, though its path is the host's.
    _write(tmp_path, **{"proc/self/cgroup": "3:memory:/box\n2:cpu,cpuacct:/docker/abc\n0::/\n"})
    limits = read_limits(tmp_path)
    assert (limits.cores, limits.memory_bytes) == (1.5, 2 * GIB)


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    _write(tmp_path, **{"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "proc/self/cgroup": "2:cpu:/\n"})
    assert read_limits(tmp_path).cores is None


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("proc/cpuinfo", "flags : fpu sse2\n", "neither AVX2"),
        ("proc/loadavg", "31.00 9 9 1/1 1\n", "busy: 31"),
        ("proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n", "1.0 GiB of it available"),
        ("sys/devices/system/cpu/cpu3/cpufreq/scaling_governor", "powersave\n", "powersave"),
        ("sys/fs/cgroup/cpu.stat", "nr_throttled 12\n", "wait 12 times"),
    ],
)
def test_what_slows_a_machine_down_is_a_warning(machine: Path, file: str, text: str, says: str) -> None:
    _write(machine, **{file: text})
    warning = _only(_machine(machine), "warning")
    assert says in warning.what
    assert warning.do


def test_more_threads_than_cores_is_a_warning_that_names_the_variable(machine: Path) -> None:
    assert "unset OMP_NUM_THREADS" in _only(_machine(machine, OMP_NUM_THREADS="64"), "warning").do
    assert "OMP_NUM_THREADS=1" in _only(_machine(machine, OMP_NUM_THREADS="1"), "note").what


def test_a_machine_that_shows_nothing_is_examined_all_the_same(tmp_path: Path) -> None:
    assert worst(_machine(tmp_path)) == "note"


def test_a_slow_source_of_time_is_a_warning(tmp_path: Path) -> None:
    _write(tmp_path, **{"sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet\n"})
    clock = next(check_clock(tmp_path))
    assert (clock.level, "hpet" in clock.what) == ("warning", True)


def test_the_real_clocks_are_measured() -> None:
    monotonic, sleep, _ = check_clock(ROOT)
    assert "ns to read" in monotonic.what
    assert "a sleep of 1 ms" in sleep.what


def test_an_unsynchronised_time_of_day_is_a_warning() -> None:
    assert synchronisation(0x2041).level == "warning"
    assert synchronisation(0x2001).level == "ok"
    assert synchronisation(None).level == "note"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_free_port_is_well(free_port: int) -> None:
    assert [finding.level for finding in check_port(free_port, ROOT)] == ["ok"]


def test_a_taken_port_is_a_problem_that_names_who_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policy_server.doctor.ports._ASK_S", 0.1)  # it never answers
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (finding,) = check_port(other.getsockname()[1], ROOT)
    assert finding.level == "problem"
    assert f"process {os.getpid()}," in finding.what


class _Answers(BaseHTTPRequestHandler):
    status = 200
    body = b'[{"name": "point-maze"}]'

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body", "level", "says"),
    [
        (200, b'[{"name": "point-maze"}]', "note", "it serves point-maze"),
        (401, b'{"error": {"code": "unauthorized", "message": ""}}', "note", "a policy server"),
        (200, b"<html>", "problem", "cannot be had"),
        (404, b"", "problem", "cannot be had"),
    ],
)
def test_a_policy_server_is_told_from_others(status: int, body: bytes, level: str, says: str) -> None:
    handler = type("Handler", (_Answers,), {"status": status, "body": body})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        (finding,) = check_port(server.server_port, ROOT)
        server.shutdown()
        thread.join()
    assert finding.level == level
    assert says in finding.what


@pytest.mark.parametrize("name", ["onnx", "openvino", "openvino-bf16", "openvino-int8", "torch"])
def test_an_installed_engine_runs_the_tiny_graph(name: str) -> None:
    (finding,) = check_engine(name)
    assert (finding.level, "runs" in finding.what) == ("ok", True), finding


def test_the_tiny_graph_is_what_is_expected_of_it() -> None:
    graph = onnx.load(engines._GRAPHS["tiny"]).graph
    np.testing.assert_array_equal(engines._X @ numpy_helper.to_array(graph.initializer[0]), engines._Y)


def test_an_engine_that_computes_wrongly_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines._RUNS, "onnx", lambda x: x + np.nan)
    (finding,) = check_engine("onnx")
    assert (finding.level, "computes wrongly" in finding.what) == ("problem", True)


def test_an_engine_that_is_not_installed_is_a_note_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(_: np.ndarray) -> np.ndarray:
        raise ImportError("No module named 'openvino'")

    monkeypatch.setitem(engines._RUNS, "openvino", absent)
    (finding,) = check_engine("openvino")
    assert (finding.level, finding.do) == ("note", "pip install 'robot-policy-server[openvino]'")


def test_no_engine_at_all_is_a_problem_unless_triton_has_them() -> None:
    assert [finding.level for finding in check_choice(["torch"], "")] == ["problem"]
    assert [finding.level for finding in check_choice([], "127.0.0.1:8001")] == ["note"]
    assert list(check_choice(["onnx"], "")) == []


@pytest.fixture
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def _nvidia_smi(root: Path, script: str) -> None:
    path = root / "bin/nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_no_gpu_is_said_clearly(no_driver: Path) -> None:
    (finding,) = check_gpus(no_driver)
    assert (finding.level, "no NVIDIA GPU" in finding.what) == ("ok", True)


def test_a_gpu_without_a_driver_is_a_warning(no_driver: Path) -> None:
    device = "sys/bus/pci/devices/0000:01:00.0"
    _write(no_driver, **{f"{device}/vendor": "0x10de\n", f"{device}/class": "0x030200\n"})
    (finding,) = check_gpus(no_driver)
    assert (finding.level, "--gpus all" in finding.do) == ("warning", True)


def test_a_gpu_is_named_and_so_is_what_cannot_use_it(no_driver: Path) -> None:
    _nvidia_smi(no_driver, "echo 'Some GPU, 580.1, 81559, 4'")
    gpu, *libraries = check_gpus(no_driver)
    assert gpu.what == "GPU 0: Some GPU, driver 580.1, 4 of 81559 MiB in use"
    assert [finding.what.partition(" ")[0] for finding in libraries] == ["onnxruntime", "torch"]


def test_a_driver_that_fails_is_a_problem_in_its_own_words(no_driver: Path) -> None:
    _nvidia_smi(no_driver, "echo Driver/library version mismatch; exit 18")
    (finding,) = check_gpus(no_driver)
    assert (finding.level, "version mismatch" in finding.what) == ("problem", True)


def test_a_triton_that_cannot_be_reached_is_a_problem(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policy_server.doctor.triton._WAIT_S", 0.2)
    (finding,) = check_triton(f"127.0.0.1:{free_port}")
    assert finding.level == "problem"
    assert f"127.0.0.1:{free_port}" in finding.what


def test_models_of_a_triton_are_listed_with_versions_and_faults() -> None:
    index = [
        {"name": "maze", "version": "2", "state": "READY"},
        {"name": "maze", "version": "1", "state": "READY"},
        {"name": "broken", "version": "1", "state": "UNAVAILABLE", "reason": "golden\ndrift"},
        {"name": "asleep"},
    ]
    assert [(finding.level, finding.what) for finding in models(index)] == [
        ("problem", "model 'broken' does not load: golden drift"),
        ("ok", "model 'maze' is ready, version 1, 2"),
        ("note", "not loaded until a gateway asks for them: asleep"),
    ]
    assert [finding.level for finding in models([])] == ["warning"]


@pytest.fixture
def copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))


def _spoil_golden(path: Path) -> None:
    """Change what the golden chunk must be, and publish that: the files are whole, the engines are wrong."""
    with np.load(path / "golden.npz") as arrays:
        np.savez(path / "golden.npz", **{**arrays, "actions": arrays["actions"] + 0.5})
    manifest = yaml.safe_load((path / MANIFEST).read_text())
    manifest["files"]["golden.npz"] = digest(path / "golden.npz")
    (path / MANIFEST).write_text(yaml.safe_dump(manifest))


def test_a_whole_bundle_is_well_on_each_engine(tiny_bundle: Bundle) -> None:
    (whole,) = check_bundle(tiny_bundle.path)
    (golden,) = check_golden_case(tiny_bundle.path, "onnx")
    assert (whole.level, golden.level) == ("ok", "ok")
    assert "golden drift" in golden.what


def test_a_damaged_file_is_a_problem_that_names_it(copy: Path) -> None:
    data = bytearray((copy / "graphs/denoise.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "graphs/denoise.onnx").write_bytes(data)
    (finding,) = check_bundle(copy)
    assert (finding.level, "graphs/denoise.onnx" in finding.what) == ("problem", True)


def test_an_engine_that_drifts_is_a_warning(copy: Path) -> None:
    _spoil_golden(copy)
    (finding,) = check_golden_case(copy, "onnx")
    assert (finding.level, "misses the golden case" in finding.what) == ("warning", True)


def test_a_bundle_that_no_engine_reproduces_is_a_problem() -> None:
    assert [finding.level for finding in check_servable("maze", ["torch"])] == ["problem"]
    assert list(check_servable("maze", ["torch", "onnx"])) == []


def test_a_folder_without_bundles_is_a_problem_and_the_others_are_found(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundles, findings = bundles_below([tmp_path, tiny_bundle.path])
    assert bundles == [tiny_bundle.path]
    assert [finding.level for finding in findings] == ["problem"]


def test_an_extra_that_is_missing_says_what_cannot_be_done_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "policy_server.doctor.extras.find_spec", lambda module: None if module == "openvino" else object()
    )
    missing, installed = check_extras()
    assert missing.what == f"without openvino there is no {EXTRAS['openvino'].brings}"
    assert "onnx" in installed.what


def test_every_extra_is_one_of_the_project() -> None:
    assert set(EXTRAS) <= set(metadata("robot-policy-server").get_all("Provides-Extra") or ())


def test_a_check_runs_in_a_process_of_its_own(free_port: int) -> None:
    assert run_apart("port", [str(free_port)], 60) == [Finding("ports", "ok", f"port {free_port} is free")]


def test_a_check_that_crashes_is_a_finding() -> None:
    (finding,) = run_apart("port", ["nonsense"], 60)
    assert (finding.subject, finding.level) == ("ports", "problem")
    assert "nonsense" in finding.what


def test_a_check_that_hangs_is_a_finding() -> None:
    (finding,) = run_apart("clock", [], 0.001)
    assert "was not done after 0.001 s" in finding.what


def test_every_check_has_a_subject() -> None:
    assert set(SUBJECTS) == set(CHECKS)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks run in this process, which has loaded every library already."""
    monkeypatch.setattr(examination, "run_apart", lambda check, arguments, _: list(CHECKS[check](*arguments)))


@pytest.mark.usefixtures("here")
def test_the_command_says_that_a_machine_can_serve(tiny_bundle: Bundle, free_port: int) -> None:
    done = CliRunner().invoke(app, ["doctor", str(tiny_bundle.path), "--port", str(free_port)])
    assert done.exit_code == 0, done.output
    assert f"{tiny_bundle.name} on openvino: golden drift" in done.output
    assert "0 problems" in done.output


@pytest.mark.usefixtures("here")
def test_a_problem_is_an_exit_code_and_the_other_checks_go_on(copy: Path, tiny_bundle: Bundle, free_port: int) -> None:
    _spoil_golden(copy)
    arguments = ["doctor", str(copy), str(tiny_bundle.path), "--port", str(free_port), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["worst"] == "problem"
    problems = [finding["what"] for finding in report["findings"] if finding["level"] == "problem"]
    assert [what.partition(":")[0] for what in problems] == ["copy"]
    assert any(finding["what"].startswith(f"{tiny_bundle.name} on onnx") for finding in report["findings"])
