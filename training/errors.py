"""What training refuses, and why.

    TrainingError
    ├── SettingsError          a setting is unknown, malformed or cannot work
    ├── TaskError              a task's sequences are not what it says, or its data cannot be read
    ├── RunDirectoryError      the run directory is in use, or is not a run
    ├── CheckpointError        a checkpoint is missing, truncated or of another model
    ├── NonFiniteError         the loss, a gradient or the weights are no longer finite numbers
    └── SweepError             a run of a sweep failed

Each message is one sentence or two for the person at the terminal: what happened and what to do next.
"""

from __future__ import annotations

DIVERGED = 3
"""Exit code of a run that ended by a NonFiniteError; of any other error it is 1."""


class TrainingError(Exception):
    """Anything training refuses; `python -m training` prints its message and exits with a code that is not 0."""


class SettingsError(TrainingError):
    """A setting is unknown, malformed or cannot work."""


class TaskError(TrainingError):
    """A task's sequences are not what it says, or its data cannot be read."""


class RunDirectoryError(TrainingError):
    """The run directory is in use, or is not a run."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, truncated or of another model."""


class NonFiniteError(TrainingError):
    """The loss, a gradient or the weights are no longer finite numbers."""


class SweepError(TrainingError):
    """A run of a sweep failed."""
