"""The ModelSpec: what the file says about itself, derived from the live cell.

Nothing in it is typed by hand but the roles, which follow from the names in `training.model.state`. The server
reads it from the file's metadata and checks it against the graph.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
from torch import Tensor

from export.step import INPUT, OUTPUT, Step
from ntm.tensor import Array, data_type, numpy_dtype, to_array, to_message
from ntm.v1 import model_pb2
from training.checkpoint import Checkpoint
from training.config import Settings

METADATA_KEY = "ntm.v1.ModelSpec"

_ROLES = {
    "memory": model_pb2.STATE_ROLE_MEMORY,
    "read_weightings": model_pb2.STATE_ROLE_READ_WEIGHTING,
    "write_weightings": model_pb2.STATE_ROLE_WRITE_WEIGHTING,
    "read_vectors": model_pb2.STATE_ROLE_READ_VECTOR,
    "usage": model_pb2.STATE_ROLE_OTHER,
    "precedence": model_pb2.STATE_ROLE_OTHER,
    "links": model_pb2.STATE_ROLE_OTHER,
}
# The cell keeps memory as [M, N]; callers see the paper's N x M.
_API_AXES = {"memory": [1, 0]}
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")


def step_spec(
    step: Step, name: str, *, task: str = "", descriptions: Mapping[str, str] | None = None
) -> model_pb2.ModelSpec:
    """Describe a step, under the name it will be served by.

    Args:
        step: the step.
        name: of the model.
        task: what it was trained to do.
        descriptions: what inputs and outputs mean, by name.
    """
    about = descriptions or {}
    return model_pb2.ModelSpec(
        name=name,
        task=task,
        inputs=[_tensor_spec(step, each, tensor, about) for each, tensor in step.inputs.items()],
        outputs=[_tensor_spec(step, each, tensor, about) for each, tensor in step.outputs.items()],
        states=[_state_spec(step, each, tensor) for each, tensor in step.states.items()],
    )


def run_spec(name: str, step: Step, checkpoint: Checkpoint, settings: Settings) -> model_pb2.ModelSpec:
    """Describe the step of a run's cell, and how it came to be."""
    task = settings.task
    descriptions = {INPUT: task.input_description, OUTPUT: task.output_description}
    spec = step_spec(step, name, task=task.name, descriptions=descriptions)
    spec.provenance.CopyFrom(_provenance(checkpoint, settings))
    return spec


def library_versions() -> dict[str, str]:
    """Of what a file is made with."""
    return {library: version(library) for library in _LIBRARIES} | {"python": platform.python_version()}


def initial_value(state: model_pb2.StateSpec) -> Array:
    """What a new session starts from, without the batch axis."""
    if state.WhichOneof("initial") == "values":
        return to_array(state.values)
    return np.full(tuple(state.shape), state.fill, dtype=numpy_dtype(state.dtype))


def _tensor_spec(step: Step, name: str, example: Tensor, about: Mapping[str, str]) -> model_pb2.TensorSpec:
    axis = step.batch_axes[name]
    values = (example if axis < 0 else example.select(axis, 0)).numpy()
    return model_pb2.TensorSpec(
        name=name,
        dtype=data_type(values.dtype),
        shape=values.shape,
        batch_axis=axis,
        description=about.get(name, ""),
    )


def _state_spec(step: Step, name: str, initial: Tensor) -> model_pb2.StateSpec:
    axis = step.batch_axes[name]
    values = initial.select(axis, 0).contiguous().numpy()
    in_cell = step.cell_states.get(name)
    other = model_pb2.STATE_ROLE_OTHER if in_cell is None else model_pb2.STATE_ROLE_CONTROLLER
    spec = model_pb2.StateSpec(
        input_name=name,
        output_name="" if name in step.session_inputs else f"next_{name}",
        role=_ROLES.get(in_cell or "", other),
        dtype=data_type(values.dtype),
        shape=values.shape,
        batch_axis=axis,
        api_axes=_API_AXES.get(in_cell or "", []),
    )
    first = values.flat[0] if values.size else 0
    if (values == first).all():
        spec.fill = float(first)
    else:
        spec.values.CopyFrom(to_message(values))
    return spec


def _provenance(checkpoint: Checkpoint, settings: Settings) -> model_pb2.Provenance:
    """How a model of a run came to be."""
    provenance = model_pb2.Provenance(
        training_command=checkpoint.command,
        seed=settings.seed,
        metrics={
            **checkpoint.metrics,
            "training_updates": checkpoint.update,
            "training_sequences": checkpoint.update * settings.batch_size,
            "training_seconds": checkpoint.seconds,
            "training_cpu_seconds": checkpoint.cpu_seconds,
            **{f"solved_at_{unit}": value for unit, value in checkpoint.solved.items()},
        },
        library_versions=library_versions(),
    )
    provenance.export_time.FromDatetime(datetime.now(UTC))
    provenance.training_config.update(checkpoint.settings)
    return provenance
