"""The tasks: one file each, from settings to batches of sequences."""

from training.tasks.copy import CopyTask
from training.tasks.sequences import Sequences

__all__ = ["CopyTask", "Sequences"]
