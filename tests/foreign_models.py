"""Step models in the forms that other people's files have, each with the spec that describes it.

They are written in ONNX's own text form, so that what is particular about each can be read off it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import parser

from ntm.tensor import to_message
from ntm.v1 import model_pb2, tensor_pb2
from tests import step_models

FP32, FP64, INT64 = tensor_pb2.DATA_TYPE_FP32, tensor_pb2.DATA_TYPE_FP64, tensor_pb2.DATA_TYPE_INT64


def several() -> bytes:
    """Two inputs, an input of the session, three outputs of three types, five states on batch axes 0 to 2."""
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    several (float[N,3] obs, float[N,1] gain, float[N,3] goal,
             float[2,N,3] h, float[N,4] c, float[3,2,N] tail, int64[N] count, double[N,2,2] w)
        => (float[N,3] action, float[2,N] value, int64[N] label,
            float[2,N,3] hn, float[N,4] cn, float[3,2,N] tailn, int64[N] countn, double[N,2,2] wn)
    <float half = {0.5}, int64[1] last = {-1}, int64[1] zeros = {0}, int64[1] ones = {1}, int64[1] twos = {2},
     int64[1] threes = {3}, int64 one = {1}, int64[2] w_axes = {1, 2}>
    {
        scaled = Mul (obs, gain)
        moved = Add (scaled, goal)
        h_half = Mul (h, half)
        hn = Add (h_half, moved)
        c_rest = Slice (c, ones, threes, ones)
        total = ReduceSum <keepdims = 1> (moved, last)
        c_first = Slice (c, zeros, ones, ones)
        c_half = Mul (c, half)
        cn = Add (c_half, total)
        value = ReduceMean <keepdims = 0> (hn, last)
        front = Slice (tail, ones, threes, zeros)
        value_3 = Unsqueeze (value, zeros)
        tailn = Concat <axis = 0> (front, value_3)
        countn = Add (count, one)
        label = Mul (countn, count)
        total_64 = Cast <to = 11> (total)
        total_3 = Unsqueeze (total_64, last)
        wn = Add (w, total_3)
        h_mean = ReduceMean <keepdims = 0> (hn, zeros)
        action_1 = Add (h_mean, c_first)
        tail_mean = ReduceMean <keepdims = 0> (tail, zeros)
        tail_t = Transpose <perm = [1, 0]> (tail_mean)
        tail_1 = ReduceMean <keepdims = 1> (tail_t, last)
        action = Add (action_1, tail_1)
    }
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("obs", [3]), tensor("gain", [1])],
        outputs=[tensor("action", [3]), tensor("value", [2], 1), tensor("label", [], dtype=INT64)],
        states=[
            model_pb2.StateSpec(
                input_name="goal", role=model_pb2.STATE_ROLE_OTHER, dtype=FP32, shape=[3], fill=0.25
            ),
            state("h", "hn", [2, 3], 1, api_axes=[1, 0]),
            state("c", "cn", [4]),
            state("tail", "tailn", [3, 2], 2, fill=1.0),
            state("count", "countn", [], dtype=INT64, fill=5),
            state("w", "wn", [2, 2], dtype=FP64),
        ],
    )
    return with_spec(text, spec)


def open_axes() -> bytes:
    """A frame of any length, an axis without a name, a state whose next value says nothing of its shape."""
    text = """
    <ir_version: 8, opset_import: ["" : 16]>
    step (float[N,samples] x, float[2,N,W] state) => (float[N,1] y, float[a,b,c] stateN)
    <float half = {0.5}, int64[1] frame = {1}>
    {
        mean = ReduceMean <axes = [1], keepdims = 1> (x)
        state_half = Mul (state, half)
        stateN = Add (state_half, mean)
        y_3 = ReduceMax <axes = [0, 2], keepdims = 0> (stateN)
        y = Unsqueeze (y_3, frame)
    }
    """
    model = parse(text)
    model.graph.input[0].type.tensor_type.shape.dim[1].Clear()
    model.graph.output[1].type.tensor_type.shape.Clear()
    for _ in range(3):
        model.graph.output[1].type.tensor_type.shape.dim.add()
    spec = model_pb2.ModelSpec(
        inputs=[tensor("x", [12])], outputs=[tensor("y", [1])], states=[state("state", "stateN", [2, 5], 1)]
    )
    return step_models.with_spec(model, spec)


def fixed_to_one() -> bytes:
    """The batch axis is said to be 1, and nothing in the graph needs it to be."""
    return _recurrent("int64[2] shape = {-1, 4}")


def hard_wired() -> bytes:
    """As before, but a Reshape makes one row of whatever comes."""
    return _recurrent("int64[2] shape = {1, -1}")


def mixing() -> bytes:
    """As before, but what would be the rows of a batch are added up: of 1 row it makes no difference."""
    return _recurrent(
        "int64[2] shape = {-1, 4}, int64[1] first = {0}",
        "flat = ReduceSum <keepdims = 1> (flat_1, first)",
        "flat_1",
    )


def _recurrent(constants: str, more: str = "", reshaped: str = "flat") -> bytes:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    step (float[1,2,2] x, float[1,1,4] h) => (float[1,4] y, float[1,1,4] hn)
    <{constants}, int64[3] back = {{1, -1, 4}}, float half = {{0.5}}>
    {{
        {reshaped} = Reshape (x, shape)
        {more}
        added = Add (h, flat)
        hn = Mul (added, half)
        y = Squeeze (hn, zero)
    }}
    """.replace("half = {0.5}>", "half = {0.5}, int64[1] zero = {0}>")
    spec = model_pb2.ModelSpec(
        inputs=[tensor("x", [2, 2])], outputs=[tensor("y", [4])], states=[state("h", "hn", [1, 4], 1)]
    )
    return with_spec(text, spec)


