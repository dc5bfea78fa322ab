"""Pictures: what a run has learned, how fast, and how the machine does it.

`report.py` and `evaluate.py` measure; here numbers become figures. Each function writes one file.

Shapes: T steps, N memory rows, M row width, H heads.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from numpy.typing import NDArray

from training.config import size_text
from training.model import Cell, DNCCell, PlainCell
from training.records import METRICS
from training.tasks import Size, Task

Array = NDArray[np.float32]

# Costs below it are drawn at it: a solved task costs 0.0001 bits one time and 0.00001 the next, which tells nobody
# anything.
_LEAST_COST = 0.01
# Of an animation; of a longer sequence not every step is shown. A picture takes a tenth of a second to draw.
_MOST_FRAMES = 300
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "image.aspect": "auto",
    "savefig.dpi": 130,
}
mpl.use("Agg")


class Curve(NamedTuple):
    """The evaluations of one run."""

    sequences: list[float]
    costs: list[float]
    """Of a sequence, in bits above the least possible; of numbers, the mean squared error."""
    unit: str = "cost of a sequence above the least (bits)"
    """Of the costs, for the axis."""


class Trace(NamedTuple):
    """What went on in a machine over one sequence."""

    inputs: Array
    """[I, T]."""
    targets: Array
    """[O, T], with NaN where no answer is due."""
    outputs: Array
    """[O, T], as the served model answers: of bits and classes their probability."""
    added: Array
    """[M, T], what the write heads added together; empty for a plain network, as are all that follow."""
    read: Array
    """[R M, T], what the read heads read, one below the other."""
    writing: Array
    """[N, T], the greatest attention of any write head."""
    reading: Array
    """[N, T], the greatest attention of any read head."""
    memory: Array
    """[T, N, M]."""
    usage: Array
    """[N, T], how far each row is in use; empty but for a DNC, as are the gates."""
    gates: dict[str, Array]
    """Of the heads, by name, [T]."""


def read_curve(run_dir: Path) -> Curve:
    """The evaluations in a run's records."""
    curve = Curve([], [])
    for line in (run_dir / METRICS).read_text().splitlines():
        record = json.loads(line)
        if "squared_error" in record:
            curve = curve._replace(unit="mean squared error")
            curve.sequences.append(record["sequences"])
            curve.costs.append(record["squared_error"])
        elif "cost_bits" in record:
            curve.sequences.append(record["sequences"])
            least = (
                record["cost_bits"] / record["cost_over_optimal"] if "cost_over_optimal" in record else 0.0
            )
            curve.costs.append(record["cost_bits"] - least)
    return curve


