"""Exported graphs: what they hold themselves, and what they read from the weights of the bundle."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from policy_models.program import Graph
from policy_server.engine.onnx import OnnxEngine
from policy_server.export.onnx import export_graphs


@pytest.mark.parametrize("width", [63, 64, 65, 127, 190])
def test_a_square_matrix_that_a_graph_wants_turned_round_is_stored_once(tmp_path: Path, width: int) -> None:
    linear = torch.nn.Linear(width, width, bias=False).eval()
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    export_graphs({"f": Graph(linear, {"x": x}, ("y",))}, {"weight": linear.weight.detach()}, tmp_path)
    constants = [value.const_value for value in ir.load(tmp_path / "f.onnx").graph.initializers.values()]
    inside = [c.name for c in constants if c is not None and not isinstance(c, ir.ExternalTensor) and c.nbytes > 1024]
    assert inside == []
    with torch.no_grad():
        wanted = linear(x).numpy()
    got = OnnxEngine({"f": tmp_path / "f.onnx"}, 1).run("f", {"x": x.numpy()})["y"]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
