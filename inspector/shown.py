"""What a tensor looks like on the page: as rows and columns, and smaller where it is too large to draw.

A tensor of a session is drawn in two ways: as a heat map of one moment, and, where it is small enough or is attention,
as a lane of the time line. A large one is reduced to blocks, each shown by the value in it that is farthest from 0, and
the page says so.

Shapes: T moments, R rows and C columns of a tensor, r and c of what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_FRAME_ELEMENTS = 2**18
"""Numbers in a heat map of one moment, at most."""
MAX_LANE_ELEMENTS = 2048
"""Numbers of one moment in a lane, at most."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """How a tensor is folded into rows and columns, and how much of it a shown number stands for."""

    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @property
    def shown_rows(self) -> int:
        """Rows of what is shown."""
        return math.ceil(self.rows / self.block_rows)

    @property
    def shown_columns(self) -> int:
        """Columns of what is shown."""
        return math.ceil(self.columns / self.block_columns)

    @property
    def is_whole(self) -> bool:
        """Whether each number of the tensor is shown."""
        return self.block_rows == self.block_columns == 1

    def shown(self, array: npt.NDArray[Any]) -> Floats:
        """A tensor at T moments, [T, ...], as it is shown, [T, r, c]."""
        folded = np.asarray(array, np.float32).reshape(len(array), self.rows, self.columns)
        return farthest_from_zero(folded, self.block_rows, self.block_columns)

    def described(self) -> dict[str, int]:
        """For the page."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "block_rows": self.block_rows,
            "block_columns": self.block_columns,
            "shown_rows": self.shown_rows,
            "shown_columns": self.shown_columns,
        }


def fold(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's rows and columns: its last axis lies across, all others down."""
    return math.prod(shape[:-1]), (shape[-1] if shape else 1)


def frame(shape: Sequence[int], limit: int = MAX_FRAME_ELEMENTS) -> Block:
    """How a tensor is drawn as a heat map: halved along its longer side until it is small enough."""
    rows, columns = fold(shape)
    block_rows = block_columns = 1
    while math.ceil(rows / block_rows) * math.ceil(columns / block_columns) > limit:
        if rows / block_rows >= columns / block_columns:
            block_rows *= 2
        else:
            block_columns *= 2
    return Block(rows, columns, block_rows, block_columns)


def attention(shape: Sequence[int], limit: int = MAX_LANE_ELEMENTS) -> Block:
    """How the attention of H heads over N rows is drawn as H lanes: too many rows are taken together."""
    heads, rows = fold(shape)
    return Block(heads, rows, 1, max(1, math.ceil(heads * rows / limit)))


def farthest_from_zero(array: Floats, block_rows: int, block_columns: int) -> Floats:
    """Blocks of [T, R, C] as the one value in each that is farthest from 0, [T, r, c]."""
    if block_rows == block_columns == 1:
        return array
    moments, rows, columns = array.shape
    padding = ((0, 0), (0, -rows % block_rows), (0, -columns % block_columns))
    padded = np.pad(array, padding)
    blocks = padded.reshape(
        moments, padded.shape[1] // block_rows, block_rows, padded.shape[2] // block_columns, block_columns
    )
    highest, lowest = blocks.max(axis=(2, 4)), blocks.min(axis=(2, 4))
    farthest: Floats = np.where(-lowest > highest, lowest, highest)
    return farthest
