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

*Run* is one of two. Where rows of a batch are independent the step runs on all of them: rows have the batch axis first
whatever the step's own layout, so transposes are added where it differs. Where the graph takes one session at a time,
since it has no batch axis or hard-wires its length, the step is the body of a Scan over rows, each in the graph's own
shape. `probe.py` chooses between the two, `runner.py` binds the buffers and runs these.

*Move*, *read* and *write* have nothing of the step's and so nothing of its version of ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from ntm.tensor import numpy_dtype, to_array
from ntm.v1 import model_pb2
from server.model.spec import graph_shape

ROWS = "ntm.rows"
TARGETS = "ntm.targets"

_OPSET = 17
_IR_VERSION = 8
# The first whose Scan has the form used here; an older step is raised to it.
_FIRST_OPSET = 9

TensorLike = model_pb2.StateSpec | model_pb2.TensorSpec


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


def derive(step: onnx.ModelProto, spec: model_pb2.ModelSpec, row_by_row: bool = False) -> DeviceGraphs:
    """Derive the device's graphs from a step that `spec` describes truly (`spec.differences` has found none).

    Args:
        step: the model's step.
        spec: what it takes and gives.
        row_by_row: whether rows are run one after another; else all at once, for which every tensor needs a batch axis.
    """
    step = _current(step, spec)
    run = _row_by_row(step, spec) if row_by_row else _together(step, spec)
    return DeviceGraphs(
        run=run.SerializeToString(),
        scan=_scan(run, spec, row_by_row).SerializeToString(),
        move=_move(spec).SerializeToString(),
        read=_read(spec).SerializeToString(),
        write=_write(spec).SerializeToString(),
    )


def has_branches_in_branches(step: onnx.ModelProto) -> bool:
    """Whether a step has an If in a branch of another.

    ONNX Runtime 1.32 crashes on some where the step is the body of a Scan and it finds the outer branch to be constant:
    such a body is to be loaded without the folding of constants.
    """
    return any(
        inner.op_type == "If"
        for node in [*step.graph.node, *(node for function in step.functions for node in function.node)]
        for outer in [node, *(inner for body in _bodies([node]) for inner in body.node)]
        if outer.op_type == "If"
        for branch in _bodies([outer])
        for inner in branch.node
    )


def row_shape(tensor: TensorLike, row_by_row: bool) -> tuple[int, ...]:
    """The shape of one row of a tensor as run and scan have it."""
    return graph_shape(tensor) if row_by_row else tuple(tensor.shape)


