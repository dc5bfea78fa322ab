"""Step graph: the exported step against the textbook one, in ONNX Runtime, side by side.

Both have the same weights, random ones; `tests/benchmarks/test_textbook.py` proves that they are one function.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.bare import BareLoop
from benchmarks.measuring import Case, Figures, side_by_side
from benchmarks.textbook import TextbookStep
from export import onnx_file
from export.step import CellStep
from training.model import NTMCell

SHIPPED_SIZE = "N=128 M=20, 1+1 heads"
_SIZES = {
    SHIPPED_SIZE: {"memory_rows": 128, "row_width": 20},
    "N=128 M=20, 5+5 heads": {"memory_rows": 128, "row_width": 20, "num_read_heads": 5, "num_write_heads": 5},
    "N=1024 M=64, 1+1 heads": {"memory_rows": 1024, "row_width": 64},
    "N=1024 M=64, 2+2 heads": {
        "memory_rows": 1024,
        "row_width": 64,
        "num_read_heads": 2,
        "num_write_heads": 2,
    },
}
_BATCH_SIZES = {SHIPPED_SIZE: (1, 8, 64, 128)}


def compare(num_rounds: int, duration_s: float, only_shipped: bool = False) -> Figures:
    """Measure both at every size and batch size; cases are named "exported, SIZE, batch B" and "textbook, ..."."""
    figures: Figures = {}
    for size in [SHIPPED_SIZE] if only_shipped else _SIZES:
        for batch_size in _BATCH_SIZES.get(size, (1, 16, 64)):
            if only_shipped and batch_size not in (1, 64):
                continue
            cases = dict(_cases(size, batch_size, duration_s))
            figures |= side_by_side(cases, num_rounds)
    return figures


def _cases(size: str, batch_size: int, duration_s: float) -> Iterator[tuple[str, Case]]:
    for name, model in models(**_SIZES[size]).items():
        yield f"{name}, {size}, batch {batch_size}", partial(BareLoop(model, batch_size).measure, duration_s)


def models(**sizes: Any) -> dict[str, bytes]:
    """The two steps of a cell as ONNX models."""
    torch.manual_seed(0)
    cell = NTMCell(input_size=9, output_size=8, controller="lstm", controller_size=100, **sizes).eval()
    return {
        "exported": onnx_file.graph(CellStep(cell)).SerializeToString(),
        "textbook": onnx_file.trace(TextbookStep(cell).eval()).SerializeToString(),
    }
