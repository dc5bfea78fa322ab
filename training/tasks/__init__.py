"""The tasks: one file each, from settings to batches of sequences. docs/adding-a-task.md adds another."""

from training.tasks.associative_recall import AssociativeRecallTask
from training.tasks.copy import CopyTask
from training.tasks.copy_episode import CopyEpisodeTask
from training.tasks.dataset import DatasetTask
from training.tasks.dynamic_ngrams import DynamicNGramsTask
from training.tasks.formal_languages import FormalLanguageTask
from training.tasks.graphs import GraphTraversalTask, ShortestPathTask
from training.tasks.priority_sort import PrioritySortTask
from training.tasks.repeat_copy import RepeatCopyTask
from training.tasks.task import PATTERNS, Goal, Pattern, Sequences, Size, Task

TASKS: dict[str, type[Task]] = {
    task.model_fields["name"].default: task
    for task in (
        CopyTask,
        RepeatCopyTask,
        AssociativeRecallTask,
        DynamicNGramsTask,
        PrioritySortTask,
        CopyEpisodeTask,
        FormalLanguageTask,
        GraphTraversalTask,
        ShortestPathTask,
        DatasetTask,
    )
}
"""Every task by its name in a TOML."""

__all__ = ["PATTERNS", "TASKS", "Goal", "Pattern", "Sequences", "Size", "Task"]
