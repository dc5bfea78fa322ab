"""Graphs: turn a model's step into the graphs that the device runs on pools of state.

A pool is one tensor `[rows, ...]` for each state tensor. Five graphs use the pools:

- *run* is the step. The state it takes and the next state it gives are bound to different rows of the pools;
- *scan* is several steps, one after another: an ONNX Scan whose body is *run*;
- *move* copies rows to other rows, in place;
- *read* gathers rows, for callers who ask to see them;
- *write* scatters rows that come from outside.

Neither *run* nor *scan* changes rows that it reads: in a graph that did, nothing orders the Gather of a state before
the ScatterND that overwrites it when the next value does not depend on the old one (a delay line), and a node
that fails between two ScatterNDs would leave half the state updated.

Rows have the batch axis first whatever the step's own layout: transposes are added where it differs.
`model_runner.py` binds the buffers and runs these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper, numpy_helper

from ntm.tensor import numpy_dtype, to_array
from ntm.v1 import model_pb2

ROWS = "ntm.rows"
TARGETS = "ntm.targets"


def given(tensor: model_pb2.TensorSpec) -> str:
    """The name of an input of run and scan."""
    return f"ntm.input.{tensor.name}"


def taken(tensor: model_pb2.TensorSpec) -> str:
    """The name of an output of run and scan."""
    return f"ntm.output.{tensor.name}"


def pool(state: model_pb2.StateSpec) -> str:
    """The name of a state's pool in every graph."""
    return f"ntm.pool.{state.input_name}"


def updated_pool(state: model_pb2.StateSpec) -> str:
    """The name of a state's pool as an output of the graphs that change it."""
    return f"ntm.updated_pool.{state.input_name}"


def content(state: model_pb2.StateSpec) -> str:
    """The name of some rows of a state: inputs of run, scan and write, outputs of read."""
    return f"ntm.content.{state.input_name}"


def next_content(state: model_pb2.StateSpec) -> str:
    """The name of the next state of some rows: outputs of run and scan."""
    return f"ntm.next_content.{state.input_name}"


@dataclass(frozen=True)
class DeviceGraphs:
    """The graphs derived from one step, serialised."""

    run: bytes
    scan: bytes
    move: bytes
    read: bytes
    write: bytes


