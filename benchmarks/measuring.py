"""Measuring: the same work done side by side, round by round, so that a busy machine slows all cases alike.

A case is a function that does some work once and returns what it measured, by name with the unit in the name
(`steps_per_s`, `p50_ms`, `cpu_us_per_step`). What the cases are is the business of the other modules here.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

Metrics = Mapping[str, float]
Case = Callable[[], Metrics]

_LIBRARIES = ("numpy", "onnxruntime", "grpcio", "protobuf", "torch", "nvidia-pytriton")


@dataclass(frozen=True)
class Figure:
    """One metric of one case over all rounds."""

    median: float
    lowest: float
    highest: float


Figures = dict[str, dict[str, Figure]]
"""By case, then by metric."""


def side_by_side(cases: Mapping[str, Case], num_rounds: int) -> Figures:
    """Run every case once a round, in turn, and summarise each metric over the rounds.

    The first round warms up and is not counted.
    """
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for round_number in range(num_rounds + 1):
        for name, case in cases.items():
            for metric, value in case().items():
                if round_number > 0:
                    seen[name].setdefault(metric, []).append(value)
    return {name: {m: _figure(values) for m, values in metrics.items()} for name, metrics in seen.items()}


def ratio(figures: Figures, case: str, reference: str, metric: str = "steps_per_s") -> float:
    """How many times the reference a case reaches, by the medians."""
    return figures[case][metric].median / figures[reference][metric].median


def machine() -> dict[str, str | int | float]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{library: found for library in _LIBRARIES if (found := _version(library))},
    }


def _figure(values: Iterable[float]) -> Figure:
    values = list(values)
    return Figure(statistics.median(values), min(values), max(values))


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