def _current(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    """The step in a form that others can be built around: with a Scan, its constants inside, no shapes of its own."""
    if any(opset.domain in ("", "ai.onnx") and opset.version < _FIRST_OPSET for opset in step.opset_import):
        step = version_converter.convert_version(step, _FIRST_OPSET)
    model = onnx.ModelProto()
    model.CopyFrom(step)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    model.graph.initializer.extend(
        numpy_helper.from_array(to_array(constant.value), constant.name) for constant in spec.constants
    )
    # What the file declares may hold for a batch of 1 alone, so ONNX Runtime finds the shapes out.
    del model.graph.value_info[:]
    for body in _bodies(model.graph.node):
        del body.value_info[:]
        for value in body.output:
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
    return model


def _together(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(step)
    graph = model.graph
    before = [
        _move_axis(content(state), state.input_name, state, 0, state.batch_axis) for state in spec.states
    ]
    before += [_move_axis(given(tensor), tensor.name, tensor, 0, tensor.batch_axis) for tensor in spec.inputs]
    made_by_nodes = {name for node in graph.node for name in node.output}
    after, new_names = [], dict[str, str]()
    for source, target, tensor in _results(spec):
        if tensor.batch_axis == 0 and source in made_by_nodes and source not in new_names:
            # An Identity would copy: ONNX Runtime keeps one whose source is used elsewhere as well.
            new_names[source] = target
        else:
            after.append(_move_axis(source, target, tensor, tensor.batch_axis, 0))

    nodes = [*before, *graph.node, *after]
    _rename(nodes, new_names)
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.extend(_infos_taken(spec, False, "batch"))
    graph.output.extend(_infos_given(spec, False, "batch"))
    return model


def _row_by_row(step: onnx.ModelProto, spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    body = onnx.GraphProto()
    body.CopyFrom(step.graph)
    del body.input[:], body.output[:]
    body.input.extend(_info(state.input_name, state, graph_shape(state)) for state in spec.states)
    body.input.extend(_info(each.name, each, graph_shape(each)) for each in spec.inputs)
    results = [result for result in _results(spec) if result[0] not in _session_inputs(spec)]
    for source, target, tensor in results:
        # A body gives each value once, and none that it was given.
        body.node.append(helper.make_node("Identity", [source], [f"ntm.row.{target}"]))
        body.output.append(_info(f"ntm.row.{target}", tensor, graph_shape(tensor)))
    names = [*map(content, spec.states), *map(given, spec.inputs)]
    scan = helper.make_node(
        "Scan", names, [target for _, target, _ in results], body=body, num_scan_inputs=len(names)
    )
    carried = [
        helper.make_node("Identity", [content(state)], [next_content(state)])
        for state in spec.states
        if not state.output_name
    ]
    return _model(
        [scan, *carried],
        inputs=_infos_taken(spec, True, "batch"),
        outputs=_infos_given(spec, True, "batch"),
        step=step,
    )


def _scan(run: onnx.ModelProto, spec: model_pb2.ModelSpec, row_by_row: bool) -> onnx.ModelProto:
    body = onnx.GraphProto()
    body.CopyFrom(run.graph)
    # A name may not stand for one thing in a body and for another around it.
    new_names = {value.name: f"ntm.body.{value.name}" for value in [*body.input, *body.output]}
    _rename(body.node, new_names)
    for value in [*body.input, *body.output]:
        value.name = new_names[value.name]
    scan = helper.make_node(
        "Scan",
        [*map(content, spec.states), *map(given, spec.inputs)],
        [*map(next_content, spec.states), *map(taken, spec.outputs)],
        body=body,
        num_scan_inputs=len(spec.inputs),
    )
    return _model(
        [scan],
        inputs=_infos_taken(spec, row_by_row, "steps", "batch"),
        outputs=_infos_given(spec, row_by_row, "steps", "batch"),
        step=run,
    )


def _move(spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    gathers = [
        helper.make_node("Gather", [pool(state), ROWS], [content(state)], axis=0) for state in spec.states
    ]
    return _model(
        [*gathers, *_scatters(spec)],
        inputs=[_rows_info(ROWS), _rows_info(TARGETS), *_pools(spec)],
        outputs=_updated_pools(spec),
        initializers=[_LAST_AXIS],
    )


def _read(spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    return _model(
        [helper.make_node("Gather", [pool(state), ROWS], [content(state)], axis=0) for state in spec.states],
        inputs=[_rows_info(ROWS), *_pools(spec)],
        outputs=[_info(content(state), state, ["batch", *state.shape]) for state in spec.states],
    )


def _write(spec: model_pb2.ModelSpec) -> onnx.ModelProto:
    return _model(
        _scatters(spec),
        inputs=[
            _rows_info(TARGETS),
            *_pools(spec),
            *(_info(content(state), state, ["batch", *state.shape]) for state in spec.states),
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
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    step: onnx.ModelProto | None = None,
) -> onnx.ModelProto:
    """A graph around a step, of its version, or one of its own."""
    graph = helper.make_graph(nodes, "ntm", inputs, outputs, initializer=initializers)
    if step is None:
        opsets = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    return helper.make_model(
        graph, opset_imports=step.opset_import, ir_version=step.ir_version, functions=step.functions
    )


def _results(spec: model_pb2.ModelSpec) -> list[tuple[str, str, TensorLike]]:
    """What a step gives: its name in the step, its name in run, and what it is."""
    results: list[tuple[str, str, TensorLike]] = [
        (tensor.name, taken(tensor), tensor) for tensor in spec.outputs
    ]
    # No step changes a session input: the next is the one that came in.
    results += [(state.output_name or state.input_name, next_content(state), state) for state in spec.states]
    return results


def _session_inputs(spec: model_pb2.ModelSpec) -> set[str]:
    return {state.input_name for state in spec.states if not state.output_name}


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The bodies of nodes, and those of the nodes in them."""
    for node in nodes:
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for body in graphs:
                yield body
                yield from _bodies(body.node)


def _rename(nodes: Sequence[onnx.NodeProto], new_names: Mapping[str, str]) -> None:
    """Give values other names, in the bodies of nodes as well."""
    for names in (
        *(names for node in nodes for names in (node.input, node.output)),
        *(names for body in _bodies(nodes) for node in body.node for names in (node.input, node.output)),
    ):
        names[:] = [new_names.get(name, name) for name in names]
    for body in _bodies(nodes):
        for value in body.output:
            value.name = new_names.get(value.name, value.name)


def _move_axis(
    source: str,
    target: str,
    tensor: TensorLike,
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
    return [_info(pool(state), state, ["rows", *state.shape]) for state in spec.states]


def _updated_pools(spec: model_pb2.ModelSpec) -> list[onnx.ValueInfoProto]:
    return [_info(updated_pool(state), state, ["rows", *state.shape]) for state in spec.states]


def _rows_info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch"])


def _infos_taken(spec: model_pb2.ModelSpec, row_by_row: bool, *axes: str) -> list[onnx.ValueInfoProto]:
    """What run and scan take: states, as Scan wants it, then what comes step by step."""
    return [
        *(_info(content(s), s, ["batch", *row_shape(s, row_by_row)]) for s in spec.states),
        *(_info(given(t), t, [*axes, *row_shape(t, row_by_row)]) for t in spec.inputs),
    ]


def _infos_given(spec: model_pb2.ModelSpec, row_by_row: bool, *axes: str) -> list[onnx.ValueInfoProto]:
    """What run and scan give, in the same order."""
    return [
        *(_info(next_content(s), s, ["batch", *row_shape(s, row_by_row)]) for s in spec.states),
        *(_info(taken(t), t, [*axes, *row_shape(t, row_by_row)]) for t in spec.outputs),
    ]


def _info(name: str, tensor: TensorLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    element_type = helper.np_dtype_to_tensor_dtype(numpy_dtype(tensor.dtype))
    return helper.make_tensor_value_info(name, element_type, shape)
