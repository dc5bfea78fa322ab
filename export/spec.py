"""The ModelSpec: what the file says about itself, derived from the live cell.

Nothing in it is typed by hand but the roles, which follow from the names in `training.model.state`. The server
reads it from the file's metadata and checks it against the graph.
"""

from __future__ import annotations

import platform
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


def model_spec(name: str, step: Step, checkpoint: Checkpoint, settings: Settings) -> model_pb2.ModelSpec:
    """Describe the step of a trained cell, under the name it will be served by."""
    task = settings.task
    fp32 = data_type(np.float32)
    return model_pb2.ModelSpec(
        name=name,
        task=task.name,
        inputs=[
            model_pb2.TensorSpec(
                name=INPUT, dtype=fp32, shape=[step.cell.input_size], description=task.input_description
            )
        ],
        outputs=[
            model_pb2.TensorSpec(
                name=OUTPUT, dtype=fp32, shape=[step.cell.output_size], description=task.output_description
            )
        ],
        states=[_state_spec(name, tensor) for name, tensor in step.initial_state(1).items()],
        provenance=_provenance(checkpoint, settings),
    )


def initial_value(state: model_pb2.StateSpec) -> Array:
    """What a new session starts from, without the batch axis."""
    if state.WhichOneof("initial") == "values":
        return to_array(state.values)
    return np.full(tuple(state.shape), state.fill, dtype=numpy_dtype(state.dtype))


def _state_spec(name: str, initial: Tensor) -> model_pb2.StateSpec:
    values = initial[0].numpy()
    spec = model_pb2.StateSpec(
        input_name=name,
        output_name=f"next_{name}",
        role=_ROLES.get(name, model_pb2.STATE_ROLE_CONTROLLER),
        dtype=data_type(values.dtype),
        shape=values.shape,
        api_axes=_API_AXES.get(name, []),
    )
    first = values.flat[0]
    if (values == first).all():
        spec.fill = float(first)
    else:
        spec.values.CopyFrom(to_message(values))
    return spec


def _provenance(checkpoint: Checkpoint, settings: Settings) -> model_pb2.Provenance:
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
        library_versions={library: version(library) for library in _LIBRARIES}
        | {"python": platform.python_version()},
    )
    provenance.export_time.FromDatetime(datetime.now(UTC))
    provenance.training_config.update(checkpoint.settings)
    return provenance
