"""Lookup: a task's class by its name, or by the import path of a class that is not in this tree.

A checkpoint remembers the path, so whoever evaluates or exports the run imports the class too.
"""

from __future__ import annotations

import functools
import inspect
from typing import Literal

from pydantic import Field, create_model

from training.errors import SettingsError
from training.import_path import find
from training.tasks import TASKS, Task


@functools.cache
def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        SettingsError: there is no such task.
    """
    if ":" not in name:
        if name not in TASKS:
            raise SettingsError(
                f"unknown task {name!r}: there are {', '.join(TASKS)}; one of your own has an import path, module:Class"
            )
        return TASKS[name]
    found = find(name, "task.name")
    if not inspect.isclass(found) or not issubclass(found, Task):
        raise SettingsError(f"task.name: {name!r} is no subclass of training.tasks.Task")
    if found.__abstractmethods__:
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise SettingsError(f"task.name: {name!r} does not say its {missing}")
    # Whatever name it gives itself, it is found again by its path.
    named: type[Task] = create_model(
        found.__name__,
        __base__=found,
        __module__=found.__module__,
        __doc__=found.__doc__,
        name=(Literal[name], Field(default=name, description="The task.")),  # type: ignore[arg-type]
    )
    return named