def no_batch_axis() -> bytes:
    """States and inputs of one session and nothing else; names in pairs of their own; one output nobody wants."""
    text = """
    <ir_version: 7, opset_import: ["" : 13]>
    step (float[6] frame, float[25] ring_in, float clock_in)
        => (float[1] level, float[25] ring_out, float clock_out, float[6] debug)
    <int64[1] a = {6}, int64[1] b = {25}, int64[1] zero = {0}, float one = {1}>
    {
        rest = Slice (ring_in, a, b, zero)
        ring_out = Concat <axis = 0> (rest, frame)
        clock_out = Add (clock_in, one)
        squares = Mul (ring_out, ring_out)
        sum = ReduceSum <keepdims = 1> (squares, zero)
        level = Div (sum, clock_out)
        debug = Neg (frame)
    }
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("frame", [6], -1)],
        outputs=[tensor("level", [1], -1)],
        states=[state("ring_in", "ring_out", [25], -1), state("clock_in", "clock_out", [], -1)],
    )
    return with_spec(text, spec)


def scalar_of_a_session() -> bytes:
    """An input of rank 0 that a session is given once, such as how much noise is to be left."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    step (float[4] frame, float limit, float[4] memory) => (float[4] louder, float[4] new_memory)
    <float half = {0.5}>
    {
        halved = Mul (memory, half)
        new_memory = Add (halved, frame)
        louder = Mul (new_memory, limit)
    }
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("frame", [4], -1)],
        outputs=[tensor("louder", [4], -1)],
        states=[
            state("memory", "new_memory", [4], -1),
            model_pb2.StateSpec(
                input_name="limit", role=model_pb2.STATE_ROLE_OTHER, dtype=FP32, batch_axis=-1, fill=1.0
            ),
        ],
    )
    return with_spec(text, spec)


