"""Graphs: turn a model's step into the graphs that the device runs on pools of state.

A pool is one tensor `[slots, ...]` for each state tensor, a row for each slot. Three graphs use them:

- *run* gathers the rows of some slots, runs the step, and gives `output` and the next state;
- *commit* scatters next state into the pools, in place when input and output are bound to one buffer;
- *read* gathers rows, for callers who ask to see them.

Run and commit are two graphs because in one nothing orders the Gather of a state before the ScatterND that
overwrites it when the next value does not depend on the old one (a delay line), and because a node that
fails between two ScatterNDs would leave half the state updated.

Rows have the batch axis first whatever the step's own layout: transposes are added where it differs.
`model_runner.py` binds the buffers and runs these.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper, numpy_helper

from ntm.tensor import numpy_dtype, to_array
from ntm.v1 import model_pb2

SLOTS = "ntm.slots"
INPUT = "ntm.input"
OUTPUT = "ntm.output"


def pool(state: model_pb2.StateSpec) -> str:
    """The name of a state's pool in every graph."""
    return f"ntm.pool.{state.input_name}"


def updated_pool(state: model_pb2.StateSpec) -> str:
    """The name of a state's pool as an output of the commit graph."""
    return f"ntm.updated_pool.{state.input_name}"


def rows(state: model_pb2.StateSpec) -> str:
    """The name of some rows of a state: outputs of run (the next state) and read, inputs of commit."""
    return f"ntm.rows.{state.input_name}"


@dataclass(frozen=True)
class DeviceGraphs:
    """The graphs derived from one step, serialised."""

    run: bytes
    commit: bytes
    read: bytes


def derive(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> DeviceGraphs:
    """Derive the device's graphs from a step that `spec` describes truly (`spec.differences` has found none)."""
    return DeviceGraphs(run=_run(step, spec), commit=_commit(step, spec), read=_read(step, spec))


def _run(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> bytes:
    before = [
        node
        for state in spec.states
        for node in (
            helper.make_node("Gather", [pool(state), SLOTS], [f"ntm.gathered.{state.input_name}"], axis=0),
            _move_axis(f"ntm.gathered.{state.input_name}", state.input_name, state, 0, state.batch_axis),
        )
    ]
    before.append(_move_axis(INPUT, spec.input.name, spec.input, 0, spec.input.batch_axis))
    after = [_move_axis(state.output_name, rows(state), state, state.batch_axis, 0) for state in spec.states]
    after.append(_move_axis(spec.output.name, OUTPUT, spec.output, spec.output.batch_axis, 0))

    model = onnx.ModelProto()
    model.CopyFrom(step)
    graph = model.graph
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(
        numpy_helper.from_array(to_array(constant.value), constant.name) for constant in spec.constants
    )
    graph.input.extend([_slots_info(), _info(INPUT, spec.input, "batch")])
    graph.input.extend(_info(pool(state), state, "slots") for state in spec.states)
    graph.output.append(_info(OUTPUT, spec.output, "batch"))
    graph.output.extend(_info(rows(state), state, "batch") for state in spec.states)
    return model.SerializeToString()


def _commit(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> bytes:
    nodes = [helper.make_node("Unsqueeze", [SLOTS, "ntm.last_axis"], ["ntm.indices"])]
    nodes += [
        helper.make_node("ScatterND", [pool(state), "ntm.indices", rows(state)], [updated_pool(state)])
        for state in spec.states
    ]
    return _model(
        step,
        nodes,
        inputs=[
            _slots_info(),
            *(_info(pool(state), state, "slots") for state in spec.states),
            *(_info(rows(state), state, "batch") for state in spec.states),
        ],
        outputs=[_info(updated_pool(state), state, "slots") for state in spec.states],
        initializers=[helper.make_tensor("ntm.last_axis", TensorProto.INT64, [1], [1])],
    )


def _read(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> bytes:
    return _model(
        step,
        [helper.make_node("Gather", [pool(state), SLOTS], [rows(state)], axis=0) for state in spec.states],
        inputs=[_slots_info(), *(_info(pool(state), state, "slots") for state in spec.states)],
        outputs=[_info(rows(state), state, "batch") for state in spec.states],
    )


def _model(
    step: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[onnx.TensorProto] | None = None,
) -> bytes:
    graph = helper.make_graph(nodes, "ntm", inputs, outputs, initializer=initializers or [])
    # The step's own versions: where it runs, these run.
    model = helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)
    serialised: bytes = model.SerializeToString()
    return serialised


def _move_axis(
    source: str,
    target: str,
    tensor: model_pb2.StateSpec | model_pb2.TensorSpec,
    source_axis: int,
    target_axis: int,
) -> onnx.NodeProto:
    """A node that moves the batch axis; an Identity, which ONNX Runtime removes, where it need not move."""
    if source_axis == target_axis:
        return helper.make_node("Identity", [source], [target])
    axes = list(range(len(tensor.shape) + 1))
    axes.insert(target_axis, axes.pop(source_axis))
    return helper.make_node("Transpose", [source], [target], perm=axes)


def _slots_info() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(SLOTS, TensorProto.INT64, ["batch"])


def _info(
    name: str, tensor: model_pb2.StateSpec | model_pb2.TensorSpec, leading_axis: str
) -> onnx.ValueInfoProto:
    element_type = helper.np_dtype_to_tensor_dtype(numpy_dtype(tensor.dtype))
    return helper.make_tensor_value_info(name, element_type, [leading_axis, *tensor.shape])
