"""What training refuses, and why.

    TrainingError
    ├── SettingsError          a setting is unknown, malformed or cannot work
    ├── TaskError              a task's sequences are not what it says, or its data cannot be read
    ├── RunDirectoryError      the run directory is in use, or is not a run
    ├── CheckpointError        a checkpoint is missing, truncated or of another model
    ├── NonFiniteError         the loss or a gradient is no longer a number
    └── SweepError             a run of a sweep failed

Each message is one sentence or two for the person at the terminal: what happened and what to do next.
"""

from __future__ import annotations


class TrainingError(Exception):
    """Anything training refuses; `python -m training` prints its message and exits with code 1."""


class SettingsError(TrainingError):
    """A setting is unknown, malformed or cannot work."""


class TaskError(TrainingError):
    """A task's sequences are not what it says, or its data cannot be read."""


class RunDirectoryError(TrainingError):
    """The run directory is in use, or is not a run."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, truncated or of another model."""


class NonFiniteError(TrainingError):
    """The loss or a gradient is no longer a number."""


class SweepError(TrainingError):
    """A run of a sweep failed."""
