"""Repository: find the model files in the models directory, laid out NAME/VERSION/model.onnx.

`spec.py` reads each file; `model_updates.py` looks again while the server runs. Hidden directories are skipped: an
export in progress lives in one.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from server.errors import ModelFileError, ModelRepositoryError
from server.model import spec
from server.model.spec import SIDECAR_NAME, StepModel

MODEL_FILE_NAME = "model.onnx"
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,17}")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_MAX_BYTES = 2**31 - 1
"""Of a message of protobuf, which an ONNX file is: what is larger is not read."""

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Size, time of the last change and inode of the model file and of the spec beside it (None: there is none)."""


@dataclass(frozen=True)
class ModelFile:
    """A model file as it was when it was looked at."""

    path: Path
    stamp: Stamp
    """Another one means that the file has changed."""

    @property
    def label(self) -> str:
        """Name and version, as the directories say them."""
        return f"{self.path.parts[-3]}/{self.path.parts[-2]}"

    @property
    def has_changed(self) -> bool:
        """Whether the file is another now, or gone."""
        return _stamp(self.path) != self.stamp

    def load(self) -> StepModel:
        """Read and check it.

        Raises:
            ModelFileError: it cannot be served, or its directories are no name and version; all reasons are listed.
        """
        name, version = self.path.parts[-3:-1]
        if not NAME_PATTERN.fullmatch(name):
            problem = f"{name!r} is not a model name: use letters, digits, '.', '_' and '-'"
        elif not VERSION_PATTERN.fullmatch(version):
            problem = f"{version!r} is not a version: name the directory 1, 2, 3 and so on"
        elif self.stamp[0] is not None and self.stamp[0][0] > _MAX_BYTES:
            problem = f"it has {self.stamp[0][0]} bytes: an ONNX file has at most {_MAX_BYTES}"
        else:
            return spec.load(self.path, name, int(version))
        raise ModelFileError(str(self.path), [problem])


def find(root: Path) -> list[ModelFile]:
    """Every model file below `root`, by name and version as text; a version without its file is none.

    Raises:
        OSError: `root`, or a directory in it, cannot be read.
    """
    files = []
    for name_dir in _directories(root):
        with suppress(FileNotFoundError):  # it went since it was listed
            for version_dir in _directories(name_dir):
                path = version_dir / MODEL_FILE_NAME
                stamp = _stamp(path)
                if stamp[0] is not None:
                    files.append(ModelFile(path, stamp))
    return files


def load_all(
    root: Path, on_problem: Callable[[ModelFile, ModelFileError], None] | None = None
) -> dict[ModelFile, StepModel]:
    """Every version of every model below `root`.

    Args:
        root: the models directory.
        on_problem: told of each file that cannot be served, which is then left out; None: any is a reason to fail.

    Raises:
        ModelRepositoryError: the directory is missing or holds no model, or some cannot be served; all are named.
    """
    try:
        files = find(root)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelRepositoryError(
            f"there is no models directory {root}: name one with --models, laid out NAME/VERSION/{MODEL_FILE_NAME}"
        ) from None
    except OSError as error:
        raise ModelRepositoryError(
            f"the models directory {error.filename} cannot be read by the server's user (uid {os.getuid()}): let it, "
            f"for example with chmod -R a+rX ({error.strerror})"
        ) from error
    models: dict[ModelFile, StepModel] = {}
    problems: list[str] = []
    for file in files:
        try:
            models[file] = file.load()
        except ModelFileError as error:
            if on_problem is None:
                problems.append(str(error))
            else:
                on_problem(file, error)
    if problems:
        raise ModelRepositoryError("\n".join(problems))
    if not files:
        raise ModelRepositoryError(
            f"the models directory {root} holds no model: lay it out NAME/VERSION/{MODEL_FILE_NAME}, such as "
            f"copy/1/{MODEL_FILE_NAME}, which `python -m export` writes"
        )
    return models


def _directories(parent: Path) -> list[Path]:
    return [path for path in sorted(parent.iterdir()) if not path.name.startswith(".") and path.is_dir()]


def _stamp(path: Path) -> Stamp:
    return tuple(_stamp_of_one(each) for each in (path, path.with_name(SIDECAR_NAME)))


def _stamp_of_one(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return None
        raise
    return status.st_size, status.st_mtime_ns, status.st_ino
