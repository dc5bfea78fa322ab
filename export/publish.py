"""Publishing: write, verify, and only then let the version appear, by one rename.

Everything happens in a hidden folder beside the target; whatever goes wrong, nothing else is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.errors import StepError, TargetError
from export.onnx_file import write_onnx
from export.spec import library_versions, run_spec, step_spec
from export.step import CellStep, Step
from export.verification import Report, Tensors, random_sequences, task_sequences, verify
from ntm.v1 import model_pb2
from training.checkpoint import BEST, Checkpoint, load, restore_cell

MODEL_FILE = "model.onnx"
_RANDOM_STEPS = 50


def export_step(
    module: nn.Module,
    *,
    inputs: Any,
    state: Any,
    path: Path | str,
    task: str = "",
    descriptions: Mapping[str, str] | None = None,
    batch_axes: Mapping[str, int] | None = None,
    session_inputs: Collection[str] = (),
    sequences: Mapping[str, Any] | None = None,
) -> Report:
    """Export one time step of a module, verified, as a model version that the server loads.

    Args:
        module: `(inputs, state) -> (outputs, next state)`, each a tensor, or several in a mapping, a NamedTuple, a
            tuple or a list; keys and fields are their names. A machine in it is exported in its fastest form.
        inputs: an example of what a step takes, with a batch of 1.
        state: what a session starts from, with a batch of 1.
        path: `<models>/<name>/<version>`, which must not exist.
        task: what the module was trained to do, for people.
        descriptions: what inputs and outputs mean, by name, for people.
        batch_axes: of the inputs and states that have their batch axis elsewhere than in front, by name.
        session_inputs: the states that a step does not give back: a session has them from its start to its end.
        sequences: what to verify with: for each input by its name [T, ...], every step a batch of 128. Random numbers
            around the example if not given; give real inputs where the module is chaotic on others, or where integers
            in it choose among things.

    Returns:
        What was verified. `Report.invariance` says whether a row's bits depend on its batch. `Report.hard_wired` says
        why the module takes a batch of 1 and no other, which is also a warning.

    Raises:
        StepError: the module is no such step, or torch's exporter cannot make a graph of it.
        TargetError: the path is not a version directory, or exists.
        VerificationError: the file does not do what the module does.
    """
    step = Step(module, inputs, state, batch_axes=batch_axes, session_inputs=session_inputs)
    spec = step_spec(step, check_target(Path(path)), task=task, descriptions=descriptions)
    spec.provenance.export_time.FromDatetime(datetime.now(UTC))
    spec.provenance.library_versions.update(library_versions())
    given = {name: np.asarray(array) for name, array in (sequences or {}).items()}
    if given.keys() - step.inputs.keys():
        raise StepError(f"sequences are of {', '.join(given)}, and the inputs are {', '.join(step.inputs)}")
    num_steps = min(map(len, given.values()), default=_RANDOM_STEPS)
    checked = {
        name: given.get(name, array)[:num_steps] for name, array in random_sequences(step, num_steps).items()
    }
    report = _publish(step, spec, Path(path), checked, is_invariance_required=False)
    if report.hard_wired:
        warnings.warn(
            f"{path} takes a batch of 1 and no other, so a server runs the rows of a batch one after another: "
            f"{report.hard_wired}",
            stacklevel=2,
        )
    return report


def publish(run_dir: Path, target: Path, memory_rows: int | None = None) -> tuple[Checkpoint, Report]:
    """Export a run's best checkpoint as a model version; returns both with what was verified.

    Args:
        run_dir: a training run.
        target: `<models>/<name>/<version>`, which must not exist.
        memory_rows: of the exported memory; as many as in training if not given.

    Raises:
        TargetError: the target is not a version directory, or exists.
        training.errors.CheckpointError: the run has no whole checkpoint.
        training.errors.SettingsError: the model cannot work with so many rows.
        VerificationError: the file does not do what the cell does.
    """
    name = check_target(target)
    checkpoint = load(run_dir / BEST)
    cell, settings = restore_cell(checkpoint, memory_rows)
    step = CellStep(cell, settings.task.loss)
    spec = run_spec(name, step, checkpoint, settings)
    sequences = task_sequences(settings.task, settings.long_sizes)
    return checkpoint, _publish(step, spec, target, sequences, is_invariance_required=True)


def _publish(
    step: Step, spec: model_pb2.ModelSpec, target: Path, sequences: Tensors, *, is_invariance_required: bool
) -> Report:
    missing = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise TargetError(
            f"{target.parent} cannot be a folder, a file is in the way: choose another"
        ) from None
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    # A second thread brings nothing to tensors so small, and waits for its core when another process has it:
    # measured on two cores with one taken, 46 s for an export instead of 15.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _write(step, spec, draft / MODEL_FILE, may_fix_batch=not is_invariance_required)
        report = verify(draft / MODEL_FILE, step, sequences, is_invariance_required=is_invariance_required)
        draft.chmod(0o755)
        _move(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # Another export may have put its version there.
                folder.rmdir()
        raise
    finally:
        torch.set_num_threads(num_threads)
    return report


def _write(step: Step, spec: model_pb2.ModelSpec, path: Path, *, may_fix_batch: bool) -> None:
    try:
        write_onnx(step, spec, path)
    except StepError as error:
        if step.hard_wired or not may_fix_batch:
            raise
        step.fix_batch(str(error))
        write_onnx(step, spec, path)


def check_target(target: Path) -> str:
    """The model's name, from the path."""
    name, version = target.absolute().parent.name, target.name
    if not re.fullmatch(r"[1-9][0-9]{0,17}", version):
        raise TargetError(f"{target} does not end in a version number: give <models>/<name>/<version>")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", name):
        raise TargetError(f"{name!r} cannot be a model's name: use letters, digits, '_', '-' and '.'")
    if target.exists():
        raise TargetError(f"{target} exists and versions are never overwritten: choose the next number")
    return name


def _move(draft: Path, target: Path) -> None:
    for path in (draft / MODEL_FILE, draft):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    try:
        draft.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise TargetError(f"{target} appeared while it was exported: choose the next number") from None
