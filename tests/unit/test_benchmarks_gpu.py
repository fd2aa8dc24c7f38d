"""The benchmark of chunks on GPUs, as far as a machine without one can tell."""

import pytest
import torch

from benchmarks import gpu_chunk
from benchmarks.contenders import EAGER
from benchmarks.result import Series
from policy_server.bundle import Bundle


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_mode_bundle"])
def test_it_compares_engines_and_says_who_is_left_out(bundle: str, request: pytest.FixtureRequest) -> None:
    policy: Bundle = request.getfixturevalue(bundle)
    rows: list[tuple[str, ...]] = []
    series: list[Series] = []
    facts: dict[str, str] = {}
    gpu_chunk._measure(policy, (EAGER, "torch", "torch-cuda"), 1, rows, series, facts)
    assert [row[0] for row in rows] == [f"{policy.name}, {EAGER}", f"{policy.name}, torch"]
    assert [one.label for one in series] == [EAGER, "torch"]
    assert facts["torch-cuda"].startswith("left out: engine 'torch-cuda'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_can_be_run_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_chunk.main([]) == 1
    assert "--device cpu --quick" in capsys.readouterr().err
