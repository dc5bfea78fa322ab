"""What export refuses, and why.

    ExportError
    ├── TargetError            the target is not <name>/<version>, or exists already
    ├── StepError              a module is no step that can be exported
    ├── RestoreError           no run can be made of a model file
    └── VerificationError      the written file does not do what the cell does
        (a checkpoint that is missing or truncated is a training.errors.CheckpointError)

Each message is a sentence for the person at the terminal: what happened and what to do next.
"""

from __future__ import annotations


class ExportError(Exception):
    """Anything export refuses; `python -m export` prints its message and exits with code 1."""


class TargetError(ExportError):
    """The target is not a version directory, or it exists already."""


class StepError(ExportError):
    """A module is no step that can be exported."""


class RestoreError(ExportError):
    """No run can be made of a model file."""


class VerificationError(ExportError):
    """The written file does not do what the cell does, or not for every batch."""
