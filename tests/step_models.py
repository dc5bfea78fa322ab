"""Small step models for tests, each made for one thing the server must get right.

Every function returns a serialised ONNX model with its ModelSpec inside; `write` puts it into a models
directory. The step of each is said in its docstring, so that tests can compute it by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import json_format
from onnx import TensorProto, helper, numpy_helper

from ntm.tensor import numpy_dtype, to_message
from ntm.v1 import model_pb2, tensor_pb2

WIDTH = 3
FP32 = tensor_pb2.DATA_TYPE_FP32


def accumulator() -> bytes:
    """sum' = 0.5 sum + x; y = sum'. Starts from 0."""
    nodes = [
        helper.make_node("Mul", ["sum", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "x"], ["next_sum"]),
        helper.make_node("Identity", ["next_sum"], ["y"]),
    ]
    return model(nodes, [vector_state("sum")], constants={"half": np.float32(0.5)})


def delay_line() -> bytes:
    """b' = a; a' = x; y = b: the input of two steps ago. Neither next state depends on the state it replaces."""
    nodes = [
        helper.make_node("Identity", ["a"], ["next_b"]),
        helper.make_node("Identity", ["x"], ["next_a"]),
        helper.make_node("Identity", ["b"], ["y"]),
    ]
    return model(nodes, [vector_state("a"), vector_state("b")])


def branching() -> bytes:
    """As the accumulator, but y = sum' comes from the body of an If, which takes it from around itself."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Mul", ["next_sum", factor], [f"{name}_y"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["batch", WIDTH])],
        )
        for name, factor in (("then", "one"), ("else", "half"))
    }
    nodes = [
        helper.make_node("Mul", ["sum", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "x"], ["next_sum"]),
        helper.make_node("ReduceMax", ["next_sum"], ["most"], keepdims=0),
        helper.make_node("Less", ["most", "much"], ["is_little"]),
        helper.make_node("If", ["is_little"], ["y"], **branches),
    ]
    constants = {"half": np.float32(0.5), "one": np.float32(1), "much": np.float32(1e9)}
    return model(nodes, [vector_state("sum")], constants)


def fragile() -> bytes:
    """As two accumulators, and between them a table of 8 rows is read at row x[0]: 8 and above fail the step."""
    nodes = [
        helper.make_node("Add", ["first", "x"], ["next_first"]),
        helper.make_node("Slice", ["x", "zero", "one", "one"], ["row"]),
        helper.make_node("Cast", ["row"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["looked_up"], axis=0),
        helper.make_node("Add", ["second", "x"], ["summed"]),
        helper.make_node("Add", ["summed", "looked_up"], ["next_second"]),
        helper.make_node("Add", ["next_first", "next_second"], ["y"]),
    ]
    constants = {
        "table": np.zeros(8, np.float32),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
    }
    return model(nodes, [vector_state("first"), vector_state("second")], constants)


def endless() -> bytes:
    """As the accumulator, but does not return while an input is above 1000."""
    forever = helper.make_graph(
        [
            helper.make_node("Identity", ["condition"], ["next_condition"]),
            helper.make_node("Identity", ["value"], ["next_value"]),
        ],
        "forever",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("next_condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_value", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Mul", ["sum", "half"], ["decayed"]),
        helper.make_node("Add", ["decayed", "x"], ["next_sum"]),
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "limit"], ["is_endless"]),
        helper.make_node("Loop", ["", "is_endless", "next_sum"], ["y"], body=forever),
    ]
    return model(
        nodes, [vector_state("sum")], {"half": np.array(0.5, np.float32), "limit": np.array(1000, np.float32)}
    )


def logarithm() -> bytes:
    """sum' = sum + x; y = log(sum'): not finite unless every sum is above 0. Starts from 1."""
    nodes = [
        helper.make_node("Add", ["sum", "x"], ["next_sum"]),
        helper.make_node("Log", ["next_sum"], ["y"]),
    ]
    return model(nodes, [vector_state("sum", fill=1.0)])


