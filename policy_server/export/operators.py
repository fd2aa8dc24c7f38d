"""Checks graphs against the operators that TensorRT's ONNX parser supports, before anything is built.

The table is from docs/operators.md of onnx-tensorrt for TensorRT 10.15, opsets 9 to 24. Restrictions beyond the type,
such as axes that must be constants, are left to the parser: it names the node too, only later. TensorRT 10.1's table
has every operator with every type that graphs of this project have, too.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from policy_server.errors import UnsupportedGraph

SUPPORTED_BY = "TensorRT 10.15"
_OPSETS = range(9, 25)

_T = ir.DataType
_FLOATS = frozenset({_T.FLOAT, _T.FLOAT16, _T.BFLOAT16})
_NUMBERS = _FLOATS | {_T.INT32, _T.INT64}
_ALL = _NUMBERS | {_T.BOOL}
_BOOL = frozenset({_T.BOOL})
_NARROW = frozenset({_T.FLOAT, _T.FLOAT16})
_QUANTIZED = frozenset({_T.INT8, _T.FLOAT8E4M3FN, _T.FLOAT4E2M1, _T.INT4})
_CONSTANTS = _ALL | (_QUANTIZED - {_T.INT8})

_NAMES: Mapping[frozenset[ir.DataType], str] = {
    _ALL: "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape "
    "ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    _NUMBERS: "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod "
    "Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    _FLOATS: "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos "
    "Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
    "GroupNormalization "
    "HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log "
    "LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu ParametricSoftplus "
    "QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal "
    "Resize RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh "
    "ThresholdedRelu Upsample",
    _NARROW: "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign",
    _BOOL: "And Not Or Xor",
    _CONSTANTS: "Constant ConstantOfShape",
    _QUANTIZED: "DequantizeLinear",
    _ALL | {_T.UINT8}: "Cast CastLike",
    _FLOATS | {_T.INT8, _T.FLOAT8E4M3FN}: "Attention",
    _FLOATS | {_T.INT8, _T.INT32, _T.INT64}: "Gelu",
    _NUMBERS | {_T.FLOAT8E4M3FN}: "Mean",
    frozenset({_T.FLOAT}): "STFT",
}
SUPPORTED: Mapping[str, frozenset[ir.DataType]] = {
    operator: types for types, operators in _NAMES.items() for operator in operators.split()
}


def check_operators(graphs: Iterable[Path]) -> None:
    """Raise UnsupportedGraph unless TensorRT's parser takes every operator of ONNX files, branches included."""
    for path in graphs:
        for complaint in _complaints(ir.load(path)):
            raise UnsupportedGraph(f"{SUPPORTED_BY} cannot build the graph {path.stem!r}: {complaint}")


def _complaints(model: ir.Model) -> Iterator[str]:
    opset = model.opset_imports.get("")
    if opset not in _OPSETS:
        yield f"it is of opset {opset}, its parser reads {_OPSETS[0]} to {_OPSETS[-1]}"
    for node in _nodes(model.graph):
        which = f"node {node.name!r}: operator {node.op_type}"
        if node.domain not in ("", "ai.onnx") or node.op_type not in SUPPORTED:
            yield f"{which} of domain {node.domain or 'ai.onnx'!r} is not supported"
            continue
        types = SUPPORTED[node.op_type]
        for value in _typed(node):
            if value.dtype is not None and value.dtype not in types:
                wanted = ", ".join(sorted(t.name for t in types))
                yield f"{which} has {value.name!r} of type {value.dtype.name}, supported are {wanted}"


def _typed(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the tensors whose type the table restricts: what an operator works on, not its indices and shapes."""
    works_on = node.inputs[1:] if node.op_type == "Where" else node.inputs[:1]
    if node.op_type in ("If", "Loop", "Constant", "ConstantOfShape"):
        works_on = ()
    for value in works_on:
        if value is not None:
            yield value
    if node.op_type in ("If", "Loop", "Constant", "ConstantOfShape", "Cast"):
        yield from node.outputs


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _nodes(attribute.as_graph())