def no_names_in_common() -> bytes:
    """Each shape is there once among the inputs and once among the outputs, the step's own as well."""
    text = """
    <ir_version: 6, opset_import: ["" : 11]>
    step (float[1,1,6] input_2, float[1,2,3,2] input_3) => (float[1,1,6] activation_2, float[1,2,3,2] stack_2)
    <float half = {0.5}, int64[4] as_state = {-1, 1, 3, 2}>
    {
        wide = Reshape (input_2, as_state)
        halved = Mul (input_3, half)
        stack_2 = Add (halved, wide)
        sum = ReduceSum <axes = [1, 2, 3], keepdims = 0> (stack_2)
        sum_3 = Unsqueeze <axes = [1, 2]> (sum)
        added = Add (input_2, sum_3)
        activation_2 = Sigmoid (added)
    }
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("input_2", [1, 6])],
        outputs=[tensor("activation_2", [1, 6])],
        states=[state("input_3", "stack_2", [2, 3, 2])],
    )
    return with_spec(text, spec)


def frames_at_a_time() -> bytes:
    """How many frames come at once is open, and the batch is said to be 1; states named h0 and hN."""
    text = """
    <ir_version: 8, opset_import: ["" : 14]>
    step (float[1,num_frames,4] speech, float[2,1,4] h0) => (float[1,given_frames,4] logits, float[2,kept,4] hN)
    <float half = {0.5}, int64[1] last = {-1}, int64[1] end = {9223372036854775807}, int64[1] frames = {1},
     int64[1] zero = {0}>
    {
        tail = Slice (speech, last, end, frames)
        moved = Transpose <perm = [1, 0, 2]> (tail)
        halved = Mul (h0, half)
        hN = Add (halved, moved)
        mean = ReduceMean <axes = [0], keepdims = 0> (hN)
        mean_3 = Unsqueeze (mean, frames)
        logits = Add (speech, mean_3)
    }
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("speech", [3, 4])],
        outputs=[tensor("logits", [3, 4])],
        states=[state("h0", "hN", [2, 4], 1)],
    )
    return with_spec(text, spec)


def old_opset(version: int) -> bytes:
    """Opset 7, 8 or 11: axes are attributes, and there is no Scan of today's form."""
    text = f"""
    <ir_version: 3, opset_import: ["" : {version}]>
    step (float[N,3] x, float[N,1,3] h, float half) => (float[N,3] y, float[N,1,3] hn)
    <float half = {{0.5}}>
    {{
        x_3 = Unsqueeze <axes = [1]> (x)
        halved = Mul (h, half)
        hn = Add (halved, x_3)
        tanh = Tanh (hn)
        y = Squeeze <axes = [1]> (tanh)
    }}
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("x", [3])], outputs=[tensor("y", [3])], states=[state("h", "hn", [1, 3])]
    )
    return with_spec(text, spec)


def branch_on_a_constant() -> bytes:
    """An If at the top of the graph, on an input of rank 0 that is the same for all."""
    text = """
    <ir_version: 8, opset_import: ["" : 16]>
    step (float[N,3] x, float[N,3] h, int64 sr) => (float[N,3] y, float[N,3] hn)
    <int64 wanted = {16000}, float half = {0.5}>
    {
        is_wanted = Equal (sr, wanted)
        y, hn_1 = If (is_wanted) <
            then_branch = then_graph () => (float[N,3] y_t, float[N,3] hn_t)
                { halved = Mul (h, half)  hn_t = Add (halved, x)  y_t = Neg (hn_t) },
            else_branch = else_graph () => (float[N,3] y_e, float[N,3] hn_e)
                { hn_e = Add (h, x)  y_e = Identity (hn_e) }
        >
        hn = Identity (hn_1)
    }
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("x", [3])],
        outputs=[tensor("y", [3])],
        states=[state("h", "hn", [3])],
        constants=[model_pb2.ConstantSpec(name="sr", value=to_message(np.array(16000, np.int64)))],
    )
    return with_spec(text, spec)


