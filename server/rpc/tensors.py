"""Tensors of steps, as messages show them: one by itself, several by name."""

from __future__ import annotations

from typing import Protocol

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from ntm.tensor import fill
from ntm.v1 import tensor_pb2
from server.model.layout import Steps
from server.model.spec import StepModel


class _ShowsOutputs(Protocol):
    @property
    def outputs(self) -> tensor_pb2.Tensor:
        """Of a model of one output."""

    @property
    def named_outputs(self) -> RepeatedCompositeFieldContainer[tensor_pb2.NamedTensor]:
        """Of a model of several."""


class _ShowsInputs(Protocol):
    @property
    def inputs(self) -> tensor_pb2.Tensor:
        """Of a model of one input."""

    @property
    def named_inputs(self) -> RepeatedCompositeFieldContainer[tensor_pb2.NamedTensor]:
        """Of a model of several."""

    @property
    def resets(self) -> tensor_pb2.Tensor:
        """Which steps begin from the initial state."""


def fill_outputs(message: _ShowsOutputs, outputs: Steps, model: StepModel) -> None:
    """Put outputs into an empty message."""
    layout = model.outputs
    if len(layout.names) == 1:
        raw = layout.raw(outputs)
        if raw is None:
            fill(message.outputs, layout.tensor(outputs, layout.names[0]))
        else:
            tensor, spec = message.outputs, model.spec.outputs[0]
            tensor.dtype, tensor.raw = spec.dtype, raw
            tensor.shape.extend((*outputs.shape, *spec.shape))
        return
    for name in layout.names:
        named = message.named_outputs.add(name=name)
        fill(named.value, layout.tensor(outputs, name))


def fill_inputs(message: _ShowsInputs, inputs: Steps, model: StepModel) -> None:
    """Put inputs into an empty message."""
    layout = model.inputs
    if len(layout.names) == 1:
        fill(message.inputs, layout.tensor(inputs, layout.names[0]))
    else:
        for name in layout.names:
            named = message.named_inputs.add(name=name)
            fill(named.value, layout.tensor(inputs, name))
    resets = layout.resets(inputs)
    if resets.any():
        fill(message.resets, resets)
