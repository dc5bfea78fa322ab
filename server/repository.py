"""Repository: find the models in the models directory, laid out NAME/VERSION/model.onnx.

`spec.py` reads each file. Hidden directories are skipped: an export in progress lives in one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from server.errors import ModelFileError, ModelRepositoryError
from server.spec import StepModel, load

MODEL_FILE_NAME = "model.onnx"
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,17}")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def load_all(root: Path) -> list[StepModel]:
    """Every version of every model below `root`.

    Raises:
        ModelRepositoryError: the directory is missing or holds no model, or some cannot be served; all are named.
    """
    if not root.is_dir():
        raise ModelRepositoryError(
            f"there is no models directory {root}: name one with --models, laid out NAME/VERSION/{MODEL_FILE_NAME}"
        )
    for directory in (root, *root.glob("*/"), *root.glob("*/*/")):
        # What cannot be read looks empty.
        if not os.access(directory, os.R_OK | os.X_OK):
            raise ModelRepositoryError(
                f"the models directory {directory} cannot be read by the server's user (uid {os.getuid()}): let it, "
                "for example with chmod -R a+rX"
            )
    models: list[StepModel] = []
    problems: list[str] = []
    for path in sorted(root.glob(f"*/*/{MODEL_FILE_NAME}")):
        name, version = path.parts[-3], path.parts[-2]
        if name.startswith(".") or version.startswith("."):
            continue
        if not NAME_PATTERN.fullmatch(name):
            problems.append(f"{path}: {name!r} is not a model name: use letters, digits, '.', '_' and '-'")
        elif not VERSION_PATTERN.fullmatch(version):
            problems.append(f"{path}: {version!r} is not a version: name the directory 1, 2, 3 and so on")
        else:
            try:
                models.append(load(path, name, int(version)))
            except ModelFileError as error:
                problems.append(str(error))
    if problems:
        raise ModelRepositoryError("\n".join(problems))
    if not models:
        raise ModelRepositoryError(
            f"the models directory {root} holds no model: lay it out NAME/VERSION/{MODEL_FILE_NAME}, such as "
            f"copy/1/{MODEL_FILE_NAME}, which `python -m export` writes"
        )
    return models
