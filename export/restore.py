"""Restoring: from a model file that `export` wrote back to a run directory with a checkpoint.

Whoever has the file alone can evaluate the model, draw it, export it anew or train on from it: the weights stand in the
file, and its description says by what settings they came to be. What only training needs, the optimiser's
means and the state of generators, is not in the file, so the run cannot be resumed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from torch import Tensor

from export.access import gather
from export.errors import RestoreError
from export.onnx_file import read_spec
from export.spec import initial_value
from export.step import INPUT, CellStep
from export.verification import follow
from ntm.v1 import model_pb2
from training import checkpoint as checkpoints
from training.checkpoint import BEST, LAST, Checkpoint
from training.config import Settings, make_cell, settings_class, write_settings
from training.errors import CheckpointError, SettingsError
from training.model import Cell, NTMCell
from training.records import METRICS, as_line

_LARGEST_DIFFERENCE = 1e-4
_NUM_STEPS = 20
_PREFIX = re.compile(r"^(module\.)?cell\.")  # of the weights of a cell, in a graph
_ONE_HOT = -1e4  # The logit of attention that is 0.


def restore(model_file: Path, run_dir: Path) -> Checkpoint:
    """Make a run directory of a model file; returns the checkpoint in it.

    Args:
        model_file: an ONNX file that `publish` wrote.
        run_dir: which must not exist.

    Raises:
        RestoreError: the file was not exported from a run, or the cell made of it does not do what the file does; or
            there is a run directory already.
    """
    if run_dir.exists():
        raise RestoreError(f"{run_dir} exists: choose another run directory")
    try:
        model = onnx.load(model_file)
        spec = read_spec(model)
    except (OSError, ValueError, DecodeError, json_format.ParseError) as error:
        raise RestoreError(f"{model_file} is no model file with a description: {error}") from None
    if not spec.provenance.training_config:
        raise RestoreError(f"{model_file} was not exported from a run: there are no settings in it")
    settings = _settings(spec, run_dir)
    cell = make_cell(settings)
    weights = _weights(cell, model, spec)
    try:
        checkpoints.load_weights(cell, weights)
    except CheckpointError as error:
        raise RestoreError(f"{model_file}: {error}") from None
    step = CellStep(cell, settings.task.loss)
    inputs = settings.task.draw(4, max(settings.task.sizes()), torch.Generator().manual_seed(0)).inputs
    difference = follow(model_file, step, {INPUT: inputs[:_NUM_STEPS].numpy()})
    if not difference <= _LARGEST_DIFFERENCE:
        raise RestoreError(
            f"the cell made of {model_file} differs from it by {difference:.2g}: it was exported by another version"
        )
    checkpoint = _checkpoint(spec, settings, cell)
    run_dir.mkdir(parents=True)
    write_settings(settings, run_dir / "settings.toml")
    record = {"update": checkpoint.update, "sequences": checkpoint.update * settings.batch_size}
    (run_dir / METRICS).write_text(as_line(record | checkpoint.metrics))
    for name in (BEST, LAST):
        checkpoints.save(checkpoint, run_dir / name)
    return checkpoint


def _settings(spec: model_pb2.ModelSpec, run_dir: Path) -> Settings:
    """Those of the run, with as many memory rows as the file has."""
    values: dict[str, Any] = json_format.MessageToDict(spec.provenance.training_config)
    for state in spec.states:
        if state.role == model_pb2.STATE_ROLE_MEMORY:
            values["model"]["memory_rows"] = state.shape[-1]
    try:
        return settings_class(values["task"]["name"])(**values | {"run_dir": str(run_dir)})
    except (ValueError, KeyError, TypeError, SettingsError) as error:
        raise RestoreError(f"the settings in the file are not of this version: {error}") from None


def _weights(cell: Cell, model: onnx.ModelProto, spec: model_pb2.ModelSpec) -> dict[str, Tensor]:
    """Of every name that the cell has: from the graph, or what the initial state tells of it."""
    arrays = {
        tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in model.graph.initializer
    }
    graph = {_PREFIX.sub("", name): array for name, array in arrays.items() if _PREFIX.match(name)}
    start = {state.input_name: torch.tensor(initial_value(state)) for state in spec.states}
    if isinstance(cell, NTMCell) and "heads.weight" in graph:
        graph["heads.weight"], graph["heads.bias"] = gather(
            graph["heads.weight"], graph["heads.bias"], cell.heads.sizes
        )
    for name, own in cell.state_dict().items():
        value = _started(name, start, cell)
        if value is not None:
            graph[name] = value
        elif name not in graph and name.endswith(".bias"):
            graph[name] = _shared_bias(model, arrays, name, own)
    return graph


def _shared_bias(model: onnx.ModelProto, arrays: dict[str, Tensor], name: str, own: Tensor) -> Tensor:
    """A bias that the exporter has left out, being zero, or keeps once under the name of another that is the same."""
    weight = f"{name.removesuffix('bias')}weight"
    for node in model.graph.node:
        is_its = weight in {_PREFIX.sub("", given) for given in node.input}
        if is_its and len(node.input) == 3 and node.input[2] in arrays:
            return arrays[node.input[2]]
    return torch.zeros_like(own)


def _started(name: str, start: dict[str, Tensor], cell: Cell) -> Tensor | None:
    """A weight that is the start of a state; None if it is another."""
    if name == "initial_memory":
        return start["memory"].mT
    if name == "initial_read_vectors":
        return start["read_vectors"]
    if name == "initial_attention_logits":
        attention = torch.cat([start["read_weightings"], start["write_weightings"]])
        return attention.log().clamp_min(_ONE_HOT)
    layer, _, part = name.removeprefix("controller.layers.").partition(".initial_")
    if not part:
        return None
    num_layers = len(cell.controller.layers)
    value = start[f"controller_{part}" if num_layers == 1 else f"controller_{int(layer) + 1}_{part}"]
    return torch.atanh(value.double().clamp(-1 + 1e-15, 1 - 1e-15)).float() if part == "hidden" else value


def _checkpoint(spec: model_pb2.ModelSpec, settings: Settings, cell: Cell) -> Checkpoint:
    made = dict(spec.provenance.metrics)
    update = int(made.pop("training_updates", 0))
    seconds, cpu_seconds = made.pop("training_seconds", 0.0), made.pop("training_cpu_seconds", 0.0)
    made.pop("training_sequences", None)
    solved = {name: made.pop(name) for name in list(made) if name.startswith("solved_at_")}
    measure = settings.task.goal.measure
    return Checkpoint(
        settings=settings.model_dump(mode="json"),
        command=spec.provenance.training_command,
        update=update,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        cell=cell.state_dict(),
        averaged=cell.state_dict(),
        optimizer={},
        random_state=torch.get_rng_state(),
        sequences_state=torch.get_rng_state(),
        metrics=made,
        best_score=float(np.sum([value for name, value in made.items() if name.startswith(measure)])),
        solved={name.removeprefix("solved_at_"): value for name, value in solved.items()},
        learning_rate=settings.optimizer.learning_rate,
        num_sizes=len(settings.task.sizes()),
        attempt_began=0,
        num_averaged=update,
        num_diverged=0,
        num_skipped=0,
        num_skipped_in_a_row=0,
        versions=checkpoints.versions(),
    )
