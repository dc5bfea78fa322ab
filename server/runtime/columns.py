"""Column: a number for each of many places, read and written for one place or for many at once."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bool, int, float)


class Column(Generic[T]):
    """The numbers of all places, seen in two ways, each of them the fast one for what it is for."""

    __slots__ = ("each", "one")

    def __init__(self, num_places: int, value: T) -> None:
        """The same value in all places: int64, float64 or bool."""
        self.each: npt.NDArray[Any] = np.full(num_places, value)
        """[places], for several at once."""
        self.one: MutableSequence[T] = memoryview(self.each)  # type: ignore[assignment,arg-type]
        """By place; it gives and takes Python's own numbers, in half the time that `each` would need."""