def derive(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> DeviceGraphs:
    """Derive the device's graphs from a step that `spec` describes truly (`spec.differences` has found none)."""
    run = _run(step, spec)
    return DeviceGraphs(
        run=run.SerializeToString(),
        scan=_scan(run, spec).SerializeToString(),
        move=_move(step, spec).SerializeToString(),
        read=_read(step, spec).SerializeToString(),
        write=_write(step, spec).SerializeToString(),
    )


def _run(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(step)
    graph = model.graph
    before = [
        _move_axis(content(state), state.input_name, state, 0, state.batch_axis) for state in spec.states
    ]
    before += [
        _move_axis(given(tensor), tensor.name, tensor, 0, tensor.batch_axis) for tensor in [spec.input]
    ]
    results: list[tuple[str, str, model_pb2.StateSpec | model_pb2.TensorSpec]] = [
        (tensor.name, taken(tensor), tensor) for tensor in [spec.output]
    ]
    results += [(state.output_name, next_content(state), state) for state in spec.states]
    made_by_nodes = {name for node in graph.node for name in node.output}
    after, new_names = [], dict[str, str]()
    for source, target, tensor in results:
        if tensor.batch_axis == 0 and source in made_by_nodes and source not in new_names:
            # An Identity would copy: ONNX Runtime keeps one whose source is used elsewhere as well.
            new_names[source] = target
        else:
            after.append(_move_axis(source, target, tensor, tensor.batch_axis, 0))

    nodes = [*before, *graph.node, *after]
    _rename(nodes, new_names)
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(
        numpy_helper.from_array(to_array(constant.value), constant.name) for constant in spec.constants
    )
    graph.input.extend(_info(given(tensor), tensor, "batch") for tensor in [spec.input])
    graph.input.extend(_info(content(state), state, "batch") for state in spec.states)
    graph.output.extend(_info(taken(tensor), tensor, "batch") for tensor in [spec.output])
    graph.output.extend(_info(next_content(state), state, "batch") for state in spec.states)
    return model


def _scan(run: onnx.ModelProto, spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    body = onnx.GraphProto()
    body.CopyFrom(run.graph)
    # A name may not stand for one thing in a body and for another around it.
    new_names = {value.name: f"ntm.body.{value.name}" for value in [*body.input, *body.output]}
    _rename(body.node, new_names)
    for values in (body.input, body.output):
        for value in values:
            value.name = new_names[value.name]
        # Scan's order: first the state, then what it takes and gives step by step.
        states = [*values][-len(spec.states) :]
        tensors = [*values][: -len(spec.states)]
        del values[:]
        values.extend([*states, *tensors])
    scan = helper.make_node(
        "Scan",
        [*map(content, spec.states), *map(given, [spec.input])],
        [*map(next_content, spec.states), *map(taken, [spec.output])],
        body=body,
        num_scan_inputs=len([spec.input]),
    )
    return _model(
        run,
        [scan],
        inputs=[
            *(_info(given(tensor), tensor, "steps", "batch") for tensor in [spec.input]),
            *(_info(content(state), state, "batch") for state in spec.states),
        ],
        outputs=[
            *(_info(taken(tensor), tensor, "steps", "batch") for tensor in [spec.output]),
            *(_info(next_content(state), state, "batch") for state in spec.states),
        ],
    )


def _move(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    gathers = [
        helper.make_node("Gather", [pool(state), ROWS], [content(state)], axis=0) for state in spec.states
    ]
    return _model(
        step,
        [*gathers, *_scatters(spec)],
        inputs=[_rows_info(ROWS), _rows_info(TARGETS), *_pools(spec)],
        outputs=_updated_pools(spec),
        initializers=[_LAST_AXIS],
    )


def _read(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    return _model(
        step,
        [helper.make_node("Gather", [pool(state), ROWS], [content(state)], axis=0) for state in spec.states],
        inputs=[_rows_info(ROWS), *_pools(spec)],
        outputs=[_info(content(state), state, "batch") for state in spec.states],
    )


def _write(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    return _model(
        step,
        _scatters(spec),
        inputs=[
            _rows_info(TARGETS),
            *_pools(spec),
            *(_info(content(state), state, "batch") for state in spec.states),
        ],
        outputs=_updated_pools(spec),
        initializers=[_LAST_AXIS],
    )


_LAST_AXIS = helper.make_tensor("ntm.last_axis", TensorProto.INT64, [1], [1])


def _scatters(spec: model_pb2.ModelSpec) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Unsqueeze", [TARGETS, _LAST_AXIS.name], ["ntm.indices"]),
        *(
            helper.make_node("ScatterND", [pool(state), "ntm.indices", content(state)], [updated_pool(state)])
            for state in spec.states
        ),
    ]


def _model(
    step: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "ntm", inputs, outputs, initializer=initializers or [])
    # The step's own versions: where it runs, these run.
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=step.opset_import, ir_version=step.ir_version, functions=step.functions
    )
    return model


def _rename(nodes: Iterable[onnx.NodeProto], new_names: Mapping[str, str]) -> None:
    """Give values other names, in the bodies of nodes as well."""
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [new_names.get(name, name) for name in names]
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _rename(body.node, new_names)


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


def _pools(spec: model_pb2.ModelSpec) -> list[onnx.ValueInfoProto]:
    return [_info(pool(state), state, "rows") for state in spec.states]


def _updated_pools(spec: model_pb2.ModelSpec) -> list[onnx.ValueInfoProto]:
    return [_info(updated_pool(state), state, "rows") for state in spec.states]


def _rows_info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch"])


def _info(
    name: str, tensor: model_pb2.StateSpec | model_pb2.TensorSpec, *leading_axes: str
) -> onnx.ValueInfoProto:
    element_type = helper.np_dtype_to_tensor_dtype(numpy_dtype(tensor.dtype))
    return helper.make_tensor_value_info(name, element_type, [*leading_axes, *tensor.shape])
