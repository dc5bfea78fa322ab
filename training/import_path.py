"""Import paths: what a setting such as `module:name` stands for, so that code of one's own need not be in this tree.

The module is imported as Python imports any: from the current directory, from PYTHONPATH, or because it is installed.
"""

from __future__ import annotations

import importlib
from typing import Any

from training.errors import SettingsError


def find(path: str, setting: str) -> Any:
    """What an import path `module:name` stands for.

    Raises:
        SettingsError: there is no such thing; it says which setting asked for it.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{setting}: {path!r} cannot be imported, there is no module {error.name!r}: run where it is, or add its "
            "folder to PYTHONPATH"
        ) from None
    except Exception as error:
        raise SettingsError(
            f"{setting}: {path!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise SettingsError(f"{setting}: the module {module_name!r} has no {name!r}") from None
