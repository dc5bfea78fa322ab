"""Layout: all inputs of one step, or all its outputs, as one run of bytes.

Between the edge and the device nobody needs to know how many tensors a step takes and gives: queues, retries, records
and replays handle *steps*, arrays of opaque elements of a fixed size. Only `rpc/` packs and unpacks them for callers,
and `runtime/` for the graph. Whether a step begins from the session's initial state is a byte of its inputs, so that it
counts wherever inputs do.

Shapes: S sessions, T steps; any leading axes where it says [...].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ntm.tensor import Array, numpy_dtype
from ntm.v1 import tensor_pb2

Steps = npt.NDArray[np.void]
"""[S, T] or [T]: each element is all of one step."""

_RESET = "ntm.reset"


class TensorLike(Protocol):
    """What a layout must know of a tensor."""

    @property
    def name(self) -> str:
        """Its name in the graph."""

    @property
    def dtype(self) -> tensor_pb2.DataType.ValueType:
        """Type of its elements."""

    @property
    def shape(self) -> Sequence[int]:
        """Of one step of one session, without the batch axis."""


class StepLayout:
    """Where each tensor of a step stands in its bytes."""

    def __init__(self, tensors: Sequence[TensorLike], has_reset: bool = False) -> None:
        """Lay tensors out one after another, each aligned for its type.

        Args:
            tensors: at least one, no name twice.
            has_reset: whether a step also says that it begins from the initial state.
        """
        self.names = [tensor.name for tensor in tensors]
        fields = [(tensor.name, numpy_dtype(tensor.dtype), tuple(tensor.shape)) for tensor in tensors]
        if has_reset:
            fields.append((_RESET, np.dtype(np.bool_), ()))
        self.fields = np.dtype(fields, align=True)
        self.dtype = np.dtype((np.void, self.fields.itemsize))
        self._has_reset = has_reset
        self._float_names = [name for name in self.names if self.fields[name].base.kind == "f"]

        self._padding = bytes(0)
        self._single: np.dtype[Any] | None = None
        """The type of the one tensor's elements, where there is one and nothing of another kind before it."""
        if len(tensors) == 1:
            base = self.fields[self.names[0]].base
            self.single_shape = [1, *tensors[0].shape]
            """Of one step of it, [T, ...]."""
            self._single = base
            self._padding = bytes(self.fields.itemsize - math.prod(tensors[0].shape) * base.itemsize)

    @property
    def step_bytes(self) -> int:
        """Bytes of one step."""
        return self.dtype.itemsize

    def none(self, *shape: int) -> Steps:
        """Steps whose every byte is 0, of a shape."""
        return np.zeros(shape, self.dtype)

    def tensor(self, steps: Steps, name: str) -> Array:
        """One tensor of some steps [...]: a view [..., *shape]."""
        return steps.view(self.fields)[name]

    def resets(self, steps: Steps) -> npt.NDArray[np.bool_]:
        """Which of some steps [...] begin from the initial state: a view [...]."""
        view: npt.NDArray[np.bool_] = steps.view(self.fields)[_RESET]
        return view

    def pack(self, tensors: Mapping[str, Array], resets: npt.NDArray[np.bool_] | None = None) -> Steps:
        """Steps [...] of tensors [..., *shape] each, checked before, all of them."""
        first = tensors[self.names[0]]
        steps = self.none(*first.shape[: first.ndim - len(self.fields[self.names[0]].shape)])
        view = steps.view(self.fields)
        for name in self.names:
            view[name] = tensors[name]
        if resets is not None:
            view[_RESET] = resets
        return steps

    def one_step(self, raw: bytes) -> Steps | None:
        """The one step [1] of a layout of one tensor, from its elements; None if they are too few, too many, or not
        finite.
        """
        if self._single is None or len(raw) + len(self._padding) != self.dtype.itemsize:
            return None
        if self._single.kind == "f" and not np.isfinite(np.frombuffer(raw, self._single)).all():
            return None
        return np.frombuffer(raw + self._padding, self.dtype)

    def raw(self, steps: Steps) -> bytes | None:
        """The elements of some steps of a layout of one tensor, row by row; None if they do not lie together."""
        return None if self._single is None or self._padding else steps.tobytes()

    def unpack(self, steps: Steps) -> dict[str, Array]:
        """The tensors [..., *shape] of some steps [...], contiguous each."""
        return {name: np.ascontiguousarray(self.tensor(steps, name)) for name in self.names}

    def are_finite(self, steps: Steps) -> bool:
        """Whether no number of some steps is infinite or not a number."""
        for name in self._float_names:
            values = self.tensor(steps, name)
            if np.count_nonzero(np.isfinite(values)) != values.size:
                return False
        return True

    def finite(self, steps: Steps) -> npt.NDArray[np.bool_]:
        """As `are_finite`, for each of some steps [S, T]: [S, T]."""
        finite = np.ones(steps.shape, np.bool_)
        for name in self._float_names:
            values = np.isfinite(self.tensor(steps, name))
            finite &= values.reshape(*steps.shape, -1).all(axis=-1)
        return finite