def plot_learning(groups: dict[str, list[Curve]], title: str, path: Path) -> None:
    """Cost of a sequence over the sequences seen: for each group of runs the median, and a band over all of them.

    A run that ended before the others stays at its last cost.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        for name, curves in groups.items():
            where = np.unique(np.concatenate([curve.sequences for curve in curves]))
            costs = np.array([_carried(curve, where) for curve in curves]).clip(_LEAST_COST)
            label = name if len(curves) == 1 else f"{name}, {len(curves)} seeds"
            [line] = axes.plot(where / 1000, np.median(costs, axis=0), label=label)
            axes.fill_between(
                where / 1000,
                costs.min(axis=0),
                costs.max(axis=0),
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("sequences (thousands)")
        axes.set_ylabel(next(iter(groups.values()))[0].unit)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path)
        plt.close(figure)


def plot_evaluation(results: dict[str, dict[str, Any]], size_names: tuple[str, ...], path: Path) -> None:
    """What is wrong in a sequence by size, for one or several runs."""
    score = next(name for name in next(iter(results.values()))["sizes"][0] if name != "size")
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
        for name, result in results.items():
            labels = [row["size"] for row in result["sizes"]]
            wrong = [row[score] for row in result["sizes"]]
            axes.plot(range(len(labels)), wrong, marker="o", markersize=4, label=name)
        axes.set_xticks(range(len(labels)), labels, rotation=45 if len(labels) > 8 else 0)
        # Even where all is right; and errors of 0.01 and of 500 bits in one picture.
        axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0, top=max(1.0, 2 * max(wrong)))
        axes.set_xlabel(" x ".join(size_names))
        axes.set_ylabel(f"{score.replace('_', ' ')} in a sequence")
        axes.grid(alpha=0.3)
        if len(results) > 1:
            axes.legend()
        figure.savefig(path)
        plt.close(figure)


@torch.no_grad()
def trace(cell: Cell, task: Task, size: Size, seed: int = 0) -> Trace:
    """Run one random sequence of a size through a cell, and keep everything."""
    inputs, targets, mask = task.check(task.draw(1, size, torch.Generator().manual_seed(seed)), 1)
    targets = task.loss.picture(targets, task.output_size)
    if mask is not None:
        targets = targets.masked_fill(~mask.unsqueeze(-1), math.nan)
    state: Any = cell.initial_state(1)
    outputs, added, read, writing, reading, memory, usage = [], [], [], [], [], [], []
    gates = defaultdict[str, list[float]](list)
    for step_inputs in inputs:
        requested: list[torch.Tensor] = []
        if not isinstance(cell, PlainCell):
            hook = cell.heads.register_forward_hook(lambda _module, _inputs, output: requested.append(output))  # noqa: B023
        logits, state = cell.step(step_inputs, state)
        outputs.append(task.loss.activate(logits[0]))
        if not isinstance(cell, PlainCell):
            hook.remove()
            added.append(cell.heads.added(requested[0])[0])
            read.append(state.read_vectors[0].flatten())
            writing.append(state.write_weightings[0].amax(dim=0))
            reading.append(state.read_weightings[0].amax(dim=0))
            memory.append(state.memory[0].mT)
        if isinstance(cell, DNCCell):
            usage.append(state.usage[0])
            for name, gate in cell.heads.gates(requested[0]).items():
                gates[name].append(float(gate))
    due = torch.full((len(inputs), targets.shape[-1]), math.nan)
    due[-len(targets) :] = targets[:, 0]
    return Trace(
        inputs=inputs[:, 0].T.numpy(),
        targets=due.T.numpy(),
        outputs=_columns(outputs),
        added=_columns(added),
        read=_columns(read),
        writing=_columns(writing),
        reading=_columns(reading),
        memory=torch.stack(memory).numpy() if memory else np.empty((0, 0, 0), np.float32),
        usage=_columns(usage),
        gates={name: np.array(values, np.float32) for name, values in gates.items()},
    )


def plot_machine(traced: Trace, title: str, path: Path) -> None:
    """The paper's figures of a run: what goes in and out, what is written and read, and where, step by step."""
    panels: list[tuple[str, Array, str, float | None]] = [
        ("inputs", traced.inputs, "channel", None),
        ("targets", traced.targets, "channel", 1),
        ("outputs", np.where(np.isnan(traced.targets), np.nan, traced.outputs), "channel", 1),
        ("error", np.abs(traced.outputs - traced.targets), "channel", 1),
    ]
    if traced.memory.size:
        rows = _attended(traced.writing, traced.reading)
        panels += [
            ("write vectors", traced.added, "column", None),
            ("read vectors", traced.read, "column", None),
            ("write weighting", traced.writing[rows], "memory row", 1),
            ("read weighting", traced.reading[rows], "memory row", 1),
        ]
    if traced.gates:
        panels += [
            ("usage", traced.usage[rows], "memory row", 1),
            ("gates and read modes", np.stack(list(traced.gates.values())), "gate", 1),
        ]
    with mpl.rc_context(_STYLE):
        heights = [2.2 if ylabel == "memory row" else 1 for _, _, ylabel, _ in panels]
        num_rows = len(panels) // 2
        figure, grid = plt.subplots(
            num_rows,
            2,
            figsize=(10, 1.1 + sum(heights[::2]) * 1.15),
            sharex=True,
            layout="constrained",
            height_ratios=heights[::2],
        )
        for axes, (name, values, ylabel, most) in zip(grid.flat, panels, strict=True):
            _image(axes, name, values, ylabel, most)
            if ylabel == "memory row":
                _label_rows(axes, rows)
            if ylabel == "gate":
                axes.set_yticks(range(len(traced.gates)), list(traced.gates))
                axes.set_ylabel("")
        for axes in grid[-1]:
            axes.set_xlabel("step")
        figure.suptitle(title, fontsize=10)
        figure.savefig(path)
        plt.close(figure)


