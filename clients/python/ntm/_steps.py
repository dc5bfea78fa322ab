"""Steps: all inputs of some steps, or all their outputs, as one array that can be cut, joined and compared.

A model of one input has it as it is, [T, ...input shape]. Several, and a mask of resets, are the fields of a structured
array [T], one field for each name. Callers see plain arrays, and dicts of them where there are several.

Shapes: T steps; with S sessions before it in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ntm.tensor import Array, TensorError, fill, to_array
from ntm.v1 import session_service_pb2

RESETS = "ntm.resets"
"""The field of the mask."""

Inputs = npt.ArrayLike | Mapping[str, npt.ArrayLike]
"""[T, ...input shape] for a model of one input; by name for one of several."""
Outputs = Any
"""An array [T, ...output shape] of a model of one output; a dict of arrays, by name, of one of several."""


@dataclass(frozen=True)
class Steps:
    """Inputs of some steps, a chunk of a stream, of which some begin from the session's initial state."""

    inputs: Inputs
    """For T steps."""
    resets: npt.ArrayLike | None = None
    """[T], which steps begin from the initial state; None: none does."""


CarriesInputs = (
    session_service_pb2.StepRequest
    | session_service_pb2.BatchStepRequest
    | session_service_pb2.WatchSessionResponse
)
CarriesOutputs = session_service_pb2.StepResponse | session_service_pb2.BatchStepResponse


def structured(tensors: Mapping[str, Array], num_leading_axes: int) -> Array:
    """Tensors [T, ...] as one array [T]."""
    first = next(iter(tensors.values()))
    fields = [(name, array.dtype, array.shape[num_leading_axes:]) for name, array in tensors.items()]
    steps: Array = np.empty(first.shape[:num_leading_axes], np.dtype(fields))
    for name, array in tensors.items():
        steps[name] = array
    return steps


def fill_inputs(message: CarriesInputs, inputs: Array) -> None:
    """Put inputs into an empty message."""
    names = inputs.dtype.names
    if names is None:
        fill(message.inputs, inputs)
        return
    for name in names:
        if name == RESETS:
            fill(message.resets, inputs[name])
        else:
            named = message.named_inputs.add(name=name)
            fill(named.value, inputs[name])


def inputs_of(message: CarriesInputs, num_leading_axes: int = 1) -> Array:
    """What `fill_inputs` put there; raises TensorError if nothing of the kind is there."""
    tensors = {named.name: to_array(named.value) for named in message.named_inputs}
    if not tensors:
        return to_array(message.inputs)
    if message.HasField("resets"):
        tensors[RESETS] = to_array(message.resets)
    return _received("named_inputs", tensors, num_leading_axes)


def outputs_of(message: CarriesOutputs, num_leading_axes: int = 1) -> Array:
    """The outputs in an answer; raises TensorError if they are none."""
    if not message.named_outputs:
        return to_array(message.outputs)
    tensors = {named.name: to_array(named.value) for named in message.named_outputs}
    return _received("named_outputs", tensors, num_leading_axes)


def _received(field: str, tensors: Mapping[str, Array], num_leading_axes: int) -> Array:
    """What came over the wire, as one array."""
    leading = {array.shape[:num_leading_axes] for array in tensors.values()}
    if "" in tensors or len(leading) != 1 or len(min(leading)) != num_leading_axes:
        raise TensorError(field, f"{field} have no names, or not all as many steps")
    return structured(tensors, num_leading_axes)


def shown(steps: Array) -> Outputs:
    """Inputs or outputs as callers see them."""
    names = steps.dtype.names
    if names is None:
        return steps
    return {name: np.ascontiguousarray(steps[name]) for name in names}
