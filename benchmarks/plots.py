"""Plots: the two pictures of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import growth
from benchmarks.measuring import Figures
from benchmarks.server_process import Shape
from benchmarks.serving import (
    BATCHES_OF_SINGLE_STEPS,
    FEW_STREAMS_OF_CHUNKS,
    STREAMS_OF_CHUNKS,
    STREAMS_OF_SINGLE_STEPS,
    name,
)

_OURS, _OTHERS, _LIMITS = "tab:blue", "tab:orange", "tab:gray"


def draw(figures: Figures, directory: Path) -> None:
    """Draw `throughput.png` and `growth.png`."""
    _throughput(figures, directory / "throughput.png")
    _growth(figures, directory / "growth.png")


def _throughput(figures: Figures, path: Path) -> None:
    bars = [
        ("bare ONNX Runtime loop, batch 64", "bare, batch 64", _LIMITS),
        ("engine alone, 64 sessions, T=32", "engine, 64 sessions in one message, T=32", _OURS),
        ("BatchStep, 64 sessions, T=32", name(Shape("BatchStep", 64, 32)), _OURS),
        ("StreamSteps, 64 streams, T=32", name(STREAMS_OF_CHUNKS), _OURS),
        ("BatchStep, 4 callers of 64 sessions, T=1", name(BATCHES_OF_SINGLE_STEPS), _OURS),
        ("StreamSteps, 32 streams, T=1", name(STREAMS_OF_SINGLE_STEPS), _OURS),
        ("empty gRPC service, 32 streams, T=1", name(STREAMS_OF_SINGLE_STEPS, "echo with uvloop"), _LIMITS),
        ("Triton, 64 streams, T=1", name(Shape("StreamSteps", 64, 1), "Triton"), _OTHERS),
        ("Triton, 32 streams, T=1", name(STREAMS_OF_SINGLE_STEPS, "Triton"), _OTHERS),
        ("naive service, 4 streams, T=32", name(FEW_STREAMS_OF_CHUNKS, "naive"), _OTHERS),
    ]
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for row, (label, case, colour) in enumerate(reversed(bars)):
        speed = figures[case]["steps_per_s"]
        spread = [[speed.median - speed.lowest], [speed.highest - speed.median]]
        axes.barh(row, speed.median, xerr=spread, color=colour, height=0.7, error_kw={"elinewidth": 1})
        axes.text(speed.highest * 1.08, row, f"{speed.median:,.0f}", va="center", fontsize=9)
        axes.text(330, row, label, va="center", ha="right", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(400, 3e5)
    axes.set_yticks([])
    axes.set_xlabel("session-steps a second (median, lowest and highest of the rounds)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _growth(figures: Figures, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    _curve(
        axes[0],
        figures,
        growth.NUM_LIVE_SESSIONS,
        [growth.live_sessions(n) for n in growth.NUM_LIVE_SESSIONS],
    )
    axes[0].set(xlabel="live sessions, of which 64 step", ylabel="µs a session-step", title="sessions")
    _curve(axes[1], figures, growth.NUM_STEPS, [growth.steps(n) for n in growth.NUM_STEPS])
    axes[1].set(xlabel="steps in a message of 8 sessions", title="steps")
    _curve(axes[2], figures, growth.NUM_MEMORY_ROWS, [growth.memory_rows(n) for n in growth.NUM_MEMORY_ROWS])
    axes[2].set(xlabel="rows of memory (bare loop, batch 16)", title="memory")
    axes[2].set_xscale("linear")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(axes: Axes, figures: Figures, sizes: Sequence[int], cases: Sequence[str]) -> None:
    speeds = [figures[case]["steps_per_s"] for case in cases]
    axes.fill_between(sizes, [1e6 / s.highest for s in speeds], [1e6 / s.lowest for s in speeds], alpha=0.2)
    axes.plot(sizes, [1e6 / s.median for s in speeds], "o-")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