def many_layouts() -> bytes:
    """Batch axes in odd places, a transposed memory, an integer counter, a declared constant, an output of no use.

    memory' [B, M=2, N=4] (shown as 4x2) = memory + count' * rate; layers' [2, B, 3] = layers + x; count' = count + 1;
    y = sum of both layers' + count'. memory starts from 0 to 7 in the graph's order, layers from 1, count from 5.
    """
    nodes = [
        helper.make_node("Add", ["count", "unit"], ["next_count"]),
        helper.make_node("Cast", ["next_count"], ["count_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["count_float", "rate"], ["increment"]),
        helper.make_node("Unsqueeze", ["increment", "memory_axes"], ["increments"]),
        helper.make_node("Add", ["memory", "increments"], ["next_memory"]),
        helper.make_node("Add", ["layers", "x"], ["next_layers"]),
        helper.make_node("ReduceSum", ["next_layers", "zero"], ["both_layers"], keepdims=0),
        helper.make_node("Unsqueeze", ["count_float", "one"], ["count_column"]),
        helper.make_node("Add", ["both_layers", "count_column"], ["y"]),
        helper.make_node("Neg", ["y"], ["unused"]),
    ]
    states = [
        model_pb2.StateSpec(
            input_name="memory",
            output_name="next_memory",
            role=model_pb2.STATE_ROLE_MEMORY,
            dtype=FP32,
            shape=[2, 4],
            values=to_message(np.arange(8, dtype=np.float32).reshape(2, 4)),
            api_axes=[1, 0],
        ),
        model_pb2.StateSpec(
            input_name="layers",
            output_name="next_layers",
            role=model_pb2.STATE_ROLE_CONTROLLER,
            dtype=FP32,
            shape=[2, WIDTH],
            batch_axis=1,
            fill=1.0,
        ),
        model_pb2.StateSpec(
            input_name="count",
            output_name="next_count",
            role=model_pb2.STATE_ROLE_OTHER,
            dtype=tensor_pb2.DATA_TYPE_INT64,
            fill=5,
        ),
    ]
    constants = {
        "unit": np.int64(1),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "memory_axes": np.array([1, 2], np.int64),
    }
    return model(
        nodes,
        states,
        constants,
        declared_constants={"rate": np.float32(0.25)},
        extra_outputs=["unused"],
    )


def size_dependent(leak: float = 1e-3) -> bytes:
    """As the accumulator, but the batch's size leaks into y: y = sum' + leak * B."""
    nodes = [
        helper.make_node("Add", ["sum", "x"], ["next_sum"]),
        helper.make_node("Shape", ["x"], ["size"], start=0, end=1),
        helper.make_node("Cast", ["size"], ["size_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["size_float", "leak"], ["leaked"]),
        helper.make_node("Add", ["next_sum", "leaked"], ["y"]),
    ]
    return model(nodes, [vector_state("sum")], constants={"leak": np.float32(leak)})


def half_floats() -> bytes:
    """As the accumulator, but x comes in 16 bits."""
    nodes = [
        helper.make_node("Cast", ["x"], ["x_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sum", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "x_float"], ["next_sum"]),
        helper.make_node("Identity", ["next_sum"], ["y"]),
    ]
    constants = {"half": np.float32(0.5)}
    return model(nodes, [vector_state("sum")], constants, input_dtype=tensor_pb2.DATA_TYPE_FP16)


def vector_state(name: str, fill: float = 0.0) -> model_pb2.StateSpec:
    """A state of WIDTH numbers."""
    return model_pb2.StateSpec(
        input_name=name,
        output_name=f"next_{name}",
        role=model_pb2.STATE_ROLE_OTHER,
        dtype=FP32,
        shape=[WIDTH],
        fill=fill,
    )


def model(
    nodes: Sequence[onnx.NodeProto],
    states: Sequence[model_pb2.StateSpec],
    constants: dict[str, Any] | None = None,
    declared_constants: dict[str, Any] | None = None,
    extra_outputs: Sequence[str] = (),
    input_dtype: tensor_pb2.DataType.ValueType = FP32,
) -> bytes:
    """A model with input x [B, WIDTH] and output y [B, WIDTH], and its spec."""
    spec = model_pb2.ModelSpec(
        name="test",
        inputs=[model_pb2.TensorSpec(name="x", dtype=input_dtype, shape=[WIDTH])],
        outputs=[model_pb2.TensorSpec(name="y", dtype=FP32, shape=[WIDTH])],
        states=states,
        constants=[
            model_pb2.ConstantSpec(name=name, value=to_message(np.asarray(value)))
            for name, value in (declared_constants or {}).items()
        ],
    )
    return with_spec(graph_of(nodes, spec, constants or {}, extra_outputs), spec)


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    spec: model_pb2.ModelSpec,
    constants: dict[str, Any],
    extra_outputs: Sequence[str] = (),
) -> onnx.ModelProto:
    """The ONNX model that a spec describes, without the spec."""
    inputs, outputs = [], []
    inputs += [_value(tensor.name, tensor) for tensor in spec.inputs]
    outputs += [_value(tensor.name, tensor) for tensor in spec.outputs]
    inputs += [_value(state.input_name, state) for state in spec.states]
    outputs += [_value(state.output_name, state) for state in spec.states if state.output_name]
    inputs += [
        helper.make_tensor_value_info(constant.name, TensorProto.FLOAT, list(constant.value.shape))
        for constant in spec.constants
    ]
    outputs += [_value(name, spec.outputs[0]) for name in extra_outputs]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "step", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def with_spec(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> bytes:
    """The model with its spec in the metadata."""
    helper.set_model_props(step, {"ntm.v1.ModelSpec": json_format.MessageToJson(spec)})
    return step.SerializeToString()


def read_back(content: bytes) -> tuple[onnx.ModelProto, model_pb2.ModelSpec]:
    """A model and the spec in its metadata."""
    step = onnx.load_from_string(content)
    text = next(entry.value for entry in step.metadata_props if entry.key == "ntm.v1.ModelSpec")
    return step, json_format.Parse(text, model_pb2.ModelSpec())


def write(models: Path, content: bytes, name: str = "test", version: int = 1) -> Path:
    """Put a model into a models directory; returns the file."""
    path = models / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def _value(name: str, tensor: model_pb2.TensorSpec | model_pb2.StateSpec) -> onnx.ValueInfoProto:
    element_type = helper.np_dtype_to_tensor_dtype(numpy_dtype(tensor.dtype))
    axes: list[Any] = list(tensor.shape)
    axes.insert(tensor.batch_axis, "batch")
    return helper.make_tensor_value_info(name, element_type, axes)