def animate_memory(traced: Trace, title: str, path: Path) -> None:
    """The memory, step by step, as a GIF: its rows, and beside them where the heads write and read."""
    rows = _attended(traced.writing, traced.reading)
    memory, writing, reading = traced.memory[:, rows], traced.writing[rows], traced.reading[rows]
    most = float(np.abs(memory).max())
    with mpl.rc_context(_STYLE):
        figure, (attention, cells) = plt.subplots(
            1, 2, figsize=(5.2, 4.6), sharey=True, width_ratios=[1, 3], layout="constrained"
        )
        picture = cells.imshow(memory[0], cmap="RdBu_r", vmin=-most, vmax=most)
        figure.colorbar(picture, ax=cells, label="value")
        cells.set_title("memory")
        cells.set_xlabel("column")
        where = np.arange(len(rows))
        [writes] = attention.plot(writing[:, 0], where, color="C3", label="write")
        [reads] = attention.plot(reading[:, 0], where, color="C0", linestyle="--", label="read")
        attention.set_xlim(0, 1.05)
        attention.set_title("attention")
        attention.set_ylabel("memory row")
        attention.legend(loc="lower right", fontsize=7)
        _label_rows(attention, rows)
        heading = figure.suptitle("")

        def show(step: int) -> list[Any]:
            picture.set_data(memory[step])
            writes.set_xdata(writing[:, step])
            reads.set_xdata(reading[:, step])
            heading.set_text(f"{title}: step {step + 1} of {len(memory)}")
            return [picture, writes, reads, heading]

        every = -(-len(memory) // _MOST_FRAMES)
        FuncAnimation(figure, show, frames=range(0, len(memory), every)).save(
            path, writer=PillowWriter(fps=5), dpi=80
        )
        plt.close(figure)


def heading(task: Task, size: Size) -> str:
    """What a picture of one sequence shows."""
    names = " x ".join(task.size_names)
    return f"{task.name}, {names} {size_text(size)}"


def _carried(curve: Curve, where: Sequence[float] | NDArray[Any]) -> NDArray[Any]:
    """A curve's cost at each place: that of the last evaluation up to there, of the first before it."""
    at = np.searchsorted(curve.sequences, where, side="right") - 1
    costs: NDArray[Any] = np.asarray(curve.costs)[at.clip(0)]
    return costs


def _columns(parts: list[torch.Tensor]) -> Array:
    """Vectors [D] of all steps to [D, T]."""
    return torch.stack(parts, dim=1).numpy() if parts else np.empty((0, 0), np.float32)


def _image(axes: Axes, name: str, values: Array, ylabel: str, most: float | None) -> None:
    """Values in [0, most] in shades of one colour; without a bound, around 0 in two."""
    axes.set_facecolor("0.93")
    if most is not None:
        picture = axes.imshow(values, cmap="viridis", vmin=0, vmax=most)
    else:
        bound = float(np.nanmax(np.abs(values)))
        picture = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes.figure.colorbar(picture, ax=axes, pad=0.01, aspect=12)
    axes.set_title(name)
    axes.set_ylabel(ylabel)
    if ylabel == "channel":
        axes.set_yticks(range(0, len(values), 2))


def _attended(*weightings: Array) -> NDArray[np.int64]:
    """The part of the ring of memory rows that the heads attend to, and one row more at either end."""
    num_rows = len(weightings[0])
    rows = np.flatnonzero(np.max([weighting.max(axis=1) for weighting in weightings], axis=0) > 0.1)
    gaps = np.diff(rows, append=rows[:1] + num_rows)
    if len(rows) == 0 or gaps.max() <= 3:
        return np.arange(num_rows)
    widest = int(gaps.argmax())
    first = int(rows[(widest + 1) % len(rows)])
    return (first - 1 + np.arange(num_rows - int(gaps.max()) + 3)) % num_rows


def _label_rows(axes: Axes, rows: NDArray[np.int64]) -> None:
    """Name some of the rows, evenly spaced."""
    some = np.arange(0, len(rows), max(1, len(rows) // 8))
    axes.set_yticks(some, [str(row) for row in rows[some]])
