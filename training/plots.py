"""Pictures: what a run has learned, how fast, and how the machine does it.

`report.py` and `evaluate.py` measure; here numbers become figures. Each function writes one file.

Shapes: T steps, N memory rows, M row width, H heads.
"""

from __future__ import annotations

import itertools
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
from training.errors import RunDirectoryError
from training.model import Cell, DNCCell, PlainCell
from training.records import METRICS, num_missing, read_records
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
    longer: dict[str, list[float]] = {}  # noqa: RUF012
    """By name, such as `wrong_bits_at_120`, what was found at sizes beyond training, which decide on the best model."""
    num_missing: int = 0
    """Updates of which the record is damaged or missing."""
    restarts: Sequence[float] = ()
    """Where the run began again with other weights, in sequences."""


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


def read_curve(run_dir: Path, num_updates: int) -> Curve:
    """The evaluations in a run's records; those whose answers were no finite numbers are left out.

    Args:
        run_dir: the run's folder.
        num_updates: that the run has made.

    Raises:
        RunDirectoryError: there are no records.
    """
    try:
        records = read_records(run_dir / METRICS)
    except OSError as error:
        raise RunDirectoryError(
            f"{run_dir} has no records to draw ({error.strerror}): train there first"
        ) from None
    curve = Curve(
        [],
        [],
        longer={},
        restarts=[r["sequences"] for r in records if r.get("restarted") and "sequences" in r],
    )
    for record in records:
        cost = record.get("squared_error", record.get("cost_bits"))
        if cost is None or record.get("sequences") is None:
            continue
        if "squared_error" in record:
            curve = curve._replace(unit="mean squared error")
        elif record.get("cost_over_optimal"):
            cost -= record["cost_bits"] / record["cost_over_optimal"]
        curve.sequences.append(record["sequences"])
        curve.costs.append(cost)
        for name, value in record.items():
            if "_at_" in name and not name.startswith("solved_at_"):
                curve.longer.setdefault(name, []).append(math.nan if value is None else value)
    # All or none of them are there, but for the records of a run that was meddled with.
    longer = {name: values for name, values in curve.longer.items() if len(values) == len(curve.costs)}
    return curve._replace(longer=longer, num_missing=num_missing(records, num_updates))


def plot_learning(groups: dict[str, list[Curve]], title: str, path: Path) -> None:
    """Cost of a sequence over the sequences seen: for each group of runs the median, and a band over all of them.

    Below it the same of what is wrong at the sizes beyond training, by which the best model is chosen. A run that ended
    before the others stays at its last cost. Ticks show where runs began again with other weights.
    """
    longer = list(
        dict.fromkeys(name for curves in groups.values() for curve in curves for name in curve.longer)
    )
    with mpl.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1 + bool(longer),
            figsize=(6.4, 5.6 if longer else 3.6),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        axes = panels[0, 0]
        for number, (name, curves) in enumerate(groups.items()):
            label = name if len(curves) == 1 else f"{name}, {len(curves)} seeds"
            colour = f"C{number % 10}"
            _draw_band(
                axes, curves, [curve.costs for curve in curves], _LEAST_COST, colour=colour, label=label
            )
            if restarts := sorted({place for curve in curves for place in curve.restarts}):
                axes.plot(
                    np.array(restarts) / 1000,
                    np.full(len(restarts), 0.02),
                    "|",
                    color=colour,
                    transform=axes.get_xaxis_transform(),
                    label="begins again with other weights",
                )
            for style, of_size in zip(itertools.cycle(["-", "--", ":", "-."]), longer, strict=False):
                having = [curve for curve in curves if of_size in curve.longer]
                if having:
                    values = [curve.longer[of_size] for curve in having]
                    label = of_size.replace("_", " ")
                    label = label if len(groups) == 1 else f"{name}: {label}"
                    _draw_band(panels[1, 0], having, values, 0.0, colour=colour, label=label, linestyle=style)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(next(iter(groups.values()))[0].unit)
        axes.set_title(title)
        if longer:
            panels[1, 0].set_yscale("symlog", linthresh=0.1, linscale=0.5)
            panels[1, 0].yaxis.set_major_formatter("{x:g}")
            panels[1, 0].set_ylim(bottom=0)
            panels[1, 0].set_ylabel("the same beyond training's sizes")
        for panel in panels.flat:
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7 if longer else None)
        panels[-1, 0].set_xlabel("sequences (thousands)")
        figure.savefig(path)
        plt.close(figure)


def _draw_band(
    axes: Axes, curves: list[Curve], values: list[list[float]], least: float, *, colour: str, **style: Any
) -> None:
    """The median over runs, and a band over all of them."""
    where = np.unique(np.concatenate([curve.sequences for curve in curves]))
    found = np.array([_carried(c.sequences, of_one, where) for c, of_one in zip(curves, values, strict=True)])
    found = found.clip(least)
    axes.plot(where / 1000, np.median(found, axis=0), color=colour, **style)
    axes.fill_between(
        where / 1000, found.min(axis=0), found.max(axis=0), color=colour, alpha=0.2, linewidth=0
    )


def plot_evaluation(results: dict[str, dict[str, Any]], size_names: tuple[str, ...], path: Path) -> None:
    """What is wrong in a sequence by size, for one or several runs."""
    score = next(name for name in next(iter(results.values()))["sizes"][0] if name != "size")
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
        most = 0.5
        for name, result in results.items():
            labels = [row["size"] for row in result["sizes"]]
            # A size of one number stands at its place, one of several has none.
            places = [int(label) for label in labels] if len(size_names) == 1 else list(range(len(labels)))
            wrong = [row[score] if math.isfinite(row[score]) else math.nan for row in result["sizes"]]
            most = max([most, *(value for value in wrong if math.isfinite(value))])
            axes.plot(places, wrong, marker="o", markersize=4, label=name)
        if len(size_names) > 1:
            axes.set_xticks(places, labels, rotation=45 if len(labels) > 8 else 0)
        # Even where all is right; and errors of 0.01 and of 500 bits in one picture.
        axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0, top=2 * most)
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
        # Below, where no head can be.
        figure.legend(handles=[writes, reads], loc="outside lower left", ncols=2, fontsize=7)
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


def _carried(sequences: Sequence[float], values: Sequence[float], where: NDArray[Any]) -> NDArray[Any]:
    """What a run has at each place: of the last evaluation up to there, of the first before it."""
    at = np.searchsorted(sequences, where, side="right") - 1
    found: NDArray[Any] = np.asarray(values, dtype=float)[at.clip(0)]
    return found


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