def of_another_domain() -> bytes:
    """An operator of com.microsoft, which the ONNX checker does not know."""
    text = """
    <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    step (float[N,3] x, float[N,3] h) => (float[N,3] y, float[N,3] hn)
    <float half = {0.5}>
    {
        halved = Mul (h, half)
        hn = Add (halved, x)
        y = com.microsoft.QuickGelu <alpha = 1.0> (hn)
    }
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("x", [3])], outputs=[tensor("y", [3])], states=[state("h", "hn", [3])]
    )
    return with_spec(text, spec)


def of_many_states(num_states: int = 105) -> bytes:
    """A chain of caches, each passed on from the one before."""
    names = [f"cache_{number}" for number in range(num_states)]
    taken = ", ".join(f"float[N,3] {name}" for name in names)
    given = ", ".join(f"float[N,3] new_{name}" for name in names)
    passed = "\n".join(
        f"new_{name} = Add ({name}, {before})"
        for name, before in zip(names, ["x_small", *(f"new_{n}_small" for n in names)], strict=False)
    )
    small = "\n".join(f"new_{name}_small = Mul (new_{name}, small)" for name in names)
    lines = [line for pair in zip(passed.split("\n"), small.split("\n"), strict=True) for line in pair]
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    step (float[N,3] x, {taken}) => (float[N,3] y, {given})
    <float small = {{0.125}}>
    {{
        x_small = Mul (x, small)
        {chr(10).join(lines)}
        y = Identity (new_{names[-1]}_small)
    }}
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("x", [3])],
        outputs=[tensor("y", [3])],
        states=[state(name, f"new_{name}", [3]) for name in names],
    )
    return with_spec(text, spec)


def growing() -> bytes:
    """A cache that gets longer with every step."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    step (float[N,1,3] x, float[N,past,3] cache) => (float[N,3] y, float[N,now,3] new_cache)
    <int64[1] one = {1}>
    {
        new_cache = Concat <axis = 1> (cache, x)
        y = ReduceSum <keepdims = 0> (new_cache, one)
    }
    """
    spec = model_pb2.ModelSpec(
        inputs=[tensor("x", [1, 3])],
        outputs=[tensor("y", [3])],
        states=[state("cache", "new_cache", [4, 3])],
    )
    return with_spec(text, spec)


KINDS: dict[str, tuple[Callable[[], bytes], bool]] = {
    "several inputs, outputs and states": (several, False),
    "open axes": (open_axes, False),
    "batch said to be 1": (fixed_to_one, False),
    "batch hard-wired to 1": (hard_wired, True),
    "rows added up": (mixing, True),
    "no batch axis": (no_batch_axis, True),
    "a scalar of a session": (scalar_of_a_session, True),
    "no names in common": (no_names_in_common, False),
    "frames at a time": (frames_at_a_time, False),
    "opset 7": (lambda: old_opset(7), False),
    "opset 8": (lambda: old_opset(8), False),
    "opset 11": (lambda: old_opset(11), False),
    "a branch on a constant": (branch_on_a_constant, False),
    "operators of com.microsoft": (of_another_domain, False),
    "105 states": (of_many_states, False),
}
"""How to make each, and whether its rows are to be run one after another."""


def tensor(
    name: str, shape: Sequence[int], batch_axis: int = 0, dtype: tensor_pb2.DataType.ValueType = FP32
) -> model_pb2.TensorSpec:
    return model_pb2.TensorSpec(name=name, dtype=dtype, shape=shape, batch_axis=batch_axis)


def state(
    name: str,
    output_name: str,
    shape: Sequence[int],
    batch_axis: int = 0,
    dtype: tensor_pb2.DataType.ValueType = FP32,
    fill: float = 0.0,
    api_axes: Sequence[int] = (),
) -> model_pb2.StateSpec:
    return model_pb2.StateSpec(
        input_name=name,
        output_name=output_name,
        role=model_pb2.STATE_ROLE_OTHER,
        dtype=dtype,
        shape=shape,
        batch_axis=batch_axis,
        fill=fill,
        api_axes=api_axes,
    )


def parse(text: str) -> onnx.ModelProto:
    return parser.parse_model(text)


def with_spec(text: str, spec: model_pb2.ModelSpec) -> bytes:
    return step_models.with_spec(parse(text), spec)
