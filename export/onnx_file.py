"""The ONNX file: trace the step, put the ModelSpec into its metadata.

`spec.py` says what the metadata holds; `verification.py` decides whether the file is good.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf import json_format

from export.errors import StepError
from export.spec import METADATA_KEY
from export.step import Step
from ntm.v1 import model_pb2

BATCH_AXIS = "batch"


def write_onnx(step: Step, spec: model_pb2.ModelSpec, path: Path) -> None:
    """Write the step as one self-contained ONNX file."""
    model = graph(step)
    _strip_source(model)
    model.producer_name, model.producer_version = "ntm.export", ""
    onnx.helper.set_model_props(model, {METADATA_KEY: json_format.MessageToJson(spec, indent=None)})
    path.write_bytes(model.SerializeToString(deterministic=True))


def read_spec(model: onnx.ModelProto) -> model_pb2.ModelSpec:
    """The ModelSpec in a model's metadata."""
    [text] = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    return json_format.Parse(text, model_pb2.ModelSpec())


def graph(step: Step) -> onnx.ModelProto:
    """The step as ONNX Runtime runs it best, which for the machine is by `access.py`."""
    return trace(step.for_onnx_runtime())


def trace(step: Step) -> onnx.ModelProto:
    """What the exporter makes of a step, for any batch size, or for 1 where the module takes no other.

    Raises:
        StepError: the exporter cannot make such a graph of the module.
    """
    # A batch of 1 would be taken for a constant, which it is to be where the module takes no other.
    size = 1 if step.hard_wired else 2
    example = [*step.example_inputs(size).values(), *step.initial_state(size).values()]
    batch = torch.export.Dim(BATCH_AXIS)
    axes = tuple({step.batch_axes[name]: batch} for name in step.input_names)
    with _quiet():
        try:
            program = torch.onnx.export(
                step,
                tuple(example),
                dynamo=True,
                input_names=step.input_names,
                output_names=step.output_names,
                dynamic_shapes=None if step.hard_wired else (axes,),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            which = "even for a batch of 1" if step.hard_wired else "for any batch size"
            raise StepError(
                f"torch's exporter can make no graph of the module {which}. Where it depends on the values "
                f"of tensors, write it otherwise. The exporter says: {_reason(error)}"
            ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    if not step.hard_wired:
        shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
        # The exporter takes what loops over the rows of a batch for one of as many rows as the example has.
        if fixed := [n for n in step.input_names if shapes[n][step.batch_axes[n]].HasField("dim_value")]:
            raise StepError(
                "torch's exporter can make no graph of the module for any batch size: it takes the batch of "
                f"{', '.join(fixed)} for a constant. Where the module loops over the rows, write it for all at once"
            )
    return model


def _reason(error: BaseException) -> str:
    """What was wrong in the first place, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def _strip_source(model: onnx.ModelProto) -> None:
    """Remove what the tracer noted about the source: paths of this machine, and a good part of the file."""
    graph = model.graph
    for part in (
        model,
        graph,
        *graph.node,
        *graph.initializer,
        *graph.value_info,
        *graph.input,
        *graph.output,
    ):
        _strip(part)
    del model.functions[:]


def _strip(part: Any) -> None:
    del part.metadata_props[:]
    part.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks to whoever develops it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
